"""Train the networks of the embedded world, and measure them.

    python scripts/train_embedded.py train               # the CLIP, the CVN and its GELU twin
    python scripts/train_embedded.py train --only cvn    # one of them: clip, cvn or gelu
    python scripts/train_embedded.py evaluate            # figures and model card of the package's weights

Training renders its images once (some two minutes) and keeps them and its checkpoints in --work. A run that
is stopped goes on from its last checkpoint and ends with the same weights, bit for bit, on the same machine
with the same number of threads: everything drawn by lot in step s is a function of (seed, s). Takes a torch
with `torch.optim.Muon` (2.9 or later).
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import clip
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from clip_dissect_cvn.embedded.captions import caption, matches
from clip_dissect_cvn.embedded.card import write_card
from clip_dissect_cvn.embedded.networks import CLIP_NORM, VIT_NORM, build_clip, build_cvn, build_vit
from clip_dissect_cvn.embedded.renderer import draw_truth, render
from clip_dissect_cvn.embedded.world import ATTRIBUTE_OF, CLASSES, FILLERS, Truth

TRAINING_WORLD = 1
SEED = 0
BATCH = 128
CONTEXT = 20
WARM_UP = 0.06
SAVE_EVERY = 100
PACKAGE = Path(__file__).parents[1] / "clip_dissect_cvn" / "embedded"


@dataclass(frozen=True)
class Pool:
    """The training images (images side side 3, uint8) with their truths."""

    images: np.ndarray
    truths: list[Truth]

    def batch(self, lots: np.random.Generator) -> tuple[Tensor, list[Truth]]:
        chosen = lots.choice(len(self.truths), BATCH, replace=False)
        pixels = torch.from_numpy(self.images[np.sort(chosen)]).permute(0, 3, 1, 2)
        return pixels.float() / 255, [self.truths[i] for i in np.sort(chosen)]


def rendered_pool(work: Path, size: int) -> Pool:
    """Render the training images, or open those rendered before."""
    path = work / f"images_{TRAINING_WORLD}_{size}.npy"
    if not path.exists():
        images = [np.asarray(render(TRAINING_WORLD, i)[0]) for i in tqdm(range(size), desc="render")]
        write_atomically(path, lambda file: np.save(file, np.stack(images)))
    return Pool(np.load(path, mmap_mode="r"), [draw_truth(TRAINING_WORLD, i) for i in range(size)])


class ClipLearner(nn.Module):
    """A CLIP whose vocabulary is the tokens of the world's words, with its loss."""

    def __init__(self) -> None:
        super().__init__()
        words = " ".join([*ATTRIBUTE_OF, *FILLERS])
        used = torch.cat([clip.tokenize(word)[0] for word in words.split()])
        self.token_ids = torch.unique(used)
        self.network = build_clip(tokens=len(self.token_ids), context=CONTEXT)

    def loss(self, pixels: Tensor, truths: list[Truth], lots: np.random.Generator) -> Tensor:
        """Contrast images and captions, where a caption belongs to every image it is true of."""
        texts = [caption(truth, lots) for truth in truths]
        tokens = torch.searchsorted(self.token_ids, clip.tokenize(texts, context_length=CONTEXT).long())
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.network(CLIP_NORM(pixels), tokens)[0].float()
        true = matches(truths, texts).float()
        return (agreement(logits, true) + agreement(logits.T, true.T)) / 2

    def weights(self) -> dict[str, Tensor]:
        return {**half(self.network), "token_ids": self.token_ids.int()}


def agreement(logits: Tensor, true: Tensor) -> Tensor:
    return F.cross_entropy(logits, true / true.sum(1, keepdim=True))


