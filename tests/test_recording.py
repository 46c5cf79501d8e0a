from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from clip_dissect_cvn.errors import ArgumentError, LayerError, UnknownNameError
from clip_dissect_cvn.lwta import LWTA
from clip_dissect_cvn.randomness import uniforms
from clip_dissect_cvn.recording import Recorded, Recorder, resolve_readout
from clip_dissect_cvn.surgery import replace_activations_
from clip_dissect_cvn.tracing import Call, trace

U = 4
BLOCKS = 24 * 4 // U
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 5}
ACT = "blocks.1.mlp.act"


def tiny_vit(**options: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return spread(timm.create_model("vit_tiny_patch16_224", **{**TINY, **options}))


def spread(model: nn.Module) -> nn.Module:
    """Make responses differ enough that competitions have likely and unlikely winners."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.orthogonal_(module.weight, gain=2.0)
    return model


@pytest.fixture(scope="module")
def cvn() -> nn.Module:
    return replace_activations_(tiny_vit(), U)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(1))


INDICES = torch.tensor([3, 4, 6, 10, 11, 12, 40])


@cache
def traced(model: nn.Module, size: tuple[int, ...] = (3, 32, 32)) -> tuple[Call, ...]:
    return trace(model, torch.zeros(1, *size))


def record(
    model: nn.Module, layers: list[str], images: Tensor, indices: Tensor | None = None, **options: Any
) -> dict[str, Recorded]:
    calls = options.pop("calls", None) or traced(model, tuple(images.shape[1:]))
    with Recorder(model, layers, calls=calls, **options) as recorder:
        return recorder.record(images, INDICES[: len(images)] if indices is None else indices)


class Heard:
    """A referee that notes the linear responses, and draws as the recorder must."""

    def __init__(self, name: str, seed: int, indices: Tensor, draw: int) -> None:
        self.name, self.seed, self.indices, self.draw = name, seed, indices, draw
        self.h, self.uniform = torch.empty(0), torch.empty(0)

    def uniforms(self, shape: tuple[int, ...]) -> Tensor:
        self.uniform = uniforms(
            self.seed, images=self.indices, layer=self.name, draw=self.draw, shape=tuple(shape[1:])
        )
        return self.uniform

    def observe(self, h: Tensor, competition: object) -> None:
        self.h = h


def heard(model: nn.Module, images: Tensor, *, seed: int = 0, draw: int = 0) -> dict[str, Heard]:
    """Run the model once with given draws, by hand."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, LWTA)}
    referees = {name: Heard(name, seed, INDICES, draw) for name in modules}
    model.eval()
    for name, module in modules.items():
        module.referee = referees[name]
    with torch.inference_mode():
        model(images)
    for module in modules.values():
        module.referee = None
    return referees


def compete_slowly(h: list[float], uniform: float) -> tuple[int, list[float], list[float]]:
    """One block from the formula: Pi = softmax(h), the winner by inverse CDF, y = xi * h."""
    weights = torch.tensor(h, dtype=torch.float64).exp()
    chance = (weights / weights.sum()).tolist()
    winner, total = 0, chance[0]
    while total <= uniform and winner < len(h) - 1:
        winner += 1
        total += chance[winner]
    return winner, chance, [value if u == winner else 0.0 for u, value in enumerate(h)]


def reference(
    passes: list[tuple[Tensor, Tensor]], pool_mode: str = "avg", readout: str = "draw"
) -> tuple[Tensor, Tensor, Tensor]:
    """Response, winner and probability of one image, by loops over positions and blocks."""
    units = passes[0][0].shape[1]
    response, probability = torch.zeros(units), torch.zeros(units)
    wins = torch.zeros(units)
    for h, uniform in passes:
        values = torch.zeros(h.shape)
        for position in range(len(h)):
            for block in range(units // U):
                at = slice(block * U, block * U + U)
                winner, chance, y = compete_slowly(h[position, at].tolist(), float(uniform[position, block]))
                wins[block * U + winner] += 1
                probability[at] += torch.tensor(chance) / len(h) / len(passes)
                expected = [p * x for p, x in zip(chance, h[position, at].tolist(), strict=True)]
                values[position, at] = torch.tensor(expected if readout == "expected" else y)
        response += (values.amax(0) if pool_mode == "max" else values.mean(0)) / len(passes)
    return response, wins.view(-1, U).argmax(1), probability


def assert_is(recorded: Recorded, row: int, expected: tuple[Tensor, Tensor, Tensor]) -> None:
    response, winner, probability = expected
    assert recorded.winner is not None and recorded.probability is not None
    torch.testing.assert_close(recorded.response[row], response, rtol=1e-4, atol=1e-5)
    assert torch.equal(recorded.winner[row].long(), winner)
    torch.testing.assert_close(recorded.probability[row].float(), probability, rtol=0, atol=1e-3)


# against the formula ---------------------------------------------------------------------------------------


def test_the_class_token_of_a_vit_by_the_formula(cvn: nn.Module, images: Tensor) -> None:
    recorded = record(cvn, [ACT], images, seed=5)[ACT]
    assert recorded.response.shape == (7, 96) and recorded.winner is not None
    assert recorded.winner.shape == (7, BLOCKS) and recorded.winner.dtype == torch.uint8
    referee = heard(cvn, images, seed=5)[ACT]
    for row in range(7):
        one = (referee.h[row, :1], referee.uniform[row, :1])
        assert_is(recorded, row, reference([one]))


@pytest.mark.parametrize(("pool_mode", "readout"), [("avg", "draw"), ("max", "draw"), ("avg", "expected")])
def test_the_patches_by_the_formula(cvn: nn.Module, images: Tensor, pool_mode: Any, readout: Any) -> None:
    recorded = record(cvn, [ACT], images[:2], tokens="patches", pool_mode=pool_mode, readout=readout)
    referee = heard(cvn, images)[ACT]
    for row in range(2):
        one = (referee.h[row, 1:], referee.uniform[row, 1:])
        assert_is(recorded[ACT], row, reference([one], pool_mode, readout))


def test_several_draws_by_the_formula(cvn: nn.Module, images: Tensor) -> None:
    runs = [heard(cvn, images, draw=draw)[ACT] for draw in range(3)]
    for readout in ("mean", "expected"):
        recorded = record(cvn, [ACT], images, draws=3, readout=readout)[ACT]
        passes = [(run.h[2, :1], run.uniform[2, :1]) for run in runs]
        assert_is(recorded, 2, reference(passes, readout=readout))


def test_feature_maps_by_the_formula() -> None:
    model = replace_activations_(spread(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))), U)
    images = torch.randn(7, 3, 6, 6, generator=torch.Generator().manual_seed(2))
    recorded = record(model, ["1"], images)["1"]
    referee = heard(model, images)["1"]
    for row in range(7):
        one = (referee.h[row].permute(1, 2, 0).reshape(16, 8), referee.uniform[row].reshape(16, 2))
        assert_is(recorded, row, reference([one]))


