"""Bad steps are counted and recorded, spikes flagged, replicas compared, slow ranks named."""

import json
import logging
import math

import numpy as np
import pytest
import torch

from alexnet_ddp.config import Device, OnNan, TrainerConfig
from alexnet_ddp.replay import read_record
from alexnet_ddp.runtime import distributed
from alexnet_ddp.runtime.distributed import World
from alexnet_ddp.runtime.errors import ConfigError, Diverged, out_of_memory, write_exit_code
from alexnet_ddp.training.faults import Guard
from alexnet_ddp.training.replicas import Replicas, checksum, describe
from tests.ranks import run_ranks

MAIN = World(0, 0, 2, 2, torch.device("cpu"))
OTHER = World(1, 1, 2, 2, torch.device("cpu"))
NAN = math.nan


def build(tmp_path, world=MAIN, counts=None, **knobs) -> Guard:
    trainer = TrainerConfig(epochs=1, global_batch_size=8, **knobs)
    describe = lambda step: {"step": step + 1, "indices": [step]}  # noqa: E731
    return Guard(
        trainer, {} if counts is None else counts, describe, tmp_path / "replay.json", world
    )


def bad(guard, step, loss=NAN):
    guard.watch(step, loss)
    return guard.bad(step)


def test_a_bad_step_ends_the_run_by_default_and_rank_0_records_it(tmp_path):
    assert bad(build(tmp_path, OTHER), 6).exit_code == 70
    assert not (tmp_path / "replay.json").exists()
    error = bad(build(tmp_path), 6)
    assert str(error).startswith(
        "the loss of step 7 is not finite; nothing of that step was applied; lower optimizer"
    )
    record = json.loads((tmp_path / "replay.json").read_text())
    assert record == {
        "reason": "loss not finite",
        "loss": "nan",
        "world_size": 2,
        "step": 7,
        "indices": [6],
    }
    assert "the gradient of step 7 is not finite" in str(bad(build(tmp_path), 6, 1.5))
    assert json.loads((tmp_path / "replay.json").read_text())["loss"] == 1.5


def test_ten_steps_skipped_in_a_row_end_the_run_and_its_resumption_counts_on(tmp_path):
    counts: dict[str, int] = {}
    guard = build(tmp_path, counts=counts, on_nan=OnNan.skip)
    assert guard.row() == {}
    assert [bad(guard, step) for step in (0, 1, 2, 10, 11, 12, 13, 14)] == [None] * 8
    guard = build(tmp_path, counts=json.loads(json.dumps(counts)), on_nan=OnNan.skip)
    assert [bad(guard, step) for step in range(15, 19)] == [None] * 4
    assert guard.row() == {"train/num_skipped_steps": 12}
    assert "nor of the 9 before it" in str(bad(guard, 19))


def test_ten_rollbacks_to_one_checkpoint_end_the_run_and_another_checkpoint_counts_anew(tmp_path):
    guard = build(tmp_path, on_nan=OnNan.rollback)
    for to in (5, 10):
        for k in range(9):
            assert bad(guard, 20 + k) is None
            guard.rolled_back(20 + k, to)
    with pytest.raises(
        Diverged, match="step 30 led back to the checkpoint of step 10 for the 10th time; lower"
    ):
        guard.rolled_back(29, 10)
    assert guard.row() == {"train/num_rollbacks": 19}


def spikes(caplog, guard, losses) -> list[str]:
    with caplog.at_level(logging.WARNING, "alexnet_ddp"):
        caplog.clear()
        for step, loss in enumerate(losses):
            guard.watch(step, loss)
    return [record.getMessage() for record in caplog.records]


def test_a_spike_is_flagged_once_with_its_record_and_not_before_there_is_something_to_compare(
    tmp_path, caplog
):
    said = spikes(
        caplog, build(tmp_path, spike_factor=20), [500.0, *[2.0] * 20, 41.0, 90.0, 2.0, NAN, 2.0]
    )
    rule = "more than trainer.spike_factor (20) times the usual 2; its images are in replay.json"
    assert said == [f"the loss of step 22 is 41, {rule}"]
    assert json.loads((tmp_path / "replay.json").read_text())["step"] == 22
    assert spikes(caplog, build(tmp_path, spike_factor=None), [2.0] * 20 + [1e9]) == []
    assert (
        spikes(caplog, build(tmp_path), [0.001] * 50 + [1.9]) == []
    )  # a small batch with a mislabelled image


@pytest.mark.parametrize("knobs", [{"spike_factor": 1.0}, {"check_every_steps": 0}])
def test_knobs_that_make_no_sense_are_refused(knobs):
    with pytest.raises(ConfigError, match=f"trainer.{next(iter(knobs))}"):
        TrainerConfig(epochs=1, global_batch_size=8, **knobs)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        '{"step": 0, "world_size": 1, "loss": 1, "indices": []}',
        '{"step": "a", "world_size": 1}',
    ],
)
def test_a_record_that_cannot_be_read_is_refused_by_name(tmp_path, text):
    path = tmp_path / "replay.json"
    path.write_text(text)
    with pytest.raises(
        ConfigError,
        match=r"file=.*replay.json cannot be read .*; give the replay.json of a run's",
    ):
        read_record(path)


