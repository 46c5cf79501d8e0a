"""Time of LWTA against GELU and against the published way to compute it: ratios, interleaved in one run.

The published way is the plain Gumbel-softmax with dense one-hot masks, in inference too: written here from
the formula, or, with --reference DIR, the activation of a DISCOVER checkout. Networks have random weights.

    python benchmarks/lwta.py --quick
    python benchmarks/lwta.py --batch 32 --threads 2 --json lwta.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import timm
import torch
from torch import Tensor, nn

from clip_dissect_cvn.lwta import LWTA

COMPETITORS = 16
TEMPERATURE = {True: 0.67, False: 0.01}
TOKENS, CHANNELS = 197, 768
BASELINE = "gelu"

Act = Callable[[], nn.Module]
Measure = Callable[[], None]


class PlainLWTA(nn.Module):
    """Gumbel-softmax over each block with a straight-through one-hot mask, every step a tensor of its own."""

    def forward(self, h: Tensor) -> Tensor:
        blocks = h.reshape(-1, COMPETITORS)
        gumbel = -torch.log(-torch.log(torch.rand_like(blocks) + 1e-8) + 1e-8)
        soft = ((blocks + gumbel) / TEMPERATURE[self.training]).softmax(-1)
        hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1)
        return h * (hard - soft.detach() + soft).reshape(h.shape)


def reference_activation(checkout: Path) -> Act:
    """Load the LWTA of a DISCOVER checkout, by the path of its file."""
    path = checkout / "timm" / "models" / "layers" / "activations.py"
    spec = importlib.util.spec_from_file_location("discover_activations", path)
    if spec is None or spec.loader is None or not path.exists():
        raise SystemExit(
            f"--reference {checkout}: there is no {path}. Pass the folder of a DISCOVER checkout."
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda: module.LWTA(U=COMPETITORS, temp=TEMPERATURE[True])


def deit(act: Act) -> nn.Module:
    model = timm.create_model("deit_tiny_patch16_224")
    for block in model.blocks:
        block.mlp.act = act()
    return model


def inference(model: nn.Module, x: Tensor) -> Measure:
    def measure() -> None:
        model.eval()
        with torch.inference_mode():
            model(x)

    return measure


def forward_backward(model: nn.Module, x: Tensor) -> Measure:
    def measure() -> None:
        model.train()
        model(x).sum().backward()
        model.zero_grad()

    return measure


def stages(acts: dict[str, Act], batch: int) -> dict[str, dict[str, Measure]]:
    """Map what is measured to its measurement for every activation."""
    h = torch.randn(batch, TOKENS, CHANNELS)
    leaf = h.clone().requires_grad_()
    image = torch.randn(batch, 3, 224, 224)
    networks = {name: deit(act) for name, act in acts.items()}
    return {
        "activation, inference": {name: inference(act(), h) for name, act in acts.items()},
        "activation, forward+backward": {name: forward_backward(act(), leaf) for name, act in acts.items()},
        "DeiT-T/16, inference": {name: inference(network, image) for name, network in networks.items()},
        "DeiT-T/16, forward+backward": {
            name: forward_backward(network, image) for name, network in networks.items()
        },
    }


def interleaved(measures: dict[str, Measure], repeats: int) -> dict[str, list[float]]:
    """Time every measure in turn, `repeats` rounds after one to warm up; seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in measures}
    for turn in range(repeats + 1):
        for name, measure in measures.items():
            start = time.perf_counter()
            measure()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summarize(stage: str, seconds: dict[str, list[float]]) -> list[dict[str, object]]:
    baseline = seconds[BASELINE]
    return [
        {
            "stage": stage,
            "activation": name,
            "milliseconds": 1e3 * median(times),
            "ratio": median(own / base for own, base in zip(times, baseline, strict=True)),
            "ratio_of_fastest": min(times) / min(baseline),
        }
        for name, times in seconds.items()
    ]


def print_rows(rows: list[dict[str, object]]) -> None:
    for row in rows:
        print(
            f"{row['stage']:30}{row['activation']:11}{row['milliseconds']:10.2f} ms"
            f"{row['ratio']:9.2f}{row['ratio_of_fastest']:14.2f}",
            flush=True,
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="images (default: 32)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own")
    parser.add_argument("--repeats", type=int, default=9, help="rounds (default: 9)")
    parser.add_argument("--quick", action="store_true", help="8 images, 3 rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there too")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="a DISCOVER checkout: time its LWTA")
    return parser.parse_args()


def main() -> None:
    options = parse()
    batch, repeats = (8, 3) if options.quick else (options.batch, options.repeats)
    torch.set_num_threads(options.threads)
    published = reference_activation(options.reference) if options.reference else PlainLWTA
    acts: dict[str, Act] = {BASELINE: nn.GELU, "lwta": lambda: LWTA(COMPETITORS), "published": published}
    print(f"{batch} images, {options.threads} threads, {repeats} rounds; ratios to {BASELINE}")
    print(f"{'':30}{'':11}{'median':>10}   {'median':>9}{'of fastest':>14}")
    rows = []
    for stage, measures in stages(acts, batch).items():
        rows += summarize(stage, interleaved(measures, repeats))
        print_rows(rows[-len(acts) :])
    if options.json:
        machine = {"torch": torch.__version__, "machine": platform.machine(), "threads": options.threads}
        options.json.write_text(json.dumps({**machine, "batch": batch, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
