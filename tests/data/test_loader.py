"""Batches in order, filled ahead by a bounded number, in buffers that are used again; errors where they belong."""

import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from alexnet_ddp.config import (
    AlexNet2012AugmentConfig,
    BasicAugmentConfig,
    FolderConfig,
    NoAugmentConfig,
    OnBadImage,
    SyntheticConfig,
)
from alexnet_ddp.data.augment import build_augment
from alexnet_ddp.data.decode import centre_into, crop_into, size_of
from alexnet_ddp.data.effects import Effects
from alexnet_ddp.data.image import FORMATS
from alexnet_ddp.data.loader import Loader, build_loader
from alexnet_ddp.data.sampler import GlobalBatchSampler, MicroBatch, evaluation_batches
from alexnet_ddp.data.sources.index import index_folder
from alexnet_ddp.data.sources.sets import open_data
from alexnet_ddp.data.sources.source import Skipped
from alexnet_ddp.runtime.errors import DataError
from tests.conftest import make_folder

CPU = torch.device("cpu")
AHEAD = 3  # batches that may be filled while one is used
SIZE = 4
LABELS = (np.arange(1_000, dtype=np.int32) * 7) % 10


def paint(slots: np.ndarray, indices: np.ndarray, epoch: int) -> list[int]:
    """A fill whose pixels say which image and epoch they are of."""
    slots[...] = ((indices + epoch) % 251)[:, None, None, None]
    return []


@contextmanager
def loading(fill, num_threads=2, colour=None, device=CPU, image_size=lambda epoch: SIZE):
    """colour(epoch, indices): the only effect there is."""

    def effects(epoch, indices, size, partners, copy):
        return Effects(colour=copy(colour(epoch, indices)))

    augment = SimpleNamespace(mixes=False, effects=effects) if colour else None
    loader = Loader(fill, LABELS, augment, image_size, num_threads, device)
    try:
        yield loader
    finally:
        loader.close()


def micro_batches(*sizes: int, epoch: int = 0) -> list[MicroBatch]:
    """One micro-batch per step, of the given sizes, with consecutive images."""
    ends = np.cumsum(sizes)
    return [
        MicroBatch(k, epoch, np.arange(end - n, end), True)
        for k, (end, n) in enumerate(zip(ends, sizes))
    ]


def assert_shows(batch, micro_batch: MicroBatch) -> None:
    n = len(micro_batch.indices)
    assert (batch.micro_batch.step, batch.micro_batch.epoch) == (
        micro_batch.step,
        micro_batch.epoch,
    )
    assert batch.images.shape == (n, SIZE, SIZE, 3)
    assert (batch.images.dtype, batch.labels.dtype, batch.indices.dtype) == (
        torch.uint8,
        torch.int64,
        torch.int32,
    )
    assert batch.indices.tolist() == micro_batch.indices.tolist()
    assert batch.labels.tolist() == LABELS[micro_batch.indices].tolist()
    assert (
        batch.images.numpy()
        == ((micro_batch.indices + micro_batch.epoch) % 251)[:, None, None, None]
    ).all()


def becomes(expected: int, count) -> bool:
    """Whether count() reaches `expected` and stays there."""
    deadline = time.monotonic() + 5
    while count() < expected and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.03)
    return count() == expected


# Order, contents, sizes


@pytest.mark.parametrize("num_threads", [1, 2, 4])
def test_batches_arrive_in_order_with_their_labels_indices_and_pixels(num_threads):
    def slow(slots, indices, epoch):
        time.sleep(0.002 * (indices[0] % 3))  # later batches are often ready first
        return paint(slots, indices, epoch)

    plan = list(GlobalBatchSampler(103, 20, seed=1).micro_batches(range(14), 0, 1, None))
    with loading(slow, num_threads) as loader:
        for batch, micro_batch in zip(loader.batches(plan), plan, strict=True):
            assert_shows(batch, micro_batch)
    assert {micro_batch.epoch for micro_batch in plan} == {0, 1, 2}


def test_smaller_larger_and_empty_batches_are_shown_exactly():
    plan = micro_batches(20, 20, 3, 0, 1, 0, 0, 33, 20, 33, 70, 2, 70, 0)
    with loading(paint) as loader:
        for batch, micro_batch in zip(loader.batches(plan), plan, strict=True):
            assert_shows(batch, micro_batch)


