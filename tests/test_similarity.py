"""Every similarity against its formula, and the laws that all of them keep."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import reference_similarity as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from clip_dissect_cvn.artifacts import ClipFeatures, UnitActivations
from clip_dissect_cvn.similarity import SIMILARITIES, inputs, score, wpmi

BUILT_IN = ["cos_similarity", "cos_similarity_cubed", "jensen_shannon", "rank_reorder", "soft_wpmi", "wpmi"]
WPMI = ["soft_wpmi", "wpmi"]
OFTEN: dict[str, Any] = {
    "wpmi": {"top_k": 7},
    "soft_wpmi": {"top_k": 20},
    "rank_reorder": {"top_fraction": 0.5},
}


def make_features(images: int = 60, concepts: int = 23, width: int = 12, seed: int = 0) -> ClipFeatures:
    """Embeddings with positive cosines, as CLIP's are."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(width, generator=generator)
    sides = [torch.randn(rows, width, generator=generator) for rows in (images, concepts)]
    return ClipFeatures(*(normalize(side + 1.5 * common, dim=1) for side in sides))


def make_activations(images: int = 60, units: int = 9, seed: int = 1) -> UnitActivations:
    generator = torch.Generator().manual_seed(seed)
    return UnitActivations("blocks.11.mlp.act", 3 * torch.randn(images, units, generator=generator) + 1)


def make_lwta_activations(images: int = 60, units: int = 8, seed: int = 2) -> UnitActivations:
    """Responses of which three in four are exactly 0: ties everywhere."""
    activations = make_activations(images, units, seed)
    generator = torch.Generator().manual_seed(seed)
    return UnitActivations(
        "lwta", activations.response * (torch.rand(images, units, generator=generator) < 0.25)
    )


FEATURES, ACTIVATIONS = make_features(), make_activations()


def values_of(
    name: str, features: ClipFeatures = FEATURES, units: UnitActivations = ACTIVATIONS, **options: Any
) -> Tensor:
    return score(name, features, units, **{**OFTEN.get(name, {}), **options}).values


def assert_agree(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-5, equal_nan=True)


def test_all_of_clip_dissects_and_jensen_shannon_are_there() -> None:
    assert set(BUILT_IN) <= set(SIMILARITIES)


@pytest.mark.parametrize("name", BUILT_IN)
def test_agrees_with_the_formula(name: str) -> None:
    expected = getattr(reference, name)(
        FEATURES.concept_activations(), ACTIVATIONS.response, **OFTEN.get(name, {})
    )
    assert_agree(values_of(name), expected)


@pytest.mark.parametrize("name", BUILT_IN)
def test_agrees_with_the_formula_by_default(name: str) -> None:
    features, units = make_features(200, 6), make_activations(200, 3)
    expected = getattr(reference, name)(features.concept_activations(), units.response)
    assert_agree(score(name, features, units).values, expected)


@pytest.mark.parametrize("name", WPMI)
def test_agrees_with_the_formula_where_images_tie(name: str) -> None:
    units = make_lwta_activations()
    expected = getattr(reference, name)(FEATURES.concept_activations(), units.response, top_k=40)
    assert_agree(values_of(name, units=units, top_k=40), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"a": 1.0},
        {"a": 60.0},
        {"lam": 0.0},
        {"min_prob": 1e-3},
        {"p_start": 1.0, "p_end": 0.5},
        {"p_end": 1e-6, "p_start": 0.9},
    ],
    ids=str,
)
def test_soft_wpmi_agrees_with_the_formula_for_its_options(options: dict[str, float]) -> None:
    expected = reference.soft_wpmi(FEATURES.concept_activations(), ACTIVATIONS.response, top_k=30, **options)
    assert_agree(values_of("soft_wpmi", top_k=30, **options), expected)


def test_rank_reorder_agrees_with_the_formula_for_its_options() -> None:
    options: dict[str, Any] = {"p": 1.5, "top_fraction": 0.8, "scale_p": 0.0, "permutations": 2, "seed": 7}
    expected = reference.rank_reorder(FEATURES.concept_activations(), ACTIVATIONS.response, **options)
    seed = options.pop("seed")
    assert_agree(score("rank_reorder", FEATURES, ACTIVATIONS, seed=seed, **options).values, expected)


@pytest.mark.parametrize("name", BUILT_IN)
def test_both_forms_agree(name: str) -> None:
    plain = SIMILARITIES[name].function(
        FEATURES.concept_activations(), ACTIVATIONS.response, device="cpu", **OFTEN.get(name, {})
    )
    assert_agree(values_of(name), plain)


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_plain_form_leaves_its_inputs_alone(name: str) -> None:
    clip_feats, unit_acts = FEATURES.concept_activations(), ACTIVATIONS.response.clone()
    before = clip_feats.clone()
    SIMILARITIES[name].function(clip_feats, unit_acts, device="cpu")
    assert torch.equal(clip_feats, before)
    assert torch.equal(unit_acts, ACTIVATIONS.response)


