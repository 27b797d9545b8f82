"""What load_run returns, with a network that is not trained."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from alexnet_ddp.api import TrainedRun
from alexnet_ddp.config.compose import compose


@pytest.fixture
def untrained(tmp_path) -> TrainedRun:
    return TrainedRun(nn.Identity(), ["a"], compose("train", ["data=synthetic"]), tmp_path)


def test_an_array_is_transformed_as_the_image(untrained):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 280, 3), np.uint8)
    for array in (pixels, pixels[:, ::-1], pixels[..., 0]):
        expected = untrained.transform(Image.fromarray(array))
        assert torch.equal(untrained.transform(array), expected)


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (np.zeros((40, 40, 3), np.float32), "float32 array [40, 40, 3]"),
        (np.zeros((3, 40, 40), np.uint8), "uint8 array [3, 40, 40]"),
        (np.zeros((40, 40, 4), np.uint8), "uint8 array [40, 40, 4]"),
        (np.zeros((0, 40), np.uint8), "uint8 array [0, 40]"),
        (torch.zeros(40, 40, 3, dtype=torch.uint8), "Tensor"),
        ("photo.jpg", "str"),
    ],
)
def test_what_is_no_image_is_one_line(untrained, image, found):
    with pytest.raises(TypeError) as error:
        untrained.transform(image)
    kinds = "an image of PIL, or a uint8 array [height, width] or [height, width, 3]"
    assert str(error.value) == f"transform takes {kinds}, not {found}"
