"""Weights files of every layout in use are read; what would run code is not; a misfit changes nothing."""

from __future__ import annotations

import argparse
import os
import pickle
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from clip_dissect_cvn.checkpoints import load_checkpoint_, read_state_dict
from clip_dissect_cvn.errors import CheckpointError, CVNError


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def random_state() -> dict[str, Tensor]:
    return {name: torch.rand_like(tensor.float()) for name, tensor in small().state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def discover_file(state: dict[str, Tensor]) -> dict[str, Any]:
    """Make what DISCOVER's and DeiT's training scripts save, with a namespace and an optimizer's state."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])
    return {
        "model": state,
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "epoch": 299,
        "args": argparse.Namespace(
            model="deit", lr=5e-4, betas=[0.9, 0.99], nested=argparse.Namespace(a=None)
        ),
        "best_acc1": np.float64(71.1),
        "best_epoch": np.int64(298),
    }


LAYOUTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "bare": dict,
    "discover": discover_file,
    "places": lambda state: {"epoch": 90, "arch": "resnet18", "state_dict": prefixed(state, "module.")},
    "averaged beside": lambda state: {"model_ema": prefixed(state, "x."), "model": state},
    "averaged only": lambda state: {"state_dict": None, "state_dict_ema": state, "epoch": 1},
    "nested": lambda state: {"state_dict": {"model": state, "step": 3}},
    "parameters": lambda state: {name: nn.Parameter(tensor) for name, tensor in state.items()},
}


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_reads_every_layout(tmp_path: Path, layout: str, zipped: bool) -> None:
    state = random_state()
    torch.save(LAYOUTS[layout](state), tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    assert_same(read_state_dict(tmp_path / "w.pth"), state)


def test_reads_scalars_of_the_other_numpy(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    state = {"a": torch.ones(2)}
    torch.save({"model": state, "best": np.float32(1)}, path, _use_new_zipfile_serialization=False)
    names = [b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"]
    mine, other = names if names[0] in path.read_bytes() else reversed(names)
    assert mine in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(mine, other))
    assert_same(read_state_dict(path), state)


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin"])
def test_reads_safetensors_by_name_and_by_content(tmp_path: Path, name: str) -> None:
    state = random_state()
    save_file(state, tmp_path / name)
    assert_same(read_state_dict(tmp_path / name), state)


def test_reads_an_old_pickle_protocol(tmp_path: Path) -> None:
    path = tmp_path / "w.pth.tar"
    torch.save({"state_dict": {"a.weight": torch.ones(2)}}, path, pickle_protocol=2)
    assert list(read_state_dict(path)) == ["a.weight"]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(["module.", "_orig_mod."]), max_size=4))
def test_strips_wrappers_in_any_order(wrappers: list[str]) -> None:
    state = {"module_list.0.weight": torch.ones(2), "a_orig_mod.b": torch.zeros(1)}
    with tempfile.TemporaryDirectory() as folder:
        save_file(prefixed(state, "".join(wrappers)), Path(folder) / "w.safetensors")
        assert_same(read_state_dict(Path(folder) / "w.safetensors"), state)


def test_strips_the_wrapper_of_a_compiled_part(tmp_path: Path) -> None:
    save_file({"blocks.0._orig_mod.mlp": torch.ones(1), "head": torch.ones(1)}, tmp_path / "w.safetensors")
    assert list(read_state_dict(tmp_path / "w.safetensors")) == ["blocks.0.mlp", "head"]


class Canary:
    """Pickles as a call that creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_a_malicious_file_runs_nothing_and_is_named(tmp_path: Path, zipped: bool) -> None:
    path, canary = tmp_path / "w.pth", tmp_path / "canary"
    holding = {"model": random_state(), "args": Canary(canary)}
    torch.save(holding, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError) as caught:
        read_state_dict(path)
    assert not canary.exists()
    assert str(caught.value) == (
        f"The checkpoint {path} refers to {os.name}.system, and only tensors and plain data are read, "
        "because a pickle can run any code. If you trust it, convert it once where its own code is "
        "installed: torch.save(model.state_dict(), 'weights.pt')."
    )


@pytest.mark.parametrize("protocol", range(6))
def test_a_bare_malicious_pickle_runs_nothing(tmp_path: Path, protocol: int) -> None:
    path, canary = tmp_path / "w.pkl", tmp_path / "canary"
    path.write_bytes(pickle.dumps(Canary(canary), protocol=protocol))
    with pytest.raises(CheckpointError, match=str(path)):
        read_state_dict(path)
    assert not canary.exists()


def test_allowing_a_namespace_is_over_after_reading(tmp_path: Path) -> None:
    torch.save(discover_file(random_state()), tmp_path / "w.pth")
    read_state_dict(tmp_path / "w.pth")
    with pytest.raises(pickle.UnpicklingError, match="Namespace"):
        torch.load(tmp_path / "w.pth", weights_only=True)


def test_a_pickled_network_is_refused_by_its_class(tmp_path: Path) -> None:
    torch.save(small(), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"refers to torch\.nn\.modules.*convert it once"):
        read_state_dict(tmp_path / "w.pth")


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def truncated_zip(path: Path) -> None:
    torch.save(random_state(), path)
    half(path)


def truncated_old(path: Path) -> None:
    torch.save(random_state(), path, _use_new_zipfile_serialization=False)
    half(path)


def truncated_safetensors(path: Path) -> None:
    save_file(random_state(), path)
    half(path)


def other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<w/>")


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "does not exist. Check the path."),
    "empty": (lambda path: path.write_bytes(b""), "is empty. Copy or download it again."),
    "truncated zip": (truncated_zip, "is cut short, damaged"),
    "truncated old": (truncated_old, "is cut short, damaged"),
    "truncated safetensors": (truncated_safetensors, "is cut short, damaged"),
    "web page": (lambda path: path.write_text("<!DOCTYPE html><html>"), "begins with b'<!DOCTYPE html><'"),
    "LFS pointer": (
        lambda path: path.write_text("version https://git-lfs"),
        "begins with b'version https://'",
    ),
    "a few bytes": (lambda path: path.write_bytes(b"\x80\x02"), "is cut short, damaged"),
    "another zip": (other_zip, "is cut short, damaged"),
    "a list": (lambda path: torch.save([torch.ones(1)], path), "holds no state dict: it has a list."),
    "a tensor": (lambda path: torch.save(torch.ones(1), path), "holds no state dict: it has a Tensor."),
    "no weights": (lambda path: torch.save({"epoch": 1, "model": {}}, path), "it has the keys epoch, model."),
    "nothing": (lambda path: torch.save({}, path), "holds no state dict: it has no keys."),
}


