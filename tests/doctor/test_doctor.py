"""doctor: most faults are created for real, and must be reported with their remedy."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from alexnet_ddp import cli
from alexnet_ddp.config import ConfigError, DoctorConfig, Wandb
from alexnet_ddp.config.compose import compose, to_plain
from alexnet_ddp.doctor import command as doctor
from alexnet_ddp.doctor import links, machines, outputs, rendezvous, speed
from alexnet_ddp.doctor.facts import Facts, collect_facts
from alexnet_ddp.doctor.findings import Level, format_bytes, format_seconds
from alexnet_ddp.doctor.links import AllReduce, Link
from alexnet_ddp.doctor.outputs import check_wandb
from alexnet_ddp.runtime.distributed import session
from alexnet_ddp.runtime.errors import RunError
from tests.cluster import Hosts, why_not
from tests.ranks import run_ranks

PROJECT = Path(__file__).parents[2]
needs_hosts = pytest.mark.skipif(why_not() is not None, reason=f"{why_not()}")


def config(*overrides: str, **options: object) -> DoctorConfig:
    smoke = [] if any(o.startswith("data=") for o in overrides) else ["experiment=smoke"]
    return DoctorConfig(**vars(cli.compose([*smoke, *overrides])), **options)


def facts(*overrides: str) -> Facts:
    cfg = config(*overrides)
    return collect_facts(cfg, to_plain(cfg))


def on_two_machines(one: Facts, **changes: object) -> list[Facts]:
    return [one, replace(one, rank=1, host="elsewhere", network="another", **changes)]


def test_more_threads_than_cores_are_reported(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "6400")
    found = machines.check_threads([facts()])
    assert found.level is Level.warn
    assert "OMP_NUM_THREADS=6400" in found.found
    assert found.remedy.startswith("unset OMP_NUM_THREADS")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert machines.check_threads([facts()]).level is Level.ok


def test_tasks_of_srun_without_torchrun_fail(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    found = machines.check_launcher([facts()])
    assert (found.level, found.found) == (Level.fail, "4 tasks, in worlds of 1")
    monkeypatch.setenv("MASTER_ADDR", "n1")
    assert machines.check_launcher([facts()]).level is Level.ok


def test_the_doctor_composes_a_run_with_its_own_options():
    overrides = ["experiment=smoke", "trainer.global_batch_size=6", "json=x.json"]
    cfg = compose("doctor", overrides)
    assert isinstance(cfg, DoctorConfig)
    assert (cfg.json, cfg.trainer.global_batch_size, cfg.run.name) == ("x.json", 6, "smoke")
    with pytest.raises(ConfigError, match=r"join_timeout_s \(0\.0\) must be in \(0, 1000000\]"):
        compose("doctor", ["join_timeout_s=0"])


def test_a_busy_port_is_reported_with_its_process(monkeypatch):
    listen = "import socket; s = socket.create_server(('', 0)); print(s.getsockname()[1], flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", listen], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        port = int(holder.stdout.readline())
        monkeypatch.setenv("MASTER_PORT", str(port))
        found = machines.check_port(facts(), 1)
        assert found.level is Level.fail
        assert f"process {holder.pid} has it" in found.found
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(
            ConfigError, match=f"MASTER_PORT={port} of .* cannot be used .*; choose another"
        ):
            rendezvous.connect(facts(), 1)
        holder.communicate("\n")
    monkeypatch.delenv("RANK")
    assert machines.check_port(facts(), 1).level is Level.ok


@needs_hosts
def test_a_full_disk_fails_and_a_small_one_warns(tmp_path):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path], check=True)
    try:
        cfg = config().checkpoint
        disk = outputs.measure_disk(tmp_path / "runs" / "x", 1_000_000)
        assert [f.level for f in outputs.check_disk(disk, 1_000_000, cfg)] == [
            Level.warn,
            Level.ok,
        ]
        (tmp_path / "full").write_bytes(bytes(2_000_000))
        space, writing = outputs.check_disk(
            outputs.measure_disk(tmp_path / "runs" / "x", 1_000_000), 1_000_000, cfg
        )
        assert (space.level, writing.level) == (Level.fail, Level.fail)
        assert "No space left" in writing.found
        assert "another run.root" in space.remedy
        assert [path.name for path in tmp_path.iterdir()] == ["full"]
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_loopback_interface_fails_only_between_machines(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    one = facts("device=cpu")
    assert [
        f.level for f in machines.check_interfaces([one, replace(one, rank=1, local_rank=1)])
    ] == [Level.ok]
    found = machines.check_interfaces(on_two_machines(one))
    assert [f.level for f in found] == [Level.fail] * 2
    assert "GLOO_SOCKET_IFNAME=lo, which reaches this machine alone" in found[0].found


def test_a_host_name_with_a_loopback_address_fails_unless_an_interface_is_named():
    debian = replace(facts("device=cpu"), address="127.0.1.1", interfaces=["lo", "eth0"], env={})
    assert "resolves to 127.0.1.1" in machines.check_interfaces(on_two_machines(debian))[0].found
    named = replace(debian, env={"GLOO_SOCKET_IFNAME": "eth0"})
    assert machines.check_interfaces(on_two_machines(named))[0].level is Level.ok
    wrong = replace(debian, env={"GLOO_SOCKET_IFNAME": "ib0"})
    assert "ib0 is none of lo, eth0" in machines.check_interfaces(on_two_machines(wrong))[0].found


def test_different_versions_devices_and_options_fail_and_name_the_rank():
    one = facts("device=cpu")
    other = {
        "versions": one.versions | {"torch": "0.4"},
        "config": one.config | {"seed": "7"},
        "device": "cuda",
    }
    two = on_two_machines(one, **other)
    device, versions, command, *_ = machines.check_compatibility(two)
    assert (device.level, versions.level, command.level) == (Level.fail,) * 3
    assert "0.4 on rank 1 (elsewhere)" in versions.found
    assert "7 on rank 1 (elsewhere)" in command.found
    assert all(
        f.level is Level.ok
        for f in machines.check_compatibility([one, replace(one, rank=1, local_rank=1)])
    )


def test_a_run_root_that_cannot_be_written_fails_with_the_reason(tmp_path):
    (tmp_path / "runs").write_text("a file")
    _, writing = outputs.check_disk(
        outputs.measure_disk(tmp_path / "runs" / "x", 1_000), 1_000, config().checkpoint
    )
    assert writing.level is Level.fail
    assert "Not a directory" in writing.found
    assert outputs.check_visibility("runs", ["n2"]).level is Level.warn


def test_data_that_a_node_does_not_have_fails(image_folder, tmp_path):
    here = facts("data=folder", f"data.root={image_folder}")
    assert machines.check_data_root([here]).level is Level.ok
    missing = facts("data=folder", f"data.root={tmp_path}/nowhere")
    found = machines.check_data_root(on_two_machines(here, data=missing.data))
    assert found.level is Level.fail
    assert "cannot be read on elsewhere" in found.found
    (tmp_path / "train").mkdir()
    other = facts("data=folder", f"data.root={tmp_path}")
    assert (
        "has different files"
        in machines.check_data_root(on_two_machines(here, data=other.data)).found
    )


def test_a_missing_device_is_reported_before_the_ranks_wait_for_it(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "found 0; use device=cpu" in machines.check_devices([facts("device=cuda")]).found


def _exchange_and_check(count: int, timeout_s: float, twice: bool = False) -> str:
    cfg = config("device=cpu", f"seed={os.environ['RANK']}")
    mine = collect_facts(cfg, to_plain(cfg))
    try:
        store = rendezvous.connect(mine, timeout_s)
        if twice:
            rendezvous.connect(replace(mine, rank=1), 3)
            rendezvous.connect(replace(mine, rank=1), 3)
        all_facts, found = rendezvous.exchange_facts(
            store, mine, count, machines.check_compatibility, timeout_s
        )
    except ConfigError as error:
        return str(error)
    assert len(all_facts) == (count if mine.rank == 0 else 0)
    return "; ".join(f.found for f in found if f.level is Level.fail)


def test_all_ranks_report_different_overrides_before_they_join():
    host = os.uname().nodename
    assert (
        run_ranks(_exchange_and_check, 2, 2, 30)
        == [f"seed: 0 on rank 0 ({host}); 1 on rank 1 ({host})"] * 2
    )


def test_a_missing_rank_is_named():
    (said,) = run_ranks(_exchange_and_check, 1, 2, 0.5)
    assert said.startswith("rank 1 of 2 did not connect to 127.0.0.1:")


def test_two_jobs_on_one_port_are_reported():
    (said,) = run_ranks(_exchange_and_check, 1, 2, 5, True)
    assert "two jobs use one port; give one of them another port" in said


@pytest.mark.parametrize("count", range(1, 8))
def test_every_pair_of_ranks_occurs_once_in_disjoint_rounds(count):
    players = list(range(0, 10 * count, 10))
    rounds = links.round_robin(players)
    paired = sorted(pair for pairs in rounds for pair in pairs)
    assert paired == [(a, b) for a in players for b in players if a < b]
    assert all(len({p for pair in pairs for p in pair}) == 2 * len(pairs) for pairs in rounds)


def _measure_network() -> tuple[list[AllReduce], list[Link], dict[int, float]]:
    links.SIZES, links._LINKS_S = (4_000, 64_000), 0.3
    with session(config("device=cpu").device, timeout=timedelta(seconds=30)) as world:
        return (
            links.time_all_reduce(world),
            links.time_links(world, [0, 1, 2]),
            links.measure_clock_offsets(world, [0, 1, 2]),
        )


@pytest.mark.slow
def test_links_all_reduces_and_clocks_are_measured_between_all_ranks():
    main, *others = run_ranks(_measure_network, 3)
    sums, found, skews = main
    assert [s.num_bytes for s in sums] == [4_000, 64_000]
    assert sorted((link.first, link.second) for link in found) == [(0, 1), (0, 2), (1, 2)]
    assert sorted(skews) == [1, 2]
    assert links.check_clocks(skews, str).level is Level.ok  # it is one clock
    assert all(other[:2] == main[:2] for other in others)


def test_all_reduce_times_are_interpolated_and_extrapolated_at_the_last_rate():
    sums = [AllReduce(1000, 0.1), AllReduce(3000, 0.5)]
    sizes = (500, 1000, 2000, 3000, 6000)
    assert [links.interpolate_seconds(n, sums) for n in sizes] == pytest.approx(
        [0.1, 0.1, 0.3, 0.5, 1]
    )
    assert sums[1].bus_rate(4) == 2 * 3 / 4 * 3000 / 0.5


def test_a_slow_link_and_a_late_clock_are_reported_with_their_nodes():
    pairs = [(a, b) for a in range(4) for b in range(a + 1, 4)]
    assert (
        links.check_links([Link(a, b, 1e-4, 1e9) for a, b in pairs], "n{}".format).level is Level.ok
    )
    found = links.check_links(
        [Link(a, b, 1e-4, 1e7 if 2 in (a, b) else 1e9) for a, b in pairs], "n{}".format
    )
    assert found.level is Level.warn
    assert "load of n2," in found.remedy
    three = [Link(0, 1, 1e-4, 1e9), Link(0, 2, 1e-4, 1e7), Link(1, 2, 1e-4, 1e7)]
    assert (
        "load of n2," in links.check_links(three, "n{}".format).remedy
    )  # most of the links are slow
    assert links.check_clocks({1: 0.1, 2: -3.0}, "n{}".format).found == "n2 is 3 s behind"


def test_gradients_that_do_not_overlap_the_backward_pass_are_reported_with_their_cost():
    found = links.check_gradients([AllReduce(1_000_000, 0.1)], 10_000_000, None, 0.3)
    assert found.level is Level.warn
    assert (
        found.found
        == "10 MB per step, all-reduced in 1 s: a step takes 300 ms, and at least 1.1 s with it"
    )
    assert (
        links.check_gradients([AllReduce(1_000_000, 0.1)], 10_000_000, "parallel=hybrid", 0.3).level
        is Level.ok
    )
    assert (
        links.check_gradients([AllReduce(1_000_000, 0.1)], 1_000_000, None, 0.3).level is Level.ok
    )


@pytest.mark.slow
def test_a_half_precision_hook_halves_the_bytes_and_other_options_are_named():
    half = ("parallel=ddp", "parallel.hook=bf16")
    less = (
        "parallel.hook=powersgd",
        "parallel.hook=post_local_sgd",
        "parallel=hybrid",
        "parallel=auto",
    )
    result = speed.Measurement(gradient_bytes=100)
    sent = [doctor._bytes_sent(config(choice), result) for choice in (*half, *less)]
    assert sent == [(100, None), (50, None), *((100, choice) for choice in less)]
    assert doctor._bytes_sent(config("parallel=auto"), replace(result, can_split=False)) == (
        100,
        None,
    )  # it takes ddp


def test_a_loader_slower_than_the_step_and_too_little_memory_are_warnings():
    assert speed.check_loader(90, 100, False).level is Level.warn
    assert (
        speed.check_loader(300, 100, True).found
        == "300 images/s per rank; loading takes 25 % of the cores"
    )
    assert speed.check_memory(1_000, 2_000, "n1").level is Level.warn


def _doctor_of_too_small_images(root: str) -> str:
    speed.STEP_S = 0.1
    with pytest.raises(ConfigError) as failed:
        doctor.main(
            config("device=cpu", "data.image_size=16", "model=alexnet", f"run.root={root}/runs"), []
        )
    return str(failed.value)


@pytest.mark.slow
def test_images_that_the_model_cannot_use_fail_and_the_other_checks_run(tmp_path):
    assert run_ranks(_doctor_of_too_small_images, 1, str(tmp_path)) == [
        "doctor: FAIL: step; the table names the remedies"
    ]


def _doctor_of_a_run_that_cannot_be_parallel(root: str, *overrides: str) -> tuple[str, str]:
    speed.STEP_S = speed.LOADER_S = links._LINKS_S = 0.1
    links.SIZES = (4_000, 64_000)
    with pytest.raises(RunError) as failed:
        doctor.main(
            config("device=cpu", *overrides, f"run.root={root}/runs", json=f"{root}/doctor.json"),
            [],
        )
    table = Path(root, "doctor.json")
    rows = json.loads(table.read_text())["findings"] if table.exists() else []
    return str(failed.value), " ".join(row["found"] for row in rows if row["check"] == "step")


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (
            ["parallel=hybrid", "parallel.group_size=3"],
            "parallel.group_size (3) must divide the number of processes (2)",
        ),
        pytest.param(
            ["parallel=hybrid", "model=torchvision", "model.name=resnet18"],
            "parallel=hybrid needs consecutive linear layers",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["parallel.hook=post_local_sgd", "parallel.local_sgd_group=2"],
            "parallel.local_sgd_group (2) must be less than the number of processes (2)",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_parallelism_that_would_not_start_fails(tmp_path, overrides, reason):
    (line, found), _ = run_ranks(
        _doctor_of_a_run_that_cannot_be_parallel, 2, str(tmp_path), *overrides
    )
    assert line == "doctor: FAIL: step; the table names the remedies"
    assert reason in found


def test_wandb_online_without_a_key_is_a_warning(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    logger = replace(config().logger, wandb=Wandb.online)
    assert check_wandb(logger).found == "no key"
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password canary")
    found = check_wandb(logger)
    assert found.level is Level.warn
    assert "127.0.0.1 does not answer" in found.found
    assert "canary" not in str(found)


def test_sizes_and_durations_have_three_digits_and_a_unit():
    assert [format_bytes(n) for n in (12, 4_000, 244_400_000, 1.5e9)] == [
        "12 B",
        "4 kB",
        "244 MB",
        "1.5 GB",
    ]
    assert [format_seconds(s) for s in (2.5, 0.0123, 4.2e-6)] == ["2.5 s", "12.3 ms", "4.2 µs"]


def _doctor(root: str) -> list[str]:
    cfg = config("device=cpu", f"run.root={root}/runs", json=f"{root}/doctor.json")
    links.SIZES, links._LINKS_S, speed.STEP_S, speed.LOADER_S = (4_000, 64_000), 0.1, 0.1, 0.1
    doctor.main(cfg, [])
    return sorted(path.name for path in Path(root).iterdir())


def test_a_good_machine_passes_and_no_files_are_left(tmp_path):
    assert run_ranks(_doctor, 2, str(tmp_path))[0] == ["doctor.json"]
    report = json.loads((tmp_path / "doctor.json").read_bytes())
    assert [f for f in report["findings"] if f["verdict"] == "FAIL"] == []
    assert {"devices", "interface", "links", "gradients", "loader", "disk"} <= {
        f["check"] for f in report["findings"]
    }
    assert [s["num_bytes"] for s in report["all_reduce"]] == [4_000, 64_000]


@pytest.mark.slow
@needs_hosts
def test_doctor_on_two_hosts_finds_the_loopback_and_both_exit_with_64(tmp_path):
    env = {**os.environ, "COMMAND": "doctor", "PYTHON": sys.executable, "PYTHONPATH": str(PROJECT)}
    env |= {
        "NNODES": "2",
        "RDZV_ENDPOINT": "n1:29500",
        "RDZV_ID": "doctor",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [str(PROJECT / "launch/node.sh"), "experiment=smoke", "device=cpu"]
    with Hosts(2) as hosts:
        pipes = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "text": True,
        }
        commands = [hosts.command(f"n{k + 1}", "env", f"NODE_RANK={k}", *command) for k in range(2)]
        nodes = [subprocess.Popen(command, env=env, cwd=tmp_path, **pipes) for command in commands]
        said = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [64, 64], said
    assert "alexnet_ddp: doctor: FAIL: interface" in said[0]
