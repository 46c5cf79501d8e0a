"""The how-to pages about inputs run as they are written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from clip_dissect_cvn.concepts import CONCEPTS
from clip_dissect_cvn.encoders import ENCODERS
from clip_dissect_cvn.probes import PROBES, load_probe

HOW_TO = Path(__file__).parents[1] / "docs" / "how-to"


@pytest.fixture(autouse=True)
def _world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Provide the files that the pages speak of, and registries to write to."""
    monkeypatch.chdir(tmp_path)
    for folder in ("photos/dog", "broden1_224/images"):
        Path(folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(f"{folder}/1.jpg")
    Path("words.txt").write_text("dog\n\ncat\n")
    for registry in (PROBES, CONCEPTS, ENCODERS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))


@pytest.mark.parametrize("page", ["your-own-images", "concepts", "encoders"])
def test_the_page_runs(page: str) -> None:
    text = (HOW_TO / f"{page}.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert blocks
    exec(compile("\n".join(blocks), f"{page}.md", "exec"), {"__name__": page})
    if page == "your-own-images":
        assert load_probe("my_photos").classes == ("dog",)


def test_the_pages_list_every_published_name() -> None:
    for page, registry in (("your-own-images", PROBES), ("concepts", CONCEPTS), ("encoders", ENCODERS)):
        text = (HOW_TO / f"{page}.md").read_text()
        assert [name for name in registry if f"`{name}`" not in text] == []
