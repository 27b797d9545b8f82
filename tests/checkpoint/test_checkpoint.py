"""A checkpoint is the whole run or nothing, the newest valid one wins, and a damaged one is never loaded."""

import contextlib
import json
import logging
import math
import os
import pickle
import re
import resource
import shutil
import signal
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from alexnet_ddp.checkpoint import format as ckpt
from alexnet_ddp.checkpoint import writer
from alexnet_ddp.checkpoint.format import find_best, find_newest
from alexnet_ddp.checkpoint.identity import identity
from alexnet_ddp.checkpoint.manager import CheckpointManager, RunState
from alexnet_ddp.cli import compose
from alexnet_ddp.config import (
    AlexNetSmallConfig,
    BestBy,
    CheckpointConfig,
    Config,
    ConfigError,
    Device,
    SGDConfig,
)
from alexnet_ddp.config.data import SyntheticConfig
from alexnet_ddp.config.schema import specs
from alexnet_ddp.model import build_model, load_checkpoint
from alexnet_ddp.runtime.distributed import session
from alexnet_ddp.runtime.errors import CheckpointIOError, NoCheckpoint
from alexnet_ddp.training.optim import build_optimizer, state_by_name
from tests.ranks import run_ranks

WHO = {"model": "AlexNet", "seed": 0, "optimizer.lr": 0.1}
FILES = ["MANIFEST.json", "model.safetensors", "optimizer.safetensors", "state.json"]


@pytest.fixture(scope="module")
def world():
    threads = torch.get_num_threads()
    with session(Device.cpu) as world:
        yield world
    torch.set_num_threads(threads)


def tensors(value: float, size: int = 8) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator) + value
    model = {
        "fc.weight": weight,
        "fc.bias": weight[0].clone(),
        "bn.num_batches_tracked": torch.tensor(int(value)),
    }
    return {"model": model, "optimizer": {"momentum_buffer/fc.weight": weight * 2}}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a
    )


@pytest.fixture
def run(tmp_path, world):
    """run(...) returns a CheckpointManager of one run directory; run.at contains its checkpoints."""

    made = []

    def make(keep_last: int = 2, who: dict[str, object] = WHO, **cfg) -> CheckpointManager:
        made.append(
            CheckpointManager(
                tmp_path,
                CheckpointConfig(keep_last=keep_last, **cfg),
                who,
                world,
                steps_per_epoch=10,
            )
        )
        return made[-1]

    make.at = tmp_path / "checkpoints"
    yield make
    for checkpoints in made:
        checkpoints.close()


def save(checkpoints: CheckpointManager, *steps: int, **state) -> None:
    for step in steps:
        assert checkpoints.save(RunState(step=step, **state), tensors(step), is_last=False) is None
        assert checkpoints.poll(wait=True) is None


def names(at: Path) -> list[str]:
    return sorted(os.listdir(at))


