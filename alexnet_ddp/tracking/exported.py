"""Sends an exported model to the run's page in wandb."""

import json
import sys
from pathlib import Path
from typing import Any

from alexnet_ddp.config import Artifacts, ConfigError, LoggerConfig
from alexnet_ddp.runtime.files import lock_run
from alexnet_ddp.tracking import Tracker
from alexnet_ddp.tracking.console import PlainConsole
from alexnet_ddp.tracking.wandb_settings import init_arguments, wandb_mode, wandb_name
from alexnet_ddp.tracking.wandb_sink import WandbSink


def send_export(
    cfg: LoggerConfig, run_dir: Path, folder: Path, form: str, metadata: dict[str, Any]
) -> None:
    """Upload `folder` as a version of the artifact export-ID, if the run uploads its checkpoints.

    form: an alias of the version. A failure is one warning: the export is complete.
    """
    mode = wandb_mode(cfg.wandb)
    if mode == "disabled" or cfg.wandb_artifacts is Artifacts.none:
        return
    tracker = Tracker(run_dir, PlainConsole(0))
    try:
        lock = lock_run(run_dir)
    except ConfigError as error:  # two processes would write one run of wandb
        tracker.say(f"warning: wandb does not get the exported model: {error}")
        return

    def build() -> WandbSink:
        spec = {
            "mode": mode,
            "name": wandb_name(run_dir),
            "config": {},
            "facts": {},
            "artifacts": cfg.wandb_artifacts.value,
            "offset": 0,
            "start_step": 0,
            "program": sys.argv[0],
            "folder": str(folder.absolute()),
            "aliases": ["latest", form],
            "metadata": metadata,
            "exit_code": _exit_code(run_dir),
            "init": init_arguments(cfg, run_dir),
        }
        return WandbSink(run_dir, spec, tracker.say)

    tracker.add(WandbSink.name, build)
    tracker.close(0)
    if lock is not None:
        lock.close()


def _exit_code(run_dir: Path) -> int:
    """How the training ended: wandb shows the run as it was. 0 if that is not known."""
    try:
        return int(json.loads((run_dir / "status.json").read_bytes())["exit_code"] or 0)
    except (OSError, ValueError, KeyError, TypeError):
        return 0
