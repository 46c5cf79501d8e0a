"""Activation functions that a module's own forward calls."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from clip_dissect_cvn.errors import SurgeryError
from clip_dissect_cvn.lwta import LWTA
from clip_dissect_cvn.sites import find_sites
from clip_dissect_cvn.surgery import lwta_layers, replace_activations_, restore_activations_


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.linear(x))


class Outer(nn.Module):
    """Calls relu itself, twice, and a function, a method and a module within that do so too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.inner, self.act = nn.Linear(4, 8), Inner(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.linear(x), inplace=True)
        x = self.act(self.inner(x) + 1)
        return F.gelu(torch.relu(x - 1))


def seen_by(model: nn.Module, x: Tensor) -> list[str]:
    """Run a model, and tell which of its competitions ran, in order."""
    runs: list[str] = []
    handles = [
        layer.register_forward_hook(lambda *_, name=name: runs.append(name))
        for name, layer in lwta_layers(model).items()
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return runs


NAMES = ["functional_relu.0", "inner.functional_relu", "act", "functional_relu.1", "functional_gelu"]


def test_each_call_of_a_function_is_replaced() -> None:
    model, x = Outer().eval(), torch.randn(3, 4)
    assert [site.name for site in find_sites(model)] == NAMES
    keys = list(model.state_dict())
    replace_activations_(model, 4)
    assert list(lwta_layers(model)) == NAMES and seen_by(model, x) == NAMES
    assert [path for path, module in model.named_modules() if "forward" in vars(module)] == ["", "inner"]
    assert list(model.state_dict()) == keys
    assert (model(x) != 0).sum() <= 3 * 2


def test_restoring_functions_is_exact() -> None:
    model, x = Outer().eval(), torch.randn(3, 4)
    before = [(path, dict(vars(module)), list(module._modules)) for path, module in model.named_modules()]
    expected = model(x)
    restore_activations_(replace_activations_(model, 2))
    after = [(path, dict(vars(module)), list(module._modules)) for path, module in model.named_modules()]
    assert before == after and torch.equal(model(x), expected)


@pytest.mark.parametrize("kept", ["act", "inner", "functional_relu"])
def test_functions_that_are_left_alone_stay_what_they_are(kept: str) -> None:
    """What remains within an intercepted forward is not taken for the owner's own call."""
    model, x = Outer().eval(), torch.randn(3, 4)
    replace_activations_(model, 2, where=lambda path, _: not path.startswith(kept))
    assert seen_by(model, x) == [name for name in NAMES if not name.startswith(kept)]


def test_only_the_linear_response_of_a_winner_passes() -> None:
    class One(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(F.linear(x, torch.eye(4)))

    x = torch.tensor([[-1.0, -40.0, 3.0, -40.0]])
    assert replace_activations_(One().eval(), 2, example=x)(x).tolist() == [[-1.0, 0.0, 3.0, 0.0]]


class InPlace(nn.Module):
    """Changes tensors without using what the function returns."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        x.relu_()
        F.relu(x, inplace=True)
        return x


def test_in_place_functions_change_their_argument() -> None:
    model = replace_activations_(InPlace().eval(), 2)
    assert list(lwta_layers(model)) == ["functional_relu.0", "functional_relu.1"]
    assert (model(torch.randn(5, 4)) != 0).sum() <= 5 * 4
    model.train()(torch.randn(5, 4)).sum().backward()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_intercept_for_themselves(duplicate: Any) -> None:
    model, x = replace_activations_(Outer().eval(), 2), torch.randn(3, 4)
    twin = duplicate(model)
    assert twin.forward.__self__.owner is twin
    assert seen_by(twin, x) == NAMES
    restore_activations_(twin)
    assert "forward" not in vars(twin) and seen_by(model, x) == NAMES


def test_an_aborted_pass_leaves_no_mode_and_no_pause_behind() -> None:
    model, x = replace_activations_(Outer().eval(), 2), torch.randn(3, 4)
    handle = model.inner.linear.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x)
    handle.remove()
    assert torch.equal(F.relu(-torch.ones(2)), torch.zeros(2))
    assert seen_by(model, x) == NAMES


def test_all_calls_of_a_function_or_none() -> None:
    class Half(Outer):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(torch.relu(self.linear(x)).unflatten(1, (2, 4)))

    sites = find_sites(Half())
    unknown = "which axis holds the channels is not known from what feeds it"
    assert [site.reason for site in sites][:2] == [f"as functional_relu.1: {unknown}", unknown]
    with pytest.raises(SurgeryError, match="functional_relu.1 is left alone, but functional_relu.0 is not"):
        replace_activations_(Outer(), lambda site: None if site.name == "functional_relu.1" else 2)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_module_that_runs_all_its_children_is_refused(depth: int) -> None:
    class Stack(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self:
                x = F.relu(layer(x))
            return x

    model = Stack(*(nn.Linear(4, 4) for _ in range(depth)))
    with pytest.raises(
        SurgeryError, match="Stack calls activation functions in a module that also runs all its"
    ):
        replace_activations_(model, 2)
    assert not lwta_layers(model) and list(model._modules) == [str(i) for i in range(depth)]
    assert not model._forward_pre_hooks and "forward" not in vars(model)


def test_a_forward_of_an_instance_is_kept() -> None:
    model = Inner()
    own = model.forward = lambda x: F.relu(model.linear(x)) + 1
    replace_activations_(model, 2)
    assert list(lwta_layers(model)) == ["functional_relu"] and model(torch.randn(2, 8)).shape == (2, 8)
    assert restore_activations_(model).forward is own


def test_torch_transformer_layers_call_a_function() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    replace_activations_(layer, 4, example=x)
    with torch.inference_mode():
        assert seen_by(layer, x) == ["functional_relu"]


def test_compilation_goes_through() -> None:
    if hasattr(LWTA.forward, "__wrapped__"):
        pytest.skip("dynamo does not trace jaxtyping's runtime checks")
    model, x = replace_activations_(Outer().eval(), 4), torch.randn(3, 4)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(2):
        assert (compiled(x) != 0).sum() <= 3 * 2
    torch.compiler.reset()


def test_export_goes_through() -> None:
    model, x = replace_activations_(Outer().eval(), 4), torch.randn(3, 4)
    assert (torch.export.export(model, (x,)).module()(x) != 0).sum() <= 3 * 2


@pytest.mark.parametrize(
    "build",
    [
        lambda: torchvision.models.DenseNet(4, (1, 1), 8, num_classes=3),
        lambda: nn.Sequential(torchvision.models.googlenet(num_classes=3, init_weights=False).inception3a),
    ],
)
def test_torchvision_models_with_functions(build: Any) -> None:
    model = build().eval()
    example = torch.zeros(1, 192, 7, 7) if isinstance(model, nn.Sequential) else torch.zeros(1, 3, 64, 64)
    replace_activations_(model, 2, example=example)
    assert any("functional_relu" in name for name in lwta_layers(model))
    assert seen_by(model, torch.randn_like(example)) == list(lwta_layers(model))
