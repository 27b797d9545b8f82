"""What a run asks of wandb: an option counts before a variable, and that before a default.

WANDB_MODE is the exception: it can only lower the option, so that it can switch wandb off. All
WANDB_... variables that are not mentioned here are read by wandb itself, in the helper process.
"""

import os
import re
import secrets
from pathlib import Path
from typing import Any

from alexnet_ddp.config import Artifacts, LoggerConfig, Wandb
from alexnet_ddp.config.option import shown
from alexnet_ddp.runtime import sweep_record
from alexnet_ddp.runtime.errors import ConfigError
from alexnet_ddp.runtime.files import write_bytes

_MODES = (Wandb.disabled, Wandb.offline, Wandb.online)
_OF_WANDB = (
    *("wandb_project", "wandb_entity", "wandb_group", "wandb_job_type", "wandb_tags"),
    *("wandb_notes", "wandb_id"),
)
_OF_SWEEP = ("wandb_project", "wandb_entity", "wandb_id")  # wandb ignores them in a sweep
_DEFAULT_PROJECT = "alexnet_ddp"
_MAX_LENGTH = 128  # of a project and an id
_MAX_TAG_LENGTH = 64


def is_sweep() -> bool:
    """Return whether the sweep agent of wandb started this run."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def wandb_mode(wanted: str | None) -> str:
    """Return the lower of `wanted` and WANDB_MODE, in the order online > offline > disabled.

    wanted: logger.wandb; None means online in a sweep, else disabled.
    """
    if wanted is None:
        wanted = Wandb.online if is_sweep() else Wandb.disabled
    asked = os.environ.get("WANDB_MODE", wanted).lower().replace("dryrun", "offline")
    limit = _MODES.index(Wandb(asked)) if asked in _MODES else len(_MODES)
    return _MODES[min(_MODES.index(Wandb(wanted)), limit)].value


def check_wandb(cfg: LoggerConfig) -> None:
    """Raise ConfigError for an option that would be ignored, or that wandb would refuse."""
    given = [name for name in _OF_WANDB if getattr(cfg, name) is not None]
    if cfg.wandb_artifacts is not Artifacts.none:
        given.append("wandb_artifacts")
    for name in given:
        value = f"logger.{name} ({shown(getattr(cfg, name))})"
        if cfg.wandb is None and not is_sweep():
            rule = "would be ignored without logger.wandb"
            raise ConfigError(f"{value} {rule}; give logger.wandb=online (or offline)")
        if name in _OF_SWEEP and is_sweep():
            rule = "would be ignored: the sweep WANDB_SWEEP_ID determines it"
            raise ConfigError(f"{value} {rule}; leave it out")
    _check_characters("logger.wandb_project", cfg.wandb_project, "/\\#?%:")
    _check_characters("logger.wandb_id", cfg.wandb_id, ":;,#?/' ")
    for tag in cfg.wandb_tags or ():
        if len(tag) > _MAX_TAG_LENGTH:
            rule = f"is longer than {_MAX_TAG_LENGTH} characters; shorten it"
            raise ConfigError(f"logger.wandb_tags: {shown(tag)} {rule}")


def wandb_name(run_dir: Path) -> str:
    """The name of a run in wandb: that of its directory, for a trial of our sweep SWEEP/NUMBER."""
    directory = run_dir.absolute()
    is_trial = sweep_record.is_sweep(directory.parent)
    return f"{directory.parent.name}/{directory.name}" if is_trial else directory.name


def init_arguments(cfg: LoggerConfig, run_dir: Path) -> dict[str, Any]:
    """Return the arguments of wandb.init. An option that is missing is left to wandb's variables.

    All starts of a run get the same id, which is kept in run_dir/wandb_id.txt.
    """
    arguments = {
        "group": cfg.wandb_group,
        "job_type": cfg.wandb_job_type,
        "tags": cfg.wandb_tags,
        "notes": cfg.wandb_notes,
    }
    run_id = wandb_id(run_dir, cfg.wandb_id)
    if not is_sweep():
        project = os.environ.get("WANDB_PROJECT") or _DEFAULT_PROJECT
        arguments |= {
            "id": run_id,
            "entity": cfg.wandb_entity,
            "project": cfg.wandb_project or project,
        }
    if not os.environ.get("WANDB_RESUME"):
        arguments["resume"] = "allow"
    # wandb gives a run of a sweep a name of its own, which is more readable than its id.
    named_by_id = is_sweep() and run_dir.name.endswith(run_id)
    if not os.environ.get("WANDB_NAME") and not named_by_id:
        arguments["name"] = wandb_name(run_dir)
    return {name: value for name, value in arguments.items() if value is not None}


def wandb_id(run_dir: Path, wanted: str | None = None) -> str:
    """Return the run's id in wandb: `wanted`, WANDB_RUN_ID, that of earlier starts, or a new one.

    It is written to wandb_id.txt, so that the next start continues the same run of wandb.
    """
    path = run_dir / "wandb_id.txt"
    found = path.read_text(errors="replace").strip() if path.exists() else ""
    kept = found if re.fullmatch(rf"\S{{1,{_MAX_LENGTH}}}", found) else ""
    run_id = wanted or os.environ.get("WANDB_RUN_ID") or kept or secrets.token_hex(4)
    if run_id != found:
        write_bytes(path, f"{run_id}\n".encode())
    return run_id


def _check_characters(option: str, value: str | None, refused: str) -> None:
    if value is None:
        return
    found = sorted(set(value) & set(refused))
    if found:
        raise ConfigError(
            f"{option} ({shown(value)}) must not contain {' '.join(map(repr, found))}; leave it out"
        )
    if len(value) > _MAX_LENGTH:
        rule = f"is longer than {_MAX_LENGTH} characters; shorten it"
        raise ConfigError(f"{option} ({shown(value)}) {rule}")