def test_a_plan_may_begin_with_an_empty_batch_or_have_none_at_all():
    plan = micro_batches(0, 0, 9)
    with loading(paint) as loader:
        assert list(loader.batches([])) == []
        for batch, micro_batch in zip(loader.batches(plan), plan, strict=True):
            assert_shows(batch, micro_batch)


def test_a_loader_goes_through_one_plan_after_another():
    with loading(paint) as loader:
        for epoch in range(3):
            plan = micro_batches(20, 20, 5, epoch=epoch)
            for batch, micro_batch in zip(loader.batches(plan), plan, strict=True):
                assert_shows(batch, micro_batch)


def test_colours_are_those_of_the_images_and_the_epoch_of_the_work():
    def colour(epoch, indices):
        return (indices[:, None] + [0, 0.25, epoch]).astype(np.float32)

    with loading(paint, colour=colour) as loader:
        for batch in loader.batches(micro_batches(10, 3, epoch=6)):
            assert batch.effects.colour.dtype == torch.float32
            assert np.array_equal(
                batch.effects.colour.numpy(), colour(6, batch.micro_batch.indices)
            )
    with loading(paint) as loader:
        assert next(loader.batches(micro_batches(4))).effects.colour is None


# Ahead, buffers, time


def test_nothing_is_filled_before_the_first_batch_is_asked_for_and_a_bounded_number_ahead():
    filled = []

    def fill(slots, indices, epoch):
        filled.extend(indices.tolist())
        return paint(slots, indices, epoch)

    taken = []
    plan = (taken.append(micro_batch) or micro_batch for micro_batch in micro_batches(*[5] * 30))
    with loading(fill) as loader:
        batches = loader.batches(plan)
        assert becomes(0, lambda: len(filled))
        for used in range(1, 4):
            next(batches)
            assert becomes(5 * (used + AHEAD), lambda: len(filled))
            assert len(taken) == used + AHEAD
        batches.close()


def test_few_buffers_are_used_again_and_again():
    with loading(paint) as loader:
        places = Counter(
            batch.images.data_ptr() for batch in loader.batches(micro_batches(*[20] * 40, 3))
        )
    assert len(places) <= AHEAD + 1
    assert min(places.values()) > 1


def test_a_batch_stays_as_it_is_until_the_next_is_asked_for():
    filled = []

    def fill(slots, indices, epoch):
        filled.append(indices)
        return paint(slots, indices, epoch)

    with loading(fill, num_threads=4) as loader:
        for batch in loader.batches(micro_batches(*[8] * 12)):
            assert becomes(min(12, batch.micro_batch.step + 1 + AHEAD), lambda: len(filled))
            assert_shows(batch, batch.micro_batch)


def test_the_images_of_a_batch_are_shared_out_to_the_threads():
    names = set()
    together = threading.Barrier(3, timeout=5)

    def fill(slots, indices, epoch):
        names.add(threading.current_thread().name)
        together.wait()  # three at once, or a BrokenBarrierError
        return paint(slots, indices, epoch)

    with loading(fill, num_threads=3) as loader:
        (batch,) = loader.batches(micro_batches(48))
        assert_shows(batch, batch.micro_batch)
    assert len(names) == 3


def test_waiting_for_images_is_counted_and_time_spent_elsewhere_is_not():
    def slow(slots, indices, epoch):
        time.sleep(0.03)
        return paint(slots, indices, epoch)

    with loading(slow, num_threads=1) as loader:
        waited = []
        for _ in loader.batches(micro_batches(1, 1)):
            waited.append(loader.waited_s)
            time.sleep(0.1)
            assert loader.waited_s == waited[-1]
    assert waited[0] > 0.02
    assert waited[1] - waited[0] < 0.03  # the second was filled meanwhile