def test_the_winner_is_recorded_also_when_its_response_is_negative() -> None:
    model = nn.Sequential(nn.Linear(4, 4), LWTA(2))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4))
        model[0].bias.zero_()
    h = torch.tensor([[-1.0, -30.0, -40.0, -2.0], [-1.0, -2.0, -3.0, -50.0]])
    recorded = record(model, ["1"], h, torch.tensor([0, 1]))["1"]
    assert recorded.winner is not None
    assert recorded.winner[0].tolist() == [0, 1] and recorded.winner[1, 1] == 0
    assert (recorded.response <= 0).all()
    winners = recorded.winner.long() + torch.tensor([0, 2])
    assert torch.equal(recorded.response.gather(1, winners), h.gather(1, winners))


# laws ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 64])
def test_batches_of_any_size_record_the_same(cvn: nn.Module, images: Tensor, size: int) -> None:
    layers = ["blocks.*.mlp.act", "norm", "head"]
    whole = record(cvn, layers, images)
    with Recorder(cvn, layers, calls=traced(cvn)) as recorder:
        parts = [recorder.record(*part) for part in zip(images.split(size), INDICES.split(size), strict=True)]
    for name, recorded in whole.items():
        response = torch.cat([part[name].response for part in parts])
        torch.testing.assert_close(response, recorded.response, rtol=1e-4, atol=1e-4)
        if recorded.winner is not None:
            assert torch.equal(torch.cat([part[name].winner for part in parts]), recorded.winner)