def flip(path: Path, offset: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def step_dir(at: Path, step: int) -> Path:
    return at / f"step-{step:08d}"


# --- what is written --------------------------------------------------------------------------------------------


def test_a_commit_leaves_exactly_its_files_and_verifies(run):
    save(run(), 7)
    assert names(run.at) == ["step-00000007"]
    assert names(step_dir(run.at, 7)) == FILES
    ckpt.verify(step_dir(run.at, 7))


def test_the_manifest_contains_size_and_checksum_of_every_other_file(run):
    save(run(), 7)
    manifest = json.loads((step_dir(run.at, 7) / "MANIFEST.json").read_bytes())
    assert (manifest["schema_version"], manifest["step"]) == (1, 7)
    assert sorted(manifest["files"]) == FILES[1:]
    for name, entry in manifest["files"].items():
        assert entry["size"] == (step_dir(run.at, 7) / name).stat().st_size
        assert re.fullmatch("[0-9a-f]{64}", entry["sha256"])


def test_state_json_contains_identity_numerics_and_world_size(run):
    save(run(), 7)
    record = json.loads((step_dir(run.at, 7) / "state.json").read_bytes())
    assert (record["identity"], record["world_size"]) == (WHO, 1)
    assert record["numerics"]["torch"] == torch.__version__
    assert record["numerics"]["threads"] == torch.get_num_threads()


def test_a_restored_run_equals_the_saved_one(run):
    state = RunState(
        step=7,
        evaluated_at=6,
        best={"step": 6, "val/top1": 100 / 3},
        sums={"loss": 0.1 + 0.2, "correct1": 5.0, "correct5": 2.0**53 - 1, "images": 5e-324},
        scaler={"scale": 65536.0, "growth_factor": math.nextafter(2, 3)},
    )
    assert run().save(state, tensors(7), is_last=True) is None
    again, saved = run().resume("r", allow_changes=False)
    assert again == state  # floats are exact through JSON
    assert list(saved) == ["model", "optimizer"]
    assert all(same(saved[stem], tensors(7)[stem]) for stem in saved)


def test_saving_does_not_change_the_tensors_for_any_strides(run):
    weight = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    strides = weight.stride()
    assert (
        run().save(RunState(step=1), {"model": {"w": weight}, "optimizer": {}}, is_last=True)
        is None
    )
    _, saved = run().resume("r", allow_changes=False)
    assert torch.equal(saved["model"]["w"], weight)
    assert weight.stride() == strides
    assert weight.requires_grad


def test_names_in_the_files_are_torchvisions_and_load_into_a_fresh_model(run):
    model = build_model(AlexNetSmallConfig(), 3, 64, seed=0)
    optimizer = build_optimizer(SGDConfig(lr=0.1), model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    run().save(
        RunState(step=1),
        {"model": model.state_dict(), "optimizer": state_by_name(optimizer, model)},
        True,
    )
    directory = step_dir(run.at, 1)
    with safetensors.safe_open(directory / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(model.state_dict())
        assert "features.0.weight" in file.keys()  # noqa: SIM118 (no dict)
    with safetensors.safe_open(directory / "optimizer.safetensors", "pt") as file:
        assert "momentum_buffer/classifier.0.weight" in file.keys()  # noqa: SIM118
    other = build_model(AlexNetSmallConfig(), 3, 64, seed=1)
    load_checkpoint(other, ckpt.read_tensors(directory, "model"), str(directory))
    assert ckpt.read_state(directory)["step"] == 1
    assert same(other.state_dict(), model.state_dict())


# --- what is rejected -------------------------------------------------------------------------------------------


def test_forty_flipped_bits_over_all_files_are_all_rejected_by_file_name(run):
    save(run(), 7)
    directory = step_dir(run.at, 7)
    for name in FILES:
        size = (directory / name).stat().st_size
        for k in range(10):
            offset, bit = k * (size - 1) // 9, k % 8
            flip(directory / name, offset, bit)
            # What a damaged manifest no longer describes is another file, or the manifest itself.
            with pytest.raises(
                ckpt.Rejected, match=r"\w\.\w" if name == "MANIFEST.json" else re.escape(name)
            ):
                ckpt.verify(directory)
            flip(directory / name, offset, bit)
    ckpt.verify(directory)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("stem", "dtype"),
    [
        *(("model", dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
        ("ema", torch.float64),
        ("optimizer", torch.float32),
    ],
)
def test_a_checkpoint_with_a_value_that_is_not_finite_is_not_written_and_an_older_one_is_rejected(
    run, stem, dtype, caplog, monkeypatch
):
    save(run(), 7)
    groups = {**tensors(8), "ema": {"fc.weight": torch.ones(3)}}
    groups[stem]["late"] = torch.ones(5, 5, dtype=dtype)
    groups[stem]["late"][4, 4] = -math.inf if stem == "ema" else math.nan
    error = run().save(RunState(step=8), groups, is_last=True)
    assert error.exit_code == 70
    assert (
        f"the weights after step 8 are not finite, and were not saved ({stem}.safetensors has"
        in str(error)
    )
    assert names(run.at) == ["step-00000007"]
    contents = {f"{s}.safetensors": safetensors.torch.save(groups[s]) for s in groups} | {
        "state.json": b"{}"
    }
    with monkeypatch.context() as old:  # a version that did not look
        old.setattr(ckpt, "_check_finite", lambda path: None)
        ckpt.write_checkpoint(run.at, 8, contents)
    assert find_newest(run.at).name == "step-00000007"
    assert (
        f"step-00000008 is rejected: {stem}.safetensors has values that are not finite (in late)"
        in caplog.text
    )
    shutil.rmtree(step_dir(run.at, 7))
    with pytest.raises(NoCheckpoint, match="none of the 1 checkpoints"):
        find_newest(run.at)


def test_every_single_flipped_bit_of_a_manifests_head_is_rejected(run):
    save(run(), 7)
    manifest = step_dir(run.at, 7) / "MANIFEST.json"
    accepted = []
    for offset in range(
        manifest.read_bytes().index(b"{", 1)
    ):  # version, step and the beginning of the files
        for bit in range(8):
            flip(manifest, offset, bit)
            with contextlib.suppress(ckpt.Rejected):  # which is what must happen
                ckpt.verify(manifest.parent)
                accepted.append((offset, bit))
            flip(manifest, offset, bit)
    assert accepted == []


@pytest.mark.sampled
@pytest.mark.parametrize("name", FILES[1:])
@pytest.mark.parametrize("share", [0, 0.5])
def test_a_truncated_file_is_rejected_by_name_and_size(run, name, share):
    save(run(), 7)
    path = step_dir(run.at, 7) / name
    size = path.stat().st_size
    os.truncate(path, int(size * share))
    with pytest.raises(
        ckpt.Rejected, match=f"^{re.escape(name)} has {int(size * share)} bytes instead of {size}$"
    ):
        ckpt.verify(path.parent)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_rejected_by_name(run, name):
    save(run(), 7)
    (step_dir(run.at, 7) / name).unlink()
    with pytest.raises(
        ckpt.Rejected,
        match=rf"^{re.escape(name)} is unreadable \(.*No such file or directory.*\)$",
    ):
        ckpt.verify(step_dir(run.at, 7))


def test_another_schema_version_is_rejected(run):
    save(run(), 7)
    path = step_dir(run.at, 7) / "MANIFEST.json"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(
        ckpt.Rejected, match=r"^MANIFEST\.json has schema version 2, this program reads 1$"
    ):
        ckpt.verify(path.parent)


def test_a_checkpoint_under_another_steps_name_is_rejected(run):
    save(run(), 7)
    step_dir(run.at, 7).rename(step_dir(run.at, 9))
    with pytest.raises(ckpt.Rejected, match=r"^MANIFEST\.json is of step 7$"):
        ckpt.verify(step_dir(run.at, 9))


@pytest.mark.sampled
@pytest.mark.parametrize(
    "content", ["", "[]", "null", "{}", '{"schema_version": 1, "step": 7, "files": []}', "\xff"]
)
def test_a_manifest_with_other_json_is_rejected(run, content):
    save(run(), 7)
    path = step_dir(run.at, 7) / "MANIFEST.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ckpt.Rejected, match=r"^MANIFEST\.json is unreadable"):
        ckpt.verify(path.parent)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


def test_a_pickle_in_place_of_the_model_is_rejected_and_never_unpickled(run, tmp_path, caplog):
    save(run(), 7)
    path = step_dir(run.at, 7) / "model.safetensors"
    path.write_bytes(pickle.dumps(Bomb(tmp_path / "it ran")))
    with pytest.raises(NoCheckpoint):
        run().resume("r", allow_changes=False)
    assert "model.safetensors has " in caplog.text
    with pytest.raises(safetensors.SafetensorError):  # also where the checksums were forged
        ckpt.read_tensors(path.parent, "model")
    assert not (tmp_path / "it ran").exists()


# --- what is found ----------------------------------------------------------------------------------------------


def test_a_new_run_starts_fresh(run):
    assert run().resume("r", allow_changes=False) == (RunState(), {})
    run.at.mkdir()
    assert run().resume("r", allow_changes=False) == (RunState(), {})


def test_the_newest_checkpoint_has_the_highest_step(run):
    save(run(keep_last=9), 9, 10, 20, 100)
    assert find_newest(run.at) == step_dir(run.at, 100)


def test_the_newest_valid_one_is_used_and_rejected_ones_are_reported(run, caplog):
    save(run(keep_last=3), 10, 20, 30)
    flip(step_dir(run.at, 30) / "optimizer.safetensors", 100)
    os.truncate(step_dir(run.at, 20) / "state.json", 5)
    with caplog.at_level(logging.WARNING):
        state, saved = run().resume("r", allow_changes=False)
    assert state.step == 10
    assert same(saved["model"], tensors(10)["model"])
    newest, second = caplog.messages
    line = "checkpoint step-00000030 is rejected: optimizer.safetensors does not match its SHA-256 checksum"
    assert newest == line
    assert re.fullmatch(
        r"checkpoint step-00000020 is rejected: state\.json has 5 bytes instead of \d+", second
    )


def test_if_all_are_damaged_the_run_does_not_start_afresh(run):
    save(run(), 10, 20)
    for step in (10, 20):
        flip(step_dir(run.at, step) / "model.safetensors", 50)
    remedy = "restore one, or choose another run.name to start afresh"
    with pytest.raises(NoCheckpoint) as e:
        run().resume("r", allow_changes=False)
    assert str(e.value) == f"none of the 2 checkpoints in {run.at} is usable; {remedy}"
    assert e.value.exit_code == 66
    with pytest.raises(NoCheckpoint):
        find_best(run.at)


def test_the_best_is_found_or_the_newest_if_it_is_damaged_or_missing(run, caplog):
    checkpoints = run()
    save(checkpoints, 10)
    assert find_best(run.at) == step_dir(run.at, 10)
    save(checkpoints, 20, 30, 40, best={"step": 20, "val/top1": 50.0})
    assert find_best(run.at) == step_dir(run.at, 20)
    flip(step_dir(run.at, 20) / "model.safetensors", 50)
    assert find_best(run.at) == step_dir(run.at, 40)
    assert (
        "checkpoint step-00000020, the best one, is rejected: model.safetensors does not match"
        in caplog.text
    )


def test_without_any_checkpoint_there_is_no_best_one(run):
    with pytest.raises(NoCheckpoint, match=r"^there is no checkpoint in .*; train the run first$"):
        find_best(run.at)


@pytest.mark.parametrize(("by", "since_best"), [(BestBy.top1, 4), (BestBy.loss, 3)])
def test_of_equal_accuracies_the_lower_loss_is_the_best_and_patience_counts_from_the_first(
    by, since_best
):
    results = {
        10: (40.0, 2.0),
        20: (60.0, 1.5),
        30: (60.0, 1.2),
        40: (60.0, 1.2),
        50: (50.0, 1.2),
        60: (60.0, math.nan),
    }
    state = RunState()
    for step, (top1, loss) in results.items():
        state.step = step
        row = {"val/top1": top1, "val/loss": loss, "val/num_images": 10 * step, "val/mine": 1.0}
        state.note_evaluation(row, by)
    kept = {"val/top1": 60.0, "val/loss": 1.2, "val/num_images": 300}
    assert state.best == {"step": 30} | kept
    assert (state.evaluated_at, state.since_best) == (60, since_best)


def test_a_checkpoint_of_an_older_version_has_no_loss_of_its_best_evaluation():
    state = RunState(step=20, best={"step": 10, "val/top1": 60.0})
    state.note_evaluation({"val/top1": 50.0, "val/loss": 3.0}, BestBy.loss)
    assert state.best == {"step": 20, "val/top1": 50.0, "val/loss": 3.0}


# --- what is kept -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep_last", "kept"), [(1, [50]), (2, [40, 50]), (3, [30, 40, 50])])
def test_the_last_k_are_kept(run, keep_last, kept):
    save(run(keep_last), 10, 20, 30, 40, 50)
    assert names(run.at) == [f"step-{step:08d}" for step in kept]


def test_the_best_is_kept_until_there_is_a_better_one(run):
    checkpoints = run(keep_last=1)
    save(checkpoints, 10, 20, 30, best={"step": 10, "val/top1": 50.0})
    assert names(run.at) == ["step-00000010", "step-00000030"]
    save(checkpoints, 40, best={"step": 40, "val/top1": 60.0})
    assert names(run.at) == ["step-00000040"]


@pytest.mark.parametrize(("keep_last", "kept"), [(1, [25]), (2, [10, 25])])
def test_rejected_checkpoints_of_later_steps_do_not_displace_newly_saved_ones(run, keep_last, kept):
    save(run(keep_last=3), 10, 30, 40)
    for step in (30, 40):
        flip(step_dir(run.at, step) / "model.safetensors", 50)
    checkpoints = run(keep_last)
    assert checkpoints.resume("r", allow_changes=False)[0].step == 10
    save(checkpoints, 25)
    assert names(run.at) == [f"step-{step:08d}" for step in kept]
    assert run().resume("r", allow_changes=False)[0].step == 25


def test_the_same_step_saved_again_replaces_the_first(run):
    save(run(), 10, 20)
    assert run().save(RunState(step=20, evaluated_at=20), tensors(-5), is_last=True) is None
    state, saved = run().resume("r", allow_changes=False)
    assert (state.step, state.evaluated_at) == (20, 20)
    assert same(saved["model"], tensors(-5)["model"])
    assert names(run.at) == ["step-00000010", "step-00000020"]


def test_after_a_crash_drafts_are_removed_and_a_replaced_checkpoint_is_restored(run):
    save(run(keep_last=3), 10, 20, 30)
    (run.at / ".tmp-step-40-0a1b2c3d").mkdir()
    (run.at / ".tmp-step-40-0a1b2c3d" / "model.safetensors").write_bytes(b"half")
    step_dir(run.at, 30).rename(run.at / ".old-step-00000030")  # killed between the two renames
    (run.at / ".old-step-00000020").mkdir()  # killed after both
    state, _ = run().resume("r", allow_changes=False)
    assert state.step == 30
    assert names(run.at) == ["step-00000010", "step-00000020", "step-00000030"]


def test_other_files_in_the_directory_are_not_changed(run):
    run.at.mkdir()
    (run.at / "notes.txt").write_text("mine")
    (run.at / "step-best").mkdir()
    save(run(), 10, 20, 30)
    assert run().resume("r", allow_changes=False)[0].step == 30
    assert names(run.at) == ["notes.txt", "step-00000020", "step-00000030", "step-best"]


# --- a disk that refuses ----------------------------------------------------------------------------------------


def refuse(checkpoints: CheckpointManager, largest_file: int | None = 100) -> CheckpointManager:
    """From here on the kernel lets the writer of `checkpoints` write no file of more bytes; None: it does again."""
    checkpoints._writer.prepare(1 << 24)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = (hard if largest_file is None else largest_file, hard)
    resource.prlimit(checkpoints._writer._process.popen.pid, resource.RLIMIT_FSIZE, limit)
    return checkpoints


def test_a_failed_write_warns_and_leaves_the_old_ones_untouched(run, caplog):
    checkpoints = run()
    save(checkpoints, 10, 20)
    save(refuse(checkpoints), 30)
    (message,) = caplog.messages
    assert re.fullmatch(
        r"the checkpoint of step 30 could not be written \(\[Errno 27\] File too large\); it needs 0 MB, "
        r"[\d,]+ MB are free; training continues, and the checkpoints before it are untouched",
        message,
    )
    assert names(run.at) == ["step-00000010", "step-00000020"]
    assert checkpoints.row() == {"checkpoint/num_failed": 1}
    assert run().resume("r", allow_changes=False)[0].step == 20


def test_the_third_failure_in_a_row_ends_the_run(run):
    checkpoints = refuse(run())
    save(checkpoints, 10, 20)
    assert checkpoints.save(RunState(step=30), tensors(1, size=1000), is_last=False) is None
    error = checkpoints.poll(wait=True)
    assert isinstance(error, CheckpointIOError)
    assert error.exit_code == 74
    assert "could not be written ([Errno 27] File too large); it needs 8 MB, " in str(error)
    assert str(error).endswith(
        f" MB are free; free some space in {run.at}, then start the same command again"
    )
    assert names(run.at) == []


def test_a_success_resets_the_count_of_failures(run):
    checkpoints = run()
    for largest, steps in ((100, (10, 20)), (None, (30,)), (100, (40, 50))):
        save(refuse(checkpoints, largest), *steps)  # None each time
    assert names(run.at) == ["step-00000030"]


def test_a_last_checkpoint_that_cannot_be_written_ends_the_run(run):
    error = refuse(run()).save(RunState(step=10), tensors(1), is_last=True)
    assert isinstance(error, CheckpointIOError)


def test_a_directory_that_cannot_be_written_is_a_failed_write(run, caplog):
    run.at.parent.mkdir(exist_ok=True)
    run.at.write_text("a file where the directory should be")
    save(run(), 10)
    assert "the checkpoint of step 10 could not be written" in caplog.text


def test_a_write_that_reads_back_differently_is_a_failed_write(tmp_path, monkeypatch):
    contents = {
        f"{stem}.safetensors": safetensors.torch.save(group) for stem, group in tensors(1).items()
    }
    contents["state.json"] = b"{}"
    assert ckpt.write_checkpoint(tmp_path, 10, contents) == step_dir(tmp_path, 10)
    real = ckpt._write_file

    def write_wrongly(path: Path, data: bytes) -> dict:
        entry = real(path, data)
        if path.name == "model.safetensors":
            flip(path, 200)
        return entry

    monkeypatch.setattr(ckpt, "_write_file", write_wrongly)
    with pytest.raises(
        ckpt.Rejected, match=r"^model.safetensors does not match its SHA-256 checksum$"
    ):
        ckpt.write_checkpoint(tmp_path, 20, contents)
    assert names(tmp_path) == ["step-00000010"]


def test_a_run_is_refused_if_the_disk_has_no_space_for_a_checkpoint(run, world, monkeypatch):
    run().prepare(tensors(1))
    usage = shutil.disk_usage(run.at.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(
        CheckpointIOError, match=r"has 0 MB free, a checkpoint needs 8 MB; free some space, or cho"
    ):
        run().prepare(tensors(1, size=1000))


# --- the process that writes ------------------------------------------------------------------------------------


def test_the_tensors_may_change_as_soon_as_save_returns(run):
    checkpoints, value = run(), tensors(1, size=1000)
    expected = {name: t.clone() for name, t in value["model"].items()}
    assert checkpoints.save(RunState(step=1), value, is_last=False) is None
    for t in value["model"].values():
        t.zero_()
    assert checkpoints.poll(wait=True) is None
    assert same(ckpt.read_tensors(step_dir(run.at, 1), "model"), expected)


def test_the_files_are_what_the_library_would_write_for_every_type(run):
    kinds = (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.uint8,
    )
    model = {f"t{i}": torch.arange(i + 1).to(kind) for i, kind in enumerate(kinds)}
    model |= {
        "flag": torch.tensor([True, False]),
        "none": torch.empty(0, 3),
        "one": torch.tensor(2.5),
    }
    assert run().save(RunState(step=1), {"model": model, "optimizer": {}}, is_last=True) is None
    assert same(ckpt.read_tensors(step_dir(run.at, 1), "model"), model)
    assert ckpt.read_tensors(step_dir(run.at, 1), "optimizer") == {}


def test_a_writer_that_is_killed_is_a_failed_write_and_the_next_one_works(run, caplog):
    checkpoints = run()
    save(checkpoints, 10)
    pid = checkpoints._writer._process.popen.pid
    os.kill(pid, signal.SIGSTOP)
    assert checkpoints.save(RunState(step=20), tensors(20), is_last=False) is None
    assert (
        checkpoints.save(RunState(step=30), tensors(30), is_last=False) is None
    )  # left out: it is busy
    os.kill(pid, signal.SIGKILL)
    checkpoints._writer._process.popen.wait()
    save(checkpoints, 40)
    assert (
        "no checkpoint of step 30: checkpoints are due faster than the disk takes them"
        in caplog.text
    )
    assert (
        "step 20 could not be written (the process that writes checkpoints ended with -9)"
        in caplog.text
    )
    assert names(run.at) == ["step-00000010", "step-00000040"]
    assert checkpoints.row() == {"checkpoint/num_failed": 1, "checkpoint/num_skipped": 1}


def test_the_best_one_is_written_even_if_another_is_being_written(run):
    checkpoints = run()
    assert checkpoints.save(RunState(step=9), tensors(9, size=1500), is_last=False) is None
    best = RunState(step=10, best={"step": 10, "val/top1": 50.0})
    assert checkpoints.save(best, tensors(10), is_last=False) is None
    assert checkpoints.poll(wait=True) is None
    assert names(run.at) == ["step-00000009", "step-00000010"]


def test_periodic_checkpoints_are_kept(run):
    save(run(keep_last=1, keep_every_epochs=2), 5, 20, 30, 40, 45)  # 10 steps an epoch
    assert names(run.at) == ["step-00000020", "step-00000040", "step-00000045"]


# --- copies -----------------------------------------------------------------------------------------------------


def test_copies_are_pruned_and_restore_a_lost_run(run, tmp_path):
    url = f"file://{tmp_path}/far"
    far = tmp_path / "far" / tmp_path.name  # the name of the run
    checkpoints = run(keep_last=1, copy_to=url)
    save(checkpoints, 10, best={"step": 10, "val/top1": 50.0})
    checkpoints.close()  # waits for the copy
    save(checkpoints, 20, best={"step": 10, "val/top1": 50.0})
    checkpoints.close()
    assert names(far) == ["step-00000010", "step-00000020"]
    ckpt.verify(far / "step-00000020")
    shutil.rmtree(run.at)
    (far / "step-00000030").mkdir()  # half a copy: no manifest
    again = run(keep_last=1, copy_to=url)
    state, saved = again.resume("r", allow_changes=False)
    assert state.step == 20
    assert same(saved["model"], tensors(20)["model"])
    assert names(run.at) == ["step-00000020"]
    save(again, 30, best={"step": 10, "val/top1": 50.0})
    again.close()
    assert names(far) == [
        "step-00000010",
        "step-00000030",
    ]  # the best one outlives the machine that had it


def test_a_failed_copy_is_a_warning_and_loses_no_checkpoint(run, tmp_path, caplog):
    (tmp_path / "far").write_text("a file where the folder should be")
    checkpoints = run(keep_last=1, copy_to=f"file://{tmp_path}/far")
    save(checkpoints, 10)
    checkpoints.close()
    assert re.search(
        r"the checkpoint of step 10 is saved, but (FileExists|NotADirectory)Error", caplog.text
    )
    save(checkpoints, 20)
    checkpoints.close()
    assert "step-00000020" in names(run.at)


def test_a_store_that_hangs_delays_no_save(tmp_path):
    class Hanging(writer.Copier):
        go = threading.Event()

        @staticmethod
        def _copy(request, checkpoint):
            assert Hanging.go.wait(30)
            assert checkpoint.exists()

    copier, memory = Hanging(), memoryview(safetensors.torch.save({"w": torch.ones(2)}))
    ranges = {"model": (0, len(memory)), "optimizer": (0, len(memory))}
    for step in (1, 2, 3, 4):
        request = writer.SaveRequest(
            str(tmp_path / "checkpoints"), step, ranges, {}, {}, 1, None, "memory://x"
        )
        assert writer.save(request, memory, copier) == writer.SaveResult(step)
    assert names(tmp_path / "checkpoints") == [
        "step-00000001",
        "step-00000004",
    ]  # the one being copied, and the newest
    Hanging.go.set()
    copier.finish()
    assert copier.take_warning() == ""


def test_if_no_copy_verifies_the_run_does_not_start_afresh(run, tmp_path):
    url, checkpoints = f"file://{tmp_path}/far", run(copy_to=f"file://{tmp_path}/far")
    save(checkpoints, 10)
    checkpoints.close()
    shutil.rmtree(run.at)
    flip(tmp_path / "far" / tmp_path.name / "step-00000010" / "model.safetensors", 100)
    with pytest.raises(
        NoCheckpoint,
        match=r"model.safetensors does not match its SHA-256 checksum; a run never start",
    ):
        run(copy_to=url).resume("r", allow_changes=False)


def test_copies_in_a_store_that_is_no_file_system(tmp_path):
    for step in (10, 20):
        contents = {
            f"{stem}.safetensors": safetensors.torch.save(group)
            for stem, group in tensors(step).items()
        }
        ckpt.write_checkpoint(tmp_path / "here", step, {**contents, "state.json": b"{}"})
        writer.copy_to_url(step_dir(tmp_path / "here", step), "memory://copies/run")
    writer.prune_copies("memory://copies/run", lambda steps: {max(steps)})
    assert writer.fetch_newest_copy("memory://copies/run", tmp_path / "there") == step_dir(
        tmp_path / "there", 20
    )
    assert writer.fetch_newest_copy("memory://copies/none", tmp_path / "none") is None


# --- several ranks ----------------------------------------------------------------------------------------------


def save_and_resume(run_dir: str) -> tuple[object, dict, list]:
    """Each rank has its own values; what comes back is rank 0's. Rank 1 does not see the files."""
    with session(Device.cpu) as world:
        place = Path(run_dir) / ("seen" if world.is_main else "unseen")
        checkpoints = CheckpointManager(place, CheckpointConfig(), WHO, world)
        outcome = checkpoints.save(
            RunState(step=7 + world.rank), tensors(7 + world.rank), is_last=True
        )
        state, saved = checkpoints.resume("r", allow_changes=False)
        fc = saved["model"]["fc.weight"]
        return outcome, vars(state), [fc.tolist(), sorted(os.listdir(run_dir))]


def test_rank_0_writes_and_reads_and_all_ranks_get_the_same(tmp_path):
    first, second = run_ranks(save_and_resume, 2, str(tmp_path))
    assert first[0] is second[0] is None
    assert first[1] == second[1] == vars(RunState(step=7))
    assert first[2] == second[2] == [tensors(7)["model"]["fc.weight"].tolist(), ["seen"]]


# --- identity ---------------------------------------------------------------------------------------------------

FREE = [
    *(
        "run.name=other",
        "run.root=elsewhere",
        "device=cpu",
        "data.root=elsewhere",
        "data.num_threads=3",
    ),
    *(
        "data.on_bad_image=skip",
        "trainer.epochs=99",
        "trainer.max_steps=5",
        "trainer.micro_batch_size=4",
    ),
    *(
        "trainer.eval_batch_size=7",
        "trainer.compile=true",
        "trainer.log_every_steps=1",
        "trainer.eval_every_epochs=3",
    ),
    *(
        "checkpoint.keep_last=9",
        "checkpoint.save_every_steps=3",
        "resume.allow_changes=true",
        "logger.wandb=offline",
    ),
    *(
        "logger.tensorboard=false",
        "logger.progress=false",
        "model.weights=some.file",
        "model.head=new",
    ),
]
FIXED = {
    "seed=1": "seed=1 (was 0)",
    "trainer.global_batch_size=65": "trainer.global_batch_size=65 (was 64)",
    "trainer.drop_last=true": "trainer.drop_last=True (was False)",
    "trainer.label_smoothing=0.2": "trainer.label_smoothing=0.2 (was 0.1)",
    "trainer.clip_grad_norm=null": "trainer.clip_grad_norm=unset (was 1.0)",
    "trainer.precision=bf16": "trainer.precision=bf16 (was fp32)",
    "model=alexnet": "model=AlexNet (was AlexNetSmall)",
    "optimizer.lr=0.5": "optimizer.lr=0.5 (was 0.1)",
    "optimizer.scaling=linear optimizer.base_batch_size=32": "optimizer.base_batch_size=32 (was unset)",
    "trainer.ema_decay=0.99": "trainer.ema_decay=0.99 (was unset)",
    "scheduler=constant": "scheduler=Constant (was Cosine)",
    "scheduler.warmup_epochs=9": "scheduler.warmup_epochs=9.0 (was 1.0)",
    "augment.flip=0": "augment.flip=0.0 (was 0.5)",
    "data.image_size=72": "data.image_size=72 (was 64)",
    "data.start_image_size=32 data.grow_epochs=3": "data.grow_epochs=3 (was unset), data.start_image_size=32 (was",
}


BASE = [
    *(
        "seed=0",
        "data=demo",
        "data.image_size=64",
        "augment=basic",
        "augment.flip=0.5",
        "model=alexnet_small",
    ),
    *("optimizer=sgd", "optimizer.lr=0.1", "scheduler=cosine", "scheduler.warmup_epochs=1"),
    *("trainer.global_batch_size=64", "trainer.label_smoothing=0.1", "trainer.clip_grad_norm=1"),
]


def who(*overrides: str) -> dict[str, object]:
    return identity(compose([*BASE, *overrides]), "abc")


@pytest.fixture(scope="module")
def me() -> dict[str, object]:
    return who()


def test_options_that_change_no_update_are_not_in_the_identity(me):
    assert who(*FREE) == me


def test_exactly_these_options_may_change_or_are_compared_by_what_they_select():
    """Every other option, and so a new one, is in the identity. Change the sets with care."""
    by_flag: dict[str, set[str]] = {"may_change": set(), "selects": set(), "compared": set()}
    as_unset = {}
    for path, spec in specs(Config):
        flag = "may_change" if spec.may_change else "selects" if spec.selects else "compared"
        by_flag[flag].add(path)
        if spec.as_unset is not None:
            as_unset[path] = spec.as_unset
    whole = ("checkpoint", "logger", "parallel", "resume")
    compared = by_flag["compared"]
    assert not [path for path in compared | by_flag["selects"] if path.split(".")[0] in whole]
    rest = {path for path in by_flag["may_change"] if path.split(".")[0] not in whole}
    assert rest == {
        *("device", "plugins", "data.root", "data.num_threads", "data.on_bad_image"),
        *("data.max_bad_images", "data.limit_val", "data.num_val", "data.cache_dir"),
        *("data.cache_gb", "model.weights", "model.head", "finetune.cache_features"),
        *("trainer.epochs", "trainer.max_steps", "trainer.micro_batch_size"),
        *("trainer.eval_batch_size", "trainer.compile", "trainer.tf32", "trainer.log_every_steps"),
        *("trainer.eval_every_epochs", "trainer.eval_every_steps", "trainer.patience"),
        *("trainer.max_hours", "trainer.hang_timeout_s", "trainer.on_nan", "trainer.spike_factor"),
        *("trainer.check_every_steps", "trainer.metrics", "trainer.callbacks"),
        *("trainer.profile_steps", "trainer.profile_ranks"),
    }
    assert by_flag["selects"] == {
        *("run.name", "run.root", "data.limit_train", "data.num_train", "data.num_classes"),
        *("data.class_order", "data.val_fraction", "data.fold", "data.shuffle"),
        "data.window_shards",
    }
    # The choices of a group agree about an option.
    assert not compared & (by_flag["may_change"] | by_flag["selects"])
    assert as_unset == {
        "finetune.method": "full",
        "finetune.backbone_lr_factor": 1.0,
        "finetune.layer_decay": 1.0,
        "data.mean": [0.485, 0.456, 0.406],
        "data.std": [0.229, 0.224, 0.225],
        "data.eval_interpolation": "bilinear",
    }


def test_an_option_that_states_nothing_is_in_the_identity():
    @dataclass(kw_only=True)
    class Bare(SyntheticConfig):
        extra: int = 3

    cfg = replace(compose([*BASE, "data=synthetic"]), data=Bare())
    found = identity(cfg, "abc")
    assert found["data.extra"] == 3
    assert "data.num_threads" not in found


def test_the_identity_survives_json(me):
    schedule = who("scheduler=step")
    assert json.loads(json.dumps(me)) == me
    assert json.loads(json.dumps(schedule)) == schedule


@pytest.mark.sampled
@pytest.mark.parametrize("override", FIXED)
def test_options_that_change_updates_are_in_the_identity_and_refused(run, me, override):
    save(run(who=me), 10)
    changed = who(*override.split())
    with pytest.raises(ConfigError) as e:
        run(who=changed).resume("mine", allow_changes=False)
    text = str(e.value)
    assert text.startswith("run.name=mine was started as another run: ")
    assert FIXED[override] in text
    assert text.endswith("; choose another run.name, or continue with resume.allow_changes=true")
    assert "\n" not in text
    assert run(who=changed).resume("mine", allow_changes=True)[0].step == 10


def test_imagenets_normalisation_is_the_same_run_whether_it_is_given_or_not(run, me):
    """Published weights give it; versions before that did not."""
    given = "data.mean=[0.485,0.456,0.406] data.std=[0.229,0.224,0.225] data.eval_interpolation=bilinear"
    explicit = who(*given.split())
    assert explicit != me
    for then, now in ((explicit, me), (me, explicit)):
        save(run(who=then), 10)
        assert run(who=now).resume("mine", allow_changes=False)[0].step == 10
    with pytest.raises(ConfigError, match=r"data.mean=\[0.5, 0.456, 0.406\] \(was unset\)"):
        run(who=who("data.mean=[0.5,0.456,0.406]")).resume("mine", allow_changes=False)


def test_a_checkpoint_without_a_newer_option_resumes_while_the_option_is_off(run, me):
    newer = ("augment.mixup_alpha", "augment.policy", "augment.num_ops", "data.start_image_size")
    save(run(who={key: value for key, value in me.items() if key not in newer}), 10)
    assert run(who=me).resume("mine", allow_changes=False)[0].step == 10
    with pytest.raises(
        ConfigError, match=r"another run: augment.mixup_alpha=0.2 \(was unset\); choose"
    ):
        run(who=who("augment.mixup_alpha=0.2")).resume("mine", allow_changes=False)


def test_groups_that_this_run_does_not_use_are_not_restored(run, caplog):
    sgd = {**WHO, "optimizer": "SGD", "trainer.ema_decay": None}
    groups = {**tensors(10), "ema": tensors(10)["model"], "hook": {"error": torch.ones(2)}}
    assert run(who=sgd).save(RunState(step=10), groups, is_last=True) is None
    assert list(run(who=sgd).newest()[1]) == ["model", "optimizer", "hook"]
    assert list(run(who={**sgd, "trainer.ema_decay": 0.9}).newest()[1]) == list(groups)
    assert caplog.messages == []
    adamw = run(who={**sgd, "optimizer": "AdamW"})
    assert list(adamw.resume("r", allow_changes=True)[1]) == ["model", "hook"]
    assert list(adamw.newest()[1]) == ["model", "hook"]  # a rollback to the other optimizer's
    assert (
        caplog.messages == ["another optimizer than the checkpoint's: its state starts afresh"] * 2
    )


def test_other_images_are_another_run(run, me):
    save(run(who=me), 10)
    with pytest.raises(
        ConfigError, match=r"another run: data=xyz \(was abc\); choose another run\.name"
    ):
        run(who={**me, "data": "xyz"}).resume("mine", allow_changes=False)


def test_resuming_with_other_numerics_is_logged(run, caplog, monkeypatch):
    save(run(), 10)
    path = "alexnet_ddp.checkpoint.manager.numerics"
    monkeypatch.setattr(path, lambda: {"torch": "9.9", "threads": torch.get_num_threads()})
    with caplog.at_level(logging.INFO):
        run().resume("r", allow_changes=False)
    difference = f"torch {torch.__version__} -> 9.9"
    assert caplog.messages == [
        f"resuming with other numerics ({difference}): equal to rounding, not bit for bit"
    ]
