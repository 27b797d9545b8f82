"""Several crops of each image in an evaluation: the pixels and the mean of torchvision's TenCrop."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms as T

from alexnet_ddp.config import ConfigError, Device, FolderConfig, SyntheticConfig, TrainerConfig
from alexnet_ddp.data.loader import build_loader
from alexnet_ddp.data.sampler import evaluation_batches
from alexnet_ddp.data.sources.index import FileStore, SampleIndex
from alexnet_ddp.data.sources.synthetic import synthetic_images
from alexnet_ddp.data.views import evaluation_views
from alexnet_ddp.runtime import distributed
from alexnet_ddp.runtime.signals import StopSignal
from alexnet_ddp.training.calibration import Outputs, Scores
from alexnet_ddp.training.evaluation import evaluate
from tests.data.test_decode import ORIGINALS, encoded

NUM_CLASSES = 7


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 5, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(72, NUM_CLASSES)).eval()


@torch.inference_mode()
def reference(paths: list[Path], resize: int, size: int, crops: int, flip: bool) -> Tensor:
    """Mean probabilities [n, classes] by torchvision's own transforms."""
    ten = {1: lambda image: [T.functional.center_crop(image, size)], 5: T.FiveCrop(size)}
    several = T.TenCrop(size) if crops == 10 else ten[crops]
    finish = T.Compose([T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    model, rows = network(), []
    for path in paths:
        image = T.functional.resize(Image.open(path).convert("RGB"), resize)
        views = list(several(image))
        if flip:
            views += several(T.functional.hflip(image))
        rows.append(model(torch.stack([finish(view) for view in views])).softmax(1).mean(0))
    return torch.stack(rows)


def ours(paths: list[Path], resize: int, size: int, crops: int, flip: bool) -> Scores:
    cfg = FolderConfig(root="x", image_size=size, eval_resize=resize)
    labels = np.arange(len(paths), dtype=np.int32) % NUM_CLASSES
    files = FileStore.pack("", [str(path) for path in paths])
    index = SampleIndex([str(c) for c in range(NUM_CLASSES)], labels, files)
    views, outputs = evaluation_views(crops, flip), Outputs()
    with distributed.session(Device.cpu) as world:
        loader = build_loader(cfg, index, None, 2, world.device, views=views)
        batches = loader.batches(evaluation_batches(len(paths), 5, 0, 1))
        found = evaluate(
            network(),
            batches,
            TrainerConfig(),
            NUM_CLASSES,
            world,
            StopSignal(),
            observe=outputs.add,
            num_views=len(views),
        )
        assert found is not None
        assert found.row["val/num_images"] == len(paths)
        scores = outputs.gather(world)
    assert scores is not None
    assert scores.labels.tolist() == labels.tolist()
    return scores


@pytest.mark.parametrize(("crops", "flip"), [(1, True), (5, False), (5, True), (10, False)])
def test_crops_equal_torchvisions(tmp_path, crops, flip):
    sizes = [(61, 97), (90, 64), (37, 37), (40, 300), (64, 65), (36, 35), (201, 133)]
    paths = [tmp_path / f"{k}.jpg" for k in range(len(sizes))]
    for path, size in zip(paths, sizes):
        path.write_bytes(encoded(*size))
    scores = ours(paths, 37, 32, crops, flip)
    expected = reference(paths, 37, 32, crops, flip)
    torch.testing.assert_close(scores.logits.exp(), expected, rtol=0, atol=1e-6)
    one_crop = ours(paths, 37, 32, 1, False)
    assert not torch.allclose(scores.logits, one_crop.logits.log_softmax(1), atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not ORIGINALS, reason="shared/data/imagenet-originals is not here")
def test_ten_crops_equal_torchvisions_on_imagenets_own_files():
    paths = ORIGINALS[:200]
    assert len(paths) == 200
    scores = ours(paths, 256, 224, 10, False)
    expected = reference(paths, 256, 224, 10, False)
    torch.testing.assert_close(scores.logits.exp(), expected, rtol=0, atol=1e-6)


def test_several_views_of_synthetic_images_are_refused():
    cfg = SyntheticConfig(num_val=2)
    views = evaluation_views(5, False)
    with pytest.raises(ConfigError, match="crops and flip have no effect on synthetic images"):
        build_loader(cfg, synthetic_images(cfg, 2), None, 1, torch.device("cpu"), views=views)
