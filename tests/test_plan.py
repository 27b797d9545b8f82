"""`python -m alexnet_ddp.plan`: table, recommendation, files and refused options."""

import json
import sys

import pytest

from alexnet_ddp import plan
from alexnet_ddp.config import ConfigError
from alexnet_ddp.config.compose import compose


def run(*overrides: str) -> None:
    plan.main(compose("plan", list(overrides)), list(overrides))


def test_two_nodes_get_a_recommendation_and_the_crossover(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    files = (f"plot={tmp_path}/plan.png", f"json={tmp_path}/plan.json")
    run("nodes=2", "gpus_per_node=1", "device=A100", "links.between_gbit_per_s=10", *files)
    out = capsys.readouterr().out
    assert "2 x 1 ranks, 128 images each (256), 224 px" in out
    assert "Use hybrid g=2: parallel=hybrid parallel.group_size=2 (" in out
    assert "fewer bytes than ddp up to a global batch of 4,096 images (32 ranks)." in out
    assert "On these links it is faster from 2 to " in out
    written = json.loads((tmp_path / "plan.json").read_text())
    assert [row["strategy"] for row in written["rows"]] == ["ddp", "ddp fp16", "hybrid g=2"]
    assert written["choice"]["strategy"] == "hybrid g=2"
    for row in written["rows"]:
        assert row["step_ms"] == pytest.approx(
            row["compute_ms"] + row["exposed_ms"] + row["update_ms"]
        )
        assert row["images_per_s"] == pytest.approx(256 / row["step_ms"] * 1e3)
        assert row["run_s"] == pytest.approx(90 * 1_281_167 / row["images_per_s"])
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_the_table_fits_a_terminal_at_1024_nodes(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    run("nodes=1024", "device=V100", "precision=fp16", "global_batch_size=1048576")
    out = capsys.readouterr().out
    assert "1024 x 8 ranks, 128 images each (1,048,576), 224 px" in out
    assert "…" not in out


def test_a_given_rate_is_that_of_a_single_rank(capsys, tmp_path):
    run(
        "nodes=1",
        "gpus_per_node=1",
        "device=custom",
        "images_per_s=1000",
        f"json={tmp_path}/one.json",
    )
    (ddp, _) = json.loads((tmp_path / "one.json").read_text())["rows"]
    assert ddp["compute_ms"] == pytest.approx(128 + 2)  # with 2 ms of launches
    assert "Use ddp: parallel=ddp\n" in capsys.readouterr().out


def test_a_hybrid_is_not_recommended_without_large_linear_layers(capsys):
    run("model=torchvision", "model.name=resnet18", "nodes=2")
    out = capsys.readouterr().out
    assert "hybrid g=" not in out
    reason = "the last linear layers have too few parameters for parallel=hybrid to pay"
    assert f"Use ddp: parallel=ddp ({reason})" in out


def test_bf16_halves_the_bytes_of_hybrids_and_is_in_the_overrides(capsys, tmp_path):
    asked = ("nodes=2", "gpus_per_node=1", f"json={tmp_path}/plan.json")
    found = {}
    for wire in ("fp32", "bf16"):
        run(*asked, f"wire_dtype={wire}")
        found[wire] = json.loads((tmp_path / "plan.json").read_text())["rows"][-1]
    convolutions = 4 * 2_469_696 / 1e6
    assert found["bf16"]["sent_mb"] - convolutions == pytest.approx(
        (found["fp32"]["sent_mb"] - convolutions) / 2
    )
    assert (
        found["bf16"]["overrides"]
        == "parallel=hybrid parallel.group_size=2 parallel.wire_dtype=bf16"
    )


def test_an_indivisible_batch_is_counted_exactly(tmp_path):
    run("global_batch_size=1001", f"json={tmp_path}/plan.json")
    ddp = json.loads((tmp_path / "plan.json").read_text())["rows"][0]
    assert ddp["images_per_s"] == pytest.approx(
        1001 / ddp["step_ms"] * 1e3
    )  # and its slowest rank has 126


def test_what_does_not_fit_into_memory_is_not_recommended(capsys):
    run("memory_gb=0.5", "gpus_per_node=1")
    assert (
        "Use a smaller batch: a GPU would need 1.2 GB of 90% of 0.5 GB; lower images_per_gpu."
        in capsys.readouterr().out
    )


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["device=B7"],
            r"device \(B7\) is not in the table of GPUs: K20, .*; use one of them, measure, or custom",
        ),
        (
            ["device=T4", "precision=bf16"],
            r"precision \(bf16\) is not supported by a T4; use fp16 or fp32",
        ),
        (["device=custom"], r"device=custom needs tflops=... or images_per_s=... of one GPU"),
        (["device=measure", "tflops=3"], r"tflops is what device=measure measures; leave it out"),
        (
            ["tflops=3", "images_per_s=3"],
            r"tflops \(3.0\) and images_per_s \(3.0\) are two ways to give the rate",
        ),
        (
            ["images_per_gpu=3", "global_batch_size=8"],
            r"images_per_gpu \(3\) and global_batch_size \(8\) are two ways",
        ),
        (
            ["global_batch_size=3"],
            r"global_batch_size \(3\) must be at least nodes \* gpus_per_node \(8\); nearest: 8",
        ),
        (
            ["wire_dtype=fp16"],
            r"wire_dtype \(fp16\) must be fp32 or bf16, as parallel.wire_dtype is",
        ),
        (
            ["device=custom", "tflops=3", "precision=bf16"],
            r"precision \(bf16\) is included in tflops already",
        ),
        (
            ["gpus_per_node=1", "links.inside_gb_per_s=9"],
            r"links.inside_gb_per_s and .* are not read if gpus_per_node",
        ),
        (
            ["model=torchvision", "model.name=resnet18", "wire_dtype=bf16"],
            r"wire_dtype \(bf16\) would be ignored: only hybrids use it",
        ),
        (["nodes=0"], r"nodes \(0\) must be at least 1"),
        (
            ["links.between_gbit_per_s=0"],
            r"links.between_gbit_per_s \(0.0\) must be greater than 0",
        ),
        (
            ["model.weights=x"],
            r"model.weights \(x\) is not read by a plan: all weights cost the same; leave it out",
        ),
        (["plot=plan.jpg"], r"plot \(plan.jpg\) must end in .png; plot=plan.png"),
        (
            ["json=/nowhere/plan.json"],
            r"json \(/nowhere/plan.json\) must be in an existing directory; create it first",
        ),
        (["data.image_size=16"], r"data.image_size \(16\) does not suit this network"),
    ],
)
def test_a_wrong_plan_is_refused_with_value_rule_and_remedy(overrides, message):
    with pytest.raises(ConfigError, match=message) as error:
        run(*overrides)
    assert "\n" not in str(error.value)


def test_a_missing_matplotlib_is_reported_before_anything_is_computed(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        ConfigError, match="plot needs matplotlib, which is not installed; pip install"
    ):
        run(f"plot={tmp_path}/plan.png")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.25, "0.2s"),
        (59.94, "59.9s"),
        (61, "1m01s"),
        (3600, "1h00m"),
        (47.9 * 3600, "47h54m"),
        (63.7 * 86400, "63d16h"),
    ],
)
def test_a_duration_has_its_two_largest_units(seconds, text):
    assert plan.duration(seconds) == text
