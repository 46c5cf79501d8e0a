"""The renderer draws what the truth says, the same bits every time; the words mean what they say."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_dissect_cvn.embedded.captions import caption, matches
from clip_dissect_cvn.embedded.probe import ShapesProbe
from clip_dissect_cvn.embedded.renderer import (
    OFFSETS,
    PIGMENTS,
    draw_truth,
    render,
    render_class,
)
from clip_dissect_cvn.embedded.world import ATTRIBUTES, CLASSES, Truth, parse, phrase, shapes_concepts
from clip_dissect_cvn.errors import ArgumentError

TRUTHS = st.builds(Truth, **{kind: st.sampled_from(words) for kind, words in ATTRIBUTES.items()})
PRINT_PIXELS = """
import hashlib
from clip_dissect_cvn.embedded.renderer import render
print(hashlib.sha256(b"".join(render(11, i)[0].tobytes() for i in (5, 0, 3))).hexdigest())
"""


def pixels(seed: int, i: int, **forced: str) -> np.ndarray:
    return np.asarray(render(seed, i, **forced)[0], dtype=np.int64)


def figure(i: int, **forced: str) -> np.ndarray:
    """Find a figure's pixels: those that differ when nothing but its colour does."""
    return (pixels(1, i, colour="red", **forced) != pixels(1, i, colour="cyan", **forced)).any(-1)


def test_rendering_again_gives_the_same_bits_in_any_order() -> None:
    forwards = [render(11, i) for i in range(12)]
    backwards = [render(11, i) for i in reversed(range(12))]
    for (image, truth), (again, same) in zip(forwards, reversed(backwards), strict=True):
        assert image.tobytes() == again.tobytes()
        assert truth == same


