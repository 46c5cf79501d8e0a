"""Image files: their order, and what each becomes."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import ImageFolder

from clip_dissect_cvn.errors import DataError
from clip_dissect_cvn.images import list_images, read_rgb, to_rgb


def save(path: Path, *, mode: str = "RGB", **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (4, 3), 7).save(path, **options)
    return path


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


# Order


NESTED = [
    "b/z.jpg",
    "b/a.JPEG",
    "b/a-b/1.png",
    "b/a/1.png",
    "b/a/c/1.webp",
    "a b/2.tif",
    "a b/10.tiff",
    "B/x.bmp",
]


def test_the_order_is_that_of_torchvision(tmp_path: Path) -> None:
    touch(tmp_path, *NESTED)
    theirs = [Path(path).relative_to(tmp_path).as_posix() for path, _ in ImageFolder(tmp_path).samples]
    assert list_images(tmp_path) == theirs


PARTS = st.text("ab-A.0 é", min_size=1, max_size=3).filter(lambda part: part.strip(". ") == part)


@settings(max_examples=40, deadline=None)
@given(st.sets(st.lists(PARTS, min_size=2, max_size=4).map(tuple), min_size=1, max_size=12))
def test_the_order_is_that_of_torchvision_for_any_names(
    tmp_path_factory: pytest.TempPathFactory, paths: set[tuple[str, ...]]
) -> None:
    root = tmp_path_factory.mktemp("tree")
    touch(root, *("/".join([*(f"{part}_" for part in path[:-1]), f"{path[-1]}.png"]) for path in paths))
    theirs = [Path(path).relative_to(root).as_posix() for path, _ in ImageFolder(root).samples]
    assert list_images(root) == theirs


def test_hidden_files_are_skipped_and_the_case_of_a_suffix_does_not_matter(tmp_path: Path) -> None:
    touch(
        tmp_path, "x.PNG", "y.Jpg", ".z.png", ".git/a.png", "c/.DS_Store", "c/._a.jpg", "c/a.jpg", "notes.txt"
    )
    assert list_images(tmp_path) == ["x.PNG", "y.Jpg", "c/a.jpg"]


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    touch(tmp_path, "real/a.png")
    (tmp_path / "real" / "up").symlink_to(tmp_path)
    (tmp_path / "same").symlink_to(tmp_path / "real")
    assert list_images(tmp_path) == ["real/a.png", "same/a.png"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "is empty. Expected images (.apng, "),
        (
            ["a.txt", "c/b.txt", "README"],
            "has no images: it holds 3 other files (2 .txt, 1 without a suffix).",
        ),
    ],
)
def test_a_folder_without_images_says_what_it_has(tmp_path: Path, names: list[str], message: str) -> None:
    touch(tmp_path, *names)
    with pytest.raises(DataError, match=f"The probe folder {tmp_path} {re.escape(message)}"):
        list_images(tmp_path)


def test_a_missing_folder_and_a_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist\. Check the path\."):
        list_images(tmp_path / "nowhere")
    touch(tmp_path, "a.png")
    with pytest.raises(DataError, match=r"a\.png is a file\. Name the folder that it is in\."):
        list_images(tmp_path / "a.png")


# Decoding


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_ordinary_modes_are_converted_by_pillow(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)).convert(
        mode
    )
    path = tmp_path / "a.tif"
    image.save(path)
    with Image.open(path) as again:
        assert again.mode == mode
        expected = again.convert("RGB")
    assert read_rgb(path).mode == "RGB"
    assert np.array_equal(read_rgb(path), expected)


def test_a_palette_with_transparency_gives_no_warning(tmp_path: Path) -> None:
    image = Image.new("P", (2, 2))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.save(tmp_path / "a.png", transparency=bytes([0, 128]))
    assert read_rgb(tmp_path / "a.png").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 257, 32896, 65535]], np.uint16), [0, 1, 128, 255]),
        (np.array([[0, 65535]], np.int32), [0, 255]),
        (np.array([[-100, 0, 100]], np.int32), [0, 128, 255]),
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (np.array([[0, 500, 1000]], np.float32), [0, 128, 255]),
        (np.array([[3e5, 3e5]], np.float32), [0, 0]),
        (np.array([[0, np.nan, 1]], np.float32), [0, 0, 255]),
    ],
)
def test_deep_grey_is_scaled_and_not_clipped(tmp_path: Path, values: np.ndarray, expected: list[int]) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert np.asarray(read_rgb(tmp_path / "a.tif"))[0].tolist() == [[grey] * 3 for grey in expected]


def test_a_16_bit_png_is_scaled(tmp_path: Path) -> None:
    Image.fromarray(np.full((2, 2), 40000, np.uint16)).save(tmp_path / "a.png")
    assert read_rgb(tmp_path / "a.png").getpixel((0, 0)) == (156, 156, 156)


def test_damaged_and_foreign_files_are_named_with_the_cause(tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(photo)
    photo.write_bytes(photo.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"The image .*photo\.jpg cannot be read: image file is truncated"):
        read_rgb(photo)
    photo.write_text("<html>404</html>")
    with pytest.raises(DataError, match=r"photo\.jpg cannot be read: it is no image, or of a format that"):
        read_rgb(photo)
    photo.unlink()
    with pytest.raises(DataError, match=r"photo\.jpg cannot be read: No such file or directory\."):
        read_rgb(photo)


def test_large_images_do_not_warn_and_gigantic_ones_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # 12 pixels warn
    assert read_rgb(path).size == (4, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)  # more than twice that is an error
    with pytest.raises(DataError, match=r"12 pixels.*Scale it down, or raise PIL\.Image\.MAX_IMAGE_PIXELS"):
        read_rgb(path)


def test_any_damage_is_a_data_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    whole = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for suffix in (".png", ".jpg", ".tif", ".bmp", ".gif", ".webp"):
        path = tmp_path / f"a{suffix}"
        Image.fromarray(whole).save(path)
        data = bytearray(path.read_bytes())
        for _ in range(40):
            broken = data[: rng.integers(1, len(data))]
            broken[rng.integers(0, len(broken))] ^= 255
            path.write_bytes(broken)
            try:
                assert read_rgb(path).mode == "RGB"
            except DataError as error:
                assert os.fspath(path) in str(error)


def test_an_image_in_memory_is_converted_in_the_same_way() -> None:
    assert to_rgb(Image.new("I;16", (1, 1), 65535)).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("RGBA", (1, 1), (1, 2, 3, 0))).getpixel((0, 0)) == (1, 2, 3)
