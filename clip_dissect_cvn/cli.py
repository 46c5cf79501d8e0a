"""The command line: the only place that parses arguments and prints.

Exit codes: 0 done, 1 a fault of ours, 2 bad input (the message says how to mend it), 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import clip_dissect_cvn as cvn

from .descriptions import Descriptions, check_writable
from .devices import resolve_device
from .store import Store


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code."""
    arguments = build_parser().parse_args(_underscored(sys.argv[1:] if argv is None else argv))
    try:
        arguments.run(arguments)
    except cvn.CVNError as error:
        print(f"clip-dissect-cvn: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\nInterrupted. What was finished is kept: the same command goes on from there.", file=sys.stderr
        )
        return 130
    return 0


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors end with where to read more."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: error: {message}. Try: {self.prog} --help\n")


def _underscored(arguments: Sequence[str]) -> list[str]:
    """Let every flag be written with dashes, too.

    >>> _underscored(["describe", "--probe-root=a-b=c-d", "--no-pretrained"])
    ['describe', '--probe_root=a-b=c-d', '--no-pretrained']
    """
    parts = [argument.partition("=") for argument in arguments]
    return [
        "--" + flag[2:].replace("-", "_") + sign + value
        if flag.startswith("--") and not flag.startswith("--no-")
        else flag + sign + value
        for flag, sign, value in parts
    ]


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="clip-dissect-cvn",
        description="Name the units of (competitive) vision networks in words.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {cvn.__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB", parser_class=Parser)
    _add_describe(verbs)
    _add_sites(verbs)
    _add_list(verbs)
    _add_cache(verbs)
    return parser


# describe --------------------------------------------------------------------------------------------------


def _add_describe(verbs: Any) -> None:
    parser = verbs.add_parser(
        "describe",
        help="name the units of a model",
        description="Name the units of a model. Without flags: the embedded CVN's, on the embedded world.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=run_describe)
    _add_model_flags(parser)
    _add_input_flags(parser)
    _add_recording_flags(parser)
    _add_output_flags(parser)


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the network")
    group.add_argument(
        "--target_model",
        "--model",
        default="cvn_embedded_vit",
        metavar="NAME",
        help="a cvn_* name, or any timm or torchvision name",
    )
    group.add_argument(
        "--target_layers",
        metavar="LAYERS",
        help="comma-separated paths or globs; unless given, the last hidden layer and the head",
    )
    group.add_argument(
        "--competitors", type=int, metavar="U", help="put LWTA with blocks of U into the model"
    )
    group.add_argument(
        "--checkpoint", metavar="FILE", help="weights: safetensors, timm, torchvision, DISCOVER"
    )
    group.add_argument(
        "--pretrained",
        action=argparse.BooleanOptionalAction,
        help="the published weights; unless given, yes for timm and torchvision names",
    )


def _add_input_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the probe images, the concepts and CLIP")
    group.add_argument(
        "--d_probe", default="shapes", metavar="NAME|DIR", help="a probe set or a folder of images"
    )
    group.add_argument(
        "--probe_root",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="where a named probe set lies; may be repeated",
    )
    group.add_argument(
        "--concept_set", default="shapes", metavar="NAME|FILE", help="a concept set or a text file"
    )
    group.add_argument(
        "--template",
        action="append",
        metavar="TEXT",
        help="a prompt with {} for the concept; several are averaged; unless given, the bare word",
    )
    group.add_argument(
        "--clip_model",
        default="embedded",
        metavar="NAME|FILE",
        help="ViT-B/16 and its like, a checkpoint, open_clip:NAME/TAG, or embedded",
    )
    group.add_argument("--strict", action="store_true", help="stop at an image that cannot be read")


def _add_recording_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("recording and similarity")
    group.add_argument(
        "--similarity_fn", default="soft_wpmi", metavar="NAME", help="how concepts are matched"
    )
    group.add_argument(
        "--similarity_option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the similarity, such as top_k=50; may be repeated",
    )
    group.add_argument(
        "--pool_mode", choices=["avg", "max"], default="avg", help="over positions of a ConvNet"
    )
    group.add_argument(
        "--tokens",
        choices=["class", "patches"],
        default="class",
        help="of a network with a class token: read that one, or pool the patches",
    )
    group.add_argument(
        "--seed", type=int, default=0, help="of the draws of LWTA, and of whatever else is random"
    )
    group.add_argument("--draws", type=int, default=1, metavar="S", help="draws of every LWTA layer an image")
    group.add_argument(
        "--readout",
        choices=["draw", "mean", "expected"],
        help="what describes an LWTA unit: its response in one draw, its mean over the draws, or "
        "its expected response; unless given, draw, and mean when there are several draws",
    )
    group.add_argument("--batch_size", type=int, default=200, metavar="N", help="images at a time")
    group.add_argument("--num_workers", type=int, default=0, metavar="N", help="processes that decode images")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    group.add_argument("--amp", choices=["off", "bf16", "fp16"], default="off", help="mixed precision")


def _add_output_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("results")
    group.add_argument("--activation_dir", default="saved_activations", metavar="DIR", help="the cache")
    group.add_argument("--result_dir", default="results", metavar="DIR", help="a new folder is made here")
    group.add_argument("--top", type=int, default=5, metavar="K", help="concepts listed for each unit")
    group.add_argument("--quiet", action="store_true", help="print only the folder of the results")


def run_describe(arguments: argparse.Namespace) -> None:
    check_writable(arguments.result_dir)
    device = resolve_device(arguments.device)
    target = cvn.load_model(
        arguments.target_model,
        competitors=arguments.competitors,
        checkpoint=arguments.checkpoint,
        pretrained=arguments.pretrained,
        seed=arguments.seed,
    )
    if target.source.get("weights") == "random":
        _note(f"{target.name} has RANDOM weights: its descriptions mean nothing. Give some by --checkpoint")
    result = cvn.describe(
        target,
        probe=cvn.load_probe(
            arguments.d_probe, roots=_pairs(arguments.probe_root, "--probe_root", "NAME=DIR")
        ),
        concepts=arguments.concept_set,
        templates=tuple(arguments.template or ["{}"]),
        encoder=arguments.clip_model,
        layers=arguments.target_layers.split(",") if arguments.target_layers else None,
        similarity=arguments.similarity_fn,
        similarity_options=_pairs(arguments.similarity_option, "--similarity_option", "KEY=VALUE", _number),
        pool_mode=arguments.pool_mode,
        tokens=arguments.tokens,
        seed=arguments.seed,
        draws=arguments.draws,
        readout=arguments.readout,
        amp=arguments.amp,
        batch_size=arguments.batch_size,
        workers=arguments.num_workers,
        device=str(device),
        strict=arguments.strict,
        top=arguments.top,
        activation_dir=arguments.activation_dir,
        progress=not arguments.quiet,
    )
    folder = result.save(arguments.result_dir)
    print(folder if arguments.quiet else summary(result, folder))


def summary(result: Descriptions, folder: Path) -> str:
    """Say what was found, how long each stage took and where it is."""
    lines = ["", f"{'layer':<28}{'units':>7}{'dead':>6}  the best described"]
    for layer, rows in result.units.groupby("layer", sort=False):
        best = rows.nlargest(3, "similarity")
        names = ", ".join(
            f"{unit} {name!r}" for unit, name in zip(best["unit"], best["description"], strict=True)
        )
        lines.append(f"{layer!s:<28}{len(rows):>7}{int(rows['dead'].sum()):>6}  {names}")
    unreadable = result.config["unreadable"]
    if unreadable:
        lines.append(f"{len(unreadable)} images could not be read and were left out: see config.json.")
    times = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in result.config["seconds"].items())
    return "\n".join([*lines, f"Time: {times}.", f"Results: {folder}"])


