"""One process that loads images, for processes.py, which measures it from outside.

    python benchmarks/one_process.py \\
        '{"loader": "ours", "data": "shards", "root": "DIR", "torch": false, "seconds": 0}'

It prints a line at the first batch: the seconds since the end of its imports. If `seconds` is not
0, it takes more batches and then sleeps for that time. All prefetched batches exist then, as during
a step that is slower than the loader.
"""

import json
import sys
import time
from collections.abc import Iterator

BATCH, SIZE, THREADS = 64, 224, 2
NUM_TAKEN = 8  # batches, before it sleeps


def theirs(request: dict) -> Iterator[int]:
    """torchvision's reference, with `workers` processes and files repeated `copies` times."""
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    yield 0
    steps = [
        transforms.RandomResizedCrop(SIZE),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
    ]
    normalise = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    data = ImageFolder(f"{request['root']}/train", transforms.Compose([*steps, normalise]))
    data.samples = data.samples * request.get("copies", 1)
    for images, _ in DataLoader(data, BATCH, shuffle=True, num_workers=request["workers"]):
        yield len(images)


def ours(request: dict) -> Iterator[int]:
    """Our loader; without request["torch"], all of it except the copy to torch's tensors."""
    if request["torch"]:
        import torch

        from alexnet_ddp.data.loader import build_loader
    else:
        from concurrent.futures import ThreadPoolExecutor

        import numpy as np

        from alexnet_ddp.data.fill import build_fill
        from alexnet_ddp.data.prefetch import Prefetcher

    from alexnet_ddp.config import BasicAugmentConfig, FolderConfig, ShardsConfig
    from alexnet_ddp.data.augment import build_augment
    from alexnet_ddp.data.sampler import GlobalBatchSampler
    from alexnet_ddp.data.sources.sets import open_data

    yield 0
    cfg = {"folder": FolderConfig, "shards": ShardsConfig}[request["data"]](
        root=request["root"], num_threads=THREADS
    )
    index = open_data(cfg).train
    augment = build_augment(BasicAugmentConfig(), 0, SIZE, cfg.eval_resize)
    if request["torch"]:
        loader = build_loader(cfg, index, augment, THREADS, torch.device("cpu"))
    else:
        threads, allocate = (
            ThreadPoolExecutor(THREADS),
            lambda size: (np.empty(size, np.uint8), None),
        )
        loader = Prefetcher(build_fill(cfg, index, augment), lambda epoch: SIZE, threads, allocate)
    sampler = GlobalBatchSampler(len(index), BATCH, seed=0)
    for batch in loader.batches(sampler.micro_batches(range(sampler.steps_per_epoch), 0, 1, None)):
        yield len(batch.images)


def main(request: dict) -> None:
    batches = {"ours": ours, "theirs": theirs}[request["loader"]](request)
    next(batches)  # its imports
    began = time.perf_counter()
    next(batches)
    print(time.perf_counter() - began, flush=True)
    if request["seconds"]:
        for _ in range(NUM_TAKEN):
            next(batches, 0)
        time.sleep(request["seconds"])
    batches.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
