from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from clip_dissect_cvn.channel_axis import reshaped
from clip_dissect_cvn.errors import SurgeryError
from clip_dissect_cvn.sites import Site, default_example, find_sites, trace

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


def sites_of(name: str, **options: Any) -> dict[str, Site]:
    model = timm.create_model(name, **options)
    return {site.name: site for site in find_sites(model)}


def competing(sites: dict[str, Site]) -> dict[str, tuple[int | None, int | None]]:
    return {name: (site.channels, site.axis) for name, site in sites.items() if not site.reason}


# families --------------------------------------------------------------------------------------------------


def test_a_vit_has_one_site_in_every_mlp() -> None:
    assert competing(sites_of("vit_tiny_patch16_224", **VIT)) == {
        "blocks.0.mlp.act": (96, -1),
        "blocks.1.mlp.act": (96, -1),
    }


def test_a_swin_sees_channels_last() -> None:
    options = {"img_size": 56, "window_size": 7, "depths": (2, 1), "num_heads": (2, 2)}
    found = competing(sites_of("swin_tiny_patch4_window7_224", embed_dim=24, **options))
    assert found["layers.0.blocks.1.mlp.act"] == (96, -1)
    assert {axis for _, axis in found.values()} == {-1} and len(found) == 3


def test_position_mlps_are_not_hidden_layers() -> None:
    options = {"img_size": 32, "window_size": 8, "depths": (1, 1), "num_heads": (2, 2)}
    sites = sites_of("swinv2_tiny_window8_256", embed_dim=24, **options)
    position = [site for name, site in sites.items() if "cpb_mlp" in name]
    assert len(position) == 2 and not any(site.hidden for site in position)
    assert {site.reason for site in position} == {"not computed from the image, such as a position embedding"}
    assert len(competing(sites)) == 2


@pytest.mark.parametrize(("name", "axis"), [("convnext_tiny", -1), ("convnext_atto", -3)])
def test_convnext_mlps_are_dense_or_convolutional(name: str, axis: int) -> None:
    found = competing(sites_of(name, depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)))
    assert found["stages.2.blocks.0.mlp.act"] == (96, axis)
    assert len(found) == 4 and {site_axis for _, site_axis in found.values()} == {axis}


def test_a_relu_called_twice_is_two_sites() -> None:
    sites = {site.name: site for site in find_sites(torchvision.models.resnet18(num_classes=3))}
    assert len(sites) == 17 and sites["layer1.0.relu.1"].index == 1
    assert sites["layer3.0.relu.0"].channels == 256 and {site.axis for site in sites.values()} == {-3}
    assert list(sites)[:3] == ["relu", "layer1.0.relu.0", "layer1.0.relu.1"]


def test_timm_resnets_have_a_module_for_every_call() -> None:
    found = competing(sites_of("resnet18"))
    assert len(found) == 17 and found["layer4.1.act2"] == (512, -3)


def test_squeeze_excite_gates_are_left_alone() -> None:
    sites = sites_of("mobilenetv3_small_050")  # the only one of the family that is small
    assert sites["blocks.0.0.se.act1"].reason == "part of a squeeze-excite gate, pooled and multiplied"
    assert sites["blocks.0.0.se.gate"].reason == "a gate, not a hidden layer"
    assert sites["act2"] == Site("act2", "Hardswish", 1024, -3)
    assert sites["bn1.act"].kind == "Hardswish" and not sites["bn1.act"].reason


def test_norm_act_layers_give_their_activation() -> None:
    sites = sites_of("test_efficientnet")
    assert sites["bn1.act"].kind == "SiLU" and {axis for _, axis in competing(sites).values()} == {-3}
    assert any("squeeze-excite" in site.reason for site in sites.values())


def test_a_gate_is_known_by_its_flow_whatever_its_class() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
            self.narrow, self.act, self.wide = nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8)
            self.head = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            gate = self.wide(self.act(self.narrow(x.mean((2, 3)))))
            x = x * gate.sigmoid()[:, :, None, None]
            return self.head(x.mean((2, 3)))

    sites = {site.name: site for site in find_sites(Gated())}
    assert sites["act"].reason == "part of a squeeze-excite gate, pooled and multiplied"
    assert not sites["stem.1"].reason and not sites["head.1"].reason