def _pairs(values: Sequence[str], flag: str, form: str, read: Any = str) -> dict[str, Any]:
    """Read KEY=VALUE flags."""
    for value in values:
        if "=" not in value:
            raise cvn.ArgumentError(f"{flag} is {value!r}, which is not of the form {form}.")
    return {key: read(text) for key, text in (value.split("=", 1) for value in values)}


def _number(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _note(text: str) -> None:
    print(f"clip-dissect-cvn: {text}", file=sys.stderr)


# sites -----------------------------------------------------------------------------------------------------


def _add_sites(verbs: Any) -> None:
    parser = verbs.add_parser("sites", help="show what LWTA would replace in a model, and what not, and why")
    parser.add_argument("model", metavar="MODEL", help="any cvn_*, timm or torchvision name")
    parser.set_defaults(run=run_sites)


def run_sites(arguments: argparse.Namespace) -> None:
    print(cvn.find_sites(cvn.load_model(arguments.model, pretrained=False).module))


# list ------------------------------------------------------------------------------------------------------


def _add_list(verbs: Any) -> None:
    parser = verbs.add_parser("list", help="list models, probe sets, concept sets, encoders and similarities")
    parser.set_defaults(run=run_list)


def run_list(arguments: argparse.Namespace) -> None:
    kinds = {
        "--model": cvn.list_models(),
        "--d_probe": cvn.PROBES,
        "--concept_set": cvn.CONCEPTS,
        "--clip_model": cvn.ENCODERS,
        "--similarity_fn": cvn.SIMILARITIES,
    }
    for flag, names in kinds.items():
        print(f"{flag:<18}{' '.join(names)}")
    print(
        "Also: any timm or torchvision model, a folder of images, a text file of concepts, a CLIP checkpoint."
    )


# cache -----------------------------------------------------------------------------------------------------


def _add_cache(verbs: Any) -> None:
    parser = verbs.add_parser("cache", help="list or prune saved activations")
    parser.add_argument("action", choices=["list", "prune"])
    parser.add_argument("--activation_dir", default="saved_activations", metavar="DIR", help="the cache")
    parser.add_argument("--older_than", type=float, metavar="DAYS", help="prune only what is older")
    parser.add_argument("--unfinished", action="store_true", help="prune only what was never finished")
    parser.add_argument("--dry_run", action="store_true", help="say what would be pruned, and prune nothing")
    parser.set_defaults(run=run_cache)


def run_cache(arguments: argparse.Namespace) -> None:
    store = Store(arguments.activation_dir)
    if arguments.action == "list":
        entries = store.list()
    else:
        days = arguments.older_than
        entries = store.prune(
            older_than=None if days is None else timedelta(days=days),
            partial_only=arguments.unfinished,
            dry_run=arguments.dry_run,
        )
    for entry in entries:
        print(entry)
    done = {"list": "", "prune": " would be removed" if arguments.dry_run else " removed"}[arguments.action]
    size = sum(entry.size for entry in entries)
    print(f"{len(entries)} artifacts, {size / 1e6:,.1f} MB{done}, in {arguments.activation_dir}")
