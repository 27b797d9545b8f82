"""The images with the largest losses of an evaluation, of all ranks, as pictures with captions."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from alexnet_ddp.config import Device
from alexnet_ddp.config.compose import compose
from alexnet_ddp.data.sources.sets import open_data
from alexnet_ddp.runtime import distributed
from alexnet_ddp.training.last_evaluation import NUM_SHOWN, LargestLosses, LastEvaluation, Mistake
from tests.ranks import run_ranks


def outputs(n: int = 61) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 5, generator=generator), torch.randint(5, (n,), generator=generator)


def gathered(n: int) -> list[Mistake]:
    """Each rank adds its share of batches of 8."""
    logits, labels = outputs(n)
    with distributed.session(Device.cpu) as world:
        losses = LargestLosses(world)
        for start in range(8 * world.rank, n, 8 * world.world_size):
            rows = torch.arange(start, min(start + 8, n))
            batch = SimpleNamespace(indices=rows.int(), labels=labels[rows])
            losses.add(batch, logits[rows])
        return losses.gather()


@pytest.mark.parametrize("n", [5, 61])
def test_the_largest_losses_are_those_of_all_images(n):
    logits, labels = outputs(n)
    losses = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    order = losses.argsort(descending=True)[:NUM_SHOWN].tolist()
    found = gathered(n)
    assert [one.index for one in found] == order
    assert [one.loss for one in found] == pytest.approx(losses[order].tolist(), abs=1e-12)
    first = order[0]
    assert (found[0].label, found[0].predicted) == (labels[first], logits[first].argmax())
    share = logits[first].double().softmax(0).max().item()
    assert found[0].probability == pytest.approx(share, abs=1e-12)


def test_all_ranks_find_the_same():
    assert run_ranks(gathered, 3, 61) == 3 * [gathered(61)]


class Shown:
    """Records what a tracker is asked to show."""

    def classes(self, results):
        self.results = results

    def examples(self, examples):
        self.shown = examples


def test_pictures_and_captions_belong_to_their_images(image_folder):
    cfg = compose("train", ["data=folder", f"data.root={image_folder}", "data.image_size=64", "run.name=x"])  # fmt: skip
    logits, labels = outputs()
    with distributed.session(Device.cpu) as world:
        data = open_data(cfg.data)
        labels = torch.from_numpy(data.val.labels.astype(np.int64))
        last, tracker = LastEvaluation(cfg.data, data, world), Shown()
        last.add(SimpleNamespace(indices=torch.arange(61), labels=labels), logits)
        counts = torch.stack([torch.bincount(labels, minlength=5)] * 3, dim=1)
        last.show(tracker, 7, counts)
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    worst = int(losses.argmax())
    name = "/".join(data.val.name(worst).split("/")[-2:])
    assert tracker.shown.captions[0].startswith(
        f"loss {losses[worst]:.2f}: label class{labels[worst]}"
    )
    assert tracker.shown.captions[0].endswith(f"%), {name}")
    assert tracker.shown.step == tracker.results.step == 7
    assert len(tracker.shown.jpegs) == len(tracker.shown.captions) == NUM_SHOWN
    assert tracker.shown.grid.shape[2] == 3
    assert tracker.results.confusion.sum() == 61
