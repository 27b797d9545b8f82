"""The benchmarks run; their figures are not tested."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import cluster

ROOT = Path(__file__).parents[1]


def test_what_the_benchmarks_import_from_the_package_exists():
    found = 0
    for file in sorted((ROOT / "benchmarks").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("alexnet_ddp"):
                for alias in node.names:
                    found += 1
                    module = importlib.import_module(node.module)
                    if not hasattr(module, alias.name):  # then it is a module of a package
                        importlib.import_module(f"{node.module}.{alias.name}")
    assert found > 20


@pytest.mark.slow
def test_the_survival_benchmark_writes_its_rows(tmp_path):
    command = [sys.executable, "benchmarks/survival.py", "--quick", "--json", str(tmp_path / "s")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "s").read_text())["results"]
    assert [row["id"] for row in results if row["id"]] == ["P13", "stall"]
    assert all(row["n"] == 1 for row in results)


@pytest.mark.slow
def test_the_loader_benchmark_writes_one_row_per_target(tmp_path, full):
    targets = ["P11", "P12", "P5", "P6", "P7", "P8"] if full else ["P11", "P12", "P5", "P7"]
    files = ["--json", str(tmp_path / "l.json"), "--plot", str(tmp_path / "l.png")]
    files += [] if full else ["--only", "P5,P11,P12"]  # P5 also gives P7
    command = [sys.executable, "benchmarks/loader.py", "--quick", *files]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "l.json").read_text())
    marks = [row["id"] for row in written["results"] if row["id"]]
    assert sorted(marks) == targets
    keys = {"id", "what", "peer", "ratio", "min", "max", "n", "ours", "theirs", "unit"}
    assert all(
        row.keys() == keys and row["n"] == 1 and row["ratio"] > 0 for row in written["results"]
    )
    assert {row["unit"] for row in written["results"]} == {"images/s", "s", "MB"}
    assert written["machine"]["versions"]["torch"]
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_preparation_benchmark_compares_the_installed_engines(tmp_path):
    command = [
        sys.executable,
        "benchmarks/prepare.py",
        "--quick",
        "--json",
        str(tmp_path / "p.json"),
    ]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "p.json").read_text())
    (figures,) = written["turns"].values()
    assert {"local, 1 process", "local, 2 processes"} <= figures.keys()
    assert len(figures) == 3 or written["skipped"]
    assert all(row["ratio"] > 0 and row["unit"] == "images/s" for row in written["results"])


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.skipif(cluster.why_not() is not None, reason=str(cluster.why_not()))
def test_the_communication_benchmark_checks_equality_and_counts_fewer_bytes(tmp_path):
    files = ["--json", str(tmp_path / "c.json"), "--plot", str(tmp_path / "c.png")]
    command = [sys.executable, "benchmarks/communication.py", "--quick", *files]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "c.json").read_text())
    rows = {row["id"]: row for row in written["results"]}
    assert rows.keys() == {"P1", "P2", "P4"}
    assert rows["P1"]["ratio"] > 12
    assert rows["P1"]["theirs"] == pytest.approx(
        244.4, rel=0.02
    )  # 61.1 million gradients of four bytes
    assert all(row["n"] == 1 and row["ratio"] > 0 for row in rows.values())
    assert written["machine"]["link_mb_per_s"]["1 Gbit/s"] < 125
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_the_communication_plot_comes_with_a_table_of_medians(tmp_path):
    turns = {"plain DDP": [2.0, 3.0, 4.0], "ours: parallel=hybrid": [1.0, 1.0, 1.0]}
    scales = {
        "plain DDP, K=1": [10.0],
        "plain DDP, K=2": [8.0],
        "ours: parallel=hybrid, K=1": [12.0],
    }
    sent = {"ours: parallel=hybrid": [10.0, 10.0], "plain DDP": [200.0, 220.0]}
    titles = {"K=2, MB sent a step": sent, "weak scaling, images/s": scales}
    titles |= {f"K=2, {size} px, 1 Gbit/s": turns for size in (64, 224)}
    about = {"cores": 2, "cpu": "a CPU", "date": "a day"}
    (tmp_path / "c.json").write_text(json.dumps({"turns": titles, "machine": about}))
    (tmp_path / "r.md").write_text(
        "# A\n<!-- communication: a -->\nold\n<!-- end of communication -->\nend\n"
    )
    files = [str(tmp_path / name) for name in ("c.json", "c.png", "r.md")]
    command = [sys.executable, "benchmarks/communication_picture.py", *files]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r.md").read_text() == (
        f"# A\n<!-- communication: a -->\n{done.stdout}<!-- end of communication -->\nend\n"
    )
    assert "| 2 | 64 | plain DDP |  | 3.00 s |  |" in done.stdout
    sentence = "each sends 10.0 MB per step, under plain DDP 210.0 MB: 21.0 times fewer (P1).\n"
    assert sentence in done.stdout
    assert (
        "| 2 | 224 | alexnet_ddp, parallel=hybrid |  | 1.00 s, 3.0 x (2.0 to 4.0) |  |"
        in done.stdout
    )
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_the_communication_benchmark_reports_what_it_needs():
    env = {**os.environ, "PATH": "/nonexistent"}
    command = [sys.executable, "benchmarks/communication.py"]
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 64
    assert done.stderr.startswith(
        "communication.py creates hosts and links on this machine, which needs "
    )
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_loader_benchmark_refuses_unknown_parts():
    command = [sys.executable, "benchmarks/loader.py", "--only", "P5,P99"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "--only knows P5, P6, P7, 64px, P8, P11, P12, not P99" in done.stderr


@pytest.mark.slow
def test_learning_curves_are_plotted_from_metrics(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    lines = [
        {"step": 1, "epoch": 0.5, "train/loss": 2.0},
        {"step": 2, "epoch": 1.0, "val/loss": 1.5, "val/top1": 40.0},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "benchmarks/learning_curve.py", str(tmp_path / "c.png"), str(run)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    done = subprocess.run(
        [*command, str(tmp_path / "nope")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert (
        done.stderr == f"{tmp_path}/nope contains no metrics.jsonl; give the directory of a run\n"
    )


@pytest.mark.slow
def test_the_large_batch_benchmark_collects_both_curves(tmp_path):
    files = [
        "--json",
        str(tmp_path / "l.json"),
        "--plot",
        str(tmp_path / "l.png"),
        "--runs",
        str(tmp_path / "runs"),
    ]
    command = [sys.executable, "benchmarks/large_batch.py", "--quick", *files]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    curves = json.loads((tmp_path / "l.json").read_text())["curves"]
    assert [found["experiment"] for found in curves.values()] == [
        "imagenet20_lars_4k",
        "imagenet20_sgd_4k",
    ]
    assert all(len(found["train/loss"]) == 2 and found["val/top1"] for found in curves.values())
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_prediction_benchmark_compares_rates_and_reports_memory(tmp_path):
    command = [sys.executable, "benchmarks/predict.py", "--quick", "--json", str(tmp_path / "p")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "p").read_text())
    units = [row["unit"] for row in written["results"]]
    assert units == ["images/s", "images/s"]  # with the network, and without
    assert set(written["machine"]["rss_mb"]) == {"2 files", "200 files"}