def test_functions_in_a_forward_are_sites() -> None:
    sites = {site.name: site for site in find_sites(torchvision.models.DenseNet(4, (1, 1), 8, num_classes=3))}
    last = sites["functional_relu"]
    assert last.function and (last.channels, last.axis) == (10, -3) and not last.reason
    assert sites["features.denseblock1.denselayer1.relu1"].channels == 8


# how the axis is followed ----------------------------------------------------------------------------------


class Toy(nn.Module):
    """A convolution, something that moves axes, an activation."""

    def __init__(self, move: Any) -> None:
        super().__init__()
        self.conv, self.act, self.move = nn.Conv2d(3, 12, 3, padding=1), nn.GELU(), move
        self.linear = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.move(self.conv(x)))


def assigned(x: Tensor) -> Tensor:
    larger = x.new_zeros(2, 12, 8, 8)
    larger[..., 1:7, 1:7] = x
    return larger


MOVES = {
    "nothing": (lambda x: x, -3),
    "permute": (lambda x: x.permute(0, 2, 3, 1), -1),
    "transposes": (lambda x: x.transpose(1, 2).transpose(-2, -1).transpose(-1, 1), -3),
    "movedim": (lambda x: torch.movedim(x, 1, -1), -1),
    "flatten": (lambda x: x.flatten(2), -2),
    "tokens": (lambda x: x.flatten(2).mT, -1),
    "view": (lambda x: x.view(2, 12, 36), -2),
    "split and merged": (lambda x: x.view(2, 3, 4, 6, 6).transpose(1, 2).reshape(2, 12, 6, 6), -3),
    "first part": (lambda x: x.chunk(2, 1)[0], -3),
    "one row": (lambda x: x[:, :, 0], -2),
    "pixel": (lambda x: x[..., 0, 0], -1),
    "strided": (lambda x: x[:, ::2, ::3, None], -4),
    "unbound": (lambda x: x.unbind(2)[1], -2),
    "picked": (lambda x: x[:, torch.tensor([1, 5])], -3),
    "concatenated": (lambda x: torch.cat([x, x * 2], 1), -3),
    "stacked": (lambda x: torch.stack([x, x], 2), -4),
    "stacked and summed": (lambda x: torch.stack([x, x], 1).sum(1), -3),
    "pooled": (lambda x: F.max_pool2d(x, 2), -3),
    "averaged": (lambda x: x.mean((2, 3)), -1),
    "averaged, kept": (lambda x: x.mean((2, 3), keepdim=True), -3),
    "padded": (lambda x: F.pad(x, (1, 1, 1, 1)), -3),
    "rolled": (lambda x: torch.roll(x, (2, 1), dims=(2, 3)), -3),
    "scaled": (lambda x: x * torch.ones(1, 12, 1, 1) + 1, -3),
    "mixed": (lambda x: x.permute(0, 2, 3, 1) @ torch.ones(12, 8), -1),
    "tokens mixed": (lambda x: torch.ones(7, 36) @ x.flatten(2).mT, -1),
    "attended": (lambda x: F.scaled_dot_product_attention(*[x.flatten(2).mT] * 3), -1),
    "normed by batch": (lambda x: F.batch_norm(x, torch.zeros(12), torch.ones(12)), -3),
    "interpolated": (lambda x: F.interpolate(x, scale_factor=2.0), -3),
    "in place": (lambda x: x.add_(1).mul_(2), -3),
    "assigned": (lambda x: assigned(x), -3),
}  # fmt: skip


@pytest.mark.parametrize("move", MOVES)
def test_channels_are_followed(move: str) -> None:
    (site,) = find_sites(Toy(MOVES[move][0]), torch.zeros(2, 3, 6, 6))
    assert (site.axis, site.reason) == (MOVES[move][1], "")


