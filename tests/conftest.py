"""Small things that several tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from clip_dissect_cvn.embedded import render

PICTURES = 40


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of forty pictures of the embedded world, in a folder for each shape."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(PICTURES):
        image, truth = render(11, i)
        (folder / truth.shape).mkdir(exist_ok=True)
        image.save(folder / truth.shape / f"{i:02d}.png")
    return folder
