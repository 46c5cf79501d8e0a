"""Time and peak memory of every similarity against the published loops, from embeddings to scores.

Each measurement is a process of its own, ours and theirs in turn, so that both meet the same machine. The
published side forms P = I T^T whole, as CLIP-Dissect does, then loops over the units; written here from the
formulas, or, with --reference DIR, the functions of a CLIP-Dissect checkout. Its rank_reorder and the plain
jensen_shannon take minutes, so they are timed on some units and scaled to all ("~" in the table).

    python benchmarks/similarity.py --quick
    python benchmarks/similarity.py --only soft_wpmi,wpmi --repeats 3 --json similarity.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clip_dissect_cvn.artifacts import ClipFeatures, UnitActivations
from clip_dissect_cvn.similarity import SIMILARITIES, score

TIMED_UNITS = {"rank_reorder": 8, "jensen_shannon": 2}
COMPETITORS = 16
MEGABYTES = 1e6 if sys.platform == "darwin" else 1e3


def make_data(images: int, concepts: int, units: int, width: int) -> tuple[ClipFeatures, UnitActivations]:
    """Draw embeddings with CLIP-like cosines (about 0.25 +- 0.04) and the responses of LWTA units."""
    generator = torch.Generator().manual_seed(0)
    common = normalize(torch.randn(width, generator=generator), dim=0)
    image = normalize(torch.randn(images, width, generator=generator), dim=1)
    concept = normalize(torch.randn(concepts, width, generator=generator), dim=1)
    features = ClipFeatures(normalize(image + 0.6 * common, dim=1), normalize(concept + 0.6 * common, dim=1))
    response = torch.randn(images, units, generator=generator)
    wins = torch.rand(images, units, generator=generator) < 1 / COMPETITORS
    return features, UnitActivations("benchmark", response.mul_(wins))


def published_cosine(clip_feats: Tensor, unit_acts: Tensor) -> Tensor:
    return torch.mm((unit_acts / unit_acts.norm(dim=0)).T, clip_feats / clip_feats.norm(dim=0))


def published_cubed(clip_feats: Tensor, unit_acts: Tensor) -> Tensor:
    left, right = ((one - one.mean(0, keepdim=True)) ** 3 for one in (unit_acts, clip_feats))
    return torch.mm((left / left.norm(dim=0).clip(1e-3)).T, right / right.norm(dim=0).clip(1e-3))


def published_wpmi(clip_feats: Tensor, unit_acts: Tensor) -> Tensor:
    return loop_wpmi(clip_feats, unit_acts, torch.ones(28, 1), a=2, lam=0.6)


def published_soft_wpmi(clip_feats: Tensor, unit_acts: Tensor) -> Tensor:
    member = 0.998 - torch.arange(100)[:, None] / 100 * (0.998 - 0.97)
    return loop_wpmi(clip_feats, unit_acts, member, a=10, lam=1)


def loop_wpmi(clip_feats: Tensor, unit_acts: Tensor, member: Tensor, *, a: float, lam: float) -> Tensor:
    """Loop over units: all rows of the top images, a logarithm an element."""
    probability = torch.softmax(a * clip_feats, dim=1)
    top = unit_acts.topk(len(member), dim=0).indices
    soft = bool((member < 1).any())
    rows = []
    for unit in range(unit_acts.shape[1]):
        given = probability[top[:, unit]]
        rows.append(((1 + member * (given - 1) if soft else given) + 1e-7).log().sum(0))
    likelihood = torch.stack(rows)
    return likelihood - lam * (likelihood.logsumexp(0) - torch.tensor(float(len(rows))).log())


def published_rank_reorder(clip_feats: Tensor, unit_acts: Tensor) -> Tensor:
    """Loop over units: two argsorts give the ranks that reorder the activations."""
    generator = torch.Generator().manual_seed(0)
    values, top = unit_acts.topk(int(0.05 * len(unit_acts)), dim=0)
    rows = []
    for unit in range(unit_acts.shape[1]):
        given, target = clip_feats[top[:, unit]], values[:, unit]
        ascending = target.flip(0)
        ranks = given.argsort(dim=0).argsort(dim=0)
        orders = [torch.randperm(len(target), generator=generator) for _ in range(5)]
        chance = torch.stack([(ascending - ascending[order]).abs() ** 3 for order in orders]).mean()
        errors = torch.cat(
            [(target[:, None] - ascending[part]).abs().pow(3).mean(0) for part in torch.split(ranks, 1500, 1)]
        )
        rows.append(-errors / chance / given.mean(0) ** 0.5)
    return torch.stack(rows)


def plain_jensen_shannon(clip_feats: Tensor, unit_acts: Tensor) -> Tensor:
    """Loop over units: the whole mixture with every concept."""
    concept, unit = (
        torch.softmax((one - one.mean(0)) / one.std(0, correction=0), dim=0)
        for one in (clip_feats, unit_acts)
    )
    concept_negentropy = torch.xlogy(concept, concept).sum(0)
    rows = []
    for one in unit.T:
        mixture = (concept + one[:, None]) / 2
        rows.append((mixture * mixture.log()).sum(0) - (concept_negentropy + torch.xlogy(one, one).sum()) / 2)
    return torch.stack(rows)


PUBLISHED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cos_similarity": published_cosine,
    "cos_similarity_cubed": published_cubed,
    "wpmi": published_wpmi,
    "soft_wpmi": published_soft_wpmi,
    "rank_reorder": published_rank_reorder,
    "jensen_shannon": plain_jensen_shannon,
}


def checkout_functions(directory: Path) -> ModuleType:
    """Import similarity.py of a CLIP-Dissect checkout."""
    spec = importlib.util.spec_from_file_location("clip_dissect_similarity", directory / "similarity.py")
    if spec is None or spec.loader is None or not (directory / "similarity.py").is_file():
        raise SystemExit(
            f"--reference is {directory}, which has no similarity.py. Name a CLIP-Dissect checkout."
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def theirs(name: str, reference: Path | None) -> Callable[[Tensor, Tensor], Tensor]:
    """Find the published side of `name`."""
    module = checkout_functions(reference) if reference else None
    if module is not None and hasattr(module, name):
        function = getattr(module, name)
        return lambda clip_feats, unit_acts: function(clip_feats, unit_acts, device="cpu")
    return PUBLISHED[name]


@dataclass
class Spent:
    """Seconds on the clock, and of all cores together: the latter mind other programs less."""

    seconds: float
    cpu_seconds: float

    @classmethod
    def now(cls) -> Spent:
        return cls(time.perf_counter(), time.process_time())

    def since(self, start: Spent, times: float = 1) -> Spent:
        return Spent((self.seconds - start.seconds) * times, (self.cpu_seconds - start.cpu_seconds) * times)


def time_theirs(
    function: Callable[[Tensor, Tensor], Tensor], timed: int, data: tuple[ClipFeatures, UnitActivations]
) -> Spent:
    """Time P and all units, from `timed` of them where that is fewer."""
    features, activations = data
    start = Spent.now()
    with torch.no_grad():
        clip_feats = features.concept_activations()
        formed = Spent.now()
        function(clip_feats, activations.response[:, :timed])
    p, loop = formed.since(start), Spent.now().since(formed, activations.units / timed)
    return Spent(p.seconds + loop.seconds, p.cpu_seconds + loop.cpu_seconds)


def time_ours(name: str, data: tuple[ClipFeatures, UnitActivations]) -> Spent:
    """Time the whole stage."""
    start = Spent.now()
    score(name, *data)
    return Spent.now().since(start)


def peak_memory() -> float:
    """Most memory this process has held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MEGABYTES


