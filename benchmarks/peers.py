"""The loaders with which ours is compared, each used as in its own documentation.

All of them return batches of 64 images (RandomResizedCrop, horizontal flip, normalised floats) from
2 persistent worker processes. They decode with Pillow and v1 transforms, or to uint8 tensors and
v2.

    python benchmarks/peers.py litdata|mosaicml TREE OUT     packs TREE/train/CLASS/* unchanged
"""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torchvision
from torch.utils.data import DataLoader
from torchvision import transforms as v1
from torchvision.transforms import v2

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
BATCH, WORKERS = 64, 2


def on_pillow(size: int) -> v1.Compose:
    """torchvision's v1 presets: Pillow until ToTensor."""
    return v1.Compose(
        [
            v1.RandomResizedCrop(size),
            v1.RandomHorizontalFlip(),
            v1.ToTensor(),
            v1.Normalize(MEAN, STD),
        ]
    )


def on_tensors(size: int) -> v2.Compose:
    """torchvision's v2 on uint8 tensors; Pillow images are converted."""
    steps = [v2.ToImage(), v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


def reference(tree: Path, transform: Callable) -> Callable[[], int]:
    """torchvision's references: ImageFolder and DataLoader."""
    data = torchvision.datasets.ImageFolder(tree / "train", transform)
    return _count(
        DataLoader(data, BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True)
    )


def webdataset(shards: Path, size: int) -> Callable[[], int]:
    """Our own tars, which have its layout; batched in the workers, as in its ImageNet example."""
    import webdataset as wds

    urls = sorted(str(path) for path in shards.glob("train-*.tar"))
    data = (
        wds.WebDataset(urls, shardshuffle=len(urls))
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
    )
    data = data.map_tuple(on_pillow(size), int).batched(BATCH)
    return _count(
        wds.WebLoader(data, batch_size=None, num_workers=WORKERS, persistent_workers=True)
    )


def litdata(chunks: Path, size: int) -> Callable[[], int]:
    """litdata, which decodes JPEGs to uint8 tensors itself."""
    from litdata import StreamingDataLoader, StreamingDataset

    data = StreamingDataset(str(chunks), shuffle=True, transform=_on_first(on_tensors(size)))
    return _count(
        StreamingDataLoader(data, batch_size=BATCH, num_workers=WORKERS, persistent_workers=True)
    )


def mosaicml(shards: Path, size: int) -> Callable[[], int]:
    """mosaicml-streaming, with Pillow images and a transform, as in its StreamingImageNet."""
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    class Images(StreamingDataset):
        def __getitem__(self, at: int) -> tuple[torch.Tensor, int]:
            sample = super().__getitem__(at)
            return transform(sample["image"]), sample["label"]

    transform = on_pillow(size)
    clean_stale_shared_memory()
    data = Images(local=str(shards), shuffle=True, batch_size=BATCH)
    return _count(DataLoader(data, BATCH, num_workers=WORKERS, persistent_workers=True))


def _count(loader: Iterable) -> Callable[[], int]:
    return lambda: sum(len(batch[0]) for batch in loader)


class _on_first:  # a class, because workers may have to pickle it
    def __init__(self, transform: Callable) -> None:
        self.transform = transform

    def __call__(self, sample: dict) -> tuple[torch.Tensor, int]:
        return self.transform(sample["image"]), sample["label"]


def _samples(tree: Path) -> list[tuple[str, int]]:
    return torchvision.datasets.ImageFolder(tree / "train").samples


def _opened(sample: tuple[str, int]) -> dict:
    """A sample for both packers, which store an opened JPEG as the bytes of its file."""
    from PIL import Image

    return {"image": Image.open(sample[0]), "label": sample[1]}


def pack_litdata(tree: Path, out: Path) -> None:
    from litdata import optimize

    optimize(
        _opened, _samples(tree), str(out), chunk_bytes="4MB", num_workers=1, start_method="fork"
    )


def pack_mosaicml(tree: Path, out: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(
        out=str(out), columns={"image": "jpeg", "label": "int"}, size_limit=1 << 23
    ) as writer:
        for sample in _samples(tree):
            writer.write(_opened(sample))


if __name__ == "__main__":
    pack = {"litdata": pack_litdata, "mosaicml": pack_mosaicml}[sys.argv[1]]
    pack(Path(sys.argv[2]), Path(sys.argv[3]))
