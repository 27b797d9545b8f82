"""Classes have names: rows of the head follow them through resume, evaluate and predict; other data is refused."""

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from PIL import Image

from alexnet_ddp import evaluate
from alexnet_ddp.api import read_run
from alexnet_ddp.checkpoint import format as ckpt
from alexnet_ddp.checkpoint.format import find_best, weights_of_run
from alexnet_ddp.cli import compose
from alexnet_ddp.config import Config, ConfigError, Device
from alexnet_ddp.data.sources.index import SampleIndex
from alexnet_ddp.data.sources.sets import ImageSets, open_data
from alexnet_ddp.model import build_model
from alexnet_ddp.runtime.distributed import World, session
from alexnet_ddp.runtime.errors import DataError
from alexnet_ddp.training.parts import TrainingParts
from alexnet_ddp.training.setup import RunSetup
from alexnet_ddp.training.trained import read_trained
from tests.ranks import run_ranks

HEAD = ("classifier.3.weight", "classifier.3.bias")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    threads = torch.get_num_threads()
    with session(Device.cpu) as world:
        yield world
    torch.set_num_threads(threads)


def make_images(root: Path, classes: str = "amq", count: int = 4) -> Path:
    for k, name in enumerate(classes):
        for split in ("train", "val"):
            folder = root / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count + k):
                pixels = np.random.default_rng([k, i]).integers(0, 255, (70, 70, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return root / "data"


def rename(data: Path, old: str, new: str) -> None:
    for split in ("train", "val"):
        (data / split / old).rename(data / split / new)


@cache
def composed(*more: str) -> Config:
    """Composed once for all tests, which differ in their folders only."""
    common = ["data=folder", "data.root=x", "data.image_size=64", "model=alexnet_small"]
    common += ["run.name=r", "device=cpu", "trainer.global_batch_size=4", "trainer.ema_decay=0.5"]
    return compose([*common, "optimizer=adamw", "optimizer.lr=0.01", *more])


def config(root: Path, *more: str) -> Config:
    cfg = composed(*more)
    data, run = replace(cfg.data, root=f"{root}/data"), replace(cfg.run, root=f"{root}/runs")
    return replace(cfg, data=data, run=run)


def saved(cfg: Config, world: World, step: int = 1) -> dict[str, dict[str, torch.Tensor]]:
    """A checkpoint of `cfg` after `step`, with moments and averages that differ in each row. Its tensors."""
    parts = TrainingParts(RunSetup(cfg, world))
    for state in parts.optimizer.state.values():
        for moment in state.values():
            moment.uniform_(1, 2) if moment.dim() else moment.fill_(9)
    for average in parts.ema._average.values():
        average.uniform_(1, 2)
    parts.setup.state.step = step
    parts.setup.checkpoints.prepare(parts.state_dict())
    assert parts.setup.checkpoints.save(parts.setup.state, parts.state_dict(), is_last=True) is None
    tensors = parts.state_dict()
    parts.setup.checkpoints.close()
    parts.close()
    return tensors


def resumed(cfg: Config, world: World) -> TrainingParts:
    parts = TrainingParts(RunSetup(cfg, world))
    parts.close()
    return parts


def test_class_names_are_recorded_in_the_checkpoint_and_in_its_files_of_weights(tmp_path, world):
    make_images(tmp_path)
    saved(config(tmp_path), world)
    (checkpoint,) = (tmp_path / "runs/r/checkpoints").iterdir()
    state = ckpt.read_state(checkpoint)
    assert state["classes"] == {"ids": ["a", "m", "q"], "names": ["a", "m", "q"]}
    assert state["images_per_class"] == [4, 5, 6]
    for stem in ("model", "ema"):
        path = checkpoint / f"{stem}.safetensors"
        with safetensors.safe_open(path, "pt") as file:
            assert file.metadata()["format"] == "pt"
            assert json.loads(file.metadata()["classes"]) == ["a", "m", "q"]
        start = path.read_bytes()[:8]
        assert int.from_bytes(start, "little") % 8 == 0  # tensors stay aligned


def test_a_renamed_class_is_refused_by_name_and_with_allow_changes_the_other_rows_move_along(
    tmp_path, world, caplog
):
    data = make_images(tmp_path)
    then = saved(config(tmp_path), world)
    rename(data, "a", "z")  # the first of three becomes the last
    with pytest.raises(ConfigError) as e:
        RunSetup(config(tmp_path), world)
    assert "started as another run: the classes differ: class a is gone, class z is new" in str(
        e.value
    )
    assert "resume.allow_changes=true" in str(e.value)

    caplog.clear()
    cfg = config(tmp_path, "resume.allow_changes=true")
    parts = resumed(cfg, world)
    line = "classes: 2 kept (m, q), 1 dropped (a), 1 new (z): rows of the head follow their class names"
    assert caplog.messages.count(line) == 1
    now = parts.state_dict()
    fresh = build_model(cfg.model, 3, 64, cfg.seed).state_dict()
    for name in HEAD:
        for stem, start in (("model", fresh[name]), ("ema", fresh[name])):
            assert torch.equal(now[stem][name][:2], then[stem][name][1:])
            assert torch.equal(now[stem][name][2], start[2])
        for moment in ("exp_avg", "exp_avg_sq"):
            key = f"{moment}/{name}"
            assert torch.equal(now["optimizer"][key][:2], then["optimizer"][key][1:])
            assert not now["optimizer"][key][2].any()
        assert now["optimizer"][f"step/{name}"] == 9
    assert torch.equal(now["model"]["classifier.0.weight"], then["model"]["classifier.0.weight"])


@pytest.mark.slow
def test_a_class_may_be_added_and_one_removed_with_allow_changes(tmp_path, world):
    data = make_images(tmp_path)
    then = saved(config(tmp_path), world)
    for split in ("train", "val"):
        shutil.copytree(data / split / "q", data / split / "b")
        shutil.copytree(data / split / "q", data / split / "c")
        shutil.rmtree(data / split / "m")
    parts = resumed(config(tmp_path, "resume.allow_changes=true"), world)  # a b c q
    for name in HEAD:
        assert torch.equal(parts.state_dict()["model"][name][[0, 3]], then["model"][name][[0, 2]])
    assert parts.setup.state.best == {}


@pytest.mark.slow
def test_the_best_evaluation_of_other_classes_is_forgotten(tmp_path, world):
    data, cfg = make_images(tmp_path), config(tmp_path)
    parts = TrainingParts(RunSetup(cfg, world))
    parts.setup.state.step = 1
    parts.setup.state.note_evaluation({"val/top1": 50.0, "val/loss": 1.0})
    assert parts.setup.checkpoints.save(parts.setup.state, parts.state_dict(), is_last=True) is None
    parts.setup.checkpoints.close()
    parts.close()
    assert RunSetup(cfg, world).state.best["step"] == 1
    rename(data, "a", "z")
    changed = RunSetup(config(tmp_path, "resume.allow_changes=true"), world)
    assert (changed.state.best, changed.state.evaluated_at) == ({}, None)


@pytest.mark.slow
def test_a_checkpoint_of_before_the_change_is_read_by_class_when_a_run_rolls_back(tmp_path, world):
    data = make_images(tmp_path)
    then = saved(config(tmp_path), world)
    rename(data, "a", "z")
    parts = resumed(config(tmp_path, "resume.allow_changes=true"), world)
    parts.roll_back(3)
    for name in HEAD:
        assert torch.equal(parts.state_dict()["model"][name][:2], then["model"][name][1:])
    parts.close()


def test_more_and_fewer_images_are_refused_with_their_numbers(tmp_path, world):
    data = make_images(tmp_path)
    saved(config(tmp_path), world)
    (data / "train/m/0.jpg").unlink()
    with pytest.raises(
        ConfigError,
        match=r"another run: 15 training images then, 14 now \(m: 5 -> 4\); restore the data, ",
    ):
        RunSetup(config(tmp_path), world)


def test_another_division_is_named_with_what_it_means(tmp_path, world):
    shutil.move(make_images(tmp_path) / "train", tmp_path / "whole")
    shutil.rmtree(tmp_path / "data")
    shutil.move(tmp_path / "whole", tmp_path / "data")
    saved(config(tmp_path, "data.fold=1/2"), world)
    with pytest.raises(ConfigError) as e:
        RunSetup(config(tmp_path, "data.val_fraction=0.5"), world)
    assert "data.val_fraction=0.5 (was unset), data.fold=unset (was 1/2)" in str(e.value)
    rule = "images that were trained on may now be validated on"
    assert f"; {rule}; restore data.val_fraction, data.fold, choose another run" in str(e.value)
    with pytest.raises(
        ConfigError, match=r"limit_train=2 \(was unset\); restore data.limit_train,"
    ):
        RunSetup(config(tmp_path, "data.fold=1/2", "data.limit_train=2"), world)
    (checkpoint,) = (tmp_path / "runs/r/checkpoints").iterdir()
    assert ckpt.read_state(checkpoint)["choice"]["data.fold"] == "1/2"


@pytest.mark.slow
def test_a_removed_bad_image_is_named_with_what_to_do(tmp_path, world):
    data = make_images(tmp_path)
    saved(config(tmp_path), world)
    bad = data / "train/m/0.jpg"
    row = {
        "split": "train",
        "index": 4,
        "name": str(bad),
        "kind": "x",
        "reason": "y",
        "step": 1,
        "epoch": 0.0,
    }
    (tmp_path / "runs/r/quarantine.jsonl").write_text(json.dumps(row) + "\n")
    bad.unlink()
    with pytest.raises(ConfigError) as e:
        RunSetup(config(tmp_path), world)
    assert (
        f"removed, of those that {tmp_path}/runs/r/quarantine.jsonl lists as bad: {bad}; "
        in str(e.value)
    )
    assert "put them back" in str(e.value)
    assert "continue with resume.allow_changes=true" in str(e.value)


def test_other_images_with_the_same_counts_are_called_so(tmp_path, world, monkeypatch):
    """Which names and sizes a fingerprint covers is tested in test_index.py."""
    make_images(tmp_path)
    monkeypatch.setattr(SampleIndex, "fingerprint", lambda self: "v2:then")
    saved(config(tmp_path), world)
    monkeypatch.setattr(SampleIndex, "fingerprint", lambda self: "v2:now")
    with pytest.raises(
        ConfigError,
        match="the training images differ: as many in each class, but other files or siz",
    ):
        RunSetup(config(tmp_path), world)


@pytest.mark.slow
def test_a_fingerprint_of_an_older_version_is_compared_as_far_as_it_goes(
    tmp_path, world, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    data, cfg = make_images(tmp_path), config(tmp_path)
    setup = RunSetup(cfg, world)
    setup.checkpoints._identity["data"] = setup.checkpoints._data.labels
    parts = TrainingParts(setup)
    parts.setup.state.step = 1
    assert parts.setup.checkpoints.save(parts.setup.state, parts.state_dict(), is_last=True) is None
    parts.setup.checkpoints.close()
    parts.close()
    monkeypatch.setattr(SampleIndex, "fingerprint", lambda self: "v2:now")
    RunSetup(cfg, world)
    assert any(
        "did not record names and sizes of images: only the classes and" in m
        for m in caplog.messages
    )
    (data / "train/m/0.jpg").unlink()
    with pytest.raises(ConfigError, match="15 training images then, 14 now"):
        RunSetup(cfg, world)


def other_order(cfg: Config) -> ImageSets:
    """The data of `cfg` with its classes the other way round."""
    data = open_data(cfg.data)
    last = len(data.val.classes) - 1
    turned = {
        split: SampleIndex(index.classes[::-1], last - index.labels, index.store)
        for split, index in (("train", data.train), ("val", data.val))
    }
    return replace(data, **turned, class_names=data.class_names[::-1])


def test_evaluate_maps_classes_by_name_and_refuses_others(tmp_path, world, caplog):
    caplog.set_level(logging.INFO)
    data, cfg = make_images(tmp_path), config(tmp_path)
    then = saved(cfg, world)["ema"]
    checkpoint = find_best(tmp_path / "runs/r/checkpoints")
    model = read_trained(cfg, checkpoint, other_order(cfg).val.classes).model
    for name in HEAD:
        assert torch.equal(model.state_dict()[name], then[name].flip(0))
    rule = "the data has the same 3 classes in another order than the training: "
    assert caplog.messages[-1] == rule + "rows of the head follow their class names"
    by_run = weights_of_run("run:r", str(tmp_path / "runs"))
    assert by_run == weights_of_run(str(tmp_path / "runs/r"), "elsewhere")
    file, known = by_run
    assert (file, sorted(known)) == (
        str(checkpoint / "ema.safetensors"),
        sorted(other_order(cfg).val.classes),
    )
    model, _ = evaluate._from_file(cfg, other_order(cfg), *by_run)
    for name in HEAD:
        assert torch.equal(model.state_dict()[name], then[name].flip(0))
    assert read_run(tmp_path / "runs/r", cfg).classes == ["a", "m", "q"]
    rename(data, "a", "z")
    with pytest.raises(
        DataError, match=r"of run r: only run r has a; only data.root has z; use a directory with"
    ):
        read_trained(cfg, checkpoint, open_data(cfg.data).val.classes)
    with pytest.raises(
        ConfigError,
        match=r"has other classes than the data: 2 kept \(m, q\), 1 dropped \(a\), 1 new",
    ):
        evaluate._from_file(cfg, open_data(cfg.data), *by_run)


def test_a_new_run_starts_from_the_best_weights_of_another_by_class_name(tmp_path, world):
    data = make_images(tmp_path)
    then = saved(config(tmp_path), world)["ema"]
    rename(data, "a", "z")
    parts = resumed(config(tmp_path, "run.name=s", "model.weights=run:r"), world)
    for name in HEAD:
        assert torch.equal(parts.model.state_dict()[name][:2], then[name][1:])
    with pytest.raises(
        ConfigError, match=r"model\.weights \(run:x\): \S+ has no such trained run; there are: r"
    ):
        weights_of_run("run:x", str(tmp_path / "runs"))


def test_a_new_head_without_weights_is_refused():
    with pytest.raises(
        ConfigError,
        match=r"^model\.head=new would be ignored without model\.weights; leave it auto$",
    ):
        compose(["model.head=new", "run.name=r"])


@pytest.mark.slow
def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(tmp_path, world):
    make_images(tmp_path)
    cfg = config(tmp_path)
    saved(cfg, world)
    parts = resumed(cfg, world)
    with torch.no_grad():
        parts.model.features[0].bias[3] = float("inf")
    parts.setup.state.step = 2
    error = parts.setup.checkpoints.save(parts.setup.state, parts.state_dict(), is_last=True)
    parts.setup.checkpoints.close()
    assert error.exit_code == 70
    assert (
        "the weights after step 2 are not finite, and were not saved (model.safetensors has"
        in str(error)
    )
    assert [d.name for d in ckpt.list_checkpoints(tmp_path / "runs/r/checkpoints")] == [
        "step-00000001"
    ]


def split_rows(root: str, allow: bool) -> dict[str, list]:
    """In a group of ranks that split the head: save, or resume. The rows of the whole head, as lists."""
    more = ["parallel=hybrid"] + ["resume.allow_changes=true"] * allow
    with session(Device.cpu) as world:
        parts = TrainingParts(RunSetup(config(Path(root), *more), world))
        if not allow:
            parts.setup.state.step = 1
            assert (
                parts.setup.checkpoints.save(parts.setup.state, parts.state_dict(), is_last=True)
                is None
            )
            parts.setup.checkpoints.close()
        with parts.evaluation_model() as model:  # collective: whole layers
            head = {name: model.state_dict()[name].tolist() for name in HEAD}
        parts.close()
        return head


@pytest.mark.slow
def test_rows_are_matched_to_classes_if_the_head_is_split_over_ranks(tmp_path):
    data = make_images(tmp_path)
    then = run_ranks(split_rows, 2, str(tmp_path), False)[0]
    rename(data, "a", "z")
    for now in run_ranks(split_rows, 2, str(tmp_path), True):
        for name in HEAD:
            assert now[name][:2] == then[name][1:]


def differing(root: str) -> str:
    with session(Device.cpu) as world:
        if world.rank == 1:
            (Path(root) / "b" / "data/val/m/0.jpg").unlink()
        try:
            RunSetup(config(Path(root) / "ab"[world.rank]), world)
        except Exception as error:
            return str(error)
    return ""


@pytest.mark.slow
def test_ranks_that_see_other_validation_images_are_refused(tmp_path):
    for name in "ab":
        make_images(tmp_path / name)
    for line in run_ranks(differing, 2, str(tmp_path)):
        assert (
            "rank 1 was started with other settings than rank 0: validation images=14 images of 3 classes"
            in line
        )
        assert "(rank 0: 15 images of 3 classes" in line
