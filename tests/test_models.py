"""Every name gives a network with the weights, the competition and the preprocessing that it stands for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import huggingface_hub.constants
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from clip_dissect_cvn import models, upstream
from clip_dissect_cvn.digests import digest_of, digest_of_state
from clip_dissect_cvn.errors import ArgumentError, CheckpointError, PluginError, UnknownNameError
from clip_dissect_cvn.lwta import LWTA
from clip_dissect_cvn.models import (
    TargetModel,
    default_layers,
    list_models,
    load_model,
    register_model,
    wrap_model,
)
from clip_dissect_cvn.surgery import lwta_layers, replace_activations_

DEITS = {"t": ("deit_tiny_patch16_224", (2, 8, 16, 24)), "s": ("deit_small_patch16_224", (2, 12, 16))}
CVNS = {f"cvn_deit_{size}{u}": (parent, u, 12) for size, (parent, choices) in DEITS.items() for u in choices}
CVNS |= {f"cvn_resnet18_places_{u}": ("resnet18", u, 17) for u in (2, 4, 8)}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise URLError("no network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", no_network)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget afterwards what a test registers."""
    monkeypatch.setattr(models.MODELS, "_entries", dict(models.MODELS._entries))
    yield


@pytest.fixture(scope="module")
def deit() -> TargetModel:
    return load_model("cvn_deit_t16")


def small(name: str, **options: Any) -> nn.Module:
    size = {} if "resnet" in name else {"img_size": 32}
    module: nn.Module = timm.create_model(name, num_classes=3, **size, **options).eval()
    return module


def test_both_registries_and_ours_list_the_ten() -> None:
    assert set(timm.list_models("cvn_*")) == set(CVNS)
    assert set(torchvision.models.list_models(include="cvn_*")) == set(CVNS)
    assert set(CVNS) <= set(list_models())
    assert all(timm.is_model(name) for name in CVNS)


@pytest.mark.parametrize("name", CVNS)
def test_a_cvn_is_its_parent_with_competition_in_every_hidden_layer(name: str) -> None:
    parent, competitors, count = CVNS[name]
    module = small(name)
    layers = lwta_layers(module)
    assert len(layers) == count
    assert {layer.competitors for layer in layers.values()} == {competitors}
    assert not [part for part in module.modules() if isinstance(part, nn.ReLU | nn.GELU)]
    make = torchvision.models.get_model if parent == "resnet18" else timm.create_model
    own = {key: tensor.shape for key, tensor in make(parent, num_classes=1000).state_dict().items()}
    assert module.state_dict().keys() == own.keys()
    assert module(torch.randn(2, 3, 32, 32)).shape == (2, 3)


def test_torchvision_builds_the_same_network() -> None:
    module = torchvision.models.get_model("cvn_deit_t8", num_classes=3, img_size=32)
    assert module.state_dict().keys() == small("cvn_deit_t8").state_dict().keys()
    assert {layer.competitors for layer in lwta_layers(module).values()} == {8}
    places = torchvision.models.get_model("cvn_resnet18_places_8", weights=None)
    assert isinstance(places, torchvision.models.ResNet)
    assert places.fc.out_features == 365


def test_the_parents_options_pass_through() -> None:
    module: Any = small("cvn_deit_t2", drop_path_rate=0.3)
    assert module.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)
    assert module.pretrained_cfg["architecture"] == "cvn_deit_t2"
    places: Any = small("cvn_resnet18_places_2", zero_init_residual=True)
    assert not places.layer1[0].bn2.weight.any()
    with pytest.raises(TypeError, match="no_such_option"):
        small("cvn_resnet18_places_2", no_such_option=1)


def test_a_backbone_of_features_competes_too() -> None:
    module = small("cvn_deit_t24", features_only=True, out_indices=(1, 2))
    assert {layer.competitors for layer in lwta_layers(module).values()} == {24}
    assert [tuple(found.shape) for found in module(torch.zeros(1, 3, 32, 32))] == [(1, 192, 2, 2)] * 2


def test_timm_knows_that_no_cvn_has_published_weights() -> None:
    assert not timm.list_models("cvn_*", pretrained=True)
    assert load_model("timm:cvn_deit_t2").source["weights"] == "random"


def test_every_upstream_name_can_be_planned() -> None:
    for name in upstream.torchvision_names():
        assert callable(upstream.from_torchvision(name).build)
    assert sum(upstream.from_timm(name).pretrained for name in timm.list_models()) > 500


