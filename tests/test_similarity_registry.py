"""Names, options, other people's similarities, and the wording of every error."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from clip_dissect_cvn.artifacts import ClipFeatures, UnitActivations
from clip_dissect_cvn.errors import ArgumentError, PluginError, UnknownNameError
from clip_dissect_cvn.similarity import SIMILARITIES, Similarity, memory, register_similarity, score
from clip_dissect_cvn.similarity.options import check_count, check_not_negative, check_positive, check_share

FEATURES = ClipFeatures(torch.eye(6, 5), torch.eye(4, 5), source={"encoder": "tiny"})
ACTIVATIONS = UnitActivations("fc", torch.arange(18.0).reshape(6, 3) % 7, source={"seed": 0})


def raises(error: type[Exception], message: str) -> Any:
    return pytest.raises(error, match=f"^{re.escape(message)}$")


@pytest.fixture
def names() -> Iterator[None]:
    """Forget the names that a test registers."""
    before = dict(SIMILARITIES._entries)
    yield
    SIMILARITIES._entries.clear()
    SIMILARITIES._entries.update(before)


def mean_product(clip_feats: Tensor, unit_acts: Tensor, *, scale: float = 1.0) -> Tensor:
    return scale * unit_acts.T @ clip_feats / len(clip_feats)


@pytest.mark.usefixtures("names")
def test_a_plugin_in_ten_lines() -> None:
    @register_similarity("correlation")
    def correlation(clip_feats: Tensor, unit_acts: Tensor, **options: Any) -> Tensor:
        p, q = (one - one.mean(0) for one in (clip_feats, unit_acts))
        return (q / q.norm(dim=0)).T @ (p / p.norm(dim=0))

    scores = score("correlation", FEATURES, ACTIVATIONS)
    stacked = torch.cat([ACTIVATIONS.response, FEATURES.concept_activations()], dim=1).T
    torch.testing.assert_close(scores.values, torch.corrcoef(stacked)[:3, 3:])
    plain = correlation(FEATURES.concept_activations(), ACTIVATIONS.response, device="cpu")
    torch.testing.assert_close(plain, scores.values)


def test_the_source_tells_what_was_done() -> None:
    scores = score("rank_reorder", FEATURES, ACTIVATIONS, seed=5, top_fraction=1.0)
    options = {"p": 3, "top_fraction": 1.0, "scale_p": 0.5, "permutations": 5}
    assert scores.layer == "fc"
    assert scores.source == {
        "similarity": "rank_reorder",
        "version": "1",
        "options": options,
        "seed": 5,
        "notes": [],
        "features": {"encoder": "tiny"},
        "activations": {"seed": 0},
    }
    assert "seed" not in score("wpmi", FEATURES, ACTIVATIONS).source


def test_options_are_listed_with_their_defaults() -> None:
    assert SIMILARITIES["wpmi"].options() == {"top_k": 28, "a": 2.0, "lam": 0.6, "min_prob": 1e-7}
    assert SIMILARITIES["cos_similarity"].options() == {}


def test_a_function_needs_no_name() -> None:
    torch.testing.assert_close(
        score(mean_product, FEATURES, ACTIVATIONS, scale=3.0).values,
        score(Similarity("product", mean_product), FEATURES, ACTIVATIONS).values * 3,
    )


def test_a_factored_form_is_used_and_then_no_memory_is_needed_for_p() -> None:
    def factored(features: ClipFeatures, units: UnitActivations, *, scale: float = 1.0) -> Tensor:
        return scale * (units.response.T @ features.images) @ features.concepts.T / len(features.images)

    entry = Similarity("product", mean_product, factored)
    torch.testing.assert_close(
        score(entry, FEATURES, ACTIVATIONS).values, score(mean_product, FEATURES, ACTIVATIONS).values
    )
    assert memory(entry, FEATURES, ACTIVATIONS) == 0
    assert score(entry, FEATURES, ACTIVATIONS).source["notes"] == []


def test_memory_without_a_factored_form_is_told() -> None:
    assert memory(mean_product, FEATURES, ACTIVATIONS) == 4 * (6 * 4 + 6 * 3)
    notes = score(mean_product, FEATURES, ACTIVATIONS).source["notes"]
    assert notes == ["P was formed whole, in 0 MB with the activations"]


def test_what_is_handed_over_is_what_the_function_names() -> None:
    seen: dict[str, Any] = {}

    def nosy(clip_feats: Tensor, unit_acts: Tensor, *, seed: int, device: str, **options: Any) -> Tensor:
        seen.update(options, seed=seed, device=device)
        return unit_acts.T @ clip_feats

    score(nosy, FEATURES, ACTIVATIONS, seed=4, sharpness=2)
    assert seen == {"seed": 4, "device": "cpu", "sharpness": 2}


def test_the_version_follows_the_source_of_a_function() -> None:
    assert Similarity("a", mean_product).version == Similarity("b", mean_product).version
    assert Similarity("a", mean_product).version != Similarity("a", lambda p, q: q.T @ p).version
    assert Similarity("a", mean_product, version="7").version == "7"


def test_the_version_of_a_function_without_source_follows_its_code() -> None:
    made: dict[str, Any] = {}
    for factor in (2, 3):
        exec(f"def f{factor}(p, q): return {factor} * q.T @ p", made)
    assert Similarity("a", made["f2"]).version != Similarity("a", made["f3"]).version


def test_a_dead_unit_needs_no_care_from_a_plugin() -> None:
    response = ACTIVATIONS.response.clone()
    response[:, 1] = 3
    scores = score(mean_product, FEATURES, UnitActivations("fc", response))
    assert scores.values[1].isnan().all()
    assert scores.values[[0, 2]].isfinite().all()


def test_a_plugin_may_change_what_it_is_given() -> None:
    def greedy(clip_feats: Tensor, unit_acts: Tensor) -> Tensor:
        return unit_acts.sub_(1).T @ clip_feats.mul_(2)

    before = ACTIVATIONS.response.clone()
    first = score(greedy, FEATURES, ACTIVATIONS).values
    assert torch.equal(ACTIVATIONS.response, before)
    assert torch.equal(score(greedy, FEATURES, ACTIVATIONS).values, first)


def test_an_unknown_similarity() -> None:
    known = ", ".join(SIMILARITIES)
    with raises(
        UnknownNameError, f"Unknown similarity 'soft_wpni'. Did you mean 'soft_wpmi'? Known: {known}."
    ):
        score("soft_wpni", FEATURES, ACTIVATIONS)


def test_an_unknown_option() -> None:
    with raises(
        UnknownNameError,
        "Unknown option of wpmi 'topk'. Did you mean 'top_k'? Known: a, lam, min_prob, top_k.",
    ):
        score("wpmi", FEATURES, ACTIVATIONS, topk=3)


def test_an_option_of_a_similarity_that_has_none() -> None:
    with raises(ArgumentError, "cos_similarity has no options, but was given 'top_k'. Leave it out."):
        score("cos_similarity", FEATURES, ACTIVATIONS, top_k=3)


def test_an_option_without_a_default() -> None:
    def sharp(clip_feats: Tensor, unit_acts: Tensor, *, sharpness: float) -> Tensor:
        return sharpness * unit_acts.T @ clip_feats

    with raises(ArgumentError, "sharp needs the option 'sharpness', which has no default. Give it a value."):
        score(sharp, FEATURES, ACTIVATIONS)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("wpmi", {"top_k": 0}, "top_k is 0. Use a whole number of at least 1."),
        ("wpmi", {"a": 0}, "a is 0. Use a finite number above 0."),
        ("wpmi", {"a": float("nan")}, "a is nan. Use a finite number above 0."),
        ("wpmi", {"min_prob": 0}, "min_prob is 0. Use a finite number above 0."),
        ("soft_wpmi", {"lam": -1}, "lam is -1. Use a finite number of at least 0."),
        ("soft_wpmi", {"p_end": 0}, "p_start is 0.998 and p_end 0. Use 0 < p_end <= p_start <= 1."),
        ("soft_wpmi", {"p_start": 0.5}, "p_start is 0.5 and p_end 0.97. Use 0 < p_end <= p_start <= 1."),
        ("rank_reorder", {"top_fraction": 0}, "top_fraction is 0. Use a number above 0 and at most 1."),
        ("rank_reorder", {"top_fraction": 5}, "top_fraction is 5. Use a number above 0 and at most 1."),
        ("rank_reorder", {"permutations": 0}, "permutations is 0. Use a whole number of at least 1."),
        ("rank_reorder", {"p": -3}, "p is -3. Use a finite number above 0."),
        ("rank_reorder", {"scale_p": -0.5}, "scale_p is -0.5. Use a finite number of at least 0."),
    ],
    ids=str,
)
def test_an_option_out_of_range(name: str, options: dict[str, Any], message: str) -> None:
    with raises(ArgumentError, message):
        score(name, FEATURES, ACTIVATIONS, **options)


@pytest.mark.parametrize("value", [2.5, True, "3", None])
def test_a_count_that_is_no_whole_number(value: object) -> None:
    with raises(ArgumentError, f"top_k is {value!r}. Use a whole number of at least 1."):
        check_count("top_k", value)


@pytest.mark.parametrize("check", [check_share, check_positive, check_not_negative])
@pytest.mark.parametrize("value", ["2", True, None])
def test_a_number_that_is_none(check: Callable[[str, object], None], value: object) -> None:
    with pytest.raises(ArgumentError, match=rf"^a is {value!r}\. Use a "):
        check("a", value)


def test_other_images_in_the_two_inputs() -> None:
    with raises(
        ArgumentError,
        "fc was recorded on 5 images, but CLIP embedded 6. Use the same probe images for both.",
    ):
        score("wpmi", FEATURES, UnitActivations("fc", torch.ones(5, 3)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_activations_that_are_not_finite(value: float) -> None:
    response = ACTIVATIONS.response.clone()
    response[4, 1] = value
    with raises(
        ArgumentError,
        f"The activations of fc hold {value} (row 4, column 1). "
        "Only finite numbers can be compared: check the network and its precision.",
    ):
        score("wpmi", FEATURES, UnitActivations("fc", response))


def test_embeddings_that_are_not_finite() -> None:
    concepts = FEATURES.concepts.clone()
    concepts[3, 2] = float("nan")
    with pytest.raises(
        ArgumentError, match=r"^The CLIP embeddings of the concepts hold nan \(row 3, column 2\)"
    ):
        score("wpmi", ClipFeatures(FEATURES.images, concepts), ACTIVATIONS)


def test_large_activations_whose_sum_overflows_are_finite() -> None:
    huge = UnitActivations("fc", ACTIVATIONS.response * 2e37)
    assert score("wpmi", FEATURES, huge).values.isfinite().all()


@pytest.mark.usefixtures("names")
def test_a_name_that_is_taken() -> None:
    with pytest.raises(ArgumentError, match="^The similarity 'wpmi' is already registered"):
        register_similarity("wpmi")(mean_product)


def test_a_plugin_of_another_shape() -> None:
    def sideways(clip_feats: Tensor, unit_acts: Tensor) -> Tensor:
        return clip_feats.T @ unit_acts

    who = f"The similarity 'sideways' ({__name__}.{sideways.__qualname__})"
    with raises(PluginError, f"{who} returned a tensor of shape (4, 3); expected (units concepts) = (3, 4)."):
        score(sideways, FEATURES, ACTIVATIONS)


def test_a_plugin_that_returns_no_tensor() -> None:
    def silent(clip_feats: Tensor, unit_acts: Tensor) -> None:
        return None

    who = f"The similarity 'silent' ({__name__}.{silent.__qualname__})"
    with raises(PluginError, f"{who} returned NoneType; expected a tensor (units concepts) = (3, 4)."):
        score(silent, FEATURES, ACTIVATIONS)  # type: ignore[arg-type]


def test_a_plugin_that_fails() -> None:
    def wrong(clip_feats: Tensor, unit_acts: Tensor) -> Tensor:
        raise KeyError("top_k")

    who = f"The similarity 'wrong' ({__name__}.{wrong.__qualname__})"
    with raises(PluginError, f"{who} failed: KeyError('top_k'). Mend that function."):
        score(wrong, FEATURES, ACTIVATIONS)


def test_a_plugin_that_returns_nan() -> None:
    def broken(clip_feats: Tensor, unit_acts: Tensor) -> Tensor:
        scores = unit_acts.T @ clip_feats
        scores[1:, 2] = torch.nan
        return scores

    who = f"The similarity 'broken' ({__name__}.{broken.__qualname__})"
    with raises(
        PluginError,
        f"{who} returned NaN for 2 units that are not dead, the first of them 1; "
        "expected numbers for all of (units concepts) = (3, 4).",
    ):
        score(broken, FEATURES, ACTIVATIONS)


def test_a_plugin_that_cannot_be_called() -> None:
    with raises(
        PluginError,
        "The similarity 'mine' is 3, which cannot be called. "
        "Register a function of (clip_feats, unit_acts, **options).",
    ):
        SIMILARITIES._make("mine", 3)
