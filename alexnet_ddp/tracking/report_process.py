"""Starts `alexnet-ddp report` for a run that is complete. The run never fails because of it.

It is a process of its own: it loads the weights once more, and an error or a lack of memory there
cannot end the training.
"""

import logging
import os
import subprocess
import sys
from pathlib import Path

from alexnet_ddp.runtime.redaction import redact

log = logging.getLogger(__name__)

_TIMEOUT_S = 240.0  # torchrun's agents on other nodes wait for this one for 300 s
# The process is alone: it is no rank, no task of Slurm, and has no exit code to report.
_OF_A_RANK = ("RANK", "LOCAL_", "GROUP_", "ROLE_", "WORLD_SIZE", "MASTER_")
_OF_A_LAUNCHER = ("TORCHELASTIC_", "ALEXNET_DDP_", "SLURM_", "OMPI_", "PMI_", "MV2_")
_SOURCE = Path(__file__).resolve().parents[2]


def write_report(run_dir: Path, plugins: list[str], timeout_s: float = _TIMEOUT_S) -> None:
    """Write report.html into run_dir. If that fails, log one warning."""
    arguments = [f"run.name={run_dir.name}", f"run.root={run_dir.parent}", *_config_dir(sys.argv)]
    if plugins:
        arguments.append(f"plugins=[{','.join(plugins)}]")
    command = [sys.executable, "-m", "alexnet_ddp.report", *arguments]
    try:
        done = subprocess.run(
            command,
            env=_environment(),
            timeout=timeout_s,
            capture_output=True,
            text=True,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("report.html could not be written: %s", " ".join(str(error).split()))
        return
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    last = redact(lines[-1]) if lines else f"exit code {done.returncode}"
    if done.returncode:
        log.warning("report.html could not be written: %s", last.removeprefix("alexnet_ddp: "))
    else:
        log.info(last)


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(_SOURCE), os.getenv("PYTHONPATH"))))
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith((*_OF_A_RANK, *_OF_A_LAUNCHER))
    }
    return kept | {"PYTHONPATH": path}


def _config_dir(arguments: list[str]) -> list[str]:
    """The option --config-dir of the training: its YAML files belong to the run's configuration."""
    for k, argument in enumerate(arguments):
        name, equals, _ = argument.partition("=")
        if name in ("--config-dir", "-cd"):
            return [argument] if equals else arguments[k : k + 2]
    return []
