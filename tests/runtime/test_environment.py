"""The environment of a process: contradictions are refused at once, and CPU quotas count as fewer cores."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from alexnet_ddp.runtime.environment import Ranks, num_usable_cores, read_ranks, refuse_lone_tasks
from alexnet_ddp.runtime.errors import ConfigError

TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
TORCHRUN |= {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


def check(env: dict[str, str]) -> None:
    read_ranks(env)
    refuse_lone_tasks(env)


def test_ranks_are_read_from_torchruns_variables():
    assert read_ranks(TORCHRUN) == Ranks(1, 1, 4, 2)
    several_tasks = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "OMPI_COMM_WORLD_SIZE": "2"}
    assert read_ranks(TORCHRUN | several_tasks) == Ranks(1, 1, 4, 2)
    refuse_lone_tasks(TORCHRUN | several_tasks)
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    assert read_ranks(alone) == Ranks()


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"WORLD_SIZE": "1"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"},  # a batch script of eight tasks
        {
            "SLURM_JOB_ID": "7",
            "SLURM_NTASKS": "8",
            "SLURM_STEP_NUM_TASKS": "1",
            "SLURM_PROCID": "0",
        },  # salloc's shell
        {"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "1"},
    ],
)
def test_one_process_is_a_world_of_one(env):
    refuse_lone_tasks(env)
    assert read_ranks(env) == Ranks()


@pytest.mark.parametrize(
    ("env", "line"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE (2) in the environment is set, but RANK is not; start with torchrun or"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "WORLD_SIZE (2) in the environment is set, but"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE ('two') in the environment must be a number; start with torchrun"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE ('') in the environment must be a number"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK (1) in the environment is set, but RANK is not"),
        ({"LOCAL_WORLD_SIZE": "2"}, "LOCAL_WORLD_SIZE (2) in the environment is set, but RANK is not"),
        ({"RANK": ""}, "RANK ('') in the environment must be a number"),
        ({"RANK": "0"}, "WORLD_SIZE is not set in the environment, but RANK is"),
        (TORCHRUN | {"RANK": "-1"}, "RANK ('-1') in the environment must be a number"),
        (TORCHRUN | {"RANK": "²"}, "RANK ('²') in the environment must be a number"),
        (TORCHRUN | {"RANK": "4"}, "RANK (4) in the environment must be less than WORLD_SIZE (4)"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "RANK (1) in the environment must be less than WORLD_SIZE (0)"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "LOCAL_RANK (2) in the environment must be less than LOCAL_WORLD_SIZE (2)"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE (5) in the environment must be at most WORLD_SIZE"),
        (TORCHRUN | {"MASTER_ADDR": ""}, "MASTER_ADDR ('') in the environment must name the host of rank 0"),
        (TORCHRUN | {"MASTER_PORT": "0"}, "MASTER_PORT (0) in the environment must be a port from 1 to 65535"),
        (TORCHRUN | {"MASTER_PORT": "65536"}, "MASTER_PORT (65536) in the environment must be a port"),
        (TORCHRUN | {"MASTER_PORT": "x"}, "MASTER_PORT ('x') in the environment must be a number"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, "srun started 2 tasks (SLURM_STEP_NUM_TASKS), and each"),
        ({"SLURM_PROCID": "3"}, "srun started several tasks (SLURM_PROCID=3), and each would run alone; start one"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun started 4 tasks (OMPI_COMM_WORLD_SIZE), and each would run alone"),
        ({"PMI_SIZE": "4"}, "mpiexec started 4 tasks (PMI_SIZE), and each would run alone"),
    ],
)  # fmt: skip
def test_a_contradiction_is_refused_with_its_value_and_the_remedy(env, line):
    with pytest.raises(ConfigError) as error:
        check(env)
    assert str(error.value).startswith(line)
    assert "; start" in str(error.value)


@pytest.mark.parametrize(
    "name", ["LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
)
def test_a_missing_variable_of_a_rank_is_named(name):
    with pytest.raises(ConfigError, match=name):
        read_ranks({key: value for key, value in TORCHRUN.items() if key != name})


LONE_RANKS = [{"WORLD_SIZE": "2"}, {"RANK": ""}, {"RANK": "1"}]
LONE_TASKS = [("train", {"SLURM_STEP_NUM_TASKS": "2"}), ("evaluate", {"SLURM_STEP_NUM_TASKS": "2"})]


# The doctor reports lone tasks in its table: see test_doctor.py.
@pytest.mark.parametrize(
    ("command", "env"),
    [
        *((command, env) for command in ("train", "evaluate", "doctor") for env in LONE_RANKS),
        *LONE_TASKS,
    ],
)
def test_a_command_refuses_before_it_imports_torch(tmp_path, command, env):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    package = str(Path(__file__).parents[2])
    full = {
        **os.environ,
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{package}",
        "ALEXNET_DDP_EXIT_CODE_FILE": "code",
    } | env
    arguments = [sys.executable, "-m", f"alexnet_ddp.{command}"]
    done = subprocess.run(
        arguments, env=full, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 64, done.stderr
    assert done.stderr.startswith("alexnet_ddp: ")
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "code").read_text() == "64\n"


# --- cores ------------------------------------------------------------------------------------------------------

V2 = "30 23 0:26 {top} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "33 24 0:29 {top} /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
V1_SET = "34 24 0:30 {top} /sys/fs/cgroup/cpuset rw shared:10 - cgroup cgroup rw,cpuset\n"


@pytest.fixture
def cores(tmp_path, monkeypatch):
    """cores(membership, mounts, files): what a process sees in such a file system, with eight cores of affinity."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)

    def count(membership: str, mounts: str, files: dict[str, str]) -> int:
        (tmp_path / "cgroup").write_text(membership)
        (tmp_path / "mountinfo").write_text("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + mounts)
        for name, content in files.items():
            path = tmp_path / "root/sys/fs/cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return num_usable_cores(tmp_path / "cgroup", tmp_path / "mountinfo", tmp_path / "root")

    return count


def v1(folder: str, quota: int) -> dict[str, str]:
    folder = f"cpu,cpuacct/{folder}"
    return {f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": "100000\n"}


@pytest.mark.parametrize(
    ("membership", "mounts", "files", "expected"),
    [
        ("0::/\n", V2.format(top="/"), {}, 8),  # the root group has no limit
        ("0::/a/b\n", V2.format(top="/"), {"a/b/cpu.max": "max 100000\n"}, 8),
        ("0::/a/b\n", V2.format(top="/"), {"a/b/cpu.max": "300000 100000\n"}, 3),
        ("0::/a/b\n", V2.format(top="/"), {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "150000 100000\n"}, 2),
        ("0::/a/b\n", V2.format(top="/"), {"a/b/cpu.max": "400000 100000\n", "a/cpu.max": "250000 50000\n"}, 4),
        ("0::/a/b\n", V2.format(top="/"), {"a/b/cpu.max": "1000 100000\n"}, 1),
        ("0::/a/b\n", V2.format(top="/"), {"a/b/cpu.max": "9900000 100000\n"}, 8),
        ("0::/\n", V2.format(top="/"), {"cpu.max": "200000 100000\n"}, 2),  # a container with its own namespace
        ("0::/docker/x\n", V2.format(top="/docker/x"), {"cpu.max": "200000 100000\n"}, 2),  # and one without
        ("0::/../other\n", V2.format(top="/"), {"cpu.max": "200000 100000\n"}, 2),
        ("0::/a\n", V2.format(top="/"), {"a/cpu.max": "nonsense\n"}, 8),
        ("4:cpu,cpuacct:/a/b\n", V1.format(top="/"), v1("a/b", 250000), 3),
        ("4:cpu,cpuacct:/a/b\n", V1.format(top="/"), v1("a/b", -1) | v1("a", 200000), 2),
        ("4:cpu,cpuacct:/a/b\n", V1.format(top="/"), v1("a/b", -1), 8),
        ("4:cpu,cpuacct:/docker/x\n", V1.format(top="/docker/x"), v1("", 100000), 1),
        ("5:cpuset:/a\n4:cpu,cpuacct:/a\n0::/\n", V1_SET.format(top="/") + V1.format(top="/"), v1("a", 200000), 2),
        ("nonsense 0::/\n", "", {}, 8),
        ("", "", {}, 8),
    ],
)  # fmt: skip
def test_the_quotas_of_a_group_and_its_parents_limit_the_cores(
    cores, membership, mounts, files, expected
):
    assert cores(membership, mounts, files) == expected


def test_without_proc_the_affinity_limits_the_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 4, 5}, raising=False)
    assert num_usable_cores(tmp_path / "none", tmp_path / "none") == 3


@pytest.mark.skipif(
    not os.access("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", os.W_OK), reason="cannot make a group"
)
def test_a_real_quota_limits_the_cores():
    group = Path(f"/sys/fs/cgroup/cpu/alexnet_ddp_test_{os.getpid()}")
    group.mkdir()
    try:
        (group / "cpu.cfs_quota_us").write_text("50000")
        join = f"echo $$ >{group}/cgroup.procs; exec '{sys.executable}' -c"
        code = "from alexnet_ddp.runtime.environment import num_usable_cores as n; print(n())"
        done = subprocess.run(
            ["bash", "-c", f'{join} "{code}"'], capture_output=True, text=True, timeout=60, check=False,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert done.stdout == "1\n", done.stderr
    finally:
        group.rmdir()
