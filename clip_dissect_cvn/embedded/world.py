"""What there is to see in the embedded world, and the words for it.

An image shows one figure. Six attributes say all there is to say about it, and every attribute has its own
words, so that a phrase such as "red circle on grass" is true or false of an image beyond doubt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import product

from ..errors import ArgumentError

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "brown", "white")
TEXTURES = ("plain", "striped", "dotted", "checkered")
BACKGROUNDS = ("snow", "sand", "grass", "night", "brick")
SIZES = ("small", "large")
PLACES = ("center", "left", "right", "top", "bottom")

ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": COLOURS,
    "texture": TEXTURES,
    "background": BACKGROUNDS,
    "size": SIZES,
    "place": PLACES,
}
ATTRIBUTE_OF = {word: attribute for attribute, words in ATTRIBUTES.items() for word in words}
FILLERS = frozenset({"a", "photo", "of", "on", "at", "the", "shape"})
NAMED_PAIRS = (
    ("colour", "shape"),
    ("texture", "shape"),
    ("size", "shape"),
    ("shape", "background"),
    ("shape", "place"),
)
CLASSES = tuple(f"{colour} {shape}" for colour, shape in product(COLOURS, SHAPES))


@dataclass(frozen=True)
class Truth:
    """The attributes of one image, each by its word.

    >>> truth = Truth("circle", "red", "plain", "grass", "small", "left")
    >>> truth.has("red circle"), truth.has("circle on snow")
    (True, False)
    """

    shape: str
    colour: str
    texture: str
    background: str
    size: str
    place: str

    def has(self, concept: str) -> bool:
        """Tell whether all that `concept` says is true of the image; ArgumentError for an unknown word."""
        mine = asdict(self)
        return all(mine[attribute] == word for attribute, word in parse(concept).items())


def phrase(attributes: Mapping[str, str]) -> str:
    """Say `attributes` (attribute -> word) in words; a single one is its bare word.

    >>> phrase({"shape": "star", "place": "left", "colour": "red"})
    'red star at the left'
    >>> phrase({"background": "grass"})
    'grass'
    """
    if len(attributes) == 1:
        return next(iter(attributes.values()))
    words = [attributes[kind] for kind in ("size", "texture", "colour") if kind in attributes]
    words.append(attributes.get("shape", "shape"))
    words += ["on", attributes["background"]] if "background" in attributes else []
    words += ["at the", attributes["place"]] if "place" in attributes else []
    return " ".join(words)


def parse(concept: str) -> dict[str, str]:
    """Read the attributes (attribute -> word) that `concept` asks for: the inverse of `phrase`.

    Raises
    ------
    ArgumentError
        when a word is unknown, or no word or two words name the same attribute.

    >>> parse("red circle on grass")
    {'colour': 'red', 'shape': 'circle', 'background': 'grass'}
    """
    words = [word for word in concept.split() if word not in FILLERS]
    unknown = [word for word in words if word not in ATTRIBUTE_OF]
    attributes = {ATTRIBUTE_OF[word]: word for word in words if word in ATTRIBUTE_OF}
    if unknown or not words or len(attributes) < len(words):
        raise ArgumentError(
            f"concept is {concept!r}, whose truth in the embedded world is not known. "
            f"Use at most one word of each kind: {', '.join(ATTRIBUTE_OF)}."
        )
    return attributes


def shapes_concepts() -> tuple[str, ...]:
    """List the concept set "shapes": pairs of attributes such as "red circle", and every attribute word.

    The more specific come first: of concepts with equal scores, the first in the list is named.

    >>> words = shapes_concepts()
    >>> len(words), words[:2], words[-1]
    (242, ('red circle', 'red square'), 'bottom')
    """
    pairs = (
        phrase(dict(zip(kinds, words, strict=True)))
        for kinds in NAMED_PAIRS
        for words in product(*(ATTRIBUTES[kind] for kind in kinds))
    )
    return (*pairs, *ATTRIBUTE_OF)