def test_timm_loads_a_checkpoint_into_a_cvn(tmp_path: Path) -> None:
    parent = timm.create_model("deit_tiny_patch16_224", num_classes=3, img_size=32)
    save_file(parent.state_dict(), tmp_path / "w.safetensors")
    module = small("cvn_deit_t16", checkpoint_path=tmp_path / "w.safetensors")
    assert digest_of_state(module.state_dict()) == digest_of_state(parent.state_dict())


def test_random_weights_are_the_seeds_and_nobody_elses(deit: TargetModel) -> None:
    torch.rand(1)
    state = torch.get_rng_state()
    again = load_model("cvn_deit_t16")
    assert torch.equal(torch.get_rng_state(), state)
    assert digest_of_state(again.module) == digest_of_state(deit.module)
    assert digest_of_state(load_model("cvn_deit_t16", seed=1).module) != digest_of_state(deit.module)
    assert deit.source["weights"] == "random"


@pytest.mark.parametrize(
    ("name", "size"), [("cvn_deit_t16", 224), ("cvn_resnet18_places_4", 224), ("timm:test_vit", 160)]
)
def test_brings_its_preprocessing(name: str, size: int) -> None:
    target = load_model(name, pretrained=False)
    tensor = target.preprocess(Image.new("RGB", (300, 200), (255, 0, 0)))
    assert tensor.shape == (3, size, size)
    if name != "timm:test_vit":
        expected = torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225])
        assert torch.allclose(tensor.mean(dim=(1, 2)), expected, atol=1e-4)
    assert not target.module.training


def test_preprocessing_follows_the_size_that_a_network_was_built_for() -> None:
    target = wrap_model(small("cvn_deit_t2"))
    assert target.preprocess(Image.new("RGB", (64, 64))).shape == (3, 32, 32)


def test_a_bare_name_is_ours_then_torchvisions_then_timms() -> None:
    assert isinstance(load_model("resnet18", pretrained=False).module, torchvision.models.ResNet)
    assert isinstance(load_model("torchvision:resnet18", pretrained=False).module, torchvision.models.ResNet)
    assert isinstance(load_model("timm:resnet18", pretrained=False).module, timm.models.ResNet)
    assert isinstance(
        load_model("test_vit.r160_in1k", pretrained=False).module, timm.models.VisionTransformer
    )
    assert load_model("resnet18_places").source["weights"] == "random"


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_that_warn_about_their_initialisation_do_not(name: str) -> None:
    assert load_model(name, pretrained=False).source["weights"] == "random"


def test_competitors_patch_an_upstream_network() -> None:
    target = load_model("timm:test_vit", pretrained=False, competitors=4)
    assert {layer.competitors for layer in lwta_layers(target.module).values()} == {4}
    assert target.source["competitors"] == 4
    plain = load_model("timm:test_vit", pretrained=False)
    assert plain.source["competitors"] is None
    assert digest_of_state(plain.module) == digest_of_state(target.module)
    assert plain.digest != target.digest


def test_competitors_may_repeat_a_name_but_not_contradict_it() -> None:
    assert load_model("cvn_deit_t16", competitors=16).source["competitors"] == 16
    with pytest.raises(ArgumentError) as caught:
        load_model("cvn_deit_t16", competitors=8)
    assert str(caught.value) == (
        "competitors=8 contradicts cvn_deit_t16, which competes with 16 already. "
        "Leave competitors out, or give them to deit_tiny_patch16_224."
    )


def test_the_digest_names_what_decides_the_activations(deit: TargetModel, tmp_path: Path) -> None:
    save_file(deit.module.state_dict(), tmp_path / "w.safetensors")
    same = load_model("cvn_deit_t16", checkpoint=tmp_path / "w.safetensors")
    assert same.digest == deit.digest
    assert same.source["weights"] == str(tmp_path / "w.safetensors")
    assert TargetModel("other", deit.module.train(), deit.preprocess).digest == deit.digest
    deit.module.eval()
    others = [
        TargetModel("same", deit.module, lambda image: torch.zeros(3, 224, 224)),
        load_model("cvn_deit_t8", checkpoint=tmp_path / "w.safetensors"),
        load_model("timm:deit_tiny_patch16_224", checkpoint=tmp_path / "w.safetensors"),
        load_model("cvn_deit_t16", seed=3),
    ]
    assert len({deit.digest, *(other.digest for other in others)}) == 5