def measure(arguments: argparse.Namespace) -> None:
    """Measure one side of one similarity in this process, and print the result as JSON."""
    side, name = arguments.measure.split(":")
    data = make_data(arguments.images, arguments.concepts, arguments.units, arguments.width)
    warm_up = make_data(200, 300, 8, 16)
    before = peak_memory()
    if side == "ours":
        time_ours(name, warm_up)
        spent = time_ours(name, data)
    else:
        function = theirs(name, arguments.reference)
        time_theirs(function, 8, warm_up)
        spent = time_theirs(function, timed_units(name, arguments.units), data)
    figures = {**asdict(spent), "peak_mb": peak_memory(), "inputs_mb": before}
    sys.stdout.write("\n" + json.dumps(figures))


def timed_units(name: str, units: int) -> int:
    return min(units, TIMED_UNITS.get(name, units))


def in_a_process(side: str, name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Run `measure` in a fresh process."""
    command = [sys.executable, __file__, f"--measure={side}:{name}"]
    command += [f"--{size}={getattr(arguments, size)}" for size in ("images", "concepts", "units", "width")]
    command += [f"--reference={arguments.reference}"] if arguments.reference else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side} {name} failed:\n{done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(name: str, arguments: argparse.Namespace) -> dict[str, float | str | bool]:
    """Measure both sides of one similarity in turn; the fastest run of each counts."""
    runs = [
        (in_a_process("ours", name, arguments), in_a_process("published", name, arguments))
        for _ in range(arguments.repeats)
    ]
    ours, published = (min(side, key=lambda run: run["seconds"]) for side in zip(*runs, strict=True))
    return {
        "similarity": name,
        "seconds": ours["seconds"],
        "published_seconds": published["seconds"],
        "published_scaled": timed_units(name, arguments.units) < arguments.units,
        "times_faster": published["seconds"] / ours["seconds"],
        "times_less_cpu": published["cpu_seconds"] / ours["cpu_seconds"],
        "peak_mb": ours["peak_mb"],
        "published_peak_mb": published["peak_mb"],
        "inputs_mb": ours["inputs_mb"],
    }


def print_row(row: dict[str, float | str | bool]) -> None:
    scaled = "~" if row["published_scaled"] else " "
    print(
        f"{row['similarity']:22}{row['seconds']:9.2f} s{scaled}{row['published_seconds']:9.2f} s"
        f"{row['times_faster']:9.1f} x{row['times_less_cpu']:9.1f} x"
        f"{row['peak_mb']:9.0f} MB{row['published_peak_mb']:9.0f} MB",
        flush=True,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = {"images": 10_000, "concepts": 20_000, "units": 768, "width": 512, "repeats": 1}
    for size, value in numbers.items():
        parser.add_argument(f"--{size}", type=int, default=value, metavar="N", help=f"default {value}")
    parser.add_argument("--quick", action="store_true", help="2,000 images, 2,000 concepts, 128 units")
    parser.add_argument("--only", default=",".join(SIMILARITIES), metavar="NAMES", help="separated by commas")
    parser.add_argument(
        "--reference", type=Path, metavar="DIR", help="a CLIP-Dissect checkout to compare with"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.images, arguments.concepts, arguments.units = 2_000, 2_000, 128
    return arguments


def main() -> None:
    arguments = parse()
    if arguments.measure:
        measure(arguments)
        return
    names = [SIMILARITIES[name].name for name in arguments.only.split(",")]
    sizes = {size: getattr(arguments, size) for size in ("images", "concepts", "units", "width")}
    print(
        ", ".join(f"{value} {size}" for size, value in sizes.items()),
        f"{torch.get_num_threads()} threads",
        sep=", ",
    )
    print(f"{'':22}{'ours':>11}{'published':>12}{'clock':>11}{'CPU':>11}{'peak':>12}{'published':>12}")
    rows = []
    for name in names:
        rows.append(compare(name, arguments))
        print_row(rows[-1])
    if arguments.json:
        arguments.json.write_text(
            json.dumps({**sizes, "threads": torch.get_num_threads(), "results": rows}, indent=2)
        )


if __name__ == "__main__":
    main()
