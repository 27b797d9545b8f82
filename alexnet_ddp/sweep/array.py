"""Trains the trials as the tasks of a Slurm job array, which slurm/sweep.sbatch starts.

Nothing waits for the tasks: Slurm requeues one that is stopped, and the same command of the sweep
reads what they have done. Which of them are queued is Slurm's to know, and not recorded here.
"""

import os
import shlex
import subprocess
from pathlib import Path

from alexnet_ddp import cli
from alexnet_ddp.config import ConfigError
from alexnet_ddp.config.space import Space
from alexnet_ddp.config.sweep import SweepConfig
from alexnet_ddp.runtime.errors import MachineError
from alexnet_ddp.runtime.files import write_bytes
from alexnet_ddp.runtime.printing import say
from alexnet_ddp.runtime.redaction import redact
from alexnet_ddp.runtime.sweep_record import SweepRecord, Trial, is_sweep
from alexnet_ddp.sweep.record import FINAL_CODES
from alexnet_ddp.sweep.results import TrialRuns
from alexnet_ddp.sweep.samplers import Draws
from alexnet_ddp.sweep.trial import trial_env

LINES = "trials.txt"  # line N: the overrides of task N, which is trial N - 1
_SCRIPT = Path("slurm/sweep.sbatch")
_TIMEOUT_S = 60.0
_AGAIN = "the same command prints the table later"


def train_in_array(cfg: SweepConfig, space: Space, record: SweepRecord, sampler: Draws) -> None:
    """Record the trials that have ended, and submit those that are neither over nor queued.

    Raises ConfigError if Slurm cannot be asked or refuses the job; a new sweep is then not
    recorded. Raises MachineError if Slurm does not answer.
    """
    script = Path.cwd() / _SCRIPT
    if not script.is_file():
        rule = f"needs {_SCRIPT} in the folder of the command ({Path.cwd()}), where the tasks run"
        remedy = "start it in the project's folder, or copy the scripts: alexnet-ddp launch ."
        raise ConfigError(f"sweep.sbatch {rule}; {remedy}")
    record.directory = record.directory.absolute()
    while len(record.trials) < sampler.num_trials:
        record.trials.append(Trial(len(record.trials), sampler.draw(record.trials)))
    runs = TrialRuns(cfg, space, record)
    queued = _queued_tasks(record.directory)  # before their results: a task that ends is seen later
    for trial in list(runs.unfinished):
        if _task(trial) not in queued:
            _record_end(trial, runs)
    is_new = not is_sweep(record.directory)
    record.write()
    left = [_task(trial) for trial in runs.unfinished if _task(trial) not in queued]
    if left:
        lines = [_line(trial, runs) for trial in record.trials]
        write_bytes(record.directory / LINES, "".join(lines).encode())
        try:
            job = _submit(cfg, record.directory, left, script)
        except ConfigError:
            if is_new:
                record.remove()
            raise
        total = len(record.trials)
        say(f"submitted {len(left)} of {total} trials as job array {job}; {_AGAIN}")
    elif queued:
        say(f"{len(queued)} trials are in Slurm's queue; {_AGAIN}")


def _record_end(trial: Trial, runs: TrialRuns) -> None:
    """Record the end of a trial that Slurm does not know any more, unless it is to be continued."""
    reader = runs.reader(trial)
    if reader is None:
        return
    run = runs.record_of(trial)
    code = run.exit_code
    if code == 0 or code in FINAL_CODES:
        runs.end(trial, reader.read(at_once=True), code)
    elif run.starts:
        reason = run.message or "no end is recorded"
        say(redact(f"trial {trial.name} is {run.status} ({reason}): it is submitted again"))


def _task(trial: Trial) -> int:
    return trial.number + 1


def _line(trial: Trial, runs: TrialRuns) -> str:
    return shlex.join([*cli.config_dir_arguments(), *runs.overrides(trial)]) + "\n"


def _queued_tasks(directory: Path) -> set[int]:
    """The tasks of this sweep that are waiting or running. A comment tells their sweep."""
    lines = _slurm("squeue", "--me", "--array", "--noheader", "--format=%K %k").splitlines()
    found = [line.strip().partition(" ") for line in lines]
    return {int(task) for task, _, comment in found if comment == _comment(directory)}


def _submit(cfg: SweepConfig, directory: Path, tasks: list[int], script: Path) -> str:
    """The id of a new job array. The options of the user come last, so that they count."""
    options = [f"--job-name={directory.name}", f"--comment={_comment(directory)}"]
    options += [f"--output={directory}/slurm-%A_%a.out"]
    options += [f"--array={_ranges(tasks)}%{cfg.sweep.parallel}"]
    given = shlex.split(cfg.sweep.sbatch or "")
    return _slurm("sbatch", "--parsable", *options, *given, str(script), str(directory / LINES))


def _comment(directory: Path) -> str:
    return f"sweep:{directory}"


def _ranges(tasks: list[int]) -> str:
    """1,3-5 for 1, 3, 4, 5."""
    parts = list[list[int]]()
    for task in tasks:
        if parts and parts[-1][-1] == task - 1:
            parts[-1] = [parts[-1][0], task]
        else:
            parts.append([task])
    return ",".join("-".join(map(str, part)) for part in parts)


def _slurm(*command: str) -> str:
    """The output of one of Slurm's commands.

    Raises ConfigError if it fails, and MachineError if it does not end. Then its effect is unknown.
    """
    env = trial_env() | {"PROJECT_DIR": os.getcwd()}
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        rule = f"has not ended within {_TIMEOUT_S:g} s"
        raise MachineError(f"{command[0]} {rule}; start the same command again later") from error
    except OSError as error:
        rule = f"needs Slurm's {command[0]} ({error})"
        raise ConfigError(f"sweep.sbatch {rule}; start it where sbatch works") from error
    if done.returncode:
        why = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise ConfigError(f"{command[0]} failed ({why}); see sweep.sbatch, its options")
    return done.stdout.strip()
