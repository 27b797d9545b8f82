"""A peer of benchmarks/communication.py: the training of plain_ddp.py with Lightning's DDP."""

import logging
import os
import warnings
from collections.abc import Callable

import lightning
import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, IterableDataset


class AlexNet(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.loss_fn = torchvision.models.alexnet(), nn.CrossEntropyLoss()

    def training_step(self, batch: tuple, _: int) -> torch.Tensor:
        images, labels = batch
        return self.loss_fn(self.model(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)


class SameBatch(IterableDataset):
    def __init__(self, batch: int, size: int) -> None:
        self.pair = torch.randn(batch, 3, size, size), torch.randint(1000, (batch,))

    def __iter__(self):
        while True:
            yield self.pair


class AsOrdered(lightning.Callback):
    def __init__(self, more: Callable[[], bool]) -> None:
        self.more = more

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: object) -> int | None:
        if self.more():
            return None
        trainer.should_stop = True
        return -1


def train(more: Callable[[], bool], batch: int, size: int) -> None:
    """Take a step whenever more() returns True, until it returns False. Each rank is a node."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    os.environ["NODE_RANK"] = os.environ["RANK"]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    world = {
        "num_nodes": int(os.environ["WORLD_SIZE"]),
        "devices": 1,
        "accelerator": "cpu",
        "strategy": "ddp",
    }
    trainer = lightning.Trainer(
        max_epochs=1, callbacks=AsOrdered(more), enable_model_summary=False, **quiet, **world
    )
    trainer.fit(AlexNet(), DataLoader(SameBatch(batch, size), batch_size=None))
