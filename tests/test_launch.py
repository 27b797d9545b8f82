"""The launch scripts, run by bash with stand-ins for python, pip, nvidia-smi, Spark and Slurm.

A stand-in records its arguments in the folder RECORD; FAKE_* variables control its behaviour.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]

WAITS = """
if [[ -n ${FAKE_WAITS:-} ]]; then
  stopped=
  for name in TERM INT USR1; do trap "echo $name >>'$RECORD/signals'; stopped=1" "$name"; done
  touch "$RECORD/ready"
  for ((i = 0; i < 200; i++)); do [[ -n $stopped ]] && break; sleep 0.05; done
  sleep 0.2 # saves
fi
"""
STAND_INS = {
    "torchrun_python": f"""
[[ $1 != -c ]] || exit "${{FAKE_IMPORT:-0}}"
printf '%s\\0' "$@" >"$RECORD/argv"; env -0 >"$RECORD/env"
{WAITS}
printf %s "${{FAKE_CODE:-}}" >"$ALEXNET_DDP_EXIT_CODE_FILE"
if [[ -n ${{FAKE_WORKER:-}} ]]; then # in its own session, as torchrun's; it outlives torchrun
  setsid bash -c 'trap "printf 75 >\"$ALEXNET_DDP_EXIT_CODE_FILE\"; exit" TERM; touch "$RECORD/ready"
    while sleep 0.05; do :; done' >/dev/null 2>&1 &
  until [[ -e $RECORD/ready ]]; do sleep 0.02; done
fi
exit "${{FAKE_EXIT:-0}}"
""",
    "setup_python": f"""
case "$1 $2 ${{3:-}}" in
  "-m venv "*) mkdir -p "${{@: -1}}/bin"; cp "$0" "${{@: -1}}/bin/python"; echo venv >>"$RECORD/calls" ;;
  "-m pip --version") ;;
  "-m pip install")
    echo pip >>"$RECORD/calls"
    [[ -z ${{FAKE_KILL:-}} ]] || kill -9 "$(<"$RECORD/pid")"
    exit "${{FAKE_PIP:-0}}" ;;
  *) exec '{sys.executable}' "$@" ;;
esac
""",
    "old_python": 'exec "$REAL" -c "import sys; sys.exit(1)"',
    "nvidia-smi": """for i in 0 1 2 3; do echo "GPU $i: a card (UUID: GPU-$i)"; done""",
    "scontrol": """
case "$1 $2" in
  "show hostnames") printf 'node7\\nnode8\\n' ;;
  "show job") echo "   JobState=${FAKE_STATE:-RUNNING} Reason=None" ;;
  *) echo "$*" >>"$RECORD/scontrol" ;;
