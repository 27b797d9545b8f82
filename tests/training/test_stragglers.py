"""Which rank is slow, and the time of a step by part."""

import json
import time
from dataclasses import replace

import pytest
import torch

from alexnet_ddp.config import DDPConfig, Device, HybridConfig, NoAugmentConfig
from alexnet_ddp.data.augment import build_augment
from alexnet_ddp.data.loader import build_loader
from alexnet_ddp.data.sampler import GlobalBatchSampler
from alexnet_ddp.data.sources.sets import open_data
from alexnet_ddp.parallel import build_parallel
from alexnet_ddp.runtime import distributed
from alexnet_ddp.runtime.distributed import World
from alexnet_ddp.training import stragglers
from alexnet_ddp.training.optim import build_optimizer
from alexnet_ddp.training.step import TrainStep
from alexnet_ddp.training.stragglers import Stopwatch, Stragglers
from alexnet_ddp.training.vote import StepVote
from tests.parallel.test_parallel import IMAGES, SGD, TRAINER, small_alexnet
from tests.ranks import run_ranks

DELAY_S = 1.0
STEPS = 2


def wait(*_):
    time.sleep(DELAY_S)


def times_of_slow_steps(parallel, slow_part):
    """The seconds by part of STEPS steps in which rank 1 is slow in a part of the first layers."""
    with distributed.session(Device.cpu) as world:
        torch.set_num_threads(1)
        model = small_alexnet()
        first = model.features[0]
        wrapped = build_parallel(parallel, model, world)
        cfg = replace(TRAINER, micro_batch_size=4)
        step = TrainStep(
            wrapped, build_optimizer(SGD, model, wrapped.global_norms), cfg, 0, world, (3, 64, 64)
        )
        if world.rank == 1 and slow_part == "forward":
            first.register_forward_hook(wait)
        elif world.rank == 1 and slow_part == "update":
            step.scaler.unscale_ = wait
        elif world.rank == 1:
            first.register_forward_hook(lambda _, inputs, out: out.register_hook(wait) and None)
        data = open_data(IMAGES).train
        sampler = GlobalBatchSampler(len(data), cfg.global_batch_size, seed=0)
        augment = build_augment(NoAugmentConfig(), 0, 64, 73)
        loader = build_loader(IMAGES, data, augment, 1, world.device)
        work = sampler.micro_batches(range(STEPS), world.rank, world.world_size, 4)
        batches = loader.batches(work)
        for k in range(STEPS):
            step(batches, k, SGD.lr, cfg.global_batch_size, StepVote())
        loader.close()
        return step.stopwatch.read()


@pytest.mark.parametrize("slow_part", ["forward", "backward", "update"])
@pytest.mark.parametrize("parallel", [DDPConfig(), HybridConfig()])
def test_the_other_rank_waits_for_a_slow_one_in_the_exchange(parallel, slow_part):
    fast, slow = run_ranks(times_of_slow_steps, 2, parallel, slow_part)
    assert slow[slow_part] >= STEPS * DELAY_S
    assert slow[slow_part] > fast[slow_part] + DELAY_S / 2
    # In plain DDP, a rank that is slow in its update keeps the others waiting in the next step.
    assert fast["exchange"] > slow["exchange"] + DELAY_S / 2
    assert min(fast["exchange"], slow["exchange"], fast["backward"], slow["forward"]) > 0


def windows(*ranks: list[tuple[float, float]]) -> list[str | None]:
    """What four ranks' (data, forward) lead to, window by window, at 100 ms a step."""
    stragglers = Stragglers(World(0, 0, 4, 4, torch.device("cpu")))
    return [stragglers.judge(torch.tensor(seconds), 0.1) for seconds in ranks]


WELL = [(0.001, 0.03), (0.002, 0.031), (0.001, 0.032), (0.0, 0.045)]
SLOW = [(0.001, 0.03), (0.05, 0.031), (0.001, 0.032), (0.0, 0.045)]


def test_a_rank_is_named_in_its_third_slow_window_and_once():
    said = windows(WELL, SLOW, SLOW, SLOW, SLOW, SLOW)
    named = "rank 1 is slow in data: 50 ms a step where the others take 1, of steps of 100 ms"
    assert said == [None, None, None, named, None, None]


def test_a_good_window_or_another_rank_in_between_starts_the_count_again():
    other = [SLOW[1], *SLOW[2:], SLOW[0]]
    assert windows(SLOW, SLOW, WELL, SLOW, SLOW, other, other, WELL) == [None] * 8


class Event:
    """A torch.cuda.Event of a device that takes a millisecond between two recorded events."""

    num_recorded = 0

    def __init__(self, enable_timing):
        assert enable_timing
        self.at = None

    def record(self):
        assert self.at is None, "recorded twice"
        Event.num_recorded += 1
        self.at = Event.num_recorded

    def elapsed_time(self, end):
        return end.at - self.at


def test_on_a_gpu_each_millisecond_of_the_device_belongs_to_one_part(monkeypatch):
    monkeypatch.setattr(stragglers.torch.cuda, "Event", Event)
    watch = Stopwatch(World(0, 0, 2, 2, torch.device("cuda", 0)))
    with watch.forward(), watch.exchange():  # events 1 to 4: the exchange is from 2 to 3
        pass
    with watch.backward():  # 5 to 10
        with watch.exchange():  # 6 to 7
            pass
        watch.gradients_ready(torch.ones(1))  # 8, and the end of the pass is 9
    assert watch.read() == pytest.approx(
        {"data": 0, "forward": 0.002, "backward": 0.003, "exchange": 0.003, "update": 0}
    )
    assert set(watch.read().values()) == {0.0}


def times_in_a_file(file):
    with distributed.session(Device.cpu) as world:
        found = Stragglers(world)
        seconds = dict.fromkeys(("data", "forward", "backward", "exchange", "update"), 2.0)
        row = found.row(seconds | {"exchange": 4.0 + world.rank}, 4, 10.0)
        found.pause("checkpoint", 1.0 + world.rank)
        found.pause("checkpoint", 1.0)
        found.write(file, num_new_steps=1)
        return row


def test_the_times_of_all_ranks_are_means_per_step_and_have_the_pauses(tmp_path):
    first, second = run_ranks(times_in_a_file, 2, tmp_path / "rank_times.json")
    assert (first["time/exchange_s"], second["time/exchange_s"]) == (1.0, 1.25)
    assert json.loads((tmp_path / "rank_times.json").read_text()) == {
        "num_steps": 4,
        "phases": [
            "data", "forward", "backward", "exchange", "update", "evaluation", "checkpoint",
        ],
        "seconds": [[0.5, 0.5, 0.5, 1.0, 0.5, 0.0, 0.4], [0.5, 0.5, 0.5, 1.25, 0.5, 0.0, 0.6]],
    }  # fmt: skip
