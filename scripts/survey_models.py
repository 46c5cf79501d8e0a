#!/usr/bin/env python
"""Patch one model of every timm module and every torchvision classification family, run it, and undo it.

Each family's representative is its smallest model, with random weights, in a process of its own with a time
limit. It has to end in one of two ways: patched, run with one winner in every block, and restored to
bit-identical outputs; or refused, with an error that says why.

    python scripts/survey_models.py --markdown docs/survey.md --json survey.json
    python scripts/survey_models.py --only 'timm/vi*'
    python scripts/survey_models.py --choose          # find the smallest models again (takes an hour)
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

from clip_dissect_cvn.block_sizes import divisors
from clip_dissect_cvn.errors import CVNError
from clip_dissect_cvn.lwta import LWTA
from clip_dissect_cvn.sites import Call, Site, Sites, default_example, sites_among, trace
from clip_dissect_cvn.surgery import lwta_layers, replace_activations_, restore_activations_

CHOSEN = Path(__file__).with_name("survey_models.json")
LARGEST_IMAGE = 256
MEMORY = 8 << 30


def main() -> int:
    options = parse()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if options.choose:
        CHOSEN.write_text(json.dumps(dict(choose()), indent=1) + "\n")
    chosen = json.loads(CHOSEN.read_text())
    rows = []
    for family in sorted(name for name in chosen if fnmatch(name, options.only)):
        rows.append(
            {"family": family, "model": chosen[family], **apart(family, chosen[family], options.seconds)}
        )
        print(line(rows[-1]), flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")
    if options.markdown:
        Path(options.markdown).write_text(page(rows))
    return int(any(row["result"] == "FAULT" for row in rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="*", help="glob of families, such as 'timm/vi*'")
    parser.add_argument("--markdown", help="write docs/survey.md's page here")
    parser.add_argument("--json", help="write all rows here")
    parser.add_argument("--seconds", type=float, default=600, help="time limit for one model")
    parser.add_argument("--choose", action="store_true", help="find each family's smallest model again")
    return parser.parse_args()


# choosing --------------------------------------------------------------------------------------------------


def choose() -> Iterator[tuple[str, str]]:
    """Name the smallest model of every family."""
    for module in timm.list_modules():
        yield (
            f"timm/{module}",
            min(timm.list_models(module=module), key=lambda name: parameters(timm.create_model, name)),
        )
    families: dict[str, list[str]] = {}
    for name in torchvision.models.list_models(module=torchvision.models):
        home = torchvision.models.get_model_builder(name).__module__
        if home.startswith("torchvision."):
            families.setdefault(home.rpartition(".")[2], []).append(name)
    for family, names in families.items():
        yield (
            f"torchvision/{family}",
            min(names, key=lambda name: parameters(torchvision.models.get_model, name)),
        )


def parameters(create: Any, name: str) -> float:
    try:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in create(name).parameters())
    except Exception:
        return float("inf")


def create(family: str, name: str) -> nn.Module:
    if family.startswith("torchvision/"):
        return torchvision.models.get_model(name).eval()
    size = timm.get_pretrained_cfg(name).input_size[-1]
    if size > LARGEST_IMAGE:
        try:
            return timm.create_model(name, img_size=LARGEST_IMAGE).eval()
        except (TypeError, AssertionError):
            pass
    return timm.create_model(name).eval()


# one model -------------------------------------------------------------------------------------------------


def apart(family: str, name: str, seconds: float) -> dict[str, Any]:
    """Survey one model in a process of its own."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=report, args=(sender, family, name))
    start = time.perf_counter()
    process.start()
    sender.close()
    try:
        row = receiver.recv() if receiver.poll(seconds) else fault(f"took more than {seconds:.0f} s")
    except EOFError:
        row = fault("the process died, out of memory perhaps")
    process.kill()
    process.join()
    return {**row, "seconds": round(time.perf_counter() - start, 1)}