def test_digests_are_the_same_in_another_process(deit: TargetModel) -> None:
    code = (
        "from clip_dissect_cvn.digests import digest_of; from clip_dissect_cvn.models import load_model;"
        "print(load_model('cvn_deit_t16').digest, digest_of({'names': {'x', 'y', 'z'}, 'rate': 0.1}))"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.split() == [deit.digest, digest_of({"rate": 0.1, "names": {"z", "y", "x"}})]


def test_a_checkpoint_decides_the_number_of_classes(tmp_path: Path) -> None:
    fine_tuned = timm.create_model("test_vit", num_classes=10)
    state = {f"module._orig_mod.{name}": tensor for name, tensor in fine_tuned.state_dict().items()}
    torch.save({"model": state, "epoch": 3}, tmp_path / "w.pth")
    target = load_model("timm:test_vit", checkpoint=tmp_path / "w.pth", competitors=4)
    assert target.module.get_submodule("head").out_features == 10  # type: ignore[attr-defined]
    assert digest_of_state(target.module.state_dict()) == digest_of_state(fine_tuned.state_dict())


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "w.pth")
    with pytest.raises(
        CheckpointError, match=r"w\.pth does not fit ResNet: 102 missing .* another architecture"
    ):
        load_model("cvn_resnet18_places_2", checkpoint=tmp_path / "w.pth")


def test_a_checkpoint_and_pretrained_contradict() -> None:
    with pytest.raises(ArgumentError) as caught:
        load_model("resnet18", pretrained=True, checkpoint="w.pth")
    assert str(caught.value) == (
        "pretrained=True and checkpoint='w.pth' both give weights. Leave one of them out."
    )


def hub_weights(monkeypatch: pytest.MonkeyPatch, state: dict[str, Tensor]) -> None:
    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", lambda *_, **__: dict(state))
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *_, **__: dict(state))


def test_pretrained_converts_the_parents_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    state = timm.create_model("deit_tiny_patch16_224").state_dict()
    hub_weights(monkeypatch, state)
    target = load_model("cvn_deit_t16", pretrained=True)
    assert digest_of_state(target.module.state_dict()) == digest_of_state(state)
    assert target.source["weights"] == "pretrained"
    assert len(lwta_layers(target.module)) == 12


@pytest.mark.parametrize(("name", "upstream"), [("resnet18", torchvision), ("timm:test_vit", timm)])
def test_an_upstream_name_is_pretrained_unless_told(
    monkeypatch: pytest.MonkeyPatch, name: str, upstream: Any
) -> None:
    make = torchvision.models.get_model if upstream is torchvision else timm.create_model
    state = make(name.removeprefix("timm:")).state_dict()
    hub_weights(monkeypatch, state)
    target = load_model(name)
    assert digest_of_state(target.module.state_dict()) == digest_of_state(state)
    assert target.source["weights"] == "pretrained"
    assert load_model(name, pretrained=False).source["weights"] == "random"


@pytest.mark.parametrize(
    ("name", "options"),
    [("resnet18", {}), ("timm:test_vit", {}), ("cvn_deit_t2", {"pretrained": True})],
)
@pytest.mark.usefixtures("offline")
def test_offline_says_what_to_do(name: str, options: dict[str, bool]) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_model(name, **options)
    assert str(caught.value).startswith(
        f"The pretrained weights of {name.removeprefix('timm:')} cannot be had ("
    )
    assert str(caught.value).endswith(
        "Give a file with checkpoint=FILE (--checkpoint FILE), or take random weights with pretrained=False "
        "(--no-pretrained)."
    )


def test_places_has_no_weights_to_fetch() -> None:
    with pytest.raises(CheckpointError) as caught:
        load_model("cvn_resnet18_places_2", pretrained=True)
    assert str(caught.value) == (
        "cvn_resnet18_places_2 has no weights on a hub. Give a file as checkpoint (--checkpoint FILE): "
        "CLIP-Dissect's resnet18_places365.pth.tar, or your own."
    )


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("cvn_diet_t16", "cvn_deit_t16"),
        ("resnet81", "resnet18"),
        ("timm:resnet50.a1_in2k", "timm:resnet50.a1_in1k"),
        ("torchvision:resnet5", "torchvision:resnet50"),
        ("CVN_DEIT_T16", None),
    ],
)
def test_an_unknown_name_is_met_with_the_nearest(name: str, meant: str | None) -> None:
    with pytest.raises(UnknownNameError) as caught:
        load_model(name)
    assert str(caught.value).startswith(f"Unknown model {name!r}.")
    assert meant is None or f"Did you mean {meant!r}?" in str(caught.value)
    assert "cvn_deit_t16" in str(caught.value)
    assert "any timm or torchvision classification model works besides, with competitors=U" in str(
        caught.value
    )