@pytest.mark.parametrize("num_images", [5, 40])
def test_images_that_grow_have_the_size_of_their_epoch_while_two_sizes_are_on_their_way(num_images):
    sizes = (1, 2, 2, 4, 4)
    filled = set()

    def fill(slots, indices, epoch):
        filled.add((epoch, slots.shape[1:]))
        return paint(slots, indices, epoch)

    plan = [
        micro_batch
        for epoch in range(5)
        for micro_batch in micro_batches(*[num_images] * 4, 3, epoch=epoch)
    ]
    with loading(fill, image_size=sizes.__getitem__) as loader:
        for batch, micro_batch in zip(loader.batches(plan), plan, strict=True):
            size = sizes[micro_batch.epoch]
            assert batch.images.shape == (len(micro_batch.indices), size, size, 3)
            assert batch.images.is_contiguous()
            assert (
                batch.images.numpy()
                == ((micro_batch.indices + micro_batch.epoch) % 251)[:, None, None, None]
            ).all()
    assert filled == {(epoch, (size, size, 3)) for epoch, size in enumerate(sizes)}


# Errors and ends


def test_an_error_in_a_thread_is_raised_when_its_batch_is_requested_and_not_earlier():
    failed = threading.Event()

    def fill(slots, indices, epoch):
        if 23 in indices:
            failed.set()
            raise DataError("image 23 is broken")
        return paint(slots, indices, epoch)

    plan = micro_batches(10, 10, 10, 10)
    with loading(fill) as loader:
        batches = loader.batches(plan)
        assert_shows(next(batches), plan[0])
        assert failed.wait(5)
        assert_shows(next(batches), plan[1])
        with pytest.raises(DataError, match="image 23 is broken"):
            next(batches)
        assert list(batches) == []
        assert_shows(next(loader.batches(plan)), plan[0])  # the loader itself is whole


def test_closing_early_cancels_what_was_not_begun_and_leaves_no_threads():
    filled, begun, go_on = [], threading.Event(), threading.Event()

    def fill(slots, indices, epoch):
        if indices[0] >= 5:
            begun.set()
            assert go_on.wait(5)
        filled.append(int(indices[0]))
        return paint(slots, indices, epoch)

    before = set(threading.enumerate())
    with loading(fill, num_threads=1) as loader:
        batches = loader.batches(micro_batches(*[5] * 30))
        next(batches)
        assert begun.wait(5)
        batches.close()
        go_on.set()
        assert_shows(
            next(loader.batches(micro_batches(3))), micro_batches(3)[0]
        )  # queued behind whatever was not cancelled
    assert filled == [0, 5, 0]
    assert set(threading.enumerate()) <= before


def test_closing_waits_for_threads_that_are_at_work_and_may_be_repeated():
    before = set(threading.enumerate())
    with loading(paint, num_threads=4) as loader:
        next(loader.batches(micro_batches(*[40] * 5)))
        loader.close()
        assert set(threading.enumerate()) <= before


# On a GPU, with CUDA's calls patched


class FakeEvent:
    made: list = []

    def __init__(self):
        self.done = []
        FakeEvent.made.append(self)

    def record(self):
        self.done.append("record")

    def synchronize(self):
        self.done.append("synchronize")


@pytest.fixture
def asked(monkeypatch):
    """What torch.empty was asked to pin, with copies to a GPU that stay in host memory."""
    pinned, empty, to = [], torch.empty, torch.Tensor.to

    def fake_empty(*shape, pin_memory=False, **how):
        pinned.append(pin_memory)
        return empty(*shape, **how)

    def fake_to(tensor, device, **how):
        assert how == {"non_blocking": True}
        return tensor.clone() if device.type == "cuda" else to(tensor, device, **how)

    FakeEvent.made = []
    monkeypatch.setattr(torch, "empty", fake_empty)
    monkeypatch.setattr(torch.Tensor, "to", fake_to)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    return pinned


def test_memory_is_pinned_for_a_gpu_and_a_buffer_is_filled_again_only_after_its_copy(asked):
    plan = micro_batches(*[6] * 12)
    waited_at = []

    def fill(slots, indices, epoch):
        waited_at.append([event.done for event in FakeEvent.made].count(["record", "synchronize"]))
        return paint(slots, indices, epoch)

    with loading(fill, num_threads=1, device=torch.device("cuda", 0)) as loader:
        for batch, micro_batch in zip(loader.batches(plan), plan, strict=True):
            assert_shows(batch, micro_batch)
    assert set(asked) == {True}
    assert len(asked) <= AHEAD + 1
    assert len(FakeEvent.made) == 12
    assert all(event.done[0] == "record" for event in FakeEvent.made)
    reused = 12 - len(asked)
    assert [event.done for event in FakeEvent.made].count(["record", "synchronize"]) == reused
    assert all(count >= k + 1 - len(asked) for k, count in enumerate(waited_at))