esac
""",
    "srun": f"""printf '%s\\0' "$@" >"$RECORD/argv"; env -0 >"$RECORD/env"; {WAITS} exit "${{FAKE_EXIT:-0}}" """,
}


class Launcher:
    """A copy of the scripts in a folder with a space in its name, and a PATH with stand-ins."""

    def __init__(self, folder: Path):
        self.project, self.record, self.path = (
            folder / "my project",
            folder / "record",
            folder / "path",
        )
        for made in (self.project, self.record, self.path):
            made.mkdir()
        for name in ("launch", "slurm"):
            shutil.copytree(PROJECT / name, self.project / name)
        (self.project / "pyproject.toml").write_text("version = 1\n")
        keep = ("HOME", "TMPDIR", "LANG")
        self.env = {name: os.environ[name] for name in keep if name in os.environ}
        self.env |= {
            "PATH": f"{self.path}:{os.environ['PATH']}",
            "RECORD": str(self.record),
            "REAL": sys.executable,
        }
        self.put("torchrun_python", "scontrol", "srun")
        self.put("nvidia-smi", text="exit 9")  # as without a driver
        self.env["PYTHON"] = "torchrun_python"

    def put(self, *names: str, text: str | None = None) -> None:
        for name in names:
            file = self.path / name
            file.write_text("#!/usr/bin/env bash\nset -u\n" + (text or STAND_INS[name]))
            file.chmod(0o755)

    def start(self, script: str, *arguments: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(self.project / script), *arguments],
            env=self.env | env,
            cwd=self.record,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # bash cannot trap signals that are ignored at its start: SIGINT in background jobs,
            # SIGHUP under nohup
            preexec_fn=lambda: [
                signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)
            ],
        )

    def run(self, script: str, *arguments: str, **env: str) -> tuple[int, str]:
        process = self.start(script, *arguments, **env)
        (self.record / "pid").write_text(str(process.pid))
        _, errors = process.communicate(timeout=30)
        return process.returncode, errors

    def signalled(self, script: str, number: signal.Signals, **env: str) -> tuple[int, list[str]]:
        process = self.start(script, FAKE_WAITS="1", **env)
        deadline = time.monotonic() + 20
        while not (self.record / "ready").exists():
            assert time.monotonic() < deadline, process.poll()
            time.sleep(0.01)
        process.send_signal(number)
        process.communicate(timeout=30)
        return process.returncode, self.lines("signals")

    def lines(self, name: str) -> list[str]:
        file = self.record / name
        return file.read_text().splitlines() if file.exists() else []

    @property
    def argv(self) -> list[str]:
        return (self.record / "argv").read_text().split("\0")[:-1]

    @property
    def child_env(self) -> dict[str, str]:
        return dict(
            entry.split("=", 1) for entry in (self.record / "env").read_text().split("\0")[:-1]
        )


@pytest.fixture
def launcher(tmp_path):
    return Launcher(tmp_path)


NODE = {"NNODES": "2", "RDZV_ENDPOINT": "node1:29500", "RDZV_ID": "run42"}
JOB = {
    "SLURM_JOB_ID": "31007",
    "SLURM_JOB_NODELIST": "n[7-8]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_CPUS_PER_TASK": "6",
}
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]


# --- local.sh and node.sh


def test_local_passes_arguments_unchanged_even_with_spaces(launcher):
    overrides = ["run.name=a b", "x=[1,2]", "", "y='*'"]
    assert launcher.run("launch/local.sh", *overrides) == (0, "")
    assert Path(launcher.argv[0]).name == "torchrun.py"
    assert launcher.argv[-6:] == ["-m", "alexnet_ddp.train", *overrides]
    assert "--standalone" in launcher.argv
    assert "--nproc_per_node=1" in launcher.argv


def test_local_works_in_the_folder_of_an_installed_package(launcher):
    (launcher.project / "launch").rename(launcher.project / "_launch")
    assert launcher.run("_launch/local.sh") == (0, "")
    assert Path(launcher.argv[0]) == launcher.project / "_launch/torchrun.py"


@pytest.mark.parametrize(
    ("visible", "override", "processes"),
    [
        (None, "", 4),
        ("0,2", "", 2),
        ("", "", 0),
        ("NoDevFiles", "", 0),
        ("1,-1", "", 1),
        (None, "device=cpu", 0),
    ],
)
def test_local_starts_one_process_per_visible_gpu_and_one_on_a_cpu(
    launcher, visible, override, processes
):
    launcher.put("nvidia-smi")
    launcher.run(
        "launch/local.sh",
        override,
        **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}),
    )
    assert f"--nproc_per_node={processes or 1}" in launcher.argv


def test_local_keeps_the_users_settings(launcher):
    mine = {
        "MALLOC_TRIM_THRESHOLD_": "1",
        "OMP_NUM_THREADS": "3",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "9",
        "NPROC": "2",
    }
    launcher.run("launch/local.sh", **mine)
    assert {name: launcher.child_env.get(name) for name in mine} == mine
    assert "--nproc_per_node=2" in launcher.argv


def test_the_projects_python_is_the_default(launcher):
    python = launcher.project / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    shutil.copy(launcher.path / "torchrun_python", python)
    assert launcher.run("launch/local.sh", PYTHON="", FAKE_CODE="70", FAKE_EXIT="1")[0] == 70


def test_command_may_be_doctor_and_others_are_refused(launcher):
    launcher.run("launch/node.sh", "experiment=alexnet", COMMAND="doctor", **NODE)
    assert launcher.argv[-3:] == ["-m", "alexnet_ddp.doctor", "experiment=alexnet"]
    rule = "local.sh: COMMAND (rm) must be train or doctor; leave it unset to train\n"
    assert launcher.run("launch/local.sh", COMMAND="rm") == (64, rule)


def test_a_python_without_the_project_is_refused_with_the_remedy(launcher):
    rule = "Python (torchrun_python) must have torch and alexnet_ddp installed"
    remedy = "run launch/setup.sh, or set PYTHON"
    assert launcher.run("launch/local.sh", FAKE_IMPORT="1") == (64, f"local.sh: {rule}; {remedy}\n")


@pytest.mark.parametrize(
    ("written", "torchrun", "expected"),
    [
        ("0", 0, 0),
        ("75", 1, 75),
        ("79", 1, 79),
        ("93", 1, 93),
        ("", 1, 1),
        ("", 137, 137),
        ("0", 1, 1),
        ("oops", 1, 1),
    ],
)
def test_the_exit_code_is_the_runs_or_else_torchruns(launcher, written, torchrun, expected):
    code, _ = launcher.run("launch/node.sh", **NODE, FAKE_CODE=written, FAKE_EXIT=str(torchrun))
    assert code == expected
    assert not Path(launcher.child_env["ALEXNET_DDP_EXIT_CODE_FILE"]).exists()


@pytest.mark.parametrize(
    ("script", "code", "expected"),
    [
        ("launch/local.sh", "75", 0),
        ("launch/local.sh", "79", 0),
        ("launch/local.sh", "70", 70),
        ("launch/node.sh", "75", 75),
    ],
)
def test_a_stopped_run_that_wandbs_agent_started_has_not_failed(launcher, script, code, expected):
    env = NODE | {"WANDB_SWEEP_ID": "s1", "FAKE_CODE": code, "FAKE_EXIT": "1"}
    assert launcher.run(script, **env)[0] == expected
    assert not Path(launcher.child_env["ALEXNET_DDP_EXIT_CODE_FILE"]).exists()


def test_the_last_start_without_progress_knows_that_it_is_the_last(launcher):
    launcher.put(
        "torchrun_python",
        text="""[[ $1 != -c ]] || exit 0