def test_another_process_draws_the_same_bits() -> None:
    here = hashlib.sha256(b"".join(render(11, i)[0].tobytes() for i in (5, 0, 3))).hexdigest()
    there = subprocess.run([sys.executable, "-c", PRINT_PIXELS], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here


def test_global_random_state_neither_matters_nor_moves() -> None:
    state = np.random.get_state()[1].copy()
    first = render(11, 1)[0].tobytes()
    assert (np.random.get_state()[1] == state).all()
    np.random.random()
    assert render(11, 1)[0].tobytes() == first


def test_seeds_and_numbers_give_different_images() -> None:
    drawn = [render(seed, i)[0].tobytes() for seed in (0, 1) for i in range(20)]
    assert len(set(drawn)) == 40


def test_the_truth_without_the_image_is_the_same_truth() -> None:
    assert [draw_truth(4, i, shape="star") for i in range(30)] == [
        render(4, i, shape="star")[1] for i in range(30)
    ]


def test_every_word_is_drawn_about_equally_often() -> None:
    truths = [draw_truth(5, i) for i in range(4000)]
    for kind, words in ATTRIBUTES.items():
        seen = Counter(asdict(truth)[kind] for truth in truths)
        expected = 4000 / len(words)
        assert all(abs(seen[word] - expected) < 5 * expected**0.5 for word in words), kind


def test_forcing_one_attribute_leaves_the_others_as_they_were() -> None:
    free = draw_truth(6, 3)
    for kind, words in ATTRIBUTES.items():
        for word in words:
            forced = asdict(draw_truth(6, 3, **{kind: word}))
            assert forced.pop(kind) == word
            assert forced.items() <= asdict(free).items()


def test_forcing_the_figure_leaves_the_background_as_it_was() -> None:
    red, blue = pixels(6, 3, colour="red", size="small"), pixels(6, 3, colour="blue", size="small")
    assert (red == blue).all(-1).mean() > 0.7


@pytest.mark.parametrize("colour", PIGMENTS)
def test_the_colour_fills_the_figure(colour: str) -> None:
    painted = pixels(1, 2, colour=colour, shape="circle", texture="plain", size="large", place="center")
    middle = painted[24:40, 24:40].reshape(-1, 3).mean(0)
    nearest = min(PIGMENTS, key=lambda name: float(np.abs(middle - np.array(PIGMENTS[name])).sum()))
    assert nearest == colour


@pytest.mark.parametrize("place", OFFSETS)
def test_the_figure_is_where_the_truth_says(place: str) -> None:
    for i in range(8):
        rows, columns = np.nonzero(figure(i, place=place, shape="circle", size="small", texture="plain"))
        offset = np.array([columns.mean(), rows.mean()]) - 31.5
        nearest = min(OFFSETS, key=lambda name: float(np.abs(offset - np.array(OFFSETS[name])).sum()))
        assert nearest == place


def test_large_figures_are_larger_than_small_ones() -> None:
    for shape in ATTRIBUTES["shape"]:
        small = max(figure(i, shape=shape, size="small", texture="plain").sum() for i in range(6))
        large = min(figure(i, shape=shape, size="large", texture="plain").sum() for i in range(6))
        assert large > 1.5 * small


def test_textures_ink_the_figure() -> None:
    def lit(texture: str) -> int:
        return int(figure(3, texture=texture, shape="square", size="large", place="center").sum())

    assert len({lit(texture) for texture in ATTRIBUTES["texture"]}) == 4
    assert all(lit(texture) < lit("plain") for texture in ATTRIBUTES["texture"] if texture != "plain")


@pytest.mark.parametrize("kind", ["shape", "background", "texture"])
def test_each_word_changes_the_pixels(kind: str) -> None:
    drawn = {word: pixels(1, 5, **{kind: word}).tobytes() for word in ATTRIBUTES[kind]}
    assert len(set(drawn.values())) == len(ATTRIBUTES[kind])


def test_unknown_attributes_and_words_are_refused() -> None:
    with pytest.raises(ArgumentError, match="'color' is no attribute of an image. Use one of shape, colour"):
        render(0, 0, color="red")
    with pytest.raises(ArgumentError, match="shape is 'blob'. Use one of circle, square"):
        render(0, 0, shape="blob")


def test_a_stratified_set_has_as_many_of_each_class() -> None:
    probe = ShapesProbe()
    labels = Counter(probe.label(i) for i in range(len(probe)))
    assert set(labels.values()) == {100}
    assert len(labels) == len(CLASSES) == 80
    for i in (0, 79, 80, 7999):
        truth = probe.truth(i)
        assert f"{truth.colour} {truth.shape}" == probe.classes[probe.label(i)]
        assert truth.has(probe.classes[probe.label(i)])
        assert render_class(probe.seed, i)[1] == truth
        assert probe.image(i).tobytes() == render_class(probe.seed, i)[0].tobytes()


def test_a_probe_set_says_what_it_is() -> None:
    probe = ShapesProbe()
    assert probe.name == "shapes"
    assert probe.identifier(17) == "shapes/2/17"
    assert probe.image(0).mode == "RGB"
    digests = {probe.digest, ShapesProbe(size=80).digest, ShapesProbe(seed=9).digest}
    assert len(digests) == 3
    assert ShapesProbe().digest == probe.digest


def test_a_probe_set_ends() -> None:
    with pytest.raises(IndexError, match="image 80 of a probe set of 80"):
        ShapesProbe(size=80).image(80)
    with pytest.raises(ArgumentError, match="size is 0, but a probe set needs at least one image"):
        ShapesProbe(size=0)


def test_the_concepts_are_distinct_and_each_has_a_truth() -> None:
    concepts = shapes_concepts()
    assert 150 <= len(concepts) == len(set(concepts)) <= 250
    assert set(CLASSES) <= set(concepts)
    shares = matches([draw_truth(8, i) for i in range(3000)], concepts).float().mean(0).tolist()
    for concept, share in zip(concepts, shares, strict=True):
        expected = np.prod([1 / len(ATTRIBUTES[kind]) for kind in parse(concept)])
        assert abs(share - expected) < 5 * (expected / 3000) ** 0.5


@pytest.mark.parametrize("concept", ["", "on the", "red unicorn", "red blue circle"])
def test_words_without_a_truth_are_refused(concept: str) -> None:
    with pytest.raises(ArgumentError, match="whose truth in the embedded world is not known"):
        draw_truth(0, 0).has(concept)


@given(TRUTHS, st.sets(st.sampled_from(sorted(ATTRIBUTES)), min_size=1))
@settings(deadline=None)
def test_what_is_said_can_be_read_back(truth: Truth, kinds: set[str]) -> None:
    said = {kind: asdict(truth)[kind] for kind in kinds}
    assert parse(phrase(said)) == said
    assert truth.has(phrase(said))


@given(TRUTHS, TRUTHS, st.integers(0, 10_000))
@settings(deadline=None)
def test_captions_are_true_and_match_where_they_are_true(truth: Truth, other: Truth, seed: int) -> None:
    lots = np.random.default_rng(seed)
    texts = [caption(truth, lots), caption(other, lots)]
    assert truth.has(texts[0])
    assert matches([truth, other], texts).tolist() == [
        [one.has(text) for text in texts] for one in (truth, other)
    ]