def test_on_a_cpu_nothing_is_pinned_and_no_events_are_made(asked):
    with loading(paint) as loader:
        list(loader.batches(micro_batches(*[6] * 5)))
    assert set(asked) == {False}
    assert FakeEvent.made == []


# With real files


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """40 training and 21 validation images of 5 classes."""
    return make_folder(tmp_path_factory.mktemp("loader") / "folder", 40, 21)


def real_loader(folder, num_threads=2, augment=True, seed=0, split="train", **knobs):
    cfg = FolderConfig(root=str(folder), image_size=32, **knobs)
    how = build_augment(BasicAugmentConfig(), seed, 32, cfg.eval_resize) if augment else None
    index = index_folder(folder, split)
    return build_loader(cfg, index, how, num_threads, CPU), index


def seen(loader: Loader, plan) -> dict[int, bytes]:
    """The pixels of each image."""
    try:
        return {
            int(i): image.numpy().tobytes()
            for b in loader.batches(plan)
            for i, image in zip(b.indices, b.images)
        }
    finally:
        loader.close()


def test_training_pixels_do_not_depend_on_threads_batches_or_ranks(folder):
    loader, index = real_loader(folder, 1)
    expected = {}
    for i in range(40):
        data, slot = index.read(i), np.empty((32, 32, 3), dtype=np.uint8)
        width, height = size_of(data)
        augment = build_augment(BasicAugmentConfig(), 0, 32, 37)
        view = augment.views(0, np.array([i]), np.array([width]), np.array([height]))
        crop_into(
            slot, data, (view.left[0], view.top[0], view.width[0], view.height[0]), view.flip[0]
        )
        expected[i] = slot.tobytes()
    loader.close()
    for num_threads, batch, world_size, micro in (
        (1, 40, 1, None),
        (2, 17, 1, 5),
        (4, 9, 3, 2),
        (2, 1, 1, 1),
    ):
        sampler, found = GlobalBatchSampler(40, batch, seed=0), {}
        for rank in range(world_size):
            plan = sampler.micro_batches(range(sampler.steps_per_epoch), rank, world_size, micro)
            found |= seen(real_loader(folder, num_threads)[0], plan)
        assert found == expected


@pytest.mark.parametrize(
    "augment", [BasicAugmentConfig(), AlexNet2012AugmentConfig(), NoAugmentConfig()]
)
def test_a_small_image_that_will_grow_shows_what_the_large_one_shows(tmp_path, augment):
    """The same box and flip, with fewer pixels: the large one, reduced, looks like it."""
    y, x = np.mgrid[0:100, 0:120]
    (tmp_path / "train/a").mkdir(parents=True)
    for i in range(8):
        smooth = np.stack([2 * x, 2 * y, x + y + i], axis=-1).astype(np.uint8)
        Image.fromarray(smooth).save(tmp_path / f"train/a/{i}.png")
    knobs = {"image_size": 32, "eval_resize": 40, "start_image_size": 16, "grow_epochs": 1}
    cfg, index = FolderConfig(root=str(tmp_path), **knobs), index_folder(tmp_path, "train")
    images = {}
    for may_grow in (False, True):
        how = build_augment(augment, 0, 32, cfg.eval_resize)
        loader = build_loader(cfg, index, how, 2, CPU, may_grow)
        (batch,) = loader.batches([MicroBatch(0, 0, np.arange(8), True)])
        images[may_grow] = batch.images.float().permute(0, 3, 1, 2).clone()
        loader.close()
    assert images[True].shape == (8, 3, 16, 16)
    assert torch.allclose(F.avg_pool2d(images[False], 2), images[True], atol=4)


def test_another_epoch_or_seed_shows_the_images_differently(folder):
    plan = {epoch: [MicroBatch(0, epoch, np.arange(40), True)] for epoch in (0, 1)}
    here, later = (seen(real_loader(folder)[0], plan[epoch]) for epoch in (0, 1))
    other = seen(real_loader(folder, seed=1)[0], plan[0])
    assert all(len({here[i], later[i], other[i]}) == 3 for i in range(40))