LOST = {
    "merged with positions": lambda x: x.flatten(1),
    "split into heads": lambda x: x.unflatten(1, (3, 4)),
    "einsum": lambda x: torch.einsum("nchw->nhwc", x),
    "averaged away": lambda x: x.mean(1),
    "products of channels": lambda x: x.flatten(2) @ x.flatten(2).mT,
}


@pytest.mark.parametrize("move", LOST)
def test_an_axis_that_is_not_known_is_not_guessed(move: str) -> None:
    (site,) = find_sites(Toy(LOST[move]), torch.zeros(2, 3, 6, 6))
    assert site.axis is None and site.channels is None and site.hidden
    assert site.reason == "which axis holds the channels is not known from what feeds it"


def slow_axes(move: Any, x: Tensor, axis: int) -> set[int]:
    """The axes along which the result changes with the channel: channel c holds the number c."""
    shape = [1] * x.ndim
    shape[axis] = x.shape[axis]
    moved = move((torch.arange(x.shape[axis]).float().view(shape) + 1).expand_as(x).clone())
    return {d - moved.ndim for d in range(moved.ndim) if not torch.equal(moved, moved.roll(1, d))}


EXACT = ["permute", "transposes", "movedim", "flatten", "tokens", "view", "first part", "one row", "pixel"]
EXACT += ["strided", "unbound", "picked", "concatenated", "stacked", "averaged", "pooled", "rolled"]


@pytest.mark.parametrize("move", EXACT)
def test_the_rules_agree_with_numbers_that_are_moved(move: str) -> None:
    assert slow_axes(MOVES[move][0], torch.zeros(2, 12, 6, 6), 1) == {MOVES[move][1]}


@given(st.lists(st.integers(2, 4), min_size=2, max_size=4), st.data())
def test_a_reshape_is_followed_as_numbers_are(shape: list[int], data: Any) -> None:
    """Split and merge neighbours at random: the law is that of `slow_axes`."""
    axis = data.draw(st.integers(0, len(shape) - 1))
    cut = data.draw(st.integers(0, len(shape) - 2))
    merged = [*shape[:cut], shape[cut] * shape[cut + 1], *shape[cut + 2 :]]
    for before, after in ((shape, merged), (merged, shape)):
        if axis >= len(before):
            continue
        found = reshaped(frozenset({axis - len(before)}), before, after)
        moved = slow_axes(lambda x, after=after: x.reshape(after), torch.zeros(before), axis)
        assert found is None or found == moved


def test_rank_does_not_decide() -> None:
    """The same shape, with channels at different ends."""
    example = torch.zeros(2, 3, 12, 12)
    first, last = Toy(lambda x: x), Toy(lambda x: x.permute(0, 2, 3, 1))
    assert [site.axis for model in (first, last) for site in find_sites(model, example)] == [-3, -1]


def test_a_linear_layer_makes_channels_of_whatever_it_is_given() -> None:
    class Mixer(Toy):
        def forward(self, x: Tensor) -> Tensor:
            return self.act(nn.functional.linear(self.conv(x), torch.ones(5, 6)))

    (site,) = find_sites(Mixer(None), torch.zeros(2, 3, 6, 6))
    assert (site.channels, site.axis) == (5, -1)


# what is left alone, and the dry run -----------------------------------------------------------------------


def test_reasons() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.PReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    model.add_module("spare", nn.Identity())
    model.spare.act = nn.ReLU()
    assert {site.name: site.reason for site in find_sites(model)} == {
        "1": "has parameters, which the state dict would lose",
        "3": "a gate, not a hidden layer",
        "spare.act": "never called in eval mode",
    }


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        (timm.layers.GlobalContext(8, fuse_add=True), "part of GlobalContext, an attention gate"),
        (timm.layers.SEModule(8), "part of a squeeze-excite gate, pooled and multiplied"),
        (timm.models.metaformer.StarReLU(), "part of StarReLU, an activation with parameters"),
        (
            timm.models.efficientvit_mit.LiteMLA(8, 8, dim=4),
            "part of LiteMLA, the kernel of a linear attention",
        ),
    ],
)
def test_families_in_which_nothing_is_a_hidden_layer(family: nn.Module, reason: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), family, nn.ReLU())
    *inner, last = (site for site in find_sites(model, torch.zeros(1, 3, 32, 32)) if site.kind == "ReLU")
    assert {site.reason for site in inner} == {reason}
    assert not last.reason and last.axis == -3