@pytest.mark.parametrize("name", BUILT_IN)
def test_half_precision_activations_are_read_as_float32(name: str) -> None:
    half = UnitActivations("half", ACTIVATIONS.response.half())
    assert_agree(
        values_of(name, units=half), values_of(name, units=UnitActivations("half", half.response.float()))
    )


@pytest.mark.parametrize("block", [1, 100, 700, 5000])
@pytest.mark.parametrize("name", BUILT_IN)
def test_the_block_size_does_not_matter(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = values_of(name)
    for module in ("inputs", "rank_reorder"):
        monkeypatch.setattr(f"clip_dissect_cvn.similarity.{module}.BLOCK", block, raising=False)
    monkeypatch.setattr(inspect.getmodule(wpmi), "CONCEPTS_AT_ONCE", 5)
    monkeypatch.setattr(inspect.getmodule(wpmi), "FACTORS_AT_ONCE", 30)
    assert_agree(values_of(name), whole)


def test_top_images_in_blocks_are_those_of_the_whole_matrix_also_where_they_tie(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    units = make_lwta_activations(images=300, units=50)
    whole = units.response.topk(150, dim=0)
    for columns in (1, 3, 50):
        monkeypatch.setattr(inputs, "BLOCK", 300 * columns)
        values, index = inputs.top_images(units, 150)
        assert torch.equal(values, whole.values)
        assert torch.equal(index, whole.indices)


@pytest.mark.parametrize("name", BUILT_IN)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000))
def test_the_order_of_images_units_and_concepts_does_not_matter(name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images, units, concepts = (torch.randperm(size, generator=generator) for size in (60, 9, 23))
    features = ClipFeatures(FEATURES.images[images], FEATURES.concepts[concepts])
    activations = UnitActivations("shuffled", ACTIVATIONS.response[images][:, units])
    assert_agree(values_of(name, features, activations), values_of(name)[units][:, concepts])


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e12])
def test_the_scale_of_the_activations_does_not_matter(name: str, scale: float) -> None:
    assert_agree(
        values_of(name, units=UnitActivations("scaled", scale * ACTIVATIONS.response)), values_of(name)
    )


@pytest.mark.parametrize(
    "name", ["cos_similarity_cubed", "jensen_shannon", "wpmi", "soft_wpmi", "rank_reorder"]
)
def test_an_offset_of_the_activations_does_not_matter(name: str) -> None:
    found = values_of(name, units=UnitActivations("offset", ACTIVATIONS.response + 4))
    torch.testing.assert_close(found, values_of(name), rtol=1e-3, atol=1e-4)


def test_the_scale_of_the_concepts_does_not_matter_to_cubed_cosine() -> None:
    function = SIMILARITIES["cos_similarity_cubed"].function
    clip_feats = FEATURES.concept_activations()
    assert_agree(
        function(1e-3 * clip_feats, ACTIVATIONS.response), function(clip_feats, ACTIVATIONS.response)
    )


@pytest.mark.parametrize("name", ["cos_similarity", "cos_similarity_cubed"])
def test_a_unit_that_is_a_concept_has_cosine_one_with_it(name: str) -> None:
    found = values_of(name, units=UnitActivations("copy", FEATURES.concept_activations()))
    torch.testing.assert_close(found.diagonal(), torch.ones(23))
    assert found.abs().max() <= 1 + 1e-5


def test_a_unit_that_is_a_concept_has_no_divergence_from_it() -> None:
    found = values_of("jensen_shannon", units=UnitActivations("copy", FEATURES.concept_activations()))
    torch.testing.assert_close(found.diagonal(), torch.zeros(23), atol=1e-6, rtol=0)
    assert found.min() >= -math.log(2)


def test_a_unit_that_is_a_concept_is_in_its_order() -> None:
    found = values_of("rank_reorder", units=UnitActivations("copy", FEATURES.concept_activations()))
    assert found.diagonal().abs().max() == 0
    assert found.max() <= 0


def test_jensen_shannon_of_one_image_against_one_other_is_nearly_ln_2() -> None:
    clip_feats, unit_acts = torch.zeros(40_000, 1), torch.zeros(40_000, 1)
    clip_feats[0], unit_acts[1] = 1, 1
    found = SIMILARITIES["jensen_shannon"].function(clip_feats, unit_acts)
    torch.testing.assert_close(found, torch.tensor([[-math.log(2)]]))