def test_uniforms_are_exactly_those_of_image_layer_and_draw(
    cvn: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, str, int]] = []

    def noted(seed: int, *, images: Tensor, layer: str, draw: int, shape: tuple[int, ...]) -> Tensor:
        asked.extend((int(image), layer, draw) for image in images)
        return uniforms(seed, images=images, layer=layer, draw=draw, shape=shape)

    monkeypatch.setattr("clip_dissect_cvn.recording.uniforms", noted)
    by_size = []
    for size in (1, 7, 64):
        with Recorder(cvn, ["head"], calls=traced(cvn), draws=2) as recorder:
            for part in zip(images.split(size), INDICES.split(size), strict=True):
                recorder.record(*part)
        by_size.append(sorted(asked))
        asked.clear()
    wanted = [
        (int(i), f"blocks.{block}.mlp.act", draw) for i in INDICES for block in range(3) for draw in (0, 1)
    ]
    assert by_size[0] == by_size[1] == by_size[2] == sorted(wanted)


def test_the_seed_decides_the_draws(cvn: nn.Module, images: Tensor) -> None:
    first, again, other = (record(cvn, [ACT], images, seed=seed)[ACT] for seed in (0, 0, 1))
    assert torch.equal(first.response, again.response)
    assert not torch.equal(first.winner, other.winner)


def test_recording_leaves_the_global_random_state_alone(cvn: nn.Module, images: Tensor) -> None:
    before = torch.random.get_rng_state()
    record(cvn, ["head"], images)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_one_layer_alone_is_recorded_as_among_others(cvn: nn.Module, images: Tensor) -> None:
    together = record(cvn, ["blocks.*.mlp.act", "head"], images)
    for name, recorded in together.items():
        assert torch.equal(record(cvn, [name], images)[name].response, recorded.response)


def test_layers_without_competition_give_their_mean_over_the_draws(cvn: nn.Module, images: Tensor) -> None:
    mean = record(cvn, ["head"], images, draws=2)["head"]
    assert mean.winner is None and mean.probability is None
    with Recorder(cvn, ["head"], calls=traced(cvn), draws=2) as recorder:
        single = []
        hook = cvn.head.register_forward_hook(lambda *call: single.append(call[-1]), prepend=True)
        recorder.record(images, INDICES)
        hook.remove()
    torch.testing.assert_close(mean.response, (single[0] + single[1]) / 2)


def test_a_network_without_competition_runs_once_whatever_the_draws(images: Tensor) -> None:
    model, runs = tiny_vit(), []
    model.patch_embed.register_forward_hook(lambda *_: runs.append(1))
    plain = record(model, ["head", ACT], images, draws=4)
    assert len(runs) == 1
    with torch.inference_mode():
        torch.testing.assert_close(plain["head"].response, model.eval()(images))


def test_no_images_give_no_rows(cvn: nn.Module, images: Tensor) -> None:
    recorded = record(cvn, [ACT, "head"], images[:0], INDICES[:0])
    assert recorded[ACT].response.shape == (0, 96)
    assert recorded[ACT].winner.shape == (0, BLOCKS)
    assert recorded["head"].response.shape == (0, 5)


def test_the_size_of_what_is_recorded_is_told(cvn: nn.Module, images: Tensor) -> None:
    with Recorder(cvn, [ACT, "head"], calls=traced(cvn)) as recorder:
        told = recorder.bytes_per_image
        recorded = recorder.record(images, INDICES).values()
    tensors = [t for r in recorded for t in (r.response, r.winner, r.probability) if t is not None]
    assert told * len(images) == sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_is_near(cvn: nn.Module, images: Tensor, amp: Any) -> None:
    model = tiny_vit()
    full, mixed = record(model, ["head"], images)["head"], record(model, ["head"], images, amp=amp)["head"]
    assert mixed.response.dtype == torch.float32
    assert not torch.equal(full.response, mixed.response)
    torch.testing.assert_close(full.response, mixed.response, rtol=0.1, atol=0.1 * full.response.std().item())


