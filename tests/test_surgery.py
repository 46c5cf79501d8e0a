from __future__ import annotations

import copy
import io
import pickle
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clip_dissect_cvn.block_sizes import divisors
from clip_dissect_cvn.errors import SurgeryError, UnknownNameError
from clip_dissect_cvn.lwta import LWTA
from clip_dissect_cvn.operation import Entry, PerCall
from clip_dissect_cvn.sites import Site, find_sites
from clip_dissect_cvn.surgery import (
    competitive,
    lwta_layers,
    replace_activations_,
    restore_activations_,
    surgery_digest_parts,
)

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 5}


def tiny_vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **VIT)


class Block(nn.Module):
    """As torchvision's BasicBlock: one ReLU, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.relu = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv2(self.relu(self.conv1(x))) + x)


def blocks() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), Block(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def inventory(model: nn.Module) -> list[Any]:
    """Everything that a module holds, by identity and in order."""
    found: list[Any] = []
    for path, module in model.named_modules():
        found.append((path, module, type(module)))
        for name, value in vars(module).items():
            found.append((path, name, list(value.items()) if isinstance(value, dict) else value))
    return found


MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": tiny_vit,
    "blocks": blocks,
    "mlp": lambda: nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 2)),
    "efficientnet": lambda: timm.create_model("test_efficientnet"),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return MODELS[request.param]()


def inputs(model: nn.Module) -> Tensor:
    if isinstance(model, nn.Sequential) and isinstance(model[0], nn.Linear):
        return torch.randn(2, 4)
    return torch.randn(2, 3, 32, 32)


# laws ------------------------------------------------------------------------------------------------------


def test_keys_weights_and_the_number_of_parameters_stay(model: nn.Module) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert replace_activations_(model, 2) is model
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_restoring_is_exact(model: nn.Module) -> None:
    x = inputs(model)
    before, expected = inventory(model.eval()), model(x)
    replace_activations_(model, 2)
    assert not torch.equal(model(x), expected)
    assert restore_activations_(model) is model
    assert inventory(model) == before
    assert torch.equal(model(x), expected)


def test_every_competition_runs_once_with_one_winner_in_each_block(model: nn.Module) -> None:
    replace_activations_(model.eval(), 4)
    runs: Counter[str] = Counter()
    for name, layer in lwta_layers(model).items():

        def check(layer: Any, h: Any, output: Tensor, name: str = name) -> None:
            runs[name] += 1
            h, y = (t.movedim(layer.dim, -1).unflatten(-1, (-1, 4)) for t in (*h, output))
            won = y != 0
            assert torch.equal(y[won], h[won])
            assert ((won.sum(-1) == 1) | (h == 0).any(-1) & ~won.any(-1)).all()

        layer.register_forward_hook(check)
    model(inputs(model))
    assert list(runs) == list(lwta_layers(model)) and set(runs.values()) == {1}


def test_modes_are_inherited_followed_and_kept() -> None:
    model = tiny_vit().train()
    model.blocks[1].eval()
    replace_activations_(model, 4)
    assert [layer.training for layer in lwta_layers(model).values()] == [True, False, True]
    model.eval()
    restore_activations_(model)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["vit", "blocks"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_are_patched_and_can_be_restored(name: str, duplicate: Any) -> None:
    model, x = MODELS[name]().eval(), torch.randn(2, 3, 32, 32)
    plain = model(x)
    twin = duplicate(replace_activations_(model, 4))
    assert lwta_layers(twin).keys() == lwta_layers(model).keys()
    assert not set(lwta_layers(twin).values()) & set(lwta_layers(model).values())
    twin(x), twin(x)
    restore_activations_(model)
    assert lwta_layers(twin) and not lwta_layers(model)
    assert torch.equal(restore_activations_(twin)(x), plain)
    assert not any(name.startswith("_lwta") for module in twin.modules() for name in vars(module))


def test_a_patched_model_can_be_saved_and_loaded() -> None:
    file = io.BytesIO()
    torch.save(replace_activations_(blocks(), 2), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    loaded(torch.randn(1, 3, 8, 8))
    assert list(lwta_layers(loaded)) == ["1.relu.0", "1.relu.1", "2.relu.0", "2.relu.1"]


@given(st.integers(2, 600))
def test_divisors_are_those_that_divide(number: int) -> None:
    assert divisors(number) == [n for n in range(2, number + 1) if number % n == 0]


@settings(deadline=None, max_examples=15)
@given(st.integers(2, 12), st.integers(1, 5))
def test_competitors_that_divide_are_taken_and_others_refused(competitors: int, blocks: int) -> None:
    channels = competitors * blocks
    model = nn.Sequential(nn.Linear(2, channels), nn.ReLU())
    replace_activations_(model, competitors, example=torch.zeros(1, 2))
    assert model[1](torch.ones(1, channels)).count_nonzero() == blocks
    restore_activations_(model)
    with pytest.raises(
        SurgeryError, match=f"1 has {channels} channels, which {channels + 1} competitors do not"
    ):
        replace_activations_(model, channels + 1, example=torch.zeros(1, 2))


# several calls ---------------------------------------------------------------------------------------------


def test_each_call_has_a_competition_of_its_own() -> None:
    model = replace_activations_(torchvision.models.resnet18(num_classes=3), 2)
    layers = lwta_layers(model)
    assert list(layers)[:4] == ["relu", "layer1.0.relu.0", "layer1.0.relu.1", "layer1.1.relu.0"]
    assert len(layers) == 17 and isinstance(model.layer1[0].relu, PerCall)
    assert model.layer1[0].relu.get_submodule("1") is layers["layer1.0.relu.1"]


def test_an_aborted_pass_does_not_shift_the_calls() -> None:
    model = replace_activations_(blocks(), 2).eval()
    runs: list[str] = []
    for name, layer in lwta_layers(model).items():
        layer.register_forward_hook(lambda *_, name=name: runs.append(name))
    handle = model[1].conv2.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(torch.randn(1, 3, 8, 8))
    handle.remove()
    assert runs == ["1.relu.0"]
    model(torch.randn(1, 3, 8, 8))
    assert runs[1:] == list(lwta_layers(model))


def test_a_part_of_a_model_runs_alone() -> None:
    model = replace_activations_(blocks(), 2)
    for _ in range(3):
        model[2](torch.randn(1, 4, 8, 8))


def test_more_calls_than_the_dry_run_saw_are_an_error() -> None:
    model = replace_activations_(blocks(), 2)
    sequence = model[1].relu
    with pytest.raises(
        SurgeryError, match="An activation was called more often than the 2 times that the dry run"
    ):
        for _ in range(3):
            sequence(torch.randn(1, 4, 8, 8))


def test_calls_may_be_chosen_one_by_one() -> None:
    model = blocks()
    relu = model[1].relu
    replace_activations_(model, {"1.relu.1": 2})
    assert list(lwta_layers(model)) == ["1.relu.1"] and model[1].relu.get_submodule("0") is relu
    model.train().eval()
    model(torch.randn(1, 3, 8, 8))
    restore_activations_(model)
    assert model[1].relu is relu


def test_calls_spread_over_a_model_are_counted_by_what_makes_them_all() -> None:
    class Shared(nn.Module):
        """One block, called twice, in which one activation is called once."""

        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(x))

    model = replace_activations_(Shared(), 2)
    assert list(lwta_layers(model)) == ["block.1.0", "block.1.1"]
    model(torch.randn(1, 4)), model(torch.randn(1, 4))


# choosing --------------------------------------------------------------------------------------------------


def test_where_narrows_the_choice() -> None:
    asked: list[tuple[str, str]] = []

    def where(path: str, module: nn.Module) -> bool:
        asked.append((path, type(module).__name__))
        return path.startswith("blocks.2")

    model = replace_activations_(tiny_vit(), 8, where=where)
    assert list(lwta_layers(model)) == ["blocks.2.mlp.act"]
    assert asked == [(f"blocks.{i}.mlp.act", "GELU") for i in range(3)]


def test_competitors_by_path_glob_or_function() -> None:
    by_glob = replace_activations_(tiny_vit(), {"blocks.1.*": 2, "blocks.?.mlp.act": 4})
    assert {name: layer.competitors for name, layer in lwta_layers(by_glob).items()} == {
        "blocks.0.mlp.act": 4, "blocks.1.mlp.act": 2, "blocks.2.mlp.act": 4,
    }  # fmt: skip

    def choose(site: Site) -> int | None:
        return None if site.path.startswith("blocks.0") else (site.channels or 0) // 2

    by_site = lwta_layers(replace_activations_(tiny_vit(), choose))
    assert [(name, layer.competitors) for name, layer in by_site.items()] == [
        ("blocks.1.mlp.act", 48),
        ("blocks.2.mlp.act", 48),
    ]


def test_the_digest_says_what_competes_where() -> None:
    model = replace_activations_(blocks(), {"1.relu.0": 4, "2.relu": 2})
    assert surgery_digest_parts(model) == {
        "1.relu.0": {"competitors": 4, "dim": -3},
        "2.relu.0": {"competitors": 2, "dim": -3},
        "2.relu.1": {"competitors": 2, "dim": -3},
    }
    assert surgery_digest_parts(restore_activations_(model)) == {}


def test_layers_are_in_order_of_execution() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.late, self.linear, self.early = nn.GELU(), nn.Linear(4, 4), nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            return self.late(self.linear(self.early(self.linear(x))))

    model = replace_activations_(Backwards(), 2)
    assert list(lwta_layers(model)) == ["early", "late"]
    assert list(lwta_layers(nn.Sequential(model))) == ["0.early", "0.late"]


def test_the_sites_of_a_patched_model() -> None:
    sites = find_sites(replace_activations_(blocks(), 2))
    assert [(site.name, site.kind, site.axis, site.reason) for site in sites][:2] == [
        ("1.relu.0", "LWTA", -3, "competes already, 2 to a block"),
        ("1.relu.1", "LWTA", -3, "competes already, 2 to a block"),
    ]


def test_channels_last_and_half_precision() -> None:
    model = replace_activations_(blocks(), 2).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).shape == (2, 4)
    model.bfloat16()(x.bfloat16())


def test_compilation_goes_through() -> None:
    if hasattr(LWTA.forward, "__wrapped__"):
        pytest.skip("dynamo does not trace jaxtyping's runtime checks")
    block = replace_activations_(blocks().eval(), 2)[1]
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    for _ in range(2):
        assert ((compiled(torch.randn(1, 4, 8, 8)) != 0).sum(1) == 2).all()
    torch.compiler.reset()


def test_export_goes_through() -> None:
    block, h = replace_activations_(blocks().eval(), 2)[1], torch.randn(1, 4, 8, 8)
    exported = torch.export.export(block, (h,)).module()
    assert ((exported(h) != 0).sum(1) == 2).all()


def test_gradients_flow() -> None:
    model = replace_activations_(blocks(), 2).train()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_transformer_layer_of_torch_does_not_take_its_fast_path() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation=nn.GELU()).eval()
    x = torch.randn(2, 5, 8)
    before, runs = inventory(layer), []
    replace_activations_(layer, 4, example=x)
    layer.activation.register_forward_hook(lambda *_: runs.append(1))
    with torch.inference_mode():
        layer(x)
        nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()(x)
    assert runs == [1, 1]
    layer.activation._forward_hooks.clear()
    restore_activations_(layer)
    assert inventory(layer) == before


# undone, whatever happens ----------------------------------------------------------------------------------


def test_competition_ends_with_its_block() -> None:
    model = tiny_vit()
    before = inventory(model)
    with competitive(model, 8) as patched:
        assert patched is model and len(lwta_layers(model)) == 3
    assert inventory(model) == before
    with pytest.raises(ZeroDivisionError), competitive(model, 8):
        raise ZeroDivisionError
    assert inventory(model) == before


@pytest.mark.parametrize("last", [0, 1, 3])
def test_a_failure_half_way_leaves_the_model_untouched(last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, attach, done = blocks(), Entry.attach, []
    before = inventory(model)

    def fails(entry: Entry) -> None:
        if len(done) == last:
            raise KeyboardInterrupt
        done.append(entry)
        attach(entry)

    monkeypatch.setattr(Entry, "attach", fails)
    with pytest.raises(KeyboardInterrupt), competitive(model, 2):
        pass
    assert len(done) == last and inventory(model) == before


@pytest.mark.parametrize("competitors", [5, {"1.relu.0": 2, "2.relu.1": 3}, lambda site: 2 / 0])
def test_a_refusal_leaves_the_model_untouched(competitors: Any) -> None:
    model = blocks()
    before = inventory(model)
    with pytest.raises((SurgeryError, ZeroDivisionError)):
        replace_activations_(model, competitors)
    assert inventory(model) == before


# errors ----------------------------------------------------------------------------------------------------


def mlp(*widths: int, act: type[nn.Module] = nn.GELU) -> nn.Module:
    layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), act())]
    return nn.Sequential(*layers)


@pytest.mark.parametrize(
    ("model", "competitors", "message"),
    [
        (mlp(4, 768), 7, "1 has 768 channels, which 7 competitors do not divide. "
         "Use one of 2, 3, 4, 6, 8, 12, 16, 24, …."),
        (mlp(4, 8, 12, 8), 5, "1 has 8 channels, which 5 competitors do not divide. Use one of 2, 4. "
         "So it is at 2 other sites."),
        (mlp(4, 8, 10), 4, "3 has 10 channels, which 4 competitors do not divide. Use one of 2, 5, 10."),
        (mlp(4, 1), 2, "1 has 1 channels, which 2 competitors do not divide. Leave it out with where=."),
        (mlp(4, 8), 1, "1 is given 1 competitors, but at least 2 have to compete. Use one of 2, 4, 8, "
         "or leave it out with where=."),
        (mlp(4, 8, act=nn.Sigmoid), 2, "Nothing to replace in Sequential. Its activations are left alone "
         "(1: a gate, not a hidden layer). Write LWTA modules into it by hand."),
        (mlp(4, 8, 8, 8, act=nn.PReLU), 2, "Nothing to replace in Sequential. Its activations are left alone "
         "(1 and 2 more: has parameters, which the state dict would lose). Write LWTA modules into it by "
         "hand."),
        (mlp(4, 8, act=nn.Identity), 2, "Nothing to replace in Sequential. It calls no known activation. "
         "Write LWTA modules into it by hand."),
        (nn.ReLU(), 2, "The model is itself an activation, ReLU, which cannot be replaced in place. "
         "Use LWTA(competitors, dim=...) instead of it."),
    ],
)  # fmt: skip
def test_messages(model: nn.Module, competitors: Any, message: str) -> None:
    with pytest.raises(SurgeryError) as raised:
        replace_activations_(model, competitors)
    assert str(raised.value) == message


def test_the_documented_message() -> None:
    model = timm.create_model("deit_tiny_patch16_224", depth=2)
    message = "blocks.0.mlp.act has 768 channels, which 7 competitors do not divide. "
    with pytest.raises(SurgeryError, match=message + "Use one of 2, 3, 4, 6, 8, 12, 16, 24, …"):
        replace_activations_(model, 7)


def test_one_activation_at_two_places_is_refused() -> None:
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act)
    with pytest.raises(SurgeryError) as raised:
        replace_activations_(model, 2)
    assert str(raised.value) == (
        "1 is one ReLU registered at 2 places, 1, 3, so its calls cannot be told apart. "
        "Give each place a module of its own, or leave it out with where=."
    )


def test_an_activation_in_a_module_that_has_two_paths_is_no_such_thing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    model.alias = model[1]
    model.forward = lambda x: model[1](model[0](x))
    assert list(lwta_layers(replace_activations_(model, 2))) == ["1.1"]


def test_patching_twice_and_restoring_nothing_are_refused() -> None:
    model = mlp(4, 8)
    with pytest.raises(
        SurgeryError, match="Sequential has no replaced activations to restore. Call replace_act"
    ):
        restore_activations_(model)
    replace_activations_(model, 2)
    for whole in (model, nn.Sequential(model)):
        with pytest.raises(
            SurgeryError, match="Sequential has replaced activations already. Call restore_act"
        ):
            replace_activations_(whole, 2)
    restore_activations_(nn.Sequential(model))
    assert isinstance(model[1], nn.GELU)


def test_a_path_that_matches_nothing_is_named() -> None:
    with pytest.raises(UnknownNameError, match="Unknown activation site '1.rely'. Did you mean '1.relu.1'"):
        replace_activations_(blocks(), {"1.rely": 2})


def test_competing_layers_of_the_users_own_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 8), LWTA(4), nn.Linear(8, 8), nn.ReLU())
    assert [layer.competitors for layer in lwta_layers(replace_activations_(model, 2)).values()] == [4, 2]
    restore_activations_(model)
    assert isinstance(model[1], LWTA) and isinstance(model[3], nn.ReLU)
