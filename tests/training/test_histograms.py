"""Histograms of parameters and gradients, of full tensors on any number of ranks; TensorBoard shows them."""

import numpy as np
import pytest
import torch
from torch import nn

from alexnet_ddp.config import ConfigError, DDPConfig, Device, HybridConfig, LoggerConfig
from alexnet_ddp.parallel import build_parallel
from alexnet_ddp.runtime import distributed
from alexnet_ddp.training.histograms import NUM_BINS, histograms
from tests.ranks import run_ranks
from tests.tracking.test_tracking import tracker


class Small(nn.Module):
    """A network with layers that a hybrid splits. The first layer is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Linear(6, 7).requires_grad_(False)
        self.classifier = nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x))


def found_in_ranks(splits: bool) -> dict[str, tuple]:
    """The histograms of a network whose gradients are its parameters; of other ranks than 0 empty."""
    torch.manual_seed(0)
    with distributed.session(Device.cpu) as world:
        split = ["classifier.0", "classifier.2"]
        cfg = HybridConfig(group_size=2, split=split) if splits else DDPConfig()
        parallel = build_parallel(cfg, Small(), world)
        for parameter in parallel.model.parameters():
            if parameter.requires_grad:
                parameter.grad = 2 * parameter.detach()
        shown = histograms(parallel, world)
        return {name: (one.low, one.high, one.counts, one.sum) for name, one in shown.items()}


def test_a_hybrid_shows_full_tensors_as_one_rank_does():
    alone = found_in_ranks(splits=False)
    torch.manual_seed(0)
    parameters = dict(Small().named_parameters())
    trained = [name for name in parameters if not name.startswith("features")]
    assert sorted(alone) == sorted(f"{kind}/{n}" for kind in ("gradients", "parameters") for n in trained)  # fmt: skip
    for name, (low, high, counts, total) in alone.items():
        kind, _, parameter = name.partition("/")
        values = parameters[parameter].detach().numpy() * (2 if kind == "gradients" else 1)
        assert (low, high) == (values.min(), values.max())
        assert sum(counts) == values.size
        assert abs(np.array(counts) - np.histogram(values, NUM_BINS)[0]).sum() <= 2  # at edges
        assert total == pytest.approx(values.sum(), abs=1e-5)
    first, second = run_ranks(found_in_ranks, 2, True)
    assert first == alone
    assert second == {}


def test_what_is_not_finite_is_left_out():
    with distributed.session(Device.cpu) as world:
        model = nn.Linear(3, 1, bias=False)
        model.weight.data = torch.tensor([[1.0, torch.nan, torch.inf]])
        model.weight.grad = torch.full((1, 3), torch.nan)
        found = histograms(build_parallel(DDPConfig(), model, world), world)
    assert found.keys() == {"parameters/weight"}
    assert (found["parameters/weight"].counts, found["parameters/weight"].sum) == ([1], 1.0)


def test_tensorboard_shows_them(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with distributed.session(Device.cpu) as world:
        torch.manual_seed(0)
        found = histograms(build_parallel(DDPConfig(), Small(), world), world)
    log = tracker(tmp_path, tensorboard=True)
    log.histograms(7, found)
    log.close(0)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (shown,) = events.Histograms("parameters/classifier.0.weight")
    expected = found["parameters/classifier.0.weight"]
    assert (shown.step, shown.histogram_value.num) == (7, 63)
    assert list(shown.histogram_value.bucket) == expected.counts
    assert shown.histogram_value.bucket_limit[-1] == expected.high
    assert shown.histogram_value.min == expected.low


def test_histograms_without_tensorboard_are_refused():
    with pytest.raises(ConfigError, match=r"logger.histograms_every_steps \(5\) would be ignored"):
        LoggerConfig(histograms_every_steps=5, tensorboard=False)
