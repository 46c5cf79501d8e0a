"""The benchmark runs, and what it calls published agrees with ours."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from clip_dissect_cvn.similarity import score

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "similarity.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_similarity", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name", ["cos_similarity", "wpmi", "soft_wpmi", "rank_reorder", "jensen_shannon", "cos_similarity_cubed"]
)
def test_the_published_loops_compute_what_ours_compute(benchmark: ModuleType, name: str) -> None:
    features, activations = benchmark.make_data(600, 40, 5, 32)
    activations.response.add_(torch.randn(600, 5, generator=torch.Generator().manual_seed(0)), alpha=0.01)
    theirs = benchmark.PUBLISHED[name](features.concept_activations(), activations.response)
    ours = score(name, features, activations).values
    if name == "rank_reorder":  # other random orders: each unit's scores differ by a factor
        ours, theirs = (one / one.mean(1, keepdim=True) for one in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_the_benchmark_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    sizes = ["--images=300", "--concepts=50", "--units=9", "--width=16"]
    command = [
        sys.executable,
        str(SCRIPT),
        *sizes,
        "--only=wpmi,rank_reorder",
        f"--json={tmp_path / 'out.json'}",
    ]
    table = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert [line.split()[0] for line in table[2:]] == ["wpmi", "rank_reorder"]
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert all(row["seconds"] > 0 and row["peak_mb"] > 0 for row in results)