def test_cosine_of_a_concept_that_is_nearly_orthogonal_to_every_image_keeps_its_precision() -> None:
    images = normalize(torch.randn(500, 64, generator=torch.Generator().manual_seed(0)) + 3, dim=1)
    axis = torch.linalg.svd(images, full_matrices=True).Vh[-1:]
    features = ClipFeatures(images, normalize(axis + 0.01 * images[:3], dim=1))
    units = make_activations(500)
    expected = reference.cos_similarity(
        features.images.double() @ features.concepts.double().T, units.response
    )
    torch.testing.assert_close(
        score("cos_similarity", features, units).values.double(), expected, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("name", WPMI)
def test_the_marginal_runs_over_the_whole_layer(name: str) -> None:
    some = UnitActivations("some", ACTIVATIONS.response[:, :3].contiguous())
    assert not torch.allclose(values_of(name)[:3], values_of(name, units=some), rtol=1e-3)
    assert_agree(values_of(name, lam=0.0)[:3], values_of(name, units=some, lam=0.0))


@pytest.mark.parametrize("name", sorted(set(BUILT_IN) - set(WPMI)))
def test_a_unit_is_scored_by_itself(name: str) -> None:
    some = UnitActivations("some", ACTIVATIONS.response[:, 4:6].contiguous())
    assert_agree(values_of(name, units=some), values_of(name)[4:6])


def test_rank_reorder_depends_on_its_seed_and_on_no_other() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = score("rank_reorder", FEATURES, ACTIVATIONS, seed=3, top_fraction=0.5).values
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(score("rank_reorder", FEATURES, ACTIVATIONS, seed=3, top_fraction=0.5).values, first)
    assert not torch.equal(
        score("rank_reorder", FEATURES, ACTIVATIONS, seed=4, top_fraction=0.5).values, first
    )


@pytest.mark.parametrize("name", BUILT_IN)
def test_twice_the_same_is_the_same_to_the_bit(name: str) -> None:
    assert torch.equal(values_of(name), values_of(name))


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_dead_unit_is_flagged_and_the_others_are_finite(name: str) -> None:
    response = make_lwta_activations().response.clone()
    response[:, 2], response[:, 5] = 0, -1.5
    scores = score(name, FEATURES, UnitActivations("dead", response), **OFTEN.get(name, {}))
    assert scores.dead.tolist() == [unit in (2, 5) for unit in range(8)]
    assert scores.values[scores.dead].isnan().all()
    assert scores.values[~scores.dead].isfinite().all()
    assert SIMILARITIES[name].function(FEATURES.concept_activations(), response)[2].isnan().all()


@pytest.mark.parametrize("name", WPMI)
def test_dead_units_are_part_of_the_marginal_as_in_clip_dissect(name: str) -> None:
    response = ACTIVATIONS.response.clone()
    response[:, 0] = 0
    expected = getattr(reference, name)(FEATURES.concept_activations(), response, **OFTEN[name])
    assert_agree(values_of(name, units=UnitActivations("dead", response))[1:], expected[1:])


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("images", [2, 3, 25])
def test_few_images_are_enough(name: str, images: int) -> None:
    features, units = make_features(images), make_activations(images)
    assert score(name, features, units).values.isfinite().all()


@pytest.mark.parametrize("name", WPMI)
def test_fewer_images_than_top_k_are_all_used_and_noted(name: str) -> None:
    features, units = make_features(15), make_activations(15)
    scores = score(name, features, units, top_k=40)
    assert_agree(scores.values, score(name, features, units, top_k=15).values)
    assert scores.source["notes"] == ["top_k is 40, but there are 15 images: all are used"]


def test_rank_reorder_notes_that_it_compares_two_images_at_least() -> None:
    scores = score("rank_reorder", make_features(15), make_activations(15))
    assert scores.source["notes"] == ["top_fraction 0.05 of 15 images is 0: 2 are used"]


def test_rank_reorder_is_finite_for_concepts_that_images_are_opposed_to() -> None:
    opposed = ClipFeatures(FEATURES.images, -FEATURES.concepts)
    found = values_of("rank_reorder", opposed)
    assert found.isfinite().all()
    assert found.max() < values_of("rank_reorder").min()


def test_rank_reorder_of_strongest_images_that_are_all_alike_prefers_the_likeliest_concept() -> None:
    response = torch.cat([torch.ones(30, 1), torch.zeros(30, 1)])
    found = values_of("rank_reorder", units=UnitActivations("flat", response))[0]
    top = response[:, 0].topk(30).indices
    assert_agree(found, -1 / FEATURES.concept_activations()[top].mean(0).sqrt())


def test_a_concept_that_never_differs_scores_nothing_in_cubed_cosine() -> None:
    clip_feats = FEATURES.concept_activations()
    clip_feats[:, 4] = 0.25
    found = SIMILARITIES["cos_similarity_cubed"].function(clip_feats, ACTIVATIONS.response)
    assert found[:, 4].abs().max() == 0
    assert found.isfinite().all()


@pytest.mark.parametrize("name", BUILT_IN)
def test_responses_on_disk_are_read_where_they_are(name: str, tmp_path: Any) -> None:
    path = tmp_path / "response"
    stored = torch.from_file(str(path), shared=True, size=ACTIVATIONS.response.numel()).view(60, 9)
    stored.copy_(ACTIVATIONS.response)
    assert_agree(values_of(name, units=UnitActivations("disk", stored)), values_of(name))
    assert torch.equal(stored, ACTIVATIONS.response)


@pytest.mark.parametrize("name", sorted(set(BUILT_IN) - {"cos_similarity"}))
def test_progress_is_told_up_to_the_end(name: str) -> None:
    told: list[tuple[int, int]] = []
    score(name, FEATURES, ACTIVATIONS, progress=lambda done, total: told.append((done, total)))
    assert told
    assert told[-1][0] == told[-1][1]
    assert told == sorted(told)
