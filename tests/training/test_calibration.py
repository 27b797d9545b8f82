"""One temperature makes probabilities agree with the accuracy, and belongs to one checkpoint."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from alexnet_ddp.config import Device
from alexnet_ddp.runtime import distributed
from alexnet_ddp.runtime.errors import ConfigError, DataError
from alexnet_ddp.training.calibration import (
    NUM_BINS,
    Outputs,
    expected_calibration_error,
    fit,
    read_temperature,
    write_calibration,
)
from tests.ranks import run_ranks


def overconfident(n=20_000, classes=6, temperature=2.5):
    """Logits, and labels that are drawn with the probabilities of logits / temperature."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(n, classes, generator=generator)
    labels = (logits / temperature).softmax(1).multinomial(1, generator=generator)[:, 0]
    return logits, labels


def test_the_temperature_is_the_minimum_of_the_loss_and_calibrates():
    logits, labels = overconfident()
    found = fit(logits, labels)
    assert found.temperature == pytest.approx(2.5, rel=0.03)  # n is finite

    def loss(temperature):
        return F.cross_entropy(logits.double() / temperature, labels).item()

    for factor in (0.999, 1.001):
        assert loss(found.temperature * factor) > loss(found.temperature)
    assert found.loss_after == pytest.approx(loss(found.temperature), abs=1e-12)
    assert found.loss_before == pytest.approx(loss(1), abs=1e-12)
    assert found.ece_before > 0.1
    assert found.ece_after < 0.02
    assert fit(logits, labels) == found
    order = torch.randperm(len(labels))
    assert fit(logits[order], labels[order]).temperature == pytest.approx(
        found.temperature, rel=1e-9
    )


def test_the_calibration_error_is_the_weighted_gap_of_15_bins():
    logits, labels = overconfident(500)
    probabilities = logits.double().softmax(1).numpy()
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels.numpy()
    expected = 0.0
    for k in range(NUM_BINS):
        inside = (confidence > k / NUM_BINS) & (confidence <= (k + 1) / NUM_BINS)
        if inside.any():
            gap = abs(right[inside].mean() - confidence[inside].mean())
            expected += inside.mean() * gap
    assert expected_calibration_error(logits, labels, 1.0) == pytest.approx(expected, abs=1e-12)


def test_what_has_no_minimum_is_refused():
    logits, _ = overconfident(200)
    with pytest.raises(DataError, match="right, and sure, about all 200 validation images; use"):
        fit(logits, logits.argmax(1))
    unfit = "200 validation images do not fit their labels better"
    for unusable in (-logits, torch.zeros_like(logits), torch.full_like(logits, torch.nan)):
        with pytest.raises(DataError, match=unfit):
            fit(unusable, logits.argmax(1))


def gathered(num_images):
    """Each rank adds its share of batches of 8; what rank 0 gathers, as lists."""
    logits, labels = overconfident(num_images)
    with distributed.session(Device.cpu) as world:
        outputs = Outputs()
        for start in range(8 * world.rank, num_images, 8 * world.world_size):
            rows = torch.arange(start, min(start + 8, num_images), dtype=torch.int32)
            rows = rows[rows != 5]  # an image that cannot be read
            batch = SimpleNamespace(indices=rows, labels=labels[rows.long()])
            outputs.add(batch, logits[rows.long()])
        found = outputs.gather(world)
        return (
            None
            if found is None
            else [found.logits.tolist(), found.labels.tolist(), found.indices.tolist()]
        )


@pytest.mark.parametrize("num_images", [3, 37])  # with 3, rank 1 has no batch
def test_all_ranks_outputs_are_gathered_in_order(num_images):
    found, nothing = run_ranks(gathered, 2, num_images)
    assert nothing is None
    logits, labels = overconfident(num_images)
    kept = [i for i in range(num_images) if i != 5]
    assert found == [logits[kept].tolist(), labels[kept].tolist(), kept]


def test_a_calibration_belongs_to_one_checkpoint(tmp_path, caplog):
    checkpoint = tmp_path / "checkpoints/step-00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "MANIFEST.json").write_text("{}")
    assert read_temperature(tmp_path, checkpoint) is None
    found = fit(*overconfident(500))
    write_calibration(tmp_path, checkpoint, found)
    assert read_temperature(tmp_path, checkpoint) == found.temperature
    assert json.loads((tmp_path / "calibration.json").read_text())["num_bins"] == 15
    assert caplog.records == []

    later = tmp_path / "checkpoints/step-00000008"
    later.mkdir()
    (later / "MANIFEST.json").write_text("{ }")
    assert read_temperature(tmp_path, later) is None
    (warning,) = caplog.messages
    assert "is of step-00000004 and not of step-00000008, the best checkpoint now" in warning
    assert "calibrate=true again" in warning
    (tmp_path / "calibration.json").write_text('{"temperature": "warm"}')
    with pytest.raises(ConfigError, match=r"calibration\.json cannot be used"):
        read_temperature(tmp_path, checkpoint)