echo "$ALEXNET_DDP_GIVES_UP_AT" >>"$RECORD/starts"; echo 5 >"$ALEXNET_DDP_START_FILE"; exit 9""",
    )
    assert launcher.run("launch/local.sh", RESTART_DELAY="0")[0] == 93
    assert launcher.lines("starts") == ["", "", "", "5"]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_stop_signal_reaches_torchrun_once_and_the_script_waits_for_the_save(launcher, number):
    received = launcher.signalled("launch/local.sh", number, FAKE_CODE="75", FAKE_EXIT="1")
    assert received == (75, [number.name.removeprefix("SIG")])


@pytest.mark.parametrize("torchrun", [1, 138])
def test_a_run_that_is_stopped_before_it_handles_signals_has_not_failed(launcher, torchrun):
    code, _ = launcher.signalled("launch/local.sh", signal.SIGUSR1, FAKE_EXIT=str(torchrun))
    assert code == 75


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(),
    reason="reads from /proc which signals a process handles",
)
@pytest.mark.parametrize("number", SIGNALS)
def test_a_stop_during_startup_prints_one_line_and_no_traceback(launcher, number):
    # A Python without a handler yet.
    starts = f"import signal, time; open({str(launcher.record / 'ready')!r}, 'w'); time.sleep(20)"
    launcher.put(
        "torchrun_python",
        text=f"""[[ $1 != -c ]] || exit 0; exec '{sys.executable}' -c "{starts}" """,
    )
    process = launcher.start("launch/local.sh")
    while not (launcher.record / "ready").exists():
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    line = "local.sh: stopped while it started; nothing is lost: start the same command again\n"
    assert (process.returncode, errors) == (75, line)


@pytest.mark.parametrize("streams", [">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full 2>/dev/full"])
def test_a_closed_or_full_stream_does_not_change_the_exit_code(launcher, streams):
    command = ["bash", "-c", f"'{launcher.project}/launch/local.sh' {streams}"]
    for code, env in ((70, {"FAKE_CODE": "70", "FAKE_EXIT": "1"}), (64, {"NPROC": "x"})):
        done = subprocess.run(
            command, env=launcher.env | env, timeout=30, capture_output=True, check=False
        )
        assert done.returncode == code


def test_another_temporary_folder_is_used_if_tmpdir_cannot_be_written(launcher, tmp_path):
    assert launcher.run(
        "launch/local.sh", TMPDIR=str(tmp_path / "none"), FAKE_CODE="70", FAKE_EXIT="1"
    ) == (70, "")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes through /proc")
def test_workers_that_outlive_torchrun_are_stopped_and_waited_for(launcher):
    assert launcher.run("launch/local.sh", FAKE_WORKER="1", FAKE_EXIT="137")[0] == 75


def test_a_lost_terminal_stops_the_run_as_sigterm_does(launcher):
    assert launcher.signalled("launch/local.sh", signal.SIGHUP, FAKE_CODE="75") == (75, ["TERM"])


def test_node_passes_the_rendezvous_to_torchrun(launcher):
    assert launcher.run("launch/node.sh", "a b", **NODE, NODE_RANK="0", NPROC_PER_NODE="8") == (
        0,
        "",
    )
    wanted = "--nproc_per_node=8 --nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=node1:29500"
    assert {
        *wanted.split(),
        "--rdzv-id=run42",
        "--rdzv-conf=last_call_timeout=30,is_host=1",
    } <= set(launcher.argv)
    assert launcher.argv[-3:] == ["-m", "alexnet_ddp.train", "a b"]


def test_node_takes_an_optional_rank_from_slurm(launcher):
    launcher.run("launch/node.sh", **NODE, SLURM_NODEID="1")
    assert "--rdzv-conf=last_call_timeout=30,is_host=0" in launcher.argv
    launcher.run("launch/node.sh", **NODE | {"NNODES": "2:4"}, LAST_CALL_S="5")
    assert "--rdzv-conf=last_call_timeout=5" in launcher.argv


A_COUNT = "a whole number of at least 1, or MIN:MAX; for two machines: NNODES=2"
AN_ENDPOINT = (
    "HOST:PORT with a port from 1 to 65535; the same on every node, for example node1:29500"
)
A_NAME = (
    "a name of letters, digits, '.', '_' and '-'; the same on every node, and used by no other run"
)


@pytest.mark.parametrize(
    ("name", "value", "rule_and_remedy"),
    [
        ("NNODES", "", A_COUNT),
        ("NNODES", "4:2", A_COUNT),
        ("RDZV_ENDPOINT", "node1", AN_ENDPOINT),
        ("RDZV_ENDPOINT", "node1:70000", AN_ENDPOINT),
        ("RDZV_ID", "a b", A_NAME),
        (
            "NPROC_PER_NODE",
            "0",
            "a whole number of at least 1; leave it unset for all devices of the node",
        ),
        ("LAST_CALL_S", "-1", "a whole number of at least 0; leave it unset for 30"),
        (
            "NODE_RANK",
            "x",
            "a whole number of at least 0; 0 on the host of RDZV_ENDPOINT, 1, 2, ... on the others",
        ),
        ("NODE_RANK", "2", "less than NNODES (2); 0 on the host of RDZV_ENDPOINT"),
    ],
)
def test_node_refuses_a_wrong_value_by_name_with_rule_and_remedy(
    launcher, name, value, rule_and_remedy
):
    message = f"node.sh: {name} ({value or 'not set'}) must be {rule_and_remedy}\n"
    assert launcher.run("launch/node.sh", **NODE | {name: value}) == (64, message)


# --- setup.sh


@pytest.fixture
def setup(launcher):
    launcher.put("setup_python")
    return lambda **env: launcher.run("launch/setup.sh", **{"PYTHON": "setup_python"} | env)


def test_setup_installs_once_and_again_only_when_pyproject_changes(launcher, setup):
    assert setup() == (0, "")
    assert setup() == (0, "")
    assert launcher.lines("calls") == ["venv", "pip"]
    (launcher.project / "pyproject.toml").write_text("version = 2\n")
    setup()
    assert launcher.lines("calls") == ["venv", "pip", "pip"]


def test_setup_replaces_an_interrupted_environment(launcher, setup):
    assert setup(FAKE_KILL="1")[0] == -signal.SIGKILL
    assert setup()[0] == 0
    assert launcher.lines("calls") == ["venv", "pip", "venv", "pip"]


def test_setup_keeps_the_environment_when_pip_fails(launcher, setup):
    reason = "pip could not install the project (see its message above)"
    assert setup(FAKE_PIP="2") == (
        1,
        f"setup.sh: {reason}; fix that and run launch/setup.sh again\n",
    )
    assert setup()[0] == 0
    assert launcher.lines("calls") == ["venv", "pip", "pip"]


def test_setup_replaces_the_environment_of_a_moved_project(launcher, setup):
    setup()
    launcher.project = launcher.project.rename(launcher.project.with_name("elsewhere"))
    setup()
    assert launcher.lines("calls") == ["venv", "pip", "venv", "pip"]


def test_setup_ignores_pythons_that_are_too_old_or_shims(launcher, setup):
    launcher.put("python3.13", text=STAND_INS["old_python"])
    launcher.put("python3.12", text=STAND_INS["setup_python"])
    assert setup(PYTHON="") == (0, "")
    assert launcher.lines("calls") == ["venv", "pip"]


def test_setup_without_a_new_enough_python_is_refused_with_the_remedy(launcher, setup):
    launcher.put("python3.9", text=STAND_INS["old_python"])
    remedy = "install one, or set PYTHON: PYTHON=/path/to/python3.12 launch/setup.sh"
    assert setup(PYTHON="python3.9") == (
        64,
        f"setup.sh: no Python >= 3.11 found (tried: python3.9); {remedy}\n",
    )


# --- slurm/train.sbatch


@pytest.fixture
def sbatch(launcher):
    launcher.env |= JOB | {"SLURM_SUBMIT_DIR": str(launcher.project)}
    return lambda *arguments, **env: launcher.run("slurm/train.sbatch", *arguments, **env)


def test_the_job_starts_one_task_per_node_with_a_rendezvous_on_the_head_node(launcher, sbatch):
    assert sbatch("run.name=a b", "x=1", SLURM_RESTART_COUNT="2") == (0, "")
    assert launcher.argv[-3:] == ["launch/node.sh", "run.name=a b", "x=1"]
    assert {"--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=6"} <= set(launcher.argv)
    host, port = launcher.child_env["RDZV_ENDPOINT"].split(":")
    assert host == "node7"
    assert 15000 <= int(port) < 30000
    assert (launcher.child_env["NNODES"], launcher.child_env["RDZV_ID"]) == ("2", "31007.2")


@pytest.mark.parametrize("code", [75, 76])
def test_the_job_is_requeued_once_when_it_was_stopped_or_lost_a_peer(launcher, sbatch, code):
    assert sbatch(FAKE_EXIT=str(code))[0] == code
    assert launcher.lines("scontrol") == ["requeue 31007"]


@pytest.mark.sampled
@pytest.mark.parametrize("code", [0, 1, 64, 65, 66, 70, 74, 93, 137, 143])
def test_the_job_is_not_requeued_on_any_other_code(launcher, sbatch, code):
    assert sbatch(FAKE_EXIT=str(code))[0] == code
    assert launcher.lines("scontrol") == []


@pytest.mark.parametrize("state", ["CANCELLED", "TIMEOUT", "COMPLETING", "PENDING"])
def test_the_job_is_not_requeued_if_slurm_has_ended_it(launcher, sbatch, state):
    assert sbatch(FAKE_EXIT="75", FAKE_STATE=state)[0] == 75
    assert launcher.lines("scontrol") == []


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_to_the_batch_shell_reaches_the_tasks_as_usr1_and_requeues(
    launcher, sbatch, number
):
    assert launcher.signalled("slurm/train.sbatch", number, FAKE_EXIT="75") == (75, ["USR1"])
    assert launcher.lines("scontrol") == ["requeue 31007"]


def test_a_signal_that_reaches_srun_before_it_handles_it_requeues_too(launcher, sbatch):
    assert launcher.signalled("slurm/train.sbatch", signal.SIGUSR1, FAKE_EXIT="138") == (
        75,
        ["USR1"],
    )
    assert launcher.lines("scontrol") == ["requeue 31007"]


def test_the_job_refuses_a_wrong_project_folder(launcher, sbatch):
    rule = "PROJECT_DIR (/nowhere) must be the project's folder, with launch/node.sh in it"
    remedy = "call sbatch there, or PROJECT_DIR=/path/to/project sbatch ..."
    assert sbatch(PROJECT_DIR="/nowhere") == (64, f"train.sbatch: {rule}; {remedy}\n")


# --- spark.sh and slurm/prepare.sbatch

SPARK_CLASS = """
echo "$* $SPARK_LOCAL_IP" >>"$RECORD/daemons"
if [[ -n ${FAKE_TAKEN:-} ]]; then echo "java.net.BindException: Address already in use"; exit 1; fi
cp "${SPARK_CONF_DIR:-/nowhere}/spark-defaults.conf" "$RECORD/defaults" 2>/dev/null
trap 'echo stopped >>"$RECORD/stopped"; exit 143' TERM
echo "INFO Master: I have been elected leader! New state: ALIVE"
echo "INFO Worker: Successfully registered with master spark://"
while sleep 0.05; do :; done
"""
SPARK_PYTHON = """
if [[ $1 == -c ]]; then [[ $2 != *pyspark* ]] || printf '%s\\n' "$SPARK_HOME" "/java"; exit 0; fi
printf '%s\\0' "$@" >"$RECORD/argv"; env -0 >"$RECORD/env"
cp "${SPARK_CONF_DIR:-/nowhere}/spark-defaults.conf" "$RECORD/defaults" 2>/dev/null
exit "${FAKE_EXIT:-0}"
"""


@pytest.fixture
def cluster(launcher):
    (launcher.path / "bin").mkdir()
    launcher.put("bin/spark-class", text=SPARK_CLASS)
    launcher.put("spark_python", text=SPARK_PYTHON)
    launcher.env |= {
        "SPARK_HOME": str(launcher.path),
        "PYTHON": "spark_python",
        "CORES": "3",
        "MEMORY": "2g",
    }
    return launcher


def test_spark_runs_a_preparation_and_stops_its_cluster(cluster):
    assert cluster.run("launch/spark.sh", "source=a b", "root=x", FAKE_EXIT="65") == (65, "")
    daemons = sorted(
        line.split() for line in cluster.lines("daemons")
    )  # workers start concurrently
    assert [(words[0].split(".")[-1], words[2], words[-1]) for words in daemons] == [
        ("Master", "127.0.0.1", "127.0.0.1"),
        ("Worker", "127.0.0.1", "127.0.0.1"),
        ("Worker", "127.0.0.2", "127.0.0.2"),
    ]
    assert {"--cores", "3", "--memory", "2g", "spark://127.0.0.1:7077"} <= set(daemons[2])
    settings = [
        "engine=spark",
        "engine.master=spark://127.0.0.1:7077",
        "+engine.conf.spark.executor.memory=2g",
    ]
    assert cluster.argv == ["-m", "alexnet_ddp.prepare", *settings, "source=a b", "root=x"]
    assert cluster.lines("stopped") == ["stopped"] * 3
    assert cluster.child_env["JAVA_HOME"] == "/java"


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, 0, marks=pytest.mark.slow),
    ],
)
def test_spark_without_a_preparation_prints_its_address_and_runs_until_a_signal(
    cluster, number, code
):
    process = cluster.start("launch/spark.sh", WORKERS="1", PORT="7999", SPARK_SECRET="x y")
    first, second = process.stdout.readline(), process.stdout.readline()
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == code
    assert first.startswith("spark.sh: spark://127.0.0.1:7999, 1 workers with 3 cores each; ")
    folder, command = second.strip().removeprefix("SPARK_CONF_DIR=").split(" ", 1)
    assert command.startswith(
        "python -m alexnet_ddp.prepare source=... root=... engine=spark engine.master=spark://"
    )
    assert cluster.lines("stopped") == ["stopped"] * 2
    assert cluster.lines("defaults") == ["spark.authenticate true", "spark.authenticate.secret x y"]
    assert not Path(folder).exists()


def test_spark_reports_why_its_cluster_did_not_start(cluster):
    reason = "java.net.BindException: Address already in use"
    assert cluster.run("launch/spark.sh", FAKE_TAKEN="1") == (
        1,
        f"spark.sh: Spark's master did not start: {reason}\n",
    )


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("WORKERS", "0", "a whole number of at least 1; leave it unset for 2"),
        ("MEMORY", "2", "a number with m or g; for example MEMORY=2g"),
    ],
)
def test_spark_refuses_a_wrong_value_by_name_with_rule_and_remedy(cluster, name, value, rule):
    assert cluster.run("launch/spark.sh", **{name: value}) == (
        64,
        f"spark.sh: {name} ({value}) must be {rule}\n",
    )


@pytest.fixture
def prepare_job(cluster):
    cluster.put(
        "scontrol", text=STAND_INS["scontrol"].replace("node7\\nnode8", "localhost\\nnode8")
    )
    cluster.put(
        "srun",
        text="""
