"""The README and the pages of docs/ run as they are written, and name what there is."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import clip_dissect_cvn as cvn
from clip_dissect_cvn.cli import _underscored, build_parser
from clip_dissect_cvn.embedded import render

ROOT = Path(__file__).parents[1]
PAGES = [path for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if path.exists()]


def blocks(page: Path, *kinds: str) -> list[str]:
    return re.findall(rf"^```(?:{'|'.join(kinds)})\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def _world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Provide the files that the pages speak of, and registries to write to."""
    monkeypatch.chdir(tmp_path)
    for folder in ("photos/dog", "broden1_224/images"):
        Path(folder).mkdir(parents=True)
        for i in range(4):
            render(0, i)[0].save(f"{folder}/{i}.jpg")
    Path("words.txt").write_text("dog\n\ncat\n")
    for registry in (cvn.PROBES, cvn.CONCEPTS, cvn.ENCODERS, cvn.MODELS, cvn.SIMILARITIES):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))  # type: ignore[attr-defined]


@pytest.mark.usefixtures("_world")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem
)
def test_the_python_of_a_page_runs(page: Path) -> None:
    code = "\n".join(blocks(page, "python"))
    exec(compile(code, page.name, "exec"), {"__name__": page.stem})


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_the_commands_of_a_page_parse(page: Path) -> None:
    for line in "\n".join(blocks(page, "console", "", "sh", "bash")).splitlines():
        _, found, arguments = line.partition("clip-dissect-cvn ")
        if found and "…" not in line and not line.lstrip().startswith("#"):
            build_parser().parse_args(
                _underscored(shlex.split(arguments.replace("VERB", "list"), comments=True))
            )


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize(
    ("page", "registry"),
    [("your-own-images", cvn.PROBES), ("concepts", cvn.CONCEPTS), ("encoders", cvn.ENCODERS)],
)
def test_a_page_lists_every_published_name(page: str, registry: dict[str, object]) -> None:
    text = (ROOT / "docs" / "how-to" / f"{page}.md").read_text()
    assert [name for name in registry if f"`{name}`" not in text] == []