@pytest.mark.parametrize("bad", BAD_FILES)
def test_names_the_file_and_what_is_wrong(tmp_path: Path, bad: str) -> None:
    make, expected = BAD_FILES[bad]
    path = tmp_path / "w.pth"
    make(path)
    with pytest.raises(CheckpointError) as caught:
        read_state_dict(path)
    assert str(caught.value).startswith(f"The checkpoint {path} ")
    assert expected in str(caught.value)
    assert isinstance(caught.value, CVNError)


def test_a_folder_lists_the_weights_files_in_it(tmp_path: Path) -> None:
    for name in ("b.pth", "a.safetensors", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        read_state_dict(tmp_path)
    assert str(caught.value) == (
        f"The checkpoint {tmp_path} is a folder. Name a weights file in it (a.safetensors, b.pth)."
    )


def test_loads_into_a_network(tmp_path: Path) -> None:
    state = random_state()
    torch.save(prefixed(state, "module."), tmp_path / "w.pth")
    module = small()
    assert load_checkpoint_(module, tmp_path / "w.pth") is module
    loaded = {name: tensor.float() for name, tensor in module.state_dict().items()}
    assert_same(
        loaded, {name: state[name].to(tensor.dtype).float() for name, tensor in module.state_dict().items()}
    )


def test_a_loaded_network_does_not_depend_on_the_file(tmp_path: Path) -> None:
    torch.save(random_state(), tmp_path / "w.pth")
    module = load_checkpoint_(small(), tmp_path / "w.pth")
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    (tmp_path / "w.pth").write_bytes(b"")
    assert_same(module.state_dict(), before)


@pytest.mark.parametrize("shape_too", [False, True])
def test_a_misfit_is_listed_and_changes_nothing(tmp_path: Path, shape_too: bool) -> None:
    state = random_state()
    del state["1.weight"], state["1.bias"]
    state["head.weight"] = torch.ones(1)
    if shape_too:
        state["3.weight"] = torch.ones(10, 4)
    torch.save(state, tmp_path / "w.pth")
    module = small()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint_(module, tmp_path / "w.pth")
    shapes = "; 1 of another shape (3.weight (10, 4), in the model (2, 4))" if shape_too else ""
    assert str(caught.value) == (
        f"{tmp_path / 'w.pth'} does not fit Sequential: 2 missing (1.weight, 1.bias); "
        f"1 unexpected (head.weight){shapes}. The file has 8 tensors, the model 9: is it another "
        "architecture? Load it into the model it was saved from."
    )
    assert_same(module.state_dict(), before)


def test_lists_no_more_than_ten_of_each(tmp_path: Path) -> None:
    torch.save({f"w{i}": torch.ones(1) for i in range(30)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"30 unexpected \(w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, …\)"):
        load_checkpoint_(small(), tmp_path / "w.pth")


class Renamed(nn.Linear):
    """Reads files with its old names, as torchvision's and timm's networks do."""

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        if prefix + "old" in state:
            state[prefix + "weight"] = state.pop(prefix + "old")
        super()._load_from_state_dict(state, prefix, *rest)


def test_a_network_may_translate_old_names(tmp_path: Path) -> None:
    torch.save({"0.old": torch.full((1, 2), 7.0), "0.bias": torch.ones(1)}, tmp_path / "w.pth")
    module = nn.Sequential(Renamed(2, 1))
    load_checkpoint_(module, tmp_path / "w.pth")
    assert torch.equal(module.state_dict()["0.weight"], torch.full((1, 2), 7.0))
