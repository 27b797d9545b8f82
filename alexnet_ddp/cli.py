"""The door between a command line and a root: Hydra composes, the story runs, every end becomes a line and a code.

    python -m alexnet_ddp.train KEY=VALUE ...

A foreseen end (errors.py) leaves as one line without a trace; a bug keeps its trace. HYDRA_FULL_ERROR=1 shows the trace
of both.
"""

import argparse
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from alexnet_ddp import config
from alexnet_ddp.config import Config, RunConfig
from alexnet_ddp.config.door import to_config, unknown_key
from alexnet_ddp.errors import ConfigError, PeerFailed, RunError, leave_code
from alexnet_ddp.printable import say
from alexnet_ddp.redact import HIDDEN, redact

_PACKAGE = Path(__file__).resolve().parent
# In a wheel conf/ lies in the package, in a checkout beside it.
CONF_DIR = next(d for d in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if d.is_dir())
# Hydra's options that only show something. --experimental-rerun would unpickle a file.
_SHOWING = ("--help", "-h", "--cfg", "-c", "--resolve", "--package", "-p", "--info", "-i", "--hydra-help", "--version")
_NOT_SUPPORTED = dict.fromkeys(("--multirun", "-m"), "start one process group per run")


def run(root: str, story: Callable[[Config, list[str]], None]) -> None:
    """Compose conf/`root`.yaml with the command line, call story(config, overrides), and exit with the run's code."""
    show_trace = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing them
    logger = logging.getLogger("alexnet_ddp")
    logger.setLevel(logging.INFO)
    logger.addHandler(_Say())
    sys.excepthook = _show_trace
    try:
        for cfg, overrides in _composed(root):  # none after --help and --cfg
            story(to_config(cfg), overrides)
        code = 0
    except (HydraException, OmegaConfBaseException, RunError) as error:
        if show_trace:
            raise
        code = _explain(error)
    except Exception:  # a bug: here it keeps its trace, and the others, who only lost a peer, do not speak for it
        leave_code(1)
        raise
    leave_code(code)
    sys.exit(code)


def _composed(root: str) -> list[tuple[DictConfig, list[str]]]:
    """What Hydra makes of conf/`root`.yaml and the command line: one configuration, or none where it only shows one."""
    sys.argv[1:] = map(_quoted, sys.argv[1:])
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd")
    own, rest = parser.parse_known_args(sys.argv[1:])
    options = [argument.split("=")[0] for argument in rest if argument.startswith("-")]
    for option in options:
        if option not in _SHOWING:
            reason = _NOT_SUPPORTED.get(option, f"known: --config-dir {' '.join(_SHOWING)}")
            raise ConfigError(f"{option} is not supported: {reason}")
    if options:
        hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=root)(lambda cfg: None)()
        return []
    return [(_compose(root, rest, own.config_dir), rest)]


def _compose(root: str, overrides: list[str], more: str | None = None) -> DictConfig:
    """Hydra composes and does no more: its own main() would call whatever a configuration names in `hydra`.

    more: a folder of further YAML files. Raises ConfigError where `hydra` is touched, for nothing would read it.
    """
    for override in overrides:
        key = override.split("=")[0].lstrip("+~")
        if re.match(r"hydra\b|.*@hydra\b", key):
            raise ConfigError(f"{key} is refused: Hydra only composes here, and calls nothing; leave it out")
    if more is not None:
        if not os.path.isdir(more):
            raise ConfigError(f"--config-dir ({more}) is not a folder; give one of YAML files")
        overrides = [*overrides, f"hydra.searchpath=['file://{os.path.abspath(more)}']"]
    try:
        with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            cfg = hydra.compose(config_name=root, overrides=overrides, return_hydra_config=True)
    except ValueError as error:  # Hydra's own, of `group=null`
        raise ConfigError(str(error).splitlines()[0].rstrip(".")) from error
    callbacks = OmegaConf.select(cfg, "hydra.callbacks")
    if callbacks:
        raise ConfigError(
            f"hydra.callbacks ({', '.join(callbacks)}) are refused: nothing here is called by a YAML file"
        )
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def _quoted(override: str) -> str:
    """engine.master=local[2,4] as Hydra wants it: its grammar has no '[' within a word."""
    found = re.fullmatch(r"([^-=][^=]*=)([A-Za-z][\w./+-]*\[.*)", override, re.DOTALL)
    return "{}'{}'".format(found[1], found[2].replace("'", r"\'")) if found else override


def compose(overrides: list[str]) -> Config:
    """The configuration that conf/train.yaml and `overrides` give. Of two values for one key the last one counts."""
    return to_config(_compose("train", overrides))


def config_of_run(run_dir: Path, overrides: list[str]) -> Config:
    """The configuration that a run was last started with, and `overrides` on top. Raises ConfigError if unknown.

    It stays the run in `run_dir`, whatever its record says.
    """
    try:
        recorded = [str(override) for override in json.loads((run_dir / "run.json").read_bytes())["overrides"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        known = sorted(d.parent.name for d in run_dir.parent.glob("*/run.json"))
        remedy = (
            f"there are: {', '.join(known) or 'none'}; give run.name, and run.root where it is not {run_dir.parent}"
        )
        raise ConfigError(f"there is no trained run {run_dir.name} in {run_dir.parent.absolute()}; {remedy}") from error
    given = {override.split("=")[0] for override in overrides}
    recorded = [override for override in recorded if override.split("=")[0] not in given or "=" not in override]
    for override in recorded:
        if HIDDEN in override:
            key = override.split("=")[0]
            raise ConfigError(f"{key} of {run_dir.name} holds a secret, which is not recorded; give {key}=... again")
    cfg = compose(recorded + overrides)
    return replace(cfg, run=RunConfig(name=run_dir.name, root=str(run_dir.parent)))


def _explain(error: Exception) -> int:
    """Print one line on the rank that has to say it; return the exit code."""
    own = isinstance(error, RunError)
    mine = os.environ.get("RANK", "0") == "0" and not isinstance(error, PeerFailed)
    if mine or (own and error.only_here):
        say(redact(f"alexnet_ddp: {error if own else _hydra_line(error)}"), sys.stderr)
    return error.exit_code if own else ConfigError.exit_code


def _hydra_line(error: Exception) -> str:
    """What Hydra says in several lines and an exception chain, without its own advice, as one line."""
    text = "\n".join(str(e) for e in (error, error.__cause__) if e is not None)
    unknown = re.search(r"Could not override '([^']+)'(?:.|\n)*Key '[^']+' not in '(\w+)'", text)
    if unknown is not None:
        return unknown_key(unknown[1], getattr(config, unknown[2]))
    text = text.replace("No match in the defaults list", "This command has no such group; see --help")
    text = re.sub(
        r"Config search path:(.|\n)*|To append to your (config|default).*|See https?:.*|(full_key|\w+_type)[=:].*",
        "",
        text,
    )
    return "; ".join(line.strip().rstrip(".") for line in text.splitlines() if line.strip()).replace(":; ", ": ")


def _show_trace(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Of a bug, as Python shows it, but without secrets."""
    for line in redact("".join(traceback.format_exception(kind, error, trace))).splitlines():
        say(line, sys.stderr)


class _Say(logging.Handler):
    """What the package logs on rank 0, as plain lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        if os.environ.get("RANK", "0") == "0":
            prefix = "warning: " if record.levelno >= logging.WARNING else ""
            say(prefix + redact(record.getMessage()), sys.stderr)  # sys.stderr of now: a progress bar's
