"""The benchmarks run: their mechanics, never their figures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_loader_benchmark_writes_one_row_for_each_of_its_targets(tmp_path):
    files = ["--json", str(tmp_path / "l.json"), "--plot", str(tmp_path / "l.png")]
    command = [sys.executable, "benchmarks/loader.py", "--quick", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "l.json").read_text())
    marks = [row["id"] for row in written["results"] if row["id"]]
    assert sorted(marks) == ["P11", "P12", "P5", "P6", "P7", "P8"]
    keys = {"id", "what", "peer", "ratio", "min", "max", "n", "ours", "theirs", "unit"}
    assert all(row.keys() == keys and row["n"] == 1 and row["ratio"] > 0 for row in written["results"])
    assert {row["unit"] for row in written["results"]} == {"images/s", "s", "MB"}
    assert written["machine"]["versions"]["torch"]
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_preparation_benchmark_compares_the_engines_that_are_there(tmp_path):
    command = [sys.executable, "benchmarks/prepare.py", "--quick", "--json", str(tmp_path / "p.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "p.json").read_text())
    (figures,) = written["turns"].values()
    assert {"local, 1 process", "local, 2 processes"} <= figures.keys()
    assert len(figures) == 3 or written["skipped"]
    assert all(row["ratio"] > 0 and row["unit"] == "images/s" for row in written["results"])


def test_the_loader_benchmark_knows_its_parts():
    command = [sys.executable, "benchmarks/loader.py", "--only", "P5,P99"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "--only knows P5, P6, P7, 64px, P8, P11, P12, not P99" in done.stderr


def test_a_learning_curve_is_drawn_from_the_rows_of_a_run(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    lines = [{"step": 1, "epoch": 0.5, "train/loss": 2.0}, {"step": 2, "epoch": 1.0, "val/loss": 1.5, "val/top1": 40.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "benchmarks/learning_curve.py", str(tmp_path / "c.png"), str(run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_large_batch_benchmark_collects_both_curves(tmp_path):
    files = ["--json", str(tmp_path / "l.json"), "--plot", str(tmp_path / "l.png"), "--runs", str(tmp_path / "runs")]
    command = [sys.executable, "benchmarks/large_batch.py", "--quick", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    curves = json.loads((tmp_path / "l.json").read_text())["curves"]
    assert [found["experiment"] for found in curves.values()] == ["imagenet20_lars_4k", "imagenet20_sgd_4k"]
    assert all(len(found["train/loss"]) == 2 and found["val/top1"] for found in curves.values())
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")
