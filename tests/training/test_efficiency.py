"""train/mfu and train/joules_per_image. No GPU is used: its name and its counters are replaced."""

from dataclasses import replace

import pytest
import torch

from alexnet_ddp.config import Device
from alexnet_ddp.config.compose import compose
from alexnet_ddp.cost_model.network import read_network
from alexnet_ddp.model import build_model
from alexnet_ddp.runtime import distributed
from alexnet_ddp.runtime.energy import Counter
from alexnet_ddp.training import efficiency
from alexnet_ddp.training.efficiency import EnergyMeter, ModelFlops
from tests.ranks import run_ranks

OPTIONS = ["data=synthetic", "data.image_size=96", "data.start_image_size=64", "data.grow_epochs=2"]
OPTIONS += ["model=alexnet_small", "trainer.epochs=3", "run.name=x"]


def test_the_utilisation_is_a_share_of_the_peak_of_all_gpus(monkeypatch):
    cfg = compose("train", OPTIONS)
    model = build_model(cfg.model, 10, 96, 0)
    with distributed.session(Device.cpu) as world:
        assert ModelFlops(cfg, model, world).row(100.0, 0) == {}  # a CPU's peak is not known
        gpu = replace(world, device=torch.device("cuda", 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
        found = ModelFlops(cfg, model, gpu)
        small, large = (read_network(model, size).train_flops for size in (64, 96))
        assert found.row(1e6, 0) == {"train/mfu": pytest.approx(100 * 1e6 * small / 495e12)}
        assert found.row(1e6, 3) == {"train/mfu": pytest.approx(100 * 1e6 * large / 495e12)}
        assert found.facts["gpu"] == "NVIDIA H200"
        assert found.facts["peak_tflops"] == 495
        assert found.facts["peak_source"].startswith("https://www.nvidia.com/")
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Radeon")
        assert ModelFlops(cfg, model, gpu).row(1e6, 0) == {}


def test_energy_is_that_of_training_only(monkeypatch):
    counts = iter([0, 10, 30, 40, 100, 100, 100])
    counter = Counter(lambda: next(counts), 0.5)
    monkeypatch.setattr(efficiency, "cpu_counters", lambda: [counter])
    with distributed.session(Device.cpu) as world:
        meter = EnergyMeter(world)
        counter.used()
        meter.pause()  # 10 counts
        meter.resume()  # 20 of an evaluation
        assert meter.row(4) == {"train/joules_per_image": 0.5 * (10 + 10) / 4}
        assert meter.row(10) == {"train/joules_per_image": 0.5 * 60 / 10}
        assert meter.row(0) == {}
        monkeypatch.setattr(efficiency, "cpu_counters", list)
        assert EnergyMeter(world).row(4) == {}


def energy_with_a_counter_that_fails() -> tuple[list[dict], int]:
    """Rows of a meter whose counter, on rank 0, fails at its fourth call; the number of calls."""
    counts = [0, 10, 30]

    def read() -> int:
        calls.append(1)
        if not counts:
            raise OSError(5, "Input/output error")
        return counts.pop(0)

    calls: list[int] = []
    efficiency.cpu_counters = lambda: [Counter(read, 1.0)]
    with distributed.session(Device.cpu) as world:
        meter = EnergyMeter(world)
        rows = [meter.row(1), meter.row(1)]
        meter.pause()
        meter.resume()
        meter.pause()
        meter.resume()
        rows += [meter.row(1), meter.row(1)]
        return rows, len(calls)


def test_after_a_counter_failed_no_rank_reports_energy():
    main, other = run_ranks(energy_with_a_counter_that_fails, 2)
    found = [{"train/joules_per_image": value} for value in (0.0, 10.0)]
    assert main == ([*found, {}, {}], 4)
    assert other == ([*found, {}, {}], 0)
