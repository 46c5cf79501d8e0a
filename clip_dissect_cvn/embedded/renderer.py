"""Draw the images of the embedded world: image i is a pure function of (seed, i)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from ..errors import ArgumentError
from .world import ATTRIBUTES, CLASSES, Truth, parse

SIDE = 64
SUPERSAMPLING = 3
PIGMENTS = {
    "red": (222, 36, 36),
    "orange": (250, 130, 20),
    "yellow": (248, 222, 40),
    "green": (40, 190, 60),
    "cyan": (40, 210, 220),
    "blue": (40, 80, 235),
    "purple": (140, 50, 200),
    "pink": (250, 130, 190),
    "brown": (125, 72, 28),
    "white": (250, 250, 250),
}
INK = (24, 24, 28)
RADII = {"small": (12.5, 14.5), "large": (19.0, 22.0)}
OFFSETS = {"center": (0, 0), "left": (-9, 0), "right": (9, 0), "top": (0, -9), "bottom": (0, 9)}
JITTER = 1.5
TILT = np.pi / 12
OUTLINE = 1.3
PURPOSES = ("attributes", "background", "figure", "texture")

Array = npt.NDArray[np.float32]
Ink = npt.NDArray[np.bool_]
Outline = list[tuple[float, float]]


def render(seed: int, i: int, **forced: str) -> tuple[Image.Image, Truth]:
    """Draw image `i` of the world `seed`: 64 x 64, RGB, with its truth.

    The same bits in any order, process and thread. `forced` attributes (`shape="star"`) replace those
    drawn by lot and leave the others as they were.

    Raises
    ------
    ArgumentError
        when `forced` names an attribute or a word that does not exist.

    >>> image, truth = render(0, 7, shape="star")
    >>> image.size, truth.shape
    ((64, 64), 'star')
    """
    truth = draw_truth(seed, i, **forced)
    background = BACKGROUNDS[truth.background](_lots(seed, i, "background"))
    pixels = _painted(background, truth, _lots(seed, i, "figure"), _lots(seed, i, "texture"))
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8)), truth


def draw_truth(seed: int, i: int, **forced: str) -> Truth:
    """Draw the truth of image `i` of the world `seed`, without the image; as `render`."""
    lots = _lots(seed, i, "attributes")
    truth = Truth(**{kind: words[lots.integers(len(words))] for kind, words in ATTRIBUTES.items()})
    return replace(truth, **_checked(forced))


def render_class(seed: int, i: int) -> tuple[Image.Image, Truth]:
    """Draw image `i` of a stratified set: its class (shape and colour) is number ``i % 80`` of CLASSES."""
    return render(seed, i, **class_attributes(i))


def class_attributes(i: int) -> dict[str, str]:
    """Give the shape and colour of image `i` of a stratified set."""
    return parse(CLASSES[i % len(CLASSES)])


def _checked(forced: dict[str, str]) -> dict[str, str]:
    for kind, word in forced.items():
        if kind not in ATTRIBUTES:
            raise ArgumentError(f"{kind!r} is no attribute of an image. Use one of {', '.join(ATTRIBUTES)}.")
        if word not in ATTRIBUTES[kind]:
            raise ArgumentError(f"{kind} is {word!r}. Use one of {', '.join(ATTRIBUTES[kind])}.")
    return forced


def _lots(seed: int, i: int, purpose: str) -> np.random.Generator:
    """Make the generator of one part of one image: no part's lots move those of another."""
    return np.random.Generator(np.random.Philox(key=[seed, i], counter=[0, 0, 0, PURPOSES.index(purpose)]))


def _painted(
    background: Array, truth: Truth, lots: np.random.Generator, texture: np.random.Generator
) -> Array:
    """Paint the figure over `background` (side side 3): an inked body, its pigment where no ink shows."""
    radius = lots.uniform(*RADII[truth.size])
    centre = _single(SIDE / 2 + np.array(OFFSETS[truth.place]) + lots.uniform(-JITTER, JITTER, 2))
    angle = lots.uniform(-TILT, TILT)
    pigment = _single(np.clip(np.array(PIGMENTS[truth.colour]) + lots.uniform(-14, 14, 3), 0, 255))
    body = _mask(truth.shape, centre, radius, angle)
    bright = _mask(truth.shape, centre, radius - OUTLINE, angle)
    if truth.texture != "plain":
        inked = TEXTURES[truth.texture](*_own_coordinates(centre, angle), texture)
        bright = Image.fromarray(np.where(inked, np.uint8(0), np.asarray(bright)))
    covered, coloured = _share(body), _share(bright)
    return background * (1 - covered) + _single(INK) * (covered - coloured) + pigment * coloured


def _single(numbers: Sequence[int] | npt.NDArray[Any]) -> Array:
    return np.asarray(numbers, dtype=np.float32)


def _own_coordinates(centre: Array, angle: float) -> tuple[Array, Array]:
    """Give every fine pixel its coordinates in the frame of a figure that is moved and tilted."""
    grid = (np.arange(SIDE * SUPERSAMPLING, dtype=np.float32) + 0.5) / SUPERSAMPLING
    x, y = grid[None, :] - centre[0], grid[:, None] - centre[1]
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    return cos * x + sin * y, cos * y - sin * x


def _share(mask: Image.Image) -> Array:
    """Tell how much of each pixel a mask of fine pixels covers (side side 1)."""
    return np.asarray(mask.reduce(SUPERSAMPLING), dtype=np.float32)[..., None] / np.float32(255)