# --- replicas -----------------------------------------------------------------------------------------------------


def test_every_flipped_bit_and_every_exchange_changes_a_checksum():
    weights = Replicas(1, MAIN)._weights
    tensor = torch.randn(200_003)
    before = checksum(tensor, weights)
    assert before == checksum(tensor.clone(), weights)
    for k in (0, 65_535, 65_536, 200_002):
        for bit in (0, 22, 23, 30, 31):
            flipped = tensor.clone()
            flipped.view(torch.int32)[k] ^= (1 << bit) - (1 << 32) * (bit == 31)
            assert checksum(flipped, weights) != before, (k, bit)
    exchanged = tensor.clone()
    exchanged[[3, 70_000]] = tensor[[70_000, 3]]
    assert checksum(exchanged, weights) != before


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_have_checksums_too(dtype):
    weights, tensor = Replicas(1, MAIN)._weights, torch.ones(3, 5, dtype=dtype)
    changed = tensor.clone()
    changed[2, 4] = 1.5
    assert checksum(tensor, weights) != checksum(changed, weights)
    assert checksum(torch.tensor(1.0), weights) != checksum(torch.tensor(2.0), weights)


def test_the_odd_rank_is_named_where_most_agree():
    sums = np.array([[1, 5, 7], [1, 5, 7], [2, 5, 8]])
    assert describe(["a", "b", "c"], sums) == "a, c (rank 2 of 3)"
    assert describe(["a", "b", "c"], sums[1:]) == "a, c (which of the 2 ranks is unknown)"
    assert (
        describe([*"abcd"], np.array([[0] * 4, [1] * 4, [2] * 4]))
        == "a, b, c ... (which of the 3 ranks is unknown)"
    )


def compared() -> list[str]:
    with distributed.session(Device.cpu) as world:
        tensors = {
            "model": {"w": torch.ones(5), "count": torch.tensor(world.rank)},
            "optimizer": {"m/w": torch.ones(5)},
            "ema": {"w": torch.ones(5)},  # averages hide no weights
        }
        replicas, said = Replicas(10, world), []
        for step in range(4, 31):
            if step == 12 and world.rank == 1:
                tensors["optimizer"]["m/w"][3] = 1.0000001
            if step == 22 and world.rank == 1:
                tensors["model"]["w"][3] = 1.0000001
            try:
                replicas.check(step, lambda: tensors)
            except Diverged as error:
                said.append(str(error))
        return said


def test_replicas_are_compared_at_the_start_and_when_it_is_due():
    for said in run_ranks(compared, 3):
        assert len(said) == 2  # after 20 and 30 steps
        assert said[0] == (
            "the replicas differ after step 20: m/w (rank 1 of 3); they were equal at step 10: suspect the memory of "
            "that machine; remove the checkpoints after step 10 and start the same command again"
        )
        assert said[1].startswith("the replicas differ after step 30: w, m/w (rank 1 of 3); ")


# --- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "size"),
    [
        (MemoryError(), "more than there is"),
        (MemoryError("Unable to allocate 1.50 GiB for an array with shape (1,)"), "1.50 GiB"),
        (RuntimeError("std::bad_alloc"), "more than there is"),
        (RuntimeError("could not create a primitive"), "more than there is"),  # oneDNN
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
            "2.00 GiB",
        ),
    ],
)
def test_a_failed_allocation_is_one_line_with_rank_and_size(error, size, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    found = out_of_memory(error)
    assert found.exit_code == 74
    assert str(found).startswith(
        f"rank 3 has no memory left: it asked for {size}; lower trainer.micro_batch_size"
    )


def test_what_torch_says_of_a_full_memory_is_understood():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8)
    assert "it asked for 1,125,899,906.8 MB" in str(out_of_memory(caught.value))
    for other in (
        "mat1 and mat2 shapes cannot be multiplied",
        "could not create a primitive descriptor for a convolution forward propagation primitive",
    ):
        assert out_of_memory(RuntimeError(other)) is None


def test_a_peer_that_is_lost_is_no_reason_where_the_peer_has_given_one(tmp_path, monkeypatch):
    file = tmp_path / "code"
    monkeypatch.setenv("ALEXNET_DDP_EXIT_CODE_FILE", str(file))
    for codes, left in (
        ([(1, 74), (0, 76)], 74),
        ([(0, 76), (1, 74)], 74),
        ([(1, 76), (0, 70)], 70),
        ([(0, 76), (1, 76)], 76),
        ([(1, 65), (0, 0)], 0),
    ):
        file.write_text("")
        for rank, code in codes:
            monkeypatch.setenv("LOCAL_RANK", str(rank))
            write_exit_code(code)
        assert int(file.read_text()) == left, codes
