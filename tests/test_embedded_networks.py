"""The shipped weights know the world they were trained on, and load the way OpenAI's do."""

from __future__ import annotations

from pathlib import Path

import clip
import numpy as np
import pytest
import torch
from PIL import Image

import clip_dissect_cvn.embedded as embedded
from clip_dissect_cvn.clip_encoder import ClipEncoder
from clip_dissect_cvn.embedded.encoder import embedded_encoder, load_clip
from clip_dissect_cvn.embedded.measures import (
    auroc,
    class_accuracy,
    held_out,
    zero_shot_accuracies,
)
from clip_dissect_cvn.embedded.networks import (
    CLIP_NORM,
    TOKENS,
    VIT_NORM,
    build_cvn,
    build_vit,
    load_vit,
    vit_preprocess,
)
from clip_dissect_cvn.embedded.probe import ShapesProbe
from clip_dissect_cvn.embedded.renderer import render
from clip_dissect_cvn.embedded.world import CLASSES, shapes_concepts
from clip_dissect_cvn.lwta import LWTA

FOLDER = Path(embedded.__file__).parent
BARS = {"shape": 0.95, "colour": 0.95, "texture": 0.90}


@pytest.fixture(scope="module")
def encoder() -> ClipEncoder:
    return embedded_encoder()


def test_the_weights_are_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.glob("*.safetensors")) < 6e6


def test_the_clip_names_what_it_sees(encoder: ClipEncoder) -> None:
    reached = zero_shot_accuracies(encoder, held_out(400))
    assert all(reached[kind] >= bar for kind, bar in BARS.items()), reached


def test_the_vits_tell_the_classes_apart_and_the_cvn_within_a_point_of_its_twin() -> None:
    probe = held_out(800)
    cvn = class_accuracy(load_vit(build_cvn(), "cvn"), probe)
    gelu = class_accuracy(load_vit(build_vit(), "gelu"), probe, draws=1)
    assert min(cvn, gelu) > 0.95
    assert cvn > gelu - 0.01 - 2 * (0.02 / 800) ** 0.5, (cvn, gelu)


def test_openai_can_load_it(encoder: ClipEncoder) -> None:
    state = load_clip().state_dict()
    theirs = clip.model.build_model(dict(state)).float()
    tokens = clip.tokenize(["red circle", "night"])
    with torch.inference_mode():
        there = theirs.encode_text(tokens)
    ours = encoder.encode_texts(["red circle", "night"])
    assert torch.nn.functional.cosine_similarity(there, ours).min() > 0.9999


def test_unseen_words_have_zero_rows(encoder: ClipEncoder) -> None:
    rows = encoder.model.token_embedding.weight
    assert rows.shape[0] == TOKENS
    unseen = clip.tokenize("zebra")[0, 1].item()
    assert not rows[unseen].any()
    assert rows[clip.tokenize("red")[0, 1].item()].any()
    assert encoder.encode_texts(["a zebra in the rain"]).isfinite().all()


def test_every_concept_has_an_embedding_of_its_own(encoder: ClipEncoder) -> None:
    embedded_words = torch.nn.functional.normalize(encoder.encode_texts(shapes_concepts()), dim=1)
    alike = embedded_words @ embedded_words.T - torch.eye(len(embedded_words))
    assert alike.max() < 0.999


def test_preprocessing_leaves_the_pixels_alone_and_takes_any_size(encoder: ClipEncoder) -> None:
    image = render(0, 0)[0]
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    assert torch.allclose(encoder.preprocess(image), CLIP_NORM(pixels), atol=1e-6)
    assert torch.equal(vit_preprocess()(image), VIT_NORM(pixels))
    for size in ((80, 200), (31, 7)):
        assert encoder.preprocess(Image.new("RGB", size)).shape == (3, 64, 64)
        assert vit_preprocess()(Image.new("RGB", size)).shape == (3, 64, 64)


def test_images_of_a_batch_do_not_depend_on_one_another(encoder: ClipEncoder) -> None:
    probe = ShapesProbe(size=7)
    batch = torch.stack([encoder.preprocess(probe.image(i)) for i in range(7)])
    whole = encoder.encode_images(batch)
    single = torch.cat([encoder.encode_images(batch[i : i + 1]) for i in range(7)])
    assert torch.allclose(whole, single, atol=1e-4)


def test_the_networks_differ_in_nothing_but_the_activation() -> None:
    cvn, gelu = build_cvn(), build_vit()
    assert [part.competitors for part in cvn.modules() if isinstance(part, LWTA)] == [8] * 4
    assert cvn.state_dict().keys() == gelu.state_dict().keys()
    assert gelu.head.out_features == len(CLASSES)
    assert build_cvn(num_classes=5).head.out_features == 5


def test_the_area_under_the_curve() -> None:
    true = torch.tensor([[True], [True], [False], [False]])
    for values, area in (([4.0, 3.0, 2.0, 1.0], 1.0), ([1.0, 2.0, 3.0, 4.0], 0.0), ([1.0] * 4, 0.5)):
        assert auroc(torch.tensor(values)[:, None], true).item() == area
    assert auroc(torch.tensor([[2.0], [1.0], [1.0], [0.0]]), true).item() == 0.875