@pytest.mark.parametrize("num_threads", [1, 4])
def test_evaluation_images_are_the_central_crops_with_their_labels(folder, num_threads):
    loader, index = real_loader(folder, num_threads, augment=False, split="val")
    shown = {}
    for batch in loader.batches(evaluation_batches(21, 6, 0, 1)):
        assert batch.labels.tolist() == index.labels[batch.indices].tolist()
        assert batch.effects.colour is None
        shown |= {int(i): image.numpy().copy() for i, image in zip(batch.indices, batch.images)}
    loader.close()
    assert sorted(shown) == list(range(21))
    for i, image in shown.items():
        slot = np.empty((32, 32, 3), dtype=np.uint8)
        centre_into(slot, index.read(i), 37)
        assert np.array_equal(image, slot)


@pytest.fixture
def damaged(tmp_path) -> Path:
    """Of 40 images, 11 is text, 12 is cut off and 30 was there when the folder was read and is not any more."""
    folder = make_folder(tmp_path / "folder", 40, 1)
    names = [Path(index_folder(folder, "train").name(i)) for i in range(40)]
    names[11].write_text("no image")
    names[12].write_bytes(names[12].read_bytes()[:-600])
    return folder


def gone(index, i: int) -> Path:
    path = Path(index.name(i))
    path.unlink()
    return path


@pytest.mark.parametrize("augment", [True, False])
def test_a_bad_image_is_a_data_error_with_path_reason_and_remedy(damaged, augment):
    loader, index = real_loader(damaged, augment=augment)
    remedy = "remove or fix it, or leave it out with data.on_bad_image=skip"
    formats = ", ".join(FORMATS)
    vanished = gone(index, 30)
    for i, message in {
        11: f"{index.name(11)}: not an image (UnidentifiedImageError); accepted formats are {formats}; {remedy}",
        12: f"{index.name(12)}: damaged: image file is truncated",
        30: f"{vanished} cannot be read (No such file or directory)",
    }.items():
        with pytest.raises(DataError) as error:
            list(loader.batches([MicroBatch(0, 0, np.array([1, i, 2]), True)]))
        assert str(error.value).startswith(message)
        assert "\n" not in str(error.value)
        assert error.value.exit_code == 65
    loader.close()


@pytest.mark.parametrize("augment", [True, False])
def test_skipping_leaves_out_exactly_the_bad_images_and_reports_the_reasons(damaged, augment):
    clean = seen(
        real_loader(damaged, augment=augment)[0], [MicroBatch(0, 0, np.r_[0:11, 13:40], True)]
    )
    loader, index = real_loader(damaged, augment=augment, on_bad_image=OnBadImage.skip)
    why = {
        11: ("not an image", ": not an image"),
        12: ("damaged", ": damaged: "),
        30: ("unreadable", " cannot be read"),
    }
    gone(index, 30)
    order = np.random.default_rng(0).permutation(40)
    plan = [
        MicroBatch(k, 0, part, True)
        for k, part in enumerate((order[:37], order[37:], np.array([11, 12, 30]), order))
    ]
    good = [
        [i for i in micro_batch.indices.tolist() if i not in (11, 12, 30)] for micro_batch in plan
    ]
    for batch, expected in zip(loader.batches(plan), good, strict=True):
        assert batch.indices.tolist() == expected
        assert sorted(one.index for one in batch.bad) == sorted(
            set(why) & set(batch.micro_batch.indices.tolist())
        )
        for one in batch.bad:
            assert batch.micro_batch.indices[one.position] == one.index
            assert one.kind == why[one.index][0]
            assert one.reason.startswith(index.name(one.index) + why[one.index][1])
        assert batch.labels.tolist() == index.labels[expected].tolist()
        assert [image.numpy().tobytes() for image in batch.images] == [clean[i] for i in expected]
    loader.close()


def test_the_colours_of_a_batch_with_bad_images_are_those_of_the_good_ones():
    def fill(slots, indices, epoch):
        paint(slots, indices, epoch)
        return [Skipped(k, i, "", "") for k, i in enumerate(indices) if i in (3, 9, 17)]

    with loading(fill, colour=lambda epoch, indices: indices[:, None].astype(np.float32)) as loader:
        (batch,) = loader.batches(micro_batches(20))
    assert batch.indices.tolist() == [i for i in range(20) if i not in (3, 9, 17)]
    assert batch.effects.colour[:, 0].tolist() == batch.indices.tolist()


