"""The main job through its command line: real processes, real files, real signals."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from alexnet_ddp import load_run
from alexnet_ddp.checkpoint import format as ckpt
from alexnet_ddp.runtime.accuracy import interval_text, percent_interval
from tests.conftest import make_folder
from tests.network import QUICK
from tests.ranks import run_command, started

ENV = {**os.environ, "WANDB_MODE": "disabled", "PYTHONPATH": str(Path(__file__).parents[1])}
SMALL = [
    "data=folder",
    "data.image_size=64",
    "trainer.log_every_steps=1",
    "logger.tensorboard=false",
    *QUICK,
]


def run(
    root: str, *overrides: str, ranks: int = 0, cwd: Path, env: dict | None = None
) -> subprocess.CompletedProcess:
    # HOME's cache is not touched: see conftest.private_cache
    cache = os.environ.get("XDG_CACHE_HOME", str(cwd / "cache"))  # a module's fixture has none
    full = {**ENV, "XDG_CACHE_HOME": cache, **(env or {})}
    # A run's record does not choose what is imported.
    plugins = QUICK[:1] if root in ("evaluate", "predict", "replay") else []
    return run_command(f"alexnet_ddp.{root}", [*overrides, *plugins], ranks, cwd, full)


def rows(run_dir: Path, key: str) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in found if key in row]


def sha_of_newest(run_dir: Path, stem: str = "model") -> str:
    newest = max((run_dir / "checkpoints").glob("step-*"))
    return hashlib.sha256((newest / f"{stem}.safetensors").read_bytes()).hexdigest()


def status(run_dir: Path) -> dict:
    return json.loads((run_dir / "status.json").read_text())


def start_and_hit(
    number: int, overrides: list[str], run_dir: Path, more_rows: int, ranks: int = 0
) -> int:
    """Start a run, send `number` to it once it has written `more_rows` and a checkpoint; its exit code."""
    full = {**ENV, "XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"]}
    before = rows(run_dir, "train/loss")
    start = before[-1]["step"] if before else 0
    with started("alexnet_ddp.train", overrides, ranks, Path.cwd(), full) as train:
        deadline = time.monotonic() + 120
        while train.is_running() and time.monotonic() < deadline:
            now = rows(run_dir, "train/loss")
            # It is saved in the background, so maybe some steps later.
            saved = any((run_dir / "checkpoints").glob("step-*"))
            if saved and now[-1]["step"] >= start + more_rows:
                break
            time.sleep(0.05)
        train.send_signal(number)
        return train.wait(60)


def test_a_run_trains_records_itself_and_is_complete_at_once_the_second_time(
    image_folder, tmp_path
):
    overrides = [
        *SMALL,
        f"data.root={image_folder}",
        "run.name=a",
        "trainer.max_steps=9",
        "trainer.global_batch_size=17",
    ]
    done = run(
        "train",
        *overrides,
        cwd=tmp_path,
        env={"ALEXNET_DDP_EXIT_CODE_FILE": str(tmp_path / "code")},
    )
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "code").read_text() == "0\n"
    run_dir = tmp_path / "runs" / "a"
    assert status(run_dir) | {"state": "complete", "step": 9, "exit_code": 0} == status(run_dir)
    assert [row["step"] for row in rows(run_dir, "train/loss")] == list(range(1, 10))
    (first, last) = rows(run_dir, "val/top1")  # the end of the first epoch, and the end of the run
    assert (first["step"], last["step"], last["val/num_images"]) == (7, 9, 61)
    assert last["val/correct1"] <= last["val/correct5"] <= 61
    best = json.loads((run_dir / "best.json").read_text())
    interval = interval_text(percent_interval(best["val/correct1"], 61))
    line = f"best evaluation: step {best['step']}  val/top1 {best['val/top1']:.2f}  val/top5 "
    assert line in done.stdout.splitlines()[-1]
    assert f"(61 images)  95 % interval of top-1: {interval} %, of top-5: " in done.stdout
    recorded = json.loads((run_dir / "run.json").read_text())
    assert recorded["overrides"] == overrides
    assert recorded["world_size"] == recorded["local_world_size"]
    assert recorded["num_nodes"] == 1
    assert json.loads((run_dir / "classes.json").read_text())["ids"] == [
        f"class{c}" for c in range(5)
    ]
    assert "global_batch_size: 17" in (run_dir / "config.yaml").read_text()
    assert {p.name for p in tmp_path.iterdir()} == {"runs", "code"}  # Hydra writes nothing

    began = time.monotonic()
    again = run("train", *overrides, cwd=tmp_path)
    assert again.returncode == 0
    assert "run a is complete" in again.stdout
    assert time.monotonic() - began < 60
    assert len(rows(run_dir, "train/loss")) == 9

    longer = run("train", *overrides[:-2], "trainer.max_steps=11", overrides[-1], cwd=tmp_path)
    assert longer.returncode == 0
    assert [row["step"] for row in rows(run_dir, "train/loss")] == list(range(1, 12))

    other = run("train", *overrides[:-1], "trainer.global_batch_size=16", cwd=tmp_path)
    assert other.returncode == 64
    assert (
        "run.name=a was started as another run: trainer.global_batch_size=16 (was 17); choose another run.name, or"
        in (other.stdout)
    )
    lost = run("train", *overrides, f"data.root={tmp_path}/none", cwd=tmp_path)
    assert lost.returncode == 65, lost.stdout
    assert status(run_dir)["state"] == "complete"  # as the run left it

    exact = run("evaluate", "run.name=a", cwd=tmp_path)
    assert exact.returncode == 0, exact.stdout
    written = json.loads((run_dir / "evaluation.json").read_text())
    assert any(
        all(written[k] == row[k] for k in row if k.startswith("val/c"))
        for row in rows(run_dir, "val/top1")
    )
    assert sum(c["num_images"] for c in written["per_class"].values()) == 61
    best = max(rows(run_dir, "val/top1"), key=lambda row: row["val/top1"])
    interval = interval_text(percent_interval(best["val/correct1"], 61))

    listed = run("runs", cwd=tmp_path).stdout
    expected = ["a", "complete", f"{best['val/top1']:.2f}", interval, "11"]
    assert listed.split()[-7:-2] == expected, listed
    assert json.loads((run_dir / "run.json").read_text())["choices"]["model"] == "plugin"

    shown = run(
        "predict", "run.name=a", f"images={image_folder}/val/class1", "output=p.jsonl", cwd=tmp_path
    )
    assert shown.returncode == 0, shown.stdout
    predictions = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert len(predictions) == len(list((image_folder / "val/class1").iterdir()))
    for row in predictions:
        found = [entry["probability"] for entry in row["predictions"]]
        assert found == sorted(found, reverse=True)
        assert sum(found) == pytest.approx(1, abs=1e-3)  # five classes, five predictions


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[list[str], Path]:
    """A run of 2 epochs, 26 steps each, and the overrides that made it."""
    root = tmp_path_factory.mktemp("resume")
    make_folder(root / "data", 205, 21)
    overrides = [*SMALL, f"data.root={root}/data", f"run.root={root}/runs", "trainer.epochs=2"]
    overrides += ["trainer.global_batch_size=8", "checkpoint.save_every_steps=5"]
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    done = run("train", *overrides, "run.name=calm", ranks=2, cwd=root)
    assert done.returncode == 0, done.stdout
    return overrides, root / "runs"


@pytest.mark.xdist_group("undisturbed")
@pytest.mark.slow
def test_stopped_and_killed_in_mid_epoch_it_ends_with_the_same_bits(undisturbed, tmp_path):
    """SIGTERM twice in the first epoch, on two ranks."""
    overrides, root = undisturbed
    hit = [*overrides, "run.name=hit"]
    run_dir = root / "hit"
    codes = [start_and_hit(signal.SIGTERM, hit, run_dir, 6, ranks=2)]
    assert status(run_dir)["exit_code"] == 75
    codes += [start_and_hit(signal.SIGTERM, hit, run_dir, 4, ranks=2)]
    assert status(run_dir)["state"] == "preempted"
    assert 0 not in codes
    done = run("train", *hit, ranks=2, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert sha_of_newest(run_dir) == sha_of_newest(root / "calm")
    for key in ("train/loss", "val/top1"):
        calm, disturbed = rows(root / "calm", key), rows(run_dir, key)
        assert [row["step"] for row in calm] == [row["step"] for row in disturbed]
        assert [row["data/index_hash"] for row in calm] == [
            row["data/index_hash"] for row in disturbed
        ]
    exact = [k for k in rows(root / "calm", "val/top1")[-1] if k.startswith("val/")]
    for calm, disturbed in zip(rows(root / "calm", "val/top1"), rows(run_dir, "val/top1")):
        assert [calm[k] for k in exact] == [disturbed[k] for k in exact]


@pytest.mark.slow
def test_with_every_augmentation_and_averages_a_run_goes_on_in_mid_epoch_with_the_same_bits(
    image_folder, tmp_path
):
    knobs = "mixup_alpha=0.2 cutmix_alpha=1 erase=0.25 brightness=0.4 contrast=0.4 saturation=0.4 hue=0.1"
    overrides = [
        *SMALL,
        f"data.root={image_folder}",
        "trainer.global_batch_size=17",
        "scheduler=constant",
    ]
    overrides += [f"augment.{knob}" for knob in f"{knobs} policy=trivialaugment".split()] + [
        "trainer.ema_decay=0.9"
    ]
    for name, max_steps in (("calm", 6), ("hit", 3), ("hit", 6)):
        done = run(
            "train", *overrides, f"run.name={name}", f"trainer.max_steps={max_steps}", cwd=tmp_path
        )
        assert done.returncode == 0, done.stdout
    for stem in ("model", "optimizer", "ema"):
        assert sha_of_newest(tmp_path / "runs/hit", stem) == sha_of_newest(
            tmp_path / "runs/calm", stem
        )
    for key in ("train/loss", "val/loss"):
        calm, hit = ([r[key] for r in rows(tmp_path / f"runs/{n}", key)] for n in ("calm", "hit"))
        assert calm[-1] == hit[-1]
        assert key == "val/loss" or calm == hit


@pytest.mark.slow
def test_where_weights_are_averaged_they_are_what_the_run_and_evaluate_and_predict_show(
    image_folder, tmp_path
):
    overrides = [
        *SMALL,
        f"data.root={image_folder}",
        "trainer.max_steps=4",
        "run.name=x",
        "trainer.ema_decay=0.7",
    ]
    done = run("train", *overrides, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "; evaluates averaged weights (trainer.ema_decay=0.7); " in done.stdout
    done = run("evaluate", "run.name=x", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "runs/x/evaluation.json").read_text())
    assert found["weights"] == "averaged"
    row = next(
        row for row in rows(tmp_path / "runs/x", "val/loss") if row["step"] == found["step"]
    )  # of the best one
    assert found["val/loss"] == pytest.approx(row["val/loss"], rel=1e-6)
    shown = load_run(tmp_path / "runs/x", plugins=["tests.network"]).model.state_dict()
    checkpoint = tmp_path / "runs/x/checkpoints" / found["checkpoint"]
    averages, weights = (ckpt.read_tensors(checkpoint, stem) for stem in ("ema", "model"))
    assert all(torch.equal(t, averages[name]) for name, t in shown.items())
    assert not torch.equal(averages["classifier.0.weight"], weights["classifier.0.weight"])


@pytest.mark.slow
@pytest.mark.xdist_group("undisturbed")
def test_killed_without_a_word_it_goes_on_from_the_last_checkpoint(undisturbed, tmp_path):
    """And on another world size it sees the same images with the same losses."""
    overrides, root = undisturbed
    hit = [*overrides, "run.name=killed"]
    run_dir = root / "killed"
    start_and_hit(signal.SIGKILL, hit, run_dir, 8)  # one process
    assert any((run_dir / "checkpoints").glob("step-*"))
    assert status(run_dir)["state"] == "running"
    done = run("train", *hit, ranks=3, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "world size 1 -> 3" in done.stdout
    calm, other = rows(root / "calm", "train/loss"), rows(run_dir, "train/loss")
    assert [row["data/index_hash"] for row in calm] == [row["data/index_hash"] for row in other]
    assert [row["train/loss"] for row in calm[:12]] == pytest.approx(
        [row["train/loss"] for row in other[:12]], rel=1e-5
    )


@pytest.mark.slow
@pytest.mark.xdist_group("undisturbed")
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(undisturbed, tmp_path):
    overrides, root = undisturbed
    run_dir = root / "damaged"
    shutil.copytree(root / "calm", run_dir)
    hit = [*overrides[:-3], *overrides[-2:], "run.name=damaged", "trainer.epochs=3"]
    newest, before = sorted((run_dir / "checkpoints").glob("step-*"), reverse=True)[:2]
    flip(newest / "optimizer.safetensors")
    done = run("train", *hit, "trainer.max_steps=53", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert (
        f"checkpoint {newest.name} is rejected: optimizer.safetensors does not match its SHA-256 checksum"
        in done.stdout
    )
    assert f"step {int(before.name[5:])} of 53" in done.stdout

    for directory in (run_dir / "checkpoints").glob("step-*"):
        flip(directory / "state.json")
    lost = run("train", *hit, "trainer.max_steps=60", cwd=tmp_path)
    assert lost.returncode == 66
    assert "is usable; restore one, or choose another run.name to start afresh" in lost.stdout
    assert status(run_dir)["exit_code"] == 66


@pytest.mark.slow
@pytest.mark.xdist_group("undisturbed")
def test_a_change_that_is_allowed_goes_on_with_a_fresh_optimizer_and_another_network_is_refused(
    undisturbed, tmp_path
):
    overrides, root = undisturbed
    shutil.copytree(root / "calm", root / "changed")
    more = [
        *overrides,
        "run.name=changed",
        "trainer.epochs=3",
        "trainer.max_steps=53",
        "resume.allow_changes=true",
    ]
    done = run("train", *more, "optimizer=adamw", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert (
        "warning: another optimizer than the checkpoint's: its state starts afresh" in done.stdout
    )
    assert rows(root / "changed", "train/loss")[-1]["step"] == 53
    other = run(
        "train",
        *more,
        "trainer.max_steps=54",
        "model=torchvision",
        "model.name=resnet18",
        cwd=tmp_path,
    )
    assert other.returncode == 64
    assert (
        "the checkpoint of changed holds another network than the configuration: " in other.stdout
    )


@pytest.mark.slow
def test_a_run_that_diverges_saves_the_state_before_and_one_process_replays_the_step(
    image_folder, tmp_path
):
    overrides = [
        *SMALL,
        f"data.root={image_folder}",
        "run.name=d",
        "trainer.epochs=9",
        "trainer.global_batch_size=17",
    ]
    overrides += ["optimizer.lr=1e12", "scheduler=constant", "trainer.clip_grad_norm=null"]
    done = run("train", *overrides, cwd=tmp_path)
    assert done.returncode == 70, done.stdout
    record = json.loads((tmp_path / "runs/d/replay.json").read_text())
    assert (
        f"of step {record['step']} is not finite; nothing of that step was applied"
        in done.stdout.splitlines()[-1]
    )
    (saved,) = (tmp_path / "runs/d/checkpoints").glob("step-*")
    assert int(saved.name[5:]) == record["step"] - 1
    again = run("replay", "runs/d/replay.json", cwd=tmp_path)
    assert again.returncode == 0, again.stdout
    assert f"images: {len(record['indices'])}, the recorded ones" in again.stdout
    assert "not finite: " in again.stdout
    assert record["names"][0] in again.stdout
    assert status(tmp_path / "runs/d")["exit_code"] == 70  # as the run left it
    two = run("replay", "run.name=d", ranks=2, cwd=tmp_path)
    assert "replay takes one process, not 2; start it without torchrun" in two.stdout


@pytest.mark.slow
def test_ranks_that_were_started_differently_are_refused(image_folder, tmp_path):
    """Each node of a cluster is started by its own command line."""
    shim = (
        "import os, sys; sys.argv.append('optimizer.lr=0.0' + str(1 + int(os.environ['RANK'])))\n"
    )
    shim += "from alexnet_ddp import cli; cli.run('train', 'alexnet_ddp.training.trainer:train')"
    (tmp_path / "shim.py").write_text(shim)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, "shim.py", *SMALL, f"data.root={image_folder}", "run.name=a"]
    done = subprocess.run(
        command, cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=120, check=False
    )
    assert (
        "rank 1 was started with other settings than rank 0: optimizer.lr=0.02 (rank 0: 0.01); "
        "start all ranks with the same command and data" in done.stderr
    )
    assert status(tmp_path / "runs/a")["exit_code"] == 64


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.slow
def test_eight_ranks_take_three_steps_on_two_cores(image_folder, tmp_path):
    overrides = [
        *SMALL,
        f"data.root={image_folder}",
        "run.name=eight",
        "trainer.max_steps=3",
        "data.limit_val=5",
    ]
    done = run("train", *overrides, "trainer.global_batch_size=13", ranks=8, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert [row["step"] for row in rows(tmp_path / "runs/eight", "train/loss")] == [1, 2, 3]
    assert rows(tmp_path / "runs/eight", "val/top1")[0]["val/num_images"] == 5


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: shutil.rmtree(root), "is not a folder; give one that contains train/CLASS/*"),
        (
            lambda root: shutil.rmtree(root / "val/class1"),
            "only train has class1; add or remove these class folders",
        ),
        (
            lambda root: (root / "train/class2/00002.jpg").write_text("text"),
            "class2/00002.jpg: not an image",
        ),
    ],
)
def test_bad_data_is_one_line_and_code_65(image_folder, tmp_path, spoil, message):
    root = shutil.copytree(image_folder, tmp_path / "data")
    spoil(root)
    overrides = [
        *SMALL,
        f"data.root={root}",
        "run.name=e",
        "trainer.max_steps=9",
        "trainer.global_batch_size=50",
    ]
    done = run("train", *overrides, cwd=tmp_path)
    assert done.returncode == 65
    last = done.stdout.splitlines()[-1]
    assert last.startswith("alexnet_ddp: ")
    assert message in last
    assert "Traceback" not in done.stdout
    assert status(tmp_path / "runs/e")["exit_code"] == 65


@pytest.mark.slow
def test_archives_and_the_folders_extracted_from_them_train_to_the_same_rows(tmp_path):
    from tests.archives import extract, make_archives

    archives = make_archives(tmp_path / "archives", classes=3, per_class=11, num_val=10)
    extract(archives, tmp_path / "tree")
    common = [
        "data.image_size=64",
        "trainer.max_steps=6",
        "trainer.global_batch_size=8",
        *SMALL[2:],
    ]
    # The default recipes of the two differ in these values.
    common += ["augment.min_scale=0.08", "trainer.epochs=2"]
    first = run(
        "train", "data=imagenet", f"data.root={archives}", "run.name=a", *common, cwd=tmp_path
    )
    second = run(
        "train", "data=folder", f"data.root={tmp_path}/tree", "run.name=b", *common, cwd=tmp_path
    )
    assert first.returncode == second.returncode == 0, first.stdout + second.stdout
    a, b = (
        [
            {
                k: v
                for k, v in row.items()
                if k != "train/images_per_sec" and not k.startswith("time")
            }
            for row in rows(tmp_path / f"runs/{n}", "step")
        ]
        for n in "ab"
    )
    assert a == b
    assert len(a) == 8


@pytest.mark.slow
def test_an_installed_wheel_works_in_an_empty_directory(tmp_path):
    root = Path(__file__).parents[1]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", tmp_path / "dist", root], check=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    subprocess.run(
        [*pip, "install", "-q", "--no-deps", "--target", tmp_path / "site", wheel], check=True
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    env = {"PYTHONPATH": str(tmp_path / "site")}
    overrides = ["experiment=smoke", "trainer.max_steps=2"]
    where = subprocess.run(
        [sys.executable, "-c", "import alexnet_ddp; print(alexnet_ddp.__file__)"],
        cwd=empty, env={**ENV, **env}, text=True, capture_output=True, check=True,
    ).stdout  # fmt: skip
    assert str(tmp_path / "site") in where
    assert (tmp_path / "site" / "alexnet_ddp" / "py.typed").exists()
    script = tmp_path / "site" / "bin" / "alexnet-ddp"
    subprocess.run([script, "launch", "scripts"], cwd=empty, env={**ENV, **env}, check=True)
    for script in ("launch/local.sh", "launch/node.sh", "slurm/train.sbatch"):
        assert (empty / "scripts" / script).read_bytes() == (root / script).read_bytes()
    local = [empty / "scripts/launch/local.sh", *overrides, "run.name=copied", "device=cpu"]
    done = subprocess.run(
        local, cwd=empty, env={**ENV, **env, "NPROC": "1", "PYTHON": sys.executable}, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_compile_changes_speed_and_not_the_losses(image_folder, tmp_path):
    overrides = [
        *SMALL,
        f"data.root={image_folder}",
        "trainer.max_steps=4",
        "trainer.global_batch_size=17",
    ]
    for name, compiled in (("eager", "false"), ("compiled", "true")):
        done = run(
            "train", *overrides, f"run.name={name}", f"trainer.compile={compiled}", cwd=tmp_path
        )
        assert done.returncode == 0, done.stdout
    eager, compiled = (
        [r["train/loss"] for r in rows(tmp_path / f"runs/{n}", "train/loss")]
        for n in ("eager", "compiled")
    )
    assert eager == pytest.approx(compiled, rel=1e-4)


@pytest.mark.slow
def test_windows_of_shards_and_growing_images_resume_bit_equal_and_on_other_ranks(tmp_path):
    make_folder(tmp_path / "images", 205, 21)
    packed = run(
        "prepare", "source=images", "root=shards", "num_shards=5", "engine.workers=1", cwd=tmp_path
    )
    assert packed.returncode == 0, packed.stdout
    overrides = [
        *(
            "data=shards",
            f"data.root={tmp_path}/shards",
            "data.shuffle=window",
            "data.window_shards=2",
        ),
        *(
            "data.image_size=96",
            "data.start_image_size=32",
            "data.grow_epochs=2",
            "trainer.epochs=3",
        ),
        *(
            *QUICK,
            "trainer.log_every_steps=1",
            "logger.tensorboard=false",
            "trainer.global_batch_size=8",
        ),
        *(
            f"run.root={tmp_path}/runs",
            "scheduler.warmup_epochs=0",
            "optimizer.lr=0.001",
            "scheduler=constant",
        ),
    ]
    calm, hit, wide = (tmp_path / "runs" / name for name in ("calm", "hit", "wide"))
    done = run("train", *overrides, "run.name=calm", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert (
        start_and_hit(signal.SIGTERM, [*overrides, "run.name=hit"], hit, 33) == 75
    )  # in the epoch of 64 pixels
    assert start_and_hit(signal.SIGKILL, [*overrides, "run.name=hit"], hit, 6) == -9
    done = run("train", *overrides, "run.name=hit", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert sha_of_newest(hit) == sha_of_newest(calm)
    done = run("train", *overrides, "run.name=wide", "trainer.max_steps=40", ranks=2, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    one, two = rows(calm, "train/loss")[:40], rows(wide, "train/loss")
    assert [row["data/index_hash"] for row in one] == [row["data/index_hash"] for row in two]
    assert [row["train/loss"] for row in one] == pytest.approx(
        [row["train/loss"] for row in two], rel=1e-4
    )
    other = run("train", *overrides, "run.name=hit", "data.window_shards=3", cwd=tmp_path)
    assert other.returncode == 64, other.stdout
    assert "data.windows=" in other.stdout


@pytest.mark.slow
def test_a_run_goes_on_under_another_parallelism_and_all_of_it_is_read_by_evaluate_and_predict(
    tmp_path,
):
    """hybrid on 4 ranks, ddp on one, hybrid on 2; beside it, ddp on one all the time."""
    images = make_folder(tmp_path / "data", 61, 21)
    common = [
        *SMALL,
        f"data.root={images}",
        "trainer.epochs=2",
        "trainer.global_batch_size=7",
    ]
    common += [
        "optimizer.scaling=none",
        "optimizer.base_batch_size=null",
        "optimizer.lr=0.05",
        "optimizer.nesterov=false",
    ]
    common += [
        "scheduler.warmup_epochs=2"
    ]  # a rate that rises slowly: rounding differences grow slowly too
    for name, parts in {
        "calm": [("ddp", 0, 18)],
        "mixed": [("hybrid", 4, 5), ("ddp", 0, 11), ("hybrid", 2, 18)],
    }.items():
        for parallel, ranks, max_steps in parts:
            more = [f"run.name={name}", f"parallel={parallel}", f"trainer.max_steps={max_steps}"]
            done = run("train", *common, *more, ranks=ranks, cwd=tmp_path)
            assert done.returncode == 0, done.stdout
            for root in ("evaluate", "predict"):
                shown = run(
                    root,
                    f"run.name={name}",
                    *[f"images={images}/val"] * (root == "predict"),
                    cwd=tmp_path,
                )
                assert shown.returncode == 0, shown.stdout
    calm, mixed = (rows(tmp_path / f"runs/{name}", "train/loss") for name in ("calm", "mixed"))
    assert [row["data/index_hash"] for row in calm] == [row["data/index_hash"] for row in mixed]
    ours, theirs = ([row["train/loss"] for row in part] for part in (mixed, calm))
    assert ours[:5] == pytest.approx(theirs[:5], rel=1e-5)
    assert ours == pytest.approx(
        theirs, rel=1e-2
    )  # on some CPUs a rounding difference flips a ReLU or a maximum


@pytest.mark.slow
def test_under_hybrid_an_unreadable_image_ends_all_ranks_or_is_left_out_by_all(tmp_path):
    images = make_folder(tmp_path / "data", 31, 5)
    (images / "train/class2/00002.jpg").write_bytes(b"no image")
    common = [
        *SMALL,
        f"data.root={images}",
        "trainer.epochs=1",
        "trainer.global_batch_size=31",
        "parallel=hybrid",
    ]
    common += ["trainer.micro_batch_size=4"]
    stopped = run("train", *common, "run.name=stopped", ranks=3, cwd=tmp_path)
    assert (
        status(tmp_path / "runs/stopped")["exit_code"],
        "class2/00002.jpg" in stopped.stdout,
    ) == (65, True)
    for name, ranks, parallel in (("split", 3, "hybrid"), ("whole", 0, "ddp")):
        more = ["data.on_bad_image=skip", f"run.name={name}", f"parallel={parallel}"]
        done = run("train", *common, *more, ranks=ranks, cwd=tmp_path)
        assert done.returncode == 0, done.stdout
    split, whole = (rows(tmp_path / f"runs/{name}", "train/loss")[0] for name in ("split", "whole"))
    assert split["train/loss"] == pytest.approx(whole["train/loss"], rel=1e-5)
    assert split["train/grad_norm"] == pytest.approx(whole["train/grad_norm"], rel=1e-5)
