"""Names and files to encoders; a tiny CLIP of the real architecture stands for the published ones."""

from __future__ import annotations

import builtins
import json
import pickle
import sys
import types
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from clip_dissect_cvn.clip_features import embed_images
from clip_dissect_cvn.encoders import ENCODERS, Encoder, load_encoder, register_encoder
from clip_dissect_cvn.errors import (
    ArgumentError,
    CheckpointError,
    DataError,
    MissingExtraError,
    PluginError,
    UnknownNameError,
)
from clip_dissect_cvn.openai_clip import NAMES, import_clip
from clip_dissect_cvn.probes import load_probe, stream
from clip_dissect_cvn.torchscript import read_torchscript

SIDE = 32
WORDS = ["dog", "red cat", "café"]


def build(vision_layers: int | tuple[int, ...] = 1, **options: int) -> nn.Module:
    sizes = {
        "embed_dim": 24, "image_resolution": SIDE, "vision_width": 64, "vision_patch_size": 16,
        "context_length": 77, "vocab_size": 49408,
        "transformer_width": 64, "transformer_heads": 1, "transformer_layers": 1, **options,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        model = import_clip().model.CLIP(vision_layers=vision_layers, **sizes)
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    return build()


@pytest.fixture(scope="module")
def half_state(tiny: nn.Module) -> dict[str, Tensor]:
    """Weights as OpenAI publishes them: half precision, and three numbers beside them."""
    numbers = {"input_resolution": SIDE, "context_length": 77, "vocab_size": 49408}
    return {
        **{name: value.half() for name, value in tiny.state_dict().items()},
        **{name: torch.tensor(number) for name, number in numbers.items()},
    }


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory, tiny: nn.Module, half_state: dict[str, Tensor]
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clips")
    paths = {kind: folder / f"tiny.{kind}" for kind in ("pt", "pth", "safetensors", "jit")}
    torch.save(half_state, paths["pt"])
    torch.save({"state_dict": half_state, "epoch": 3}, paths["pth"])
    save_file({name: value.contiguous() for name, value in half_state.items()}, paths["safetensors"])
    halved = build()
    halved.load_state_dict({name: value.half().float() for name, value in tiny.state_dict().items()})
    example = (torch.zeros(1, 3, SIDE, SIDE), torch.zeros(1, 77, dtype=torch.int64))
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.trace(halved, example, check_trace=False), str(paths["jit"]))  # type: ignore[no-untyped-call]
    return paths


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def registered() -> Iterator[list[str]]:
    """Names to take out of the registry again."""
    names: list[str] = []
    yield names
    for name in names:
        ENCODERS._entries.pop(name)


# Checkpoints in OpenAI's format


@pytest.mark.parametrize("kind", ["pt", "pth", "safetensors", "jit"])
def test_every_format_gives_the_embeddings_of_the_clip_package(
    files: dict[str, Path], images: Tensor, kind: str
) -> None:
    clip = import_clip()
    with warnings.catch_warnings(action="ignore"):
        theirs, preprocess = clip.load(str(files["pt"]), device="cpu")
    with torch.no_grad():
        expected = theirs.encode_image(images), theirs.encode_text(clip.tokenize(WORDS))
    ours = load_encoder(str(files[kind]))
    assert isinstance(ours, Encoder)
    assert (ours.name, ours.context_length) == ("tiny", 77)
    assert torch.equal(ours.encode_images(images), expected[0])
    assert torch.equal(ours.encode_texts(WORDS), expected[1])
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 41, 3), dtype=np.uint8))
    assert torch.equal(ours.preprocess(photo), preprocess(photo))


