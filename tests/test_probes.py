"""Names and folders to probe sets."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset
from torchvision.datasets import CIFAR100, ImageFolder

from clip_dissect_cvn.concepts import load_concepts
from clip_dissect_cvn.errors import ArgumentError, DataError, PluginError, UnknownNameError
from clip_dissect_cvn.probe_sets import JoinedProbe
from clip_dissect_cvn.probes import PROBES, ProbeSet, as_probe, load_probe, register_probe


@pytest.fixture(autouse=True)
def _no_roots(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.startswith("CVN_")]:
        monkeypatch.delenv(variable)


@pytest.fixture
def registered() -> Iterator[list[str]]:
    """Names to take out of the registry again."""
    names: list[str] = []
    yield names
    for name in names:
        PROBES._entries.pop(name)


def make_images(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3), (number, 0, 0)).save(root / name)
    return root


class Numbers(Dataset[tuple[Image.Image, int]]):
    classes = ("even", "odd")

    def __init__(self, shade: int = 0) -> None:
        self.images = [Image.new("L", (2, 2), shade + i) for i in range(5)]

    def __len__(self) -> int:
        return 5

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return self.images[i], i % 2


# Folders


def test_a_nested_folder_is_torchvisions_image_folder(tmp_path: Path) -> None:
    make_images(tmp_path, "dog/b.png", "dog/a.jpg", "cat/x/c.png", "cat/z.png")
    probe, theirs = load_probe(tmp_path), ImageFolder(tmp_path)
    assert isinstance(probe, ProbeSet)
    assert len(probe) == len(theirs) == 4
    assert list(probe.classes or ()) == theirs.classes
    assert [probe.label(i) for i in range(4)] == theirs.targets
    assert [probe.identifier(i) for i in range(4)] == ["cat/z.png", "cat/x/c.png", "dog/a.jpg", "dog/b.png"]
    assert all(np.array_equal(probe.image(i), theirs[i][0]) for i in range(4))


def test_a_flat_folder_has_no_classes_and_a_mixed_one_some_labels(tmp_path: Path) -> None:
    make_images(tmp_path, "b.png", "a.png")
    flat = load_probe(str(tmp_path))
    assert (flat.name, flat.classes, flat.label(0)) == (tmp_path.name, None, None)
    assert [flat.identifier(i) for i in range(2)] == ["a.png", "b.png"]
    make_images(tmp_path, "a/c.png")
    mixed = load_probe(tmp_path)
    assert [mixed.label(i) for i in range(3)] == [None, None, 0]


def test_the_digest_of_a_folder_follows_every_file(tmp_path: Path) -> None:
    make_images(tmp_path, "a.png", "b.png")
    digests = [load_probe(tmp_path).digest, load_probe(tmp_path).digest]
    os.utime(tmp_path / "a.png", ns=(1, 1))
    digests.append(load_probe(tmp_path).digest)
    (tmp_path / "b.png").rename(tmp_path / "c.png")
    digests.append(load_probe(tmp_path).digest)
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_broken_links_and_names_of_any_bytes_are_reported_and_not_fatal(tmp_path: Path) -> None:
    make_images(tmp_path, "a.png")
    (tmp_path / "broken.png").symlink_to("nowhere")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")).write_bytes((tmp_path / "a.png").read_bytes())
    probe = load_probe(tmp_path)
    assert len(probe.digest) > 8
    assert probe.identifier(2).encode() == "\ufffd.png".encode()
    assert probe.image(2).size == (4, 3)
    with pytest.raises(DataError, match="broken.png cannot be read"):
        probe.image(1)


def test_a_folder_of_a_name_needs_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_images(tmp_path, "broden/a.jpg", "mine/b.png")
    monkeypatch.chdir(tmp_path)
    assert load_probe("./broden").name == "broden"
    assert load_probe("mine").identifier(0) == "b.png"
    assert load_probe(".").name == tmp_path.name
    with pytest.raises(DataError, match="needs a folder"):
        load_probe("broden")


def test_unknown_names_and_paths_are_told_apart() -> None:
    with pytest.raises(
        UnknownNameError, match="Unknown probe set 'imagnet_val'. Did you mean 'imagenet_val'"
    ):
        load_probe("imagnet_val")
    with pytest.raises(UnknownNameError, match="Or give the path of a folder of images"):
        load_probe("")
    with pytest.raises(DataError, match="The probe folder data/imagenet does not exist"):
        load_probe("data/imagenet")
    with pytest.raises(
        ArgumentError, match="probe is a int. Expected a name, a folder's path, a torch-style"
    ):
        load_probe(3)


# Published sets


@pytest.mark.parametrize("name", ["imagenet_val", "broden", "places365_val"])
def test_a_published_set_lies_where_flag_or_variable_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    given, set_ = make_images(tmp_path / "1", "c/a.jpg"), make_images(tmp_path / "2", "c/b.jpg")
    variable = f"CVN_{name.upper()}_ROOT"
    with pytest.raises(
        DataError, match=f"name it by --probe_root {name}=DIR, roots=.*, or the variable {variable}"
    ):
        load_probe(name)
    monkeypatch.setenv(variable, str(set_))
    assert load_probe(name).identifier(0) == "c/b.jpg"
    assert load_probe(name, roots={name: given}).identifier(0) == "c/a.jpg"
    assert load_probe(name, roots={name: given}).name == name


def test_a_root_of_an_unknown_name_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="Unknown probe set 'brodn'. Did you mean 'broden'"):
        load_probe("broden", roots={"brodn": tmp_path})
    with pytest.raises(ArgumentError, match="'imagenet_broden' has no folder of its own. Leave its root out"):
        load_probe("imagenet_broden", roots={"imagenet_broden": tmp_path})


def test_the_masks_of_broden_are_left_out(tmp_path: Path) -> None:
    make_images(tmp_path, "pascal/1.jpg", "ade20k/2.jpg", "ade20k/2_object.png")
    probe = load_probe("broden", roots={"broden": tmp_path})
    assert [probe.identifier(i) for i in range(len(probe))] == ["ade20k/2.jpg", "pascal/1.jpg"]


def test_imagenet_broden_is_one_after_the_other(tmp_path: Path) -> None:
    roots = {
        "imagenet_val": make_images(tmp_path / "i", "n1/a.jpg", "n2/b.jpg", "n2/c.jpg"),
        "broden": make_images(tmp_path / "b", "dtd/d.jpg"),
    }
    probe = load_probe("imagenet_broden", roots=roots)
    assert isinstance(probe, ProbeSet)
    assert [probe.identifier(i) for i in range(len(probe))] == [
        "imagenet_val/n1/a.jpg",
        "imagenet_val/n2/b.jpg",
        "imagenet_val/n2/c.jpg",
        "broden/dtd/d.jpg",
    ]
    assert probe.classes == ("n1", "n2", "dtd")
    assert [probe.label(i) for i in range(4)] == [0, 1, 1, 2]
    assert probe.image(3).size == (4, 3)
    assert isinstance(probe, JoinedProbe)
    assert probe.digest != JoinedProbe("x", probe.parts[::-1]).digest
    with pytest.raises(DataError, match="The probe set 'broden' needs a folder"):
        load_probe("imagenet_broden", roots={"imagenet_val": roots["imagenet_val"]})


def test_cifar100_comes_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    words = [word.replace(" ", "_") for word in load_concepts("cifar100").words]
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": words}))
    pixels = np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072)
    for name in ("train", "test"):
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "fine_labels": [1, 99]}))
    with pytest.raises(
        DataError, match="is not in .*, or is damaged"
    ):  # the files are not the published ones
        load_probe("cifar100_val", roots={"cifar100_val": tmp_path})
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    monkeypatch.setenv("CVN_CIFAR100_TRAIN_ROOT", str(tmp_path))
    probe = load_probe("cifar100_train")
    assert isinstance(probe, ProbeSet)
    assert probe.classes == load_concepts("cifar100").words
    assert (len(probe), probe.label(1), probe.identifier(1)) == (2, 99, "cifar100_train/1")
    assert np.array_equal(probe.image(1), CIFAR100(str(tmp_path))[1][0])
    before = probe.digest
    (folder / "train").write_bytes(pickle.dumps({"data": pixels + 1, "fine_labels": [1, 99]}))
    assert load_probe("cifar100_train").digest != before


def test_cifar100_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(DataError, match=r"not in .*\.cache.*with: python -c .*CIFAR100\(.*download=True\)"):
        load_probe("cifar100_train")
    with pytest.raises(DataError, match="--probe_root cifar100_val=DIR.*CVN_CIFAR100_VAL_ROOT"):
        load_probe("cifar100_val")


# Your own


def test_what_a_registered_function_may_return(tmp_path: Path, registered: list[str]) -> None:
    folder = make_images(tmp_path, "c/a.png")
    results = {
        "p": folder,
        "s": str(folder),
        "d": Numbers(),
        "l": [Image.new("L", (1, 1))],
        "x": load_probe(folder),
    }
    for name, value in results.items():
        registered.append(f"test_{name}")
        register_probe(f"test_{name}")(lambda value=value: value)
        probe = load_probe(f"test_{name}")
        assert isinstance(probe, ProbeSet)
        assert probe.image(0).mode == "RGB"
        assert probe.name == (folder.name if name == "x" else f"test_{name}")
    with pytest.raises(ArgumentError, match="'test_p' is already registered"):
        register_probe("test_p")(lambda: folder)


def test_a_registered_function_gets_the_root_that_it_names(tmp_path: Path, registered: list[str]) -> None:
    registered.append("test-roots")
    seen = {}

    @register_probe("test-roots")
    def make(root: Path | None, roots: dict[str, Path]) -> Path:
        seen.update(root=root, roots=roots)
        return tmp_path

    make_images(tmp_path, "a.png")
    load_probe("test-roots", roots={"test-roots": tmp_path, "broden": "elsewhere"})
    assert seen == {"root": tmp_path, "roots": {"test-roots": tmp_path, "broden": "elsewhere"}}


def test_a_registration_that_does_not_work_is_named(registered: list[str]) -> None:
    registered += ["test_none", "test_fails"]
    register_probe("test_none")(lambda: None)
    with pytest.raises(
        PluginError, match="'test_none' was made as a NoneType. Expected a folder's path, a torch"
    ):
        load_probe("test_none")
    register_probe("test_fails")(lambda: 1 / 0)
    with pytest.raises(
        PluginError, match="'test_fails' could not be made by .*ZeroDivisionError.*Mend that function"
    ):
        load_probe("test_fails")


@pytest.mark.parametrize("value", [{}, 3, b"abc", iter(()), [1, 2], ["a.png"], {"a": 1}.values()])
def test_other_things_are_no_probe_sets(value: object) -> None:
    with pytest.raises(PluginError, match="The probe set 'x' was made as a "):
        as_probe("x", value)


def test_a_torch_style_data_set() -> None:
    probe = load_probe(Numbers())
    assert probe.classes == ("even", "odd")
    assert [probe.label(i) for i in range(5)] == [0, 1, 0, 1, 0]
    assert probe.image(3).getpixel((0, 0)) == (3, 3, 3)
    assert probe.digest == load_probe(Numbers()).digest
    assert probe.digest != load_probe(Numbers(shade=1)).digest


def test_a_data_set_may_bring_its_digest() -> None:
    numbers = Numbers()
    numbers.digest = "mine"  # type: ignore[attr-defined]
    assert load_probe(numbers).digest == "mine"


def test_a_list_of_images() -> None:
    images = [Image.new("RGB", (2, 2), (i, 0, 0)) for i in range(3)]
    probe = load_probe(images)
    assert (len(probe), probe.classes, probe.label(0), probe.identifier(2)) == (3, None, None, "custom/2")
    assert probe.digest == load_probe(tuple(images)).digest != load_probe(images[::-1]).digest
    with pytest.raises(DataError, match="The probe set 'custom' has no images"):
        load_probe([])


def test_a_data_set_of_tensors_or_a_failing_one_is_named() -> None:
    tensors = load_probe(TensorDataset(torch.zeros(2, 3, 4, 4)))
    with pytest.raises(
        ArgumentError, match="'custom' has a Tensor as image 1. Expected a PIL image or .PIL image"
    ):
        tensors.image(1)

    class Failing(Numbers):
        def __getitem__(self, i: int) -> tuple[Image.Image, int]:
            raise OSError("no disk")

    failing = load_probe(Failing())
    with pytest.raises(DataError, match=r"The image custom/1 cannot be read: OSError\('no disk'\)"):
        failing.image(1)
    assert failing.digest
