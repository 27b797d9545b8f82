"""The views of an image in an evaluation: crops of the resized image, and their mirror images."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class View:
    """A crop of an image, perhaps mirrored horizontally.

    x, y: the position of the crop, in the mirrored image if `flip`: 0 is the left or upper edge,
    1 the right or lower edge.
    """

    x: float = 0.5
    y: float = 0.5
    flip: bool = False

    def corner(self, size: tuple[int, int], crop: tuple[int, int]) -> tuple[int, int]:
        """The upper left corner of the crop in the image that is not mirrored.

        size, crop: width and height in pixels. The rounding is that of torchvision's center_crop.
        """
        spare = size[0] - crop[0], size[1] - crop[1]
        left, top = round(spare[0] * self.x), round(spare[1] * self.y)
        return spare[0] - left if self.flip else left, top


EvalViews = Sequence[View]
CENTRE = (View(),)
_CORNERS = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0))


def evaluation_views(crops: int, flip: bool) -> EvalViews:
    """The views of torchvision's FiveCrop and TenCrop, in their order.

    crops: 1 (the centre), 5 (the corners and the centre), or 10 (those and their mirror images).
    flip: also the mirror image of each of the 1 or 5 crops.
    """
    places = [(0.5, 0.5)] if crops == 1 else [*_CORNERS, (0.5, 0.5)]
    flips = (False, True) if flip or crops == 10 else (False,)
    return tuple(View(x, y, mirrored) for mirrored in flips for x, y in places)