def _mask(shape: str, centre: Array, radius: float, angle: float) -> Image.Image:
    side = SIDE * SUPERSAMPLING
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    for outline, filled in _OUTLINES[shape]:
        points = (np.array(outline) * radius @ turn + centre) * SUPERSAMPLING
        draw.polygon([tuple(point) for point in points.tolist()], fill=255 if filled else 0)
    return mask


def _round(
    radius: float, *, x: float = 0.0, y: float = 0.0, corners: int = 40, start: float = 0.0
) -> Outline:
    turns = 2 * np.pi * np.arange(corners) / corners + start
    return [(x + radius * float(np.sin(t)), y - radius * float(np.cos(t))) for t in turns]


def _star() -> Outline:
    tips, notches = _round(1.15, corners=5), _round(0.5, corners=5, start=np.pi / 5)
    return [point for pair in zip(tips, notches, strict=True) for point in pair]


def _heart() -> Outline:
    turns = 2 * np.pi * np.arange(48) / 48
    x = 16 * np.sin(turns) ** 3
    y = 13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns) - np.cos(4 * turns)
    return [(float(a) / 16, -float(b) / 16 - 0.1) for a, b in zip(x, y, strict=True)]


def _cross() -> Outline:
    a, b = 1.0, 0.34
    upper = [(-a, -b), (-b, -b), (-b, -a), (b, -a), (b, -b), (a, -b)]
    return [*upper, *((-x, -y) for x, y in upper)]


_OUTLINES: dict[str, tuple[tuple[Outline, bool], ...]] = {
    "circle": ((_round(0.92), True),),
    "square": ((_round(1.15, corners=4, start=np.pi / 4), True),),
    "triangle": ((_round(1.2, y=0.2, corners=3), True),),
    "star": ((_star(), True),),
    "heart": ((_heart(), True),),
    "cross": ((_cross(), True),),
    "ring": ((_round(1.0), True), (_round(0.45), False)),
    "moon": ((_round(1.05, x=0.15), True), (_round(0.8, x=0.65), False)),
}


def _striped(u: Array, v: Array, lots: np.random.Generator) -> Ink:
    shift, period = lots.uniform(0, 1), lots.uniform(5.0, 6.0)
    inked: Ink = ((u + v) / (math.sqrt(2) * period) + shift) % 1 < 0.36
    return inked


def _dotted(u: Array, v: Array, lots: np.random.Generator) -> Ink:
    shift, period = _single(lots.uniform(0, 1, 2)), lots.uniform(5.4, 6.4)
    across, down = (u / period + shift[0]) % 1 - 0.5, (v / period + shift[1]) % 1 - 0.5
    inked: Ink = across**2 + down**2 < 0.09
    return inked


def _checkered(u: Array, v: Array, lots: np.random.Generator) -> Ink:
    shift, period = _single(lots.uniform(0, 1, 2)), lots.uniform(8.0, 9.5)
    inked: Ink = ((u / period + shift[0]) % 1 < 0.5) ^ ((v / period + shift[1]) % 1 < 0.5)
    return inked


TEXTURES: dict[str, Callable[[Array, Array, np.random.Generator], Ink]] = {
    "striped": _striped,
    "dotted": _dotted,
    "checkered": _checkered,
}


def _ground(colour: tuple[int, int, int], lots: np.random.Generator, *, grain: float) -> Array:
    shade = lots.uniform(0.9, 1.08)
    return _single(colour) * shade + grain * _noise(lots, SIDE)


def _noise(lots: np.random.Generator, rows: int) -> Array:
    return lots.standard_normal((rows, SIDE, 1), dtype=np.float32)


def _snow(lots: np.random.Generator) -> Array:
    ground = _ground((200, 214, 232), lots, grain=4.0)
    flakes = lots.random((SIDE, SIDE, 1), dtype=np.float32) < 0.06
    return np.where(flakes, np.float32(255), ground)


def _sand(lots: np.random.Generator) -> Array:
    ripples = np.sin(_single(range(SIDE)) * lots.uniform(0.7, 0.9) + lots.uniform(0, 6.3))
    bend = np.sin(_single(range(SIDE)) * 0.15 + lots.uniform(0, 6.3))
    return _ground((208, 184, 132), lots, grain=7.0) + _single(8 * np.outer(ripples, bend)[..., None])


def _grass(lots: np.random.Generator) -> Array:
    blades = np.repeat(16 * _noise(lots, SIDE // 4), 4, axis=0)
    return _ground((84, 112, 62), lots, grain=5.0) + blades


def _night(lots: np.random.Generator) -> Array:
    ground = _ground((26, 30, 58), lots, grain=2.0)
    stars = lots.random((SIDE, SIDE, 1), dtype=np.float32) < 0.02
    return np.where(stars, np.float32(220), ground)


def _brick(lots: np.random.Generator) -> Array:
    shift = lots.integers(0, 16, 2)
    rows, columns = np.arange(SIDE)[:, None] + shift[0], np.arange(SIDE)[None, :] + shift[1]
    staggered = columns + 8 * ((rows // 8) % 2)
    mortar = (rows % 8 == 0) | (staggered % 16 == 0)
    return np.where(mortar[..., None], _single((186, 172, 160)), _ground((146, 84, 70), lots, grain=5.0))


BACKGROUNDS: dict[str, Callable[[np.random.Generator], Array]] = {
    "snow": _snow,
    "sand": _sand,
    "grass": _grass,
    "night": _night,
    "brick": _brick,
}