def report(sender: Connection, family: str, name: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        sender.send(survey(create(family, name)))
    except Exception as error:
        sender.send(fault(repr(error)))


def fault(message: str) -> dict[str, Any]:
    return {"result": "FAULT", "message": message}


def survey(model: nn.Module) -> dict[str, Any]:
    """Patch, run, check and restore one model."""
    try:
        example = small_example(model)
        calls = trace(model, example)
        sites = sites_among(model, calls)
        found = {"left": Counter(site.reason for site in sites if site.reason), "activations": len(sites)}
    except CVNError as error:
        return {"result": "refused", "message": str(error)}
    images = torch.rand((2, *example.shape[1:]), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before, parts, keys = model(images), inventory(model), list(model.state_dict())
        try:
            replace_activations_(model, smallest_block, example=example)
        except CVNError as error:
            return {"result": "refused", "message": str(error), **found}
        assert keys == list(model.state_dict()), "state-dict keys changed"
        with watched(model):
            model(images)
        layers = lwta_layers(model)
        restore_activations_(model)
        assert parts == inventory(model), "something was left behind"
        assert same(before, model(images)), "the outputs differ after restoring"
    confirmed = len(confirms(model, calls, sites))
    return {"result": "OK", "message": "", "replaced": len(layers), "confirmed": confirmed, **found}


def small_example(model: nn.Module) -> Tensor:
    """Make an input that is no larger than it needs to be, for the time it takes."""
    example = default_example(model)
    if example.ndim == 4 and example.shape[-1] > LARGEST_IMAGE:
        smaller = example[..., :LARGEST_IMAGE, :LARGEST_IMAGE]
        with suppress(CVNError):
            trace(model, smaller)
            return smaller
    return example


def smallest_block(site: Site) -> int | None:
    return next(iter(divisors(site.channels or 0)), None)


def inventory(model: nn.Module) -> list[Any]:
    """List everything that surgery could have changed."""
    flat = []
    for path, module in model.named_modules():
        flat.append((path, id(module)))
        for name, value in module.__dict__.items():
            flat.append((path, name, [*value.items()] if name in TABLES else id(value)))
    return flat


TABLES = ("_modules", "_forward_pre_hooks", "_forward_hooks")


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one.nan_to_num(), other.nan_to_num())
    parts = one.values() if isinstance(one, dict) else one
    others = other.values() if isinstance(other, dict) else other
    return all(same(*pair) for pair in zip(parts, others, strict=True))


@contextmanager
def watched(model: nn.Module) -> Iterator[None]:
    """Check that every competition is called once, and passes the response of one winner in each block."""
    seen: Counter[str] = Counter()

    def check(layer: LWTA, inputs: tuple[Tensor], output: Tensor, *, name: str) -> None:
        seen[name] += 1
        h, y = (t.movedim(layer.dim, -1).unflatten(-1, (-1, layer.competitors)) for t in (inputs[0], output))
        won = y != 0
        lost_to_zero = ~won.any(-1) & (h == 0).any(-1)
        assert torch.equal(y[won], h[won]), f"{name} does not pass the winner's response"
        assert ((won.sum(-1) == 1) | lost_to_zero | y.isnan().any(-1)).all(), (
            f"{name} has not one winner a block"
        )

    layers = lwta_layers(model)
    handles = [
        layer.register_forward_hook(lambda *call, name=name: check(*call, name=name))
        for name, layer in layers.items()
    ]
    yield
    for handle in handles:
        handle.remove()
    assert seen == dict.fromkeys(layers, 1), (
        f"not called once: {[name for name in layers if seen[name] != 1]}"
    )


def confirms(model: nn.Module, calls: Sequence[Call], sites: Sites) -> list[str]:
    """Hold the channels of each site against the features that the layer before it declares, if it does."""
    modules = dict(model.named_modules())
    replaced = {(site.path, site.index): site for site in sites if not site.reason and not site.function}
    declared: dict[tuple[int, ...], int] = {}
    found = []
    for call in calls:
        module, site = modules[call.path], replaced.get((call.path, call.index))
        if site is not None and not call.function and call.shape in declared:
            assert declared[call.shape] == site.channels, f"{site.name}: {site.channels}, fed with {declared}"
            found.append(site.name)
        features = [value for name in FEATURES if isinstance(value := getattr(module, name, None), int)]
        if features and not call.function and not list(module.children()):
            declared = {call.shape: features[0]}
    return found


FEATURES = ("out_channels", "out_features", "num_features", "num_channels")


# printing --------------------------------------------------------------------------------------------------


def line(row: dict[str, Any]) -> str:
    left = "; ".join(f"{count} {reason}" for reason, count in row.get("left", {}).items())
    cells = [row["family"], row["model"], row.get("replaced", ""), row["result"], row["message"] or left]
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def page(rows: list[dict[str, Any]]) -> str:
    results = Counter(row["result"] for row in rows)
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}"
    head = INTRODUCTION.format(
        **{"OK": 0, "refused": 0, "FAULT": 0, **results},
        all=len(rows),
        confirmed=sum(row.get("confirmed", 0) for row in rows),
        replaced=sum(row.get("replaced", 0) for row in rows),
        versions=versions,
    )
    table = [
        "| family | model | replaced | result | left alone (why) or refused (why) |",
        "| --- | --- | --- | --- | --- |",
    ]
    return "\n".join([head, *table, *map(line, rows), LIMITS])


INTRODUCTION = """# Survey: which models can be patched

One model of every timm module and of every torchvision classification family, the smallest, with random
weights: {OK} of {all} are patched, run with exactly one winner in every block, and restored to bit-identical
outputs; {refused} refused, for the reason told; {FAULT} do anything else. Blocks are of 2 units, or of
the smallest number that divides the channels. Where a layer that declares its features feeds an activation
directly ({confirmed} of {replaced} sites), the channel axis was held against it. With {versions}.

Written by `python scripts/survey_models.py --markdown docs/survey.md`.
"""

LIMITS = """
## Limits

- Activations with parameters (PReLU, timm's StarReLU) stay: without them the state dict would lose keys.
- Activations written out as products in a forward, such as `x * sigmoid(x)`, are not known as activations.
- A function that a forward calls (`F.relu(x)`) is replaced where it is called: that forward runs under a
  torch function mode. `torch.compile` and `torch.export` go through it; `torch.jit.script`, `torch.fx` and
  `nn.DataParallel` do not.
- The calls of an activation that is called several times are told apart by counting, so one model must not
  run in two threads at once.
- `inplace=True` of a module is not imitated: a skip connection that relied on it carries the linear response.
- Heads that only run in training, such as GoogLeNet's auxiliary ones, keep their activations.
"""

if __name__ == "__main__":
    sys.exit(main())
