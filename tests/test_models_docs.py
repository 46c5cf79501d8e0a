"""The how-to pages about models run as they are written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from clip_dissect_cvn import models

HOW_TO = Path(__file__).parents[1] / "docs" / "how-to"


@pytest.mark.parametrize("page", ["your-own-model", "checkpoints"])
def test_the_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models.MODELS, "_entries", dict(models.MODELS._entries))
    blocks = re.findall(
        r"^```python\n(.*?)^```", (HOW_TO / f"{page}.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert blocks
    exec(compile("\n".join(blocks), f"{page}.md", "exec"), {})