# one pass, and everything undone ---------------------------------------------------------------------------


def test_the_pass_stops_after_the_last_layer(cvn: nn.Module, images: Tensor) -> None:
    ran: Counter[str] = Counter()
    with Recorder(cvn, [ACT, "blocks.0"], calls=traced(cvn)) as recorder:
        hooks = [
            module.register_forward_pre_hook(lambda *_, path=path: ran.update([path]))
            for path, module in cvn.named_modules()
        ]
        recorder.record(images, INDICES)
        for hook in hooks:
            hook.remove()
    assert ran["blocks.0.mlp.fc2"] == 1 and ran[ACT] == 1
    assert not {"blocks.1.mlp.fc2", "blocks.2", "head"} & set(ran)
    assert max(ran.values()) == 1


def state(model: nn.Module) -> list[object]:
    return [
        (
            path,
            module.training,
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            getattr(module, "referee", None),
        )
        for path, module in model.named_modules()
    ]


class BoomError(Exception):
    pass


def test_the_model_is_as_before_also_after_an_error(images: Tensor) -> None:
    model = replace_activations_(tiny_vit(), U).train()
    model.blocks[0].eval()
    before = state(model)
    record(model, [ACT, "norm"], images)
    assert state(model) == before

    def boom(*_: object) -> None:
        raise BoomError

    with pytest.raises(BoomError), Recorder(model, ["head"]) as recorder:
        handle = model.norm.register_forward_hook(boom)
        try:
            recorder.record(images, INDICES)
        finally:
            handle.remove()
    assert state(model) == before
    with pytest.raises(LayerError):
        record(model, [ACT], images * torch.nan)
    assert state(model) == before


def test_recording_outside_the_block_is_refused(cvn: nn.Module, images: Tensor) -> None:
    with pytest.raises(ArgumentError, match="record was called outside of the recorder's block. Write: with"):
        Recorder(cvn, [ACT], calls=traced(cvn)).record(images, INDICES)


# networks --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return torchvision.models.resnet18(num_classes=3)


@pytest.fixture(scope="module")
def photos() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def test_a_relu_called_twice_gives_two_layers_of_one_row_an_image(resnet: nn.Module, photos: Tensor) -> None:
    recorded = record(resnet, ["layer1.0.relu", "layer1.0.bn1", "fc"], photos)
    assert list(recorded) == ["layer1.0.bn1", "layer1.0.relu.0", "layer1.0.relu.1", "fc"]
    assert {r.response.shape[0] for r in recorded.values()} == {2}
    outputs = []
    handle = resnet.layer1[0].relu.register_forward_hook(lambda *call: outputs.append(call[-1].clone()))
    with torch.inference_mode():
        resnet.eval()(photos)
    handle.remove()
    for name, output in zip(["layer1.0.relu.0", "layer1.0.relu.1"], outputs, strict=True):
        torch.testing.assert_close(recorded[name].response, output.mean((2, 3)))


def test_a_patched_resnet_has_a_layer_for_each_call(photos: Tensor) -> None:
    model = replace_activations_(torchvision.models.resnet18(num_classes=3), 2)
    recorded = record(model, ["layer1.0.relu", "fc"], photos, pool_mode="max")
    assert list(recorded) == ["layer1.0.relu.0", "layer1.0.relu.1", "fc"]
    for name in ("layer1.0.relu.0", "layer1.0.relu.1"):
        referee = heard(model, photos_of(photos))[name]
        assert recorded[name].winner.shape == (2, 32)
        h = referee.h[0].permute(1, 2, 0)
        chance = h.reshape(*h.shape[:2], 32, 2).softmax(-1).mean((0, 1)).flatten()
        torch.testing.assert_close(recorded[name].probability[0].float(), chance, rtol=0, atol=1e-3)


def photos_of(photos: Tensor) -> Tensor:
    """As many photographs as INDICES, the first two of which are `photos`."""
    return torch.cat([photos, photos, photos, photos])[: len(INDICES)]