def test_the_table() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LeakyReLU(), nn.Conv2d(8, 2, 3), nn.Sigmoid())
    assert str(find_sites(model)).splitlines() == [
        "site  kind       channels  axis",
        "1     LeakyReLU  8         -3    competes",
        "3     Sigmoid    2         -3    a gate, not a hidden layer",
    ]


def test_a_subclass_is_known_by_its_parent() -> None:
    class Special(nn.ReLU):
        pass

    (site,) = find_sites(nn.Sequential(nn.Linear(4, 8), Special()))
    assert site.kind == "ReLU" and not site.reason


class Keeper(nn.Module):
    """Keeps its output, has a buffer that it counts in, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(4, 8), nn.ReLU()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.act(self.linear(x)) + torch.rand(8)
        self.count += 1
        return self.kept


def test_a_dry_run_leaves_no_trace() -> None:
    model = Keeper().train()
    before, state = dict(model.__dict__), torch.get_rng_state()
    find_sites(model, torch.zeros(2, 4))
    assert model.__dict__ == before and model.training and model.act.training and model.count == 0
    assert torch.equal(torch.get_rng_state(), state) and not model.act._forward_hooks


def test_a_model_that_needs_numbers_runs_on_real_ones(capfd: pytest.CaptureFixture[str]) -> None:
    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.act = nn.Linear(4, 8), nn.ReLU()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            x = self.linear(x)
            self.count += 1
            return self.act(x) if float(x.abs().sum()) >= 0 else x

    model = Looking()
    (site,) = find_sites(model, torch.zeros(2, 4))
    assert site.channels == 8 and not site.reason
    assert "".join(capfd.readouterr()) == "" and model.count == 0


def test_a_model_that_cannot_be_copied_runs_itself() -> None:
    model = Keeper().train()
    model.forward = lambda x, forward=model.forward: forward(x)
    (site,) = find_sites(model, torch.zeros(2, 4))
    assert site.channels == 8 and model.training and model.count == 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_calls_are_listed_in_order_with_the_axis_of_their_output() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(2))
    calls = [call for call in trace(model, torch.zeros(2, 3, 6, 6)) if not call.function]
    assert [(call.path, call.kind, call.shape, call.axis) for call in calls] == [
        ("0", "Conv2d", (2, 8, 4, 4), -3),
        ("1", "ReLU", (2, 8, 4, 4), -3),
        ("2", "Flatten", (2, 8, 16), -2),
        ("", "Sequential", (2, 8, 16), -2),
    ]


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Linear(7, 2), (1, 7)),
        (nn.Conv2d(1, 2, 3), (1, 1, 224, 224)),
        (timm.create_model("vit_tiny_patch16_224", **VIT), (1, 3, 32, 32)),
        (timm.create_model("test_resnet", in_chans=1), (1, 1, 160, 160)),
        (torchvision.models.VisionTransformer(32, 8, 1, 2, 24, 48), (1, 3, 32, 32)),
    ],
)
def test_the_example_follows_the_model(model: nn.Module, shape: tuple[int, ...]) -> None:
    assert default_example(model).shape == shape


def test_the_example_has_the_type_of_the_weights() -> None:
    assert default_example(nn.Linear(3, 3).bfloat16()).dtype == torch.bfloat16


def test_a_model_that_does_not_run_is_refused() -> None:
    with pytest.raises(
        SurgeryError,
        match=r"Linear does not run on an input of shape \(1, 3\): RuntimeError.* Pass example, a batch",
    ):
        find_sites(nn.Linear(4, 2), torch.zeros(1, 3))
    with pytest.raises(
        SurgeryError,
        match=r"Bilinear ran on no input of the shapes .*1, 3, 224, 224.*the first said: TypeError",
    ):
        find_sites(nn.Bilinear(2, 2, 2))