printf '%s\\0' "$@" >"$RECORD/srun"
trap 'echo USR1 >>"$RECORD/signals"; kill $listener; exit' USR1
"$REAL" -c "
import socket, time
server = socket.create_server(('localhost', $PORT))
time.sleep(60)" &
listener=$!
wait
""",
    )
    cluster.env |= JOB | {"SLURM_SUBMIT_DIR": str(cluster.project)}
    return lambda *arguments, **env: cluster.run("slurm/prepare.sbatch", *arguments, **env)


def test_the_preparation_job_uses_a_cluster_with_a_secret_and_stops_it(cluster, prepare_job):
    job = os.getpid()  # the port is opened, so it must be free
    master = f"spark://localhost:{15000 + job % 15000}"
    assert prepare_job("source=a b", "root=x", SLURM_JOB_ID=str(job)) == (0, "")
    srun = (cluster.record / "srun").read_text().split("\0")
    assert {"--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=6", master} <= set(srun)
    settings = ["engine=spark", f"engine.master={master}", "+engine.conf.spark.executor.memory=2g"]
    assert cluster.argv == ["-m", "alexnet_ddp.prepare", *settings, "source=a b", "root=x"]
    assert cluster.lines("signals") == ["USR1"]
    secret = cluster.child_env["SPARK_SECRET"]
    assert len(secret) == 32
    assert cluster.lines("defaults") == [
        "spark.authenticate true",
        f"spark.authenticate.secret {secret}",
    ]
    assert not Path(cluster.child_env["SPARK_CONF_DIR"]).exists()


@pytest.mark.parametrize(("code", "requeued"), [(75, ["requeue 31007"]), (65, []), (0, [])])
def test_the_preparation_job_is_requeued_if_it_was_stopped(cluster, prepare_job, code, requeued):
    assert prepare_job("source=a", "engine=local", FAKE_EXIT=str(code))[0] == code
    assert cluster.argv == [
        "-m",
        "alexnet_ddp.prepare",
        "engine.workers=6",
        "source=a",
        "engine=local",
    ]
    assert not (cluster.record / "srun").exists()
    assert cluster.lines("scontrol") == requeued


def test_the_preparation_job_refuses_a_wrong_project_folder(prepare_job):
    rule = "PROJECT_DIR (/nowhere) must be the project's folder, with launch/spark.sh in it"
    remedy = "call sbatch there, or PROJECT_DIR=/path/to/project sbatch ..."
    assert prepare_job(PROJECT_DIR="/nowhere") == (64, f"prepare.sbatch: {rule}; {remedy}\n")