def test_with_mixing_the_previous_image_comes_last_and_partners_are_the_neighbours():
    def fill(slots, indices, epoch):
        paint(slots, indices, epoch)
        return [Skipped(k, i, "", "") for k, i in enumerate(indices) if i in (3, 17)]

    augment = build_augment(BasicAugmentConfig(mixup_alpha=1.0), 0, SIZE, SIZE)
    plan = [
        MicroBatch(0, 0, np.arange(5, 9), False, 4),
        MicroBatch(0, 0, np.arange(0, 10), False, 17),
        MicroBatch(0, 0, np.array([3]), False, 2),
        MicroBatch(0, 0, np.arange(0), True, None),
    ]
    expected = [  # images, own indices, partners
        ([5, 6, 7, 8, 4], [5, 6, 7, 8], [4, 5, 6, 7]),
        (
            [0, 1, 2, 4, 5, 6, 7, 8, 9],
            [0, 1, 2, 4, 5, 6, 7, 8, 9],
            [0, 0, 1, 4, 4, 5, 6, 7, 8],
        ),  # 0 and 4 alone
        ([2], [], []),
        ([], [], []),
    ]
    loader = Loader(fill, LABELS, augment, lambda epoch: SIZE, 2, CPU)
    for batch, (decoded, own, partners) in zip(loader.batches(plan), expected, strict=True):
        assert batch.images[:, 0, 0, 0].tolist() == decoded
        assert batch.indices.tolist() == own
        assert batch.labels.tolist() == LABELS[own].tolist()
        assert batch.images[batch.effects.mixing.rows, 0, 0, 0].tolist() == partners
        assert batch.effects.mixing.labels.tolist() == LABELS[partners].tolist()
    loader.close()


# Images that are nowhere


def synthetic(**knobs):
    return SyntheticConfig(image_size=16, num_train=50, num_val=20, num_classes=7, **knobs)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_synthetic_images_are_the_same_in_every_run_and_batch_and_differ_from_each_other(
    num_threads,
):
    sets = [open_data(synthetic()) for _ in range(2)]
    plans = [micro_batches(50), micro_batches(*[7] * 7, 1)]
    augment = build_augment(BasicAugmentConfig(), 0, 16, 18)
    first, second = (
        seen(build_loader(synthetic(), data.train, augment, num_threads, CPU), plan)
        for data, plan in zip(sets, plans)
    )
    assert first == second
    assert len(first) == 50
    assert len(set(first.values())) > 45  # windows of one strip of noise: two may coincide
    pixels = np.frombuffer(b"".join(first.values()), dtype=np.uint8)
    assert abs(pixels.mean() - 127.5) < 3


def test_synthetic_sets_have_the_numbers_asked_for_and_every_class():
    data = open_data(synthetic(limit_train=30))
    assert (len(data.train), len(data.val)) == (30, 20)
    assert data.class_names == data.train.classes == [f"class{c}" for c in range(7)]
    assert set(data.val.labels) == set(range(7))
    assert [
        batch.labels.tolist()
        for batch in build_loader(synthetic(), data.val, None, 1, CPU).batches(micro_batches(20))
    ] == [data.val.labels.tolist()]


def test_a_synthetic_image_has_no_encoded_bytes():
    images = open_data(synthetic()).train
    with pytest.raises(
        DataError, match=r"^synthetic image 3 cannot be read \(synthetic images have"
    ):
        images.read(3)
    assert images.nbytes > 16 * 16 * 3


def test_the_loader_announces_each_micro_batch_before_it_is_read():
    events = []

    def fill(slots, indices, epoch):
        events.append(("read", indices.tolist()))
        return []

    def will_need(indices):
        events.append(("hint", indices.tolist()))

    loader = Loader(fill, LABELS, None, lambda epoch: SIZE, 1, CPU, will_need)
    list(loader.batches(micro_batches(7, 3)))
    loader.close()
    for indices in (list(range(7)), list(range(7, 10))):
        assert events.index(("hint", indices)) < events.index(("read", indices))
    assert len(events) == 4