def to_tensor(image: Image.Image) -> Tensor:
    return torch.zeros(3, 8, 8)


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("kind", ["pair", "target", "module"])
def test_a_model_of_ones_own(kind: str) -> None:
    @register_model("mine")
    def mine(*, pretrained: bool = True, **kwargs: Any) -> Any:
        module = net()
        with_cfg: Any = timm.create_model("test_vit", **kwargs)
        return {
            "pair": (module, to_tensor),
            "target": TargetModel("mine", module, to_tensor, {"weights": "shipped"}),
            "module": with_cfg,
        }[kind]

    target = load_model("mine")
    assert "mine" in list_models()
    assert target.preprocess(Image.new("RGB", (9, 9))).shape[0] == 3
    assert target.source["weights"] == ("shipped" if kind == "target" else "pretrained")
    assert load_model("mine", competitors=2).source["competitors"] == 2


@pytest.mark.usefixtures("registry")
def test_registration_refuses_what_would_fail_later() -> None:
    with pytest.raises(ArgumentError, match="'cvn_deit_t16' is already registered"):
        register_model("cvn_deit_t16")(lambda **kwargs: net())
    with pytest.raises(
        ArgumentError, match=r"'mine' is built by .*Write it as a function f\(\*, pretrained=False"
    ):
        register_model("mine")(net)
    register_model("odd")(lambda **kwargs: 3)
    with pytest.raises(PluginError, match="'odd' was built as int. Return a module"):
        load_model("odd")


@pytest.mark.usefixtures("registry")
def test_a_builder_of_one_number_of_classes_lists_the_misfit(tmp_path: Path) -> None:
    register_model("mine")(lambda *, pretrained=False: (net(), to_tensor))
    state = net().state_dict()
    state["4.weight"], state["4.bias"] = torch.ones(7, 4), torch.ones(7)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(
        CheckpointError, match=r"2 of another shape \(4\.weight \(7, 4\), in the model \(2, 4\)"
    ):
        load_model("mine", checkpoint=tmp_path / "w.pth")


def test_wrapping_leaves_a_network_as_it_is() -> None:
    module = net().train()
    target = wrap_model(module, preprocess=to_tensor, name="mine")
    assert target.module is module
    assert module.training
    assert target.source == {"name": "mine", "competitors": None, "weights": "given"}


def test_wrapping_needs_a_preprocessing() -> None:
    with pytest.raises(ArgumentError) as caught:
        wrap_model(net())
    assert str(caught.value) == (
        "Sequential does not say how its images are prepared. Pass preprocess, a function from a PIL image "
        "to a (channels, height, width) tensor."
    )


def test_default_layers_are_the_last_hidden_one_and_the_head(deit: TargetModel) -> None:
    assert default_layers(deit.module) == ["blocks.11.mlp.act", "head"]
    assert default_layers(timm.create_model("test_vit")) == ["blocks.5.mlp.act", "head"]
    assert default_layers(timm.create_model("test_vit", num_classes=0)) == ["blocks.5.mlp.act"]
    assert default_layers(torchvision.models.squeezenet1_1()) == ["classifier.2"]
    assert default_layers(nn.Sequential(nn.Flatten(), nn.Linear(12, 2))) == ["1"]


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        return torch.relu(self.conv(images))


def test_default_layers_where_the_activation_is_a_function() -> None:
    module = nn.Sequential(Functional(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    assert default_layers(module) == ["0", "3"]


def test_default_layers_of_a_network_without_any() -> None:
    with pytest.raises(ArgumentError) as caught:
        default_layers(nn.Sequential(nn.Conv2d(3, 4, 1)))
    assert str(caught.value) == (
        "Sequential has no hidden activation and no linear head that can be told from its modules. "
        "Name the layers to dissect."
    )


def test_default_layers_of_a_network_that_calls_one_relu_twice() -> None:
    module = torchvision.models.resnet18(num_classes=4)
    assert default_layers(module) == ["layer4.1.relu.1", "fc"]
    replace_activations_(module, 4)
    assert default_layers(module) == ["layer4.1.relu.1", "fc"]
    assert isinstance(module.get_submodule("layer4.1.relu.1"), LWTA)
