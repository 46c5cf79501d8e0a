"""The probe set "shapes": 8,000 rendered images, as many of each class, with known truth."""

from __future__ import annotations

from PIL.Image import Image

from ..digests import digest_of_file
from ..errors import ArgumentError
from . import renderer, world
from .renderer import SIDE, class_attributes, draw_truth, render_class
from .world import CLASSES, Truth

PROBE_WORLD = 2
IMAGES_PER_CLASS = 100


class ShapesProbe:
    """Images of the embedded world, drawn when asked for; image i is of class ``i % 80`` ("red circle", …).

    By default a hundred images of each class, from a world that nothing was trained on.

    >>> probe = ShapesProbe()
    >>> len(probe), probe.classes[probe.label(81)], probe.truth(81).colour
    (8000, 'red square', 'red')
    """

    name = "shapes"
    classes = CLASSES

    def __init__(self, *, size: int = IMAGES_PER_CLASS * len(CLASSES), seed: int = PROBE_WORLD) -> None:
        if size < 1:
            raise ArgumentError(f"size is {size}, but a probe set needs at least one image. Use 1 or more.")
        self.size = size
        self.seed = seed

    def __len__(self) -> int:
        return self.size

    def image(self, i: int) -> Image:
        """Draw image `i`: 64 x 64, RGB."""
        return render_class(self.seed, self._checked(i))[0]

    def truth(self, i: int) -> Truth:
        """Tell the attributes of image `i`."""
        return draw_truth(self.seed, self._checked(i), **class_attributes(i))

    def identifier(self, i: int) -> str:
        """Name image `i`: ``shapes/SEED/i``."""
        return f"{self.name}/{self.seed}/{self._checked(i)}"

    def label(self, i: int) -> int:
        """Give the class of image `i`, an index into `classes`."""
        return self._checked(i) % len(self.classes)

    @property
    def digest(self) -> str:
        """Name the images: what draws them, the seed and how many there are."""
        drawn_by = digest_of_file(renderer.__file__)[:16] + digest_of_file(world.__file__)[:16]
        return f"{self.name}-{SIDE}-{self.seed}-{self.size}-{drawn_by}"

    def _checked(self, i: int) -> int:
        if not 0 <= i < self.size:
            raise IndexError(f"image {i} of a probe set of {self.size}")
        return i