def test_a_folder_is_embedded_as_clip_dissect_does(files: dict[str, Path], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number, mode in enumerate(["RGB", "L", "RGBA", "P", "RGB"]):
        pixels = rng.integers(0, 256, (30 + number, 50, 3), dtype=np.uint8)
        (tmp_path / f"class {number % 2}").mkdir(exist_ok=True)
        Image.fromarray(pixels).convert(mode).save(tmp_path / f"class {number % 2}" / f"{number}.png")
    with warnings.catch_warnings(action="ignore"):
        theirs, preprocess = import_clip().load(str(files["pt"]), device="cpu")
    loader = DataLoader(ImageFolder(str(tmp_path), preprocess), 2)
    with torch.no_grad():
        expected = torch.cat([theirs.encode_image(images) for images, _ in loader])
    ours = load_encoder(files["pt"])
    batches = stream(load_probe(tmp_path), {"clip": ours.preprocess}, batch_size=3)
    found = torch.cat([embed_images(ours, batch.tensors["clip"]) for batch in batches])
    assert torch.allclose(found, expected / expected.norm(dim=1, keepdim=True), atol=1e-6)


def test_the_format_does_not_change_the_digest_and_the_weights_do(
    files: dict[str, Path], half_state: dict[str, Tensor], tmp_path: Path
) -> None:
    digests = {load_encoder(path).digest for path in files.values()}
    other = {**half_state, "visual.proj": half_state["visual.proj"] + 1}
    torch.save(other, tmp_path / "tiny.pt")
    assert len(digests) == 1
    assert load_encoder(tmp_path / "tiny.pt").digest not in digests


def test_weights_in_float32_lose_nothing(tiny: nn.Module, images: Tensor, tmp_path: Path) -> None:
    torch.save(tiny.state_dict(), tmp_path / "a.pt")
    model: Any = tiny
    assert torch.equal(load_encoder(tmp_path / "a.pt").encode_images(images), model.encode_image(images))


def test_a_resnet_tower_loads_too(tmp_path: Path, images: Tensor) -> None:
    model: Any = build((1, 1, 1, 1), vision_width=2)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    assert torch.equal(load_encoder(tmp_path / "a.pt").encode_images(images), model.encode_image(images))


def test_an_encoder_is_frozen_in_float32_and_its_preprocessing_goes_to_other_processes(
    files: dict[str, Path], images: Tensor
) -> None:
    encoder: Any = load_encoder(files["pt"])
    assert not encoder.model.training
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    assert encoder.encode_images(images).dtype == encoder.encode_texts(WORDS).dtype == torch.float32
    assert encoder.to_("cpu") is encoder
    photo = Image.new("RGB", (40, 40), (1, 2, 3))
    sent = pickle.loads(pickle.dumps(encoder.preprocess))
    assert torch.equal(sent(photo), encoder.preprocess(photo))


def test_a_short_context_is_read_from_the_weights(tmp_path: Path) -> None:
    torch.save(build(context_length=8).state_dict(), tmp_path / "a.pt")
    encoder = load_encoder(tmp_path / "a.pt")
    assert encoder.context_length == 8
    assert len(encoder.encode_texts(["a b c d e f"])) == 1
    with pytest.raises(
        DataError, match=r"^1 of 2 concepts are longer than the 8 tokens that a reads .* with 9\. Shorten"
    ):
        encoder.encode_texts(["a b c d e f", "a b c d e f g"])


def test_files_that_are_no_clip_are_refused(
    tmp_path: Path, half_state: dict[str, Tensor], files: dict[str, Path]
) -> None:
    path = tmp_path / "a.pt"

    def refuse(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            load_encoder(path)

    refuse(r"a\.pt does not exist")
    torch.save(nn.Linear(2, 2).state_dict(), path)
    refuse(r"a\.pt is not a CLIP in OpenAI's format: it has weight, bias, …, but no text_pro.*open_clip:")
    torch.save({name: value for name, value in half_state.items() if name != "visual.proj"}, path)
    refuse(r"but no visual\.proj or visual\.attnpool")
    torch.save({**half_state, "token_embedding.weight": torch.zeros(9, 64)}, path)
    refuse(r"embeds 9 tokens, and OpenAI's tokenizer has 49408")
    torch.save({**half_state, "visual.class_embedding": torch.zeros(9)}, path)
    refuse("does not fit the CLIP that its own shapes describe")
    path.write_bytes(files["jit"].read_bytes()[:100_000])
    refuse(r"a\.pt")
    path.write_bytes(pickle.dumps(print, protocol=2))
    refuse(r"a\.pt refers to .*print, and only tensors and plain data are read")


def repack(source: Path, target: Path, change: dict[str, bytes]) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change.get(name.partition("/")[2], old.read(name)))


def test_damaged_and_hostile_archives_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(files["jit"]) as archive:
        data = archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
    changes = {
        "data.pkl": (
            pickle.dumps(print),
            "it refers to builtins.print, which is neither a tensor nor a module",
        ),
        "data/0": (b"1", "a.pt cannot be read: .*Copy or download it again"),
    }
    for name, (content, message) in changes.items():
        repack(files["jit"], path, {name: content})
        with pytest.raises(CheckpointError, match=message):
            load_encoder(path)
    repack(files["jit"], path, {"data.pkl": data[:-100]})
    with pytest.raises(CheckpointError, match="The TorchScript archive .*a.pt cannot be read"):
        load_encoder(path)


def test_an_archive_is_read_as_torch_reads_it(files: dict[str, Path], tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.BatchNorm2d(3).half(), nn.Linear(2, 3, dtype=torch.float64)])
            self.turned = nn.Parameter(torch.arange(6.0).view(2, 3).T)
            self.register_buffer("empty", torch.zeros(0, 2))
            self.sizes, self.name = [1, 2], "mixed"

        def forward(self, x: Tensor) -> Tensor:
            return x

    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.script(Mixed()), str(tmp_path / "mixed.jit"))  # type: ignore[no-untyped-call]
        for path in (files["jit"], tmp_path / "mixed.jit"):
            theirs = torch.jit.load(str(path)).state_dict()  # type: ignore[no-untyped-call]
            ours = read_torchscript(path)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
            assert all(ours[name].dtype == theirs[name].dtype for name in theirs)