@pytest.mark.parametrize(
    ("name", "layer", "axis"),
    [
        ("convnext_atto", "stages.1.blocks.0.mlp.act", -3),
        ("test_convnext3", "stages.1.blocks.0.mlp.act", -1),
        ("swin_tiny_patch4_window7_224", "layers.0.blocks.0.mlp.act", -1),
    ],
)
def test_spatial_means_run_along_the_positions(name: str, layer: str, axis: int) -> None:
    options = {
        "img_size": 56,
        "window_size": 7,
        "embed_dim": 24,
        "num_heads": (2, 2, 2, 2),
        "depths": (1, 1, 1, 1),
    }
    model = timm.create_model(name, num_classes=3, **(options if "swin" in name else {})).eval()
    images = torch.randn(2, 3, 56, 56)
    outputs = []
    recorded = record(model, [layer], images)[layer]
    handle = model.get_submodule(layer).register_forward_hook(lambda *call: outputs.append(call[-1]))
    with torch.inference_mode():
        model(images)
    handle.remove()
    torch.testing.assert_close(recorded.response, outputs[0].movedim(axis, -1).flatten(1, -2).mean(1))


def layer_of(model: nn.Module, layer: str, images: Tensor) -> Tensor:
    outputs: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda *call: outputs.append(call[-1]))
    with torch.inference_mode():
        model.eval()(images)
    handle.remove()
    return outputs[0]


TOKENS = [
    ("vit_tiny_patch16_224", {}, "blocks.0.norm1", 1, 0),
    ("vit_tiny_patch16_224", {"reg_tokens": 4}, "blocks.0.norm1", 5, 0),
    (
        "vit_tiny_patch16_224",
        {"reg_tokens": 4, "class_token": False, "global_pool": "avg"},
        "blocks.0.norm1",
        4,
        None,
    ),
    ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}, "blocks.0.norm1", 0, None),
    ("vit_tiny_patch16_224", {"global_pool": "avg"}, "blocks.0.norm1", 1, None),
    ("deit_tiny_distilled_patch16_224", {}, "blocks.0.norm1", 2, 0),
    ("beit_base_patch16_224", {}, "blocks.0.norm1", 1, None),
]


@pytest.mark.parametrize(("name", "options", "layer", "prefix", "token"), TOKENS)
def test_the_class_token_is_read_where_the_network_classifies_by_it(
    name: str, options: dict[str, Any], layer: str, prefix: int, token: int | None, images: Tensor
) -> None:
    model = spread(timm.create_model(name, **{**TINY, **options}))
    output = layer_of(model, layer, images)
    assert output.shape[1] == 16 + prefix
    patches = output[:, prefix:].mean(1)
    recorded = record(model, [layer, "patch_embed"], images)
    torch.testing.assert_close(recorded[layer].response, patches if token is None else output[:, token])
    torch.testing.assert_close(
        recorded["patch_embed"].response, layer_of(model, "patch_embed", images).mean(1)
    )
    torch.testing.assert_close(record(model, [layer], images, tokens="patches")[layer].response, patches)


def test_torchvision_has_its_class_token_first() -> None:
    model = torchvision.models.VisionTransformer(32, 8, 1, 2, 24, 48, num_classes=3)
    images = torch.randn(2, 3, 32, 32)
    layers = ["encoder.layers.encoder_layer_0.mlp.1", "conv_proj"]
    recorded = record(model, layers, images)
    torch.testing.assert_close(recorded[layers[0]].response, layer_of(model, layers[0], images)[:, 0])
    torch.testing.assert_close(
        recorded["conv_proj"].response, layer_of(model, "conv_proj", images).mean((2, 3))
    )


def test_a_class_token_that_enters_late_is_read_where_it_is() -> None:
    model = timm.create_model("cait_xxs24_224", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2)
    images = torch.randn(2, 3, 32, 32)
    layers = ["blocks.0.norm1", "blocks_token_only.0.norm1", "blocks_token_only.0.mlp.fc1"]
    recorded = record(model, layers, images)
    before, inside, alone = (layer_of(model, layer, images) for layer in layers)
    torch.testing.assert_close(recorded[layers[0]].response, before.mean(1))
    torch.testing.assert_close(recorded[layers[1]].response, inside[:, 0])
    torch.testing.assert_close(recorded[layers[2]].response, alone[:, 0])


