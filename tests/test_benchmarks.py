"""The benchmarks run: their mechanics, never their figures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_loader_benchmark_writes_its_table(tmp_path):
    command = [sys.executable, "benchmarks/loader.py", "--quick", "--json", str(tmp_path / "l.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "l.json").read_text())
    row = next(row for row in written["results"] if row["id"] == "P5")
    assert row["n"] == 1
    assert row["ours"] > 0 < row["theirs"]
    assert row["unit"] == "images/s"
    assert written["machine"]["versions"]["torch"]


def test_a_learning_curve_is_drawn_from_the_rows_of_a_run(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    lines = [{"step": 1, "epoch": 0.5, "train/loss": 2.0}, {"step": 2, "epoch": 1.0, "val/loss": 1.5, "val/top1": 40.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "benchmarks/learning_curve.py", str(tmp_path / "c.png"), str(run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
