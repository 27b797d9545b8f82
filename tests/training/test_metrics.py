"""Sums and counts are exact, and become means once, where a row is written."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from alexnet_ddp.config import Device
from alexnet_ddp.runtime.distributed import session
from alexnet_ddp.training import metrics
from alexnet_ddp.training.metrics import Meter, Throughput, evaluation_row, train_row


@pytest.fixture(scope="module", autouse=True)
def world():
    """A world of one: Meter.read() is collective."""
    threads = torch.get_num_threads()
    with session(Device.cpu) as world:
        yield world
    torch.set_num_threads(threads)


def logits_that_rank(labels: Tensor, ranks: list[int], num_classes: int) -> Tensor:
    """Logits in which the true class of image i comes at place ranks[i], from 0."""
    logits = torch.zeros(len(labels), num_classes)
    for i, (label, rank) in enumerate(zip(labels.tolist(), ranks)):
        others = [c for c in range(num_classes) if c != label]
        order = [*others[:rank], label, *others[rank:]]
        for place, c in enumerate(order):
            logits[i, c] = -float(place)
    return logits


def test_a_meter_sums_loss_hits_and_images_over_batches():
    meter = Meter(torch.device("cpu"))
    for ranks in ([0, 1, 4, 5], [0, 0, 9]):
        labels = torch.arange(len(ranks)) + 2
        meter.add(torch.tensor(2.5), logits_that_rank(labels, ranks, 10), labels)
    assert meter.read() == {"loss": 5.0, "correct1": 3, "correct5": 5, "images": 7, "weight": 7}


def test_reading_does_not_forget_and_reset_does():
    meter, labels = Meter(torch.device("cpu")), torch.tensor([1])
    logits = logits_that_rank(labels, [0], 6)
    meter.add(torch.tensor(1.0), logits, labels)
    assert meter.read()["images"] == 1
    assert meter.read()["images"] == 1
    meter.add(torch.tensor(1.0), logits, labels)
    assert meter.read() == {"loss": 2.0, "correct1": 2, "correct5": 2, "images": 2, "weight": 2}
    meter.reset()
    assert meter.read() == {"loss": 0.0, "correct1": 0, "correct5": 0, "images": 0, "weight": 0}


def test_a_meter_goes_on_from_the_sums_of_a_checkpoint():
    meter, labels = Meter(torch.device("cpu")), torch.tensor([1, 1])
    sums = {"loss": 0.1 + 0.2, "correct1": 3.0, "correct5": 5.0, "images": 2.0**40 + 1}
    meter.load(sums)
    weight = {"weight": sums["images"]}  # of a checkpoint that has none
    assert meter.read() == sums | weight
    meter.load(sums | {"weight": 3.5})
    logits = logits_that_rank(labels, [0, 2], 6)
    meter.add(torch.tensor(0.0), logits, labels, torch.tensor(1.25))
    more = {"correct1": 4, "correct5": 7, "images": 2.0**40 + 3, "weight": 4.75}
    assert meter.read() == sums | more


@pytest.mark.parametrize("num_classes", [1, 2, 5])
def test_with_five_classes_or_fewer_every_image_is_among_the_top_five(num_classes):
    meter, labels = Meter(torch.device("cpu")), torch.zeros(3, dtype=torch.int64)
    meter.add(
        torch.tensor(1.0), logits_that_rank(labels, [0, 0, num_classes - 1], num_classes), labels
    )
    sums = meter.read()
    assert (sums["correct1"], sums["correct5"]) == (3 if num_classes == 1 else 2, 3)


def test_a_meter_takes_a_loss_that_requires_a_gradient_and_keeps_no_graph():
    meter, labels = Meter(torch.device("cpu")), torch.tensor([0])
    logits = torch.zeros(1, 6, requires_grad=True)
    meter.add(logits.sum() + 1, logits, labels)
    assert meter.read()["loss"] == 1


def test_a_training_row_is_a_mean_over_images_and_a_percentage():
    sums = {"loss": 30.0, "correct1": 5.0, "correct5": 9.0, "images": 20.0, "weight": 25.0}
    row = train_row(sums)
    assert row == {"train/loss": 1.2, "train/top1": 25.0}


def test_a_row_without_a_step_that_was_applied_has_no_loss():
    assert train_row({"loss": 0.0, "correct1": 0.0, "correct5": 0.0, "images": 0.0}) == {}


def test_an_evaluation_row_carries_its_counts_as_integers():
    row = evaluation_row({"loss": 501.5, "correct1": 333.0, "correct5": 1003.0, "images": 1003.0})
    assert row == {
        "val/loss": 0.5,
        "val/top1": 100 * 333 / 1003,
        "val/top5": 100.0,
        "val/num_images": 1003,
        "val/correct1": 333,
        "val/correct5": 1003,
    }
    assert {type(row[f"val/{name}"]) for name in ("num_images", "correct1", "correct5")} == {int}


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: now.s))
    return now


def test_pace_is_images_and_waiting_since_the_last_row(clock):
    pace = Throughput()
    for _ in range(4):
        pace.add(planned=64, seen=64)
    clock.s += 2
    assert pace.row(waited_s=0.4) == {
        "train/images_per_sec": 128.0,
        "time/step_s": 0.5,
        "time/data_s": 0.1,
    }
    pace.add(planned=64, seen=64)
    clock.s += 4
    assert pace.row(waited_s=0.9) == {
        "train/images_per_sec": 16.0,
        "time/step_s": 4.0,
        "time/data_s": 0.5,
    }


def test_pace_leaves_pauses_out(clock):
    pace = Throughput()
    pace.add(planned=10, seen=10)
    clock.s += 7
    pace.pause(5)
    assert pace.row(0)["train/images_per_sec"] == 5


def test_pace_counts_images_that_could_not_be_read_and_only_while_there_are_some(clock):
    pace = Throughput()
    pace.add(planned=10, seen=8)
    pace.add(planned=10, seen=9)
    clock.s += 1
    row = pace.row(0)
    assert (row["train/images_per_sec"], row["data/num_bad_images"]) == (17, 3)
    pace.add(planned=10, seen=10)
    clock.s += 1
    assert "data/num_bad_images" not in pace.row(0)


def test_pace_without_a_step_or_without_time_is_finite(clock):
    pace = Throughput()
    assert pace.row(0) == {"train/images_per_sec": 0.0, "time/step_s": 0.0, "time/data_s": 0.0}