class Twice(nn.Module):
    """One LWTA called twice, over the patches of an image as further rows."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)
        self.lwta = LWTA(U)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.mix(x.flatten(0, 1))
        x = (self.lwta(rows) + rows).unflatten(0, x.shape[:2])
        return self.head(self.lwta(x).mean(1))


def test_a_competition_called_twice_draws_twice() -> None:
    model, x = Twice(), torch.randn(7, 5, 8)
    calls = traced(model, tuple(x.shape[1:]))
    recorded = record(model, ["lwta.1", "head"], x, calls=calls)
    parts = [
        record(model, ["lwta.1", "head"], x[i : i + 1], INDICES[i : i + 1], calls=calls) for i in range(7)
    ]
    for name, whole in recorded.items():
        torch.testing.assert_close(torch.cat([part[name].response for part in parts]), whole.response)
    with pytest.raises(LayerError, match="lwta.0 gives .* for 1 images: its first axis is not the images"):
        record(model, ["lwta.0"], x, calls=calls)


def test_draws_that_belong_to_no_image_are_refused() -> None:
    class Merging(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:-1])

    model, x = Merging(LWTA(U), nn.Linear(8, 2)), torch.randn(7, 8)
    calls = traced(nn.Sequential(*model), (8,))
    with pytest.raises(LayerError, match="0 has 6 rows for 7 images, but a draw belongs to one of them"):
        record(model, ["1"], x, calls=calls)


# errors ----------------------------------------------------------------------------------------------------


def test_nan_and_infinity_name_layer_and_image(cvn: nn.Module, images: Tensor) -> None:
    for value in (torch.nan, torch.inf):
        broken = images.clone()
        broken[3, 0, 0, 0] = value
        for layer in (ACT, "head"):
            with pytest.raises(
                LayerError, match=f"{layer} gives NaN or infinity for image 10 of the probe set"
            ):
                record(cvn, [layer], broken)


def test_a_layer_in_windows_is_refused() -> None:
    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=56,
        window_size=7,
        embed_dim=24,
        num_heads=(2, 2, 2, 2),
        depths=(1, 1, 1, 1),
    )
    images = torch.randn(2, 3, 56, 56)
    with pytest.raises(
        LayerError, match="attn.qkv gives .* its first axis is not the images, but windows or tokens"
    ):
        record(model, ["layers.0.blocks.0.attn.qkv"], images)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both = Both()
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.both(x)[0])


class Both(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def test_a_layer_that_gives_no_single_tensor_is_refused() -> None:
    with pytest.raises(LayerError, match="both .*Choose a layer inside it or after it"):
        record(Odd(), ["both"], torch.randn(7, 4))


@pytest.mark.parametrize(
    ("readout", "draws", "chosen"),
    [
        (None, 1, "draw"),
        (None, 4, "mean"),
        ("draw", 1, "draw"),
        ("mean", 2, "mean"),
        ("expected", 1, "expected"),
    ],
)
def test_the_readout_follows_the_draws(readout: Any, draws: int, chosen: str) -> None:
    assert resolve_readout(readout, draws) == chosen


@pytest.mark.parametrize(
    ("readout", "draws", "message"),
    [
        ("draw", 2, "readout is 'draw', which is one draw, but draws is 2. Use readout 'mean'"),
        ("mean", 1, "readout is 'mean', but draws is 1. Use 2 draws or more, or readout 'draw'"),
        (None, 0, "draws is 0, but at least one is needed"),
        ("means", 2, "Unknown readout 'means'. Did you mean 'mean'\\? Known: draw, expected, mean"),
    ],
)
def test_contradicting_options_are_refused(cvn: nn.Module, readout: Any, draws: int, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Recorder(cvn, [ACT], calls=traced(cvn), readout=readout, draws=draws)


@pytest.mark.parametrize(("option", "value"), [("pool_mode", "mean"), ("tokens", "clas"), ("amp", "fp8")])
def test_unknown_options_are_named(cvn: nn.Module, option: str, value: Any) -> None:
    with pytest.raises(UnknownNameError, match=f"Unknown {option} '{value}'"):
        Recorder(cvn, [ACT], calls=traced(cvn), **{option: value})