# OpenAI's names


def test_the_names_are_those_of_the_package() -> None:
    assert list(NAMES) == import_clip().available_models()
    assert {*NAMES} <= {*ENCODERS}


def test_a_name_loads_what_the_package_downloads(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(import_clip().clip, "_download", lambda *args: asked.append(args) or str(files["pt"]))
    assert load_encoder("ViT-B/16").name == "ViT-B/16"
    assert asked[0][0].endswith("/ViT-B-16.pt")
    assert asked[0][1] == str(tmp_path / ".cache/clip")


def test_a_failing_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(import_clip().clip, "_download", fail)
    with pytest.raises(
        CheckpointError, match=r"ViT-L/14@336px are not in .*no network.*Put ViT-L-14-336px\.pt there"
    ):
        load_encoder("ViT-L/14@336px")


def test_unknown_names_get_a_suggestion() -> None:
    with pytest.raises(UnknownNameError, match="Unknown encoder 'ViT-B-16'. Did you mean 'ViT-B/16'"):
        load_encoder("ViT-B-16")
    with pytest.raises(
        UnknownNameError, match="Or give the path of a CLIP checkpoint, or open_clip:NAME/TAG"
    ):
        load_encoder("ViT-B/61")
    with pytest.raises(
        ArgumentError, match="encoder is a int, without name, digest, .*Expected a name, a CLIP"
    ):
        load_encoder(3)


def test_another_package_of_the_name_clip_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    real = import_clip()
    import_clip.cache_clear()
    with monkeypatch.context() as patch:
        for name in [name for name in sys.modules if name.partition(".")[0] == "clip"]:
            patch.delitem(sys.modules, name)
        patch.setitem(sys.modules, "clip", types.ModuleType("clip"))
        with pytest.raises(
            PluginError, match=r"clip cannot be imported: .*not a package\. Mend it with: pip"
        ):
            import_clip()
        other: Any = types.ModuleType("clip")
        other.clip, other.model, other.__file__ = (
            types.ModuleType("clip.clip"),
            types.ModuleType("m"),
            "/x/clip.py",
        )
        for name, module in (("clip", other), ("clip.clip", other.clip), ("clip.model", other.model)):
            patch.setitem(sys.modules, name, module)
        with pytest.raises(PluginError, match=r"The package clip at /x/clip\.py is not OpenAI's"):
            import_clip()
    import_clip.cache_clear()
    assert import_clip() is real


# open_clip


@pytest.fixture(scope="module")
def open_clip_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A tiny architecture that open_clip knows by a name, and weights for it."""
    open_clip = pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("open_clip")
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": SIDE, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
    }
    (folder / "cvn-test-tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "cvn-test-tiny.json")
    with torch.random.fork_rng():
        model = open_clip.create_model("cvn-test-tiny")
    torch.save(model.state_dict(), folder / "weights.pt")
    return "cvn-test-tiny", folder / "weights.pt"


def test_open_clip_weights_give_its_embeddings(open_clip_files: tuple[str, Path], images: Tensor) -> None:
    import open_clip

    name, path = open_clip_files
    ours = load_encoder(f"open_clip:{name}/{path}")
    assert isinstance(ours, Encoder)
    theirs, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=str(path))
    tokens = open_clip.get_tokenizer(name)(WORDS)
    with torch.no_grad():
        assert torch.allclose(ours.encode_images(images), theirs.eval().encode_image(images), atol=1e-5)
        assert torch.allclose(ours.encode_texts(WORDS), theirs.encode_text(tokens), atol=1e-5)
    photo = Image.new("RGB", (50, 40), (1, 2, 3))
    assert torch.equal(pickle.loads(pickle.dumps(ours.preprocess))(photo), preprocess(photo))
    assert ours.digest == load_encoder(f"open_clip:{name}/{path}").digest


def test_open_clip_does_not_cut_long_concepts(open_clip_files: tuple[str, Path]) -> None:
    name, path = open_clip_files
    encoder = load_encoder(f"open_clip:{name}/{path}")
    assert encoder.context_length == 20
    encoder.encode_texts(["dog " * 18])
    with pytest.raises(
        DataError, match=r"1 of 1 concepts are longer than the 20 tokens that open_clip:.* with 21"
    ):
        encoder.encode_texts(["dog " * 19])


def test_open_clip_names_are_checked(open_clip_files: tuple[str, Path], tmp_path: Path) -> None:
    name, _ = open_clip_files
    with pytest.raises(UnknownNameError, match="Unknown open_clip model 'ViT-B-33'. Did you mean 'ViT-B-32'"):
        load_encoder("open_clip:ViT-B-33/openai")
    with pytest.raises(
        UnknownNameError, match="Unknown open_clip tag of ViT-B-32 'opnai'. Did you mean 'openai'"
    ):
        load_encoder("open_clip:ViT-B-32/opnai")
    with pytest.raises(
        ArgumentError, match="is 'open_clip:ViT-B-32', without weights. Add /TAG or /FILE; .*openai"
    ):
        load_encoder("open_clip:ViT-B-32")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"The weights of open_clip:.*other\.pt cannot be had"):
        load_encoder(f"open_clip:{name}/{tmp_path / 'other.pt'}")


def test_weights_trained_with_quick_gelu_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    open_clip = pytest.importorskip("open_clip")
    seen = {}

    def create(name: str, **options: Any) -> None:
        seen[name, options["pretrained"]] = options["force_quick_gelu"]
        raise RuntimeError("no network")

    monkeypatch.setattr(open_clip, "create_model_from_pretrained", create)
    for tag in ("openai", "laion2b_s34b_b79k"):
        with pytest.raises(
            CheckpointError, match="no network.*Give a file of that architecture as open_clip:NAME/FILE"
        ):
            load_encoder(f"open_clip:ViT-B-32/{tag}")
    with pytest.raises(CheckpointError, match="no network"):
        load_encoder("open_clip:hf-hub:owner/name")
    assert seen == {
        ("ViT-B-32", "openai"): True,
        ("ViT-B-32", "laion2b_s34b_b79k"): False,
        ("hf-hub:owner/name", None): False,
    }


def test_open_clip_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *args: Any) -> Any:
        if name == "open_clip":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(
        MissingExtraError,
        match=r"'open_clip:ViT-B-32/openai' needs the package 'open_clip_torch'.*\[open-clip\]",
    ):
        load_encoder("open_clip:ViT-B-32/openai")


def test_torchs_generator_is_left_alone(files: dict[str, Path], open_clip_files: tuple[str, Path]) -> None:
    before = torch.random.get_rng_state()
    load_encoder(files["pt"])
    load_encoder("open_clip:{}/{}".format(*open_clip_files))
    assert torch.equal(torch.random.get_rng_state(), before)


# Your own


def test_a_registered_encoder(files: dict[str, Path], registered: list[str]) -> None:
    encoder = load_encoder(files["pt"])
    registered.append("test_encoder")
    register_encoder("test_encoder")(lambda: encoder)
    assert load_encoder("test_encoder") is encoder
    with pytest.raises(ArgumentError, match="'test_encoder' is already registered"):
        register_encoder("test_encoder")(lambda: encoder)


def test_a_registration_that_does_not_work_is_named(registered: list[str]) -> None:
    registered += ["test_part", "test_fails"]
    register_encoder("test_part")(lambda: types.SimpleNamespace(name="x", digest="y", preprocess=abs))
    with pytest.raises(
        PluginError,
        match="'test_part' was given as a SimpleNamespace, without context_length, encode_images, encode_t",
    ):
        load_encoder("test_part")
    register_encoder("test_fails")(lambda: 1 / 0)
    with pytest.raises(
        PluginError, match="The encoder 'test_fails' could not be made by .*ZeroDivisionError"
    ):
        load_encoder("test_fails")