class ClassLearner(nn.Module):
    """A ViT with its loss: cross-entropy over the 80 classes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def loss(self, pixels: Tensor, truths: list[Truth], lots: np.random.Generator) -> Tensor:
        labels = torch.tensor([CLASSES.index(f"{truth.colour} {truth.shape}") for truth in truths])
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.network(VIT_NORM(pixels)).float()
        return F.cross_entropy(logits, labels)

    def weights(self) -> dict[str, Tensor]:
        return half(self.network)


@dataclass(frozen=True)
class Recipe:
    """What is trained, for how many steps, and on how many images.

    The learning rate starts again every `cycle` steps, so a longer training begins as a shorter one.
    """

    learner: Callable[[], ClipLearner | ClassLearner]
    steps: int
    cycle: int
    images: int


RECIPES = {
    "clip": Recipe(ClipLearner, steps=2500, cycle=2500, images=50_000),
    "cvn": Recipe(lambda: ClassLearner(build_cvn()), steps=9000, cycle=3000, images=150_000),
    "gelu": Recipe(lambda: ClassLearner(build_vit()), steps=9000, cycle=3000, images=150_000),
}


def half(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.half().contiguous() for name, value in network.state_dict().items()}


def train(name: str, *, work: Path, out: Path, steps: int | None = None, images: int | None = None) -> None:
    """Train one network, from its last checkpoint in `work` if there is one; write its weights to `out`."""
    recipe = RECIPES[name]
    steps = steps or recipe.steps
    with lots_of(-1):
        learner = recipe.learner()
    optimisers = build_optimisers(learner)
    pool = rendered_pool(work, images or recipe.images)
    state = work / f"{name}.pt"
    start = resume(state, learner, optimisers)
    bar = tqdm(range(start, steps), desc=name, initial=start, total=steps)
    for step in bar:
        loss = update(learner, optimisers, pool, step, recipe.cycle)
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            save(state, step + 1, learner, optimisers)
    weights = safetensors_bytes(learner.weights())
    write_atomically(out / f"{name}.safetensors", lambda file: file.write(weights))


def update(
    learner: ClipLearner | ClassLearner, optimisers: list[Optimizer], pool: Pool, step: int, cycle: int
) -> float:
    """Take one step; all that is drawn by lot in it is a function of SEED and `step`."""
    lots = np.random.Generator(np.random.Philox(key=[SEED, step]))
    learner.train()
    with lots_of(step):
        loss = learner.loss(*pool.batch(lots), lots)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * pace(step % cycle / cycle)
        optimiser.step()
        optimiser.zero_grad()
    return loss.item()


def pace(progress: float) -> float:
    """Give the learning rate's share of its peak: a linear warm-up, then a cosine to zero."""
    if progress < WARM_UP:
        return (progress + 1e-3) / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))


def build_optimisers(learner: nn.Module) -> list[Optimizer]:
    """Muon for the matrices of the transformer blocks, AdamW for the rest."""
    named = list(learner.named_parameters())
    matrices = [value for name, value in named if value.ndim == 2 and "blocks." in name]
    others = [value for name, value in named if not (value.ndim == 2 and "blocks." in name)]
    muon = torch.optim.Muon(matrices, lr=3e-3, weight_decay=0.02)
    adam = torch.optim.AdamW(others, lr=1e-3, weight_decay=0.02)
    for optimiser in (muon, adam):
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return [muon, adam]


@contextmanager
def lots_of(step: int) -> Iterator[None]:
    """Make torch's draws those of `step`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1_000_003 * SEED + step + 1)
        yield


def resume(path: Path, learner: nn.Module, optimisers: list[Optimizer]) -> int:
    """Load a checkpoint if there is one; return the number of steps done."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    learner.load_state_dict(state["learner"])
    for optimiser, held in zip(optimisers, state["optimisers"], strict=True):
        optimiser.load_state_dict(held)
    return int(state["steps"])


def save(path: Path, steps: int, learner: nn.Module, optimisers: list[Optimizer]) -> None:
    held = [optimiser.state_dict() for optimiser in optimisers]
    state = {"steps": steps, "learner": learner.state_dict(), "optimisers": held}
    write_atomically(path, lambda file: torch.save(state, file))


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with part.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def main(arguments: Sequence[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("action", choices=("train", "evaluate"))
    parser.add_argument("--only", choices=tuple(RECIPES), action="append", help="train just this network")
    parser.add_argument("--out", type=Path, default=PACKAGE, help="folder of the result (the package)")
    parser.add_argument("--work", type=Path, default=Path("build/embedded"), help="folder of the checkpoints")
    parser.add_argument("--steps", type=int, help="steps of each training")
    parser.add_argument("--images", type=int, help="training images to render")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    if chosen.action == "evaluate":
        write_card(chosen.out)
    else:
        for name in chosen.only or RECIPES:
            train(name, work=chosen.work, out=chosen.out, steps=chosen.steps, images=chosen.images)


if __name__ == "__main__":
    main()
