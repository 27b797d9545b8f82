"""The door between a command line and a root: Hydra composes, the story runs, every end becomes a line and a code.

    python -m alexnet_ddp.train KEY=VALUE ...

A foreseen end (errors.py) leaves as one line without a trace; a bug keeps its trace. HYDRA_FULL_ERROR=1 shows the trace
of both.
"""

import json
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alexnet_ddp.config import Config
from alexnet_ddp.config.door import to_config
from alexnet_ddp.errors import ConfigError, PeerFailed, RunError, leave_code

_PACKAGE = Path(__file__).resolve().parent
# In a wheel conf/ lies in the package, in a checkout beside it.
CONF_DIR = next(d for d in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if d.is_dir())


def run(root: str, story: Callable[[Config, list[str]], None]) -> None:
    """Compose conf/`root`.yaml with the command line, call story(config, overrides), and exit with the run's code."""
    show_trace = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing them
    logger = logging.getLogger("alexnet_ddp")
    logger.setLevel(logging.INFO)
    logger.addHandler(_Say())
    try:
        for cfg, overrides in _composed(root):  # none after --help and --cfg
            story(to_config(cfg), overrides)
        code = 0
    except (HydraException, OmegaConfBaseException, RunError) as error:
        if show_trace:
            raise
        code = _explain(error)
    leave_code(code)
    sys.exit(code)


def _composed(root: str) -> list[tuple[DictConfig, list[str]]]:
    """What Hydra makes of conf/`root`.yaml and the command line: one configuration, or none."""
    composed: list[tuple[DictConfig, list[str]]] = []

    def keep(cfg: DictConfig) -> None:
        overrides = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)  # as they were typed
        composed.append((cfg, overrides))

    sys.argv[1:] = map(_quoted, sys.argv[1:])
    try:
        hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=root)(keep)()
    except ValueError as error:  # Hydra's own, of `group=null`
        raise ConfigError(str(error).splitlines()[0].rstrip(".")) from error
    if len(composed) > 1:
        raise ConfigError("--multirun is not supported: start one process group per run")
    return composed


def _quoted(override: str) -> str:
    """engine.master=local[2,4] as Hydra wants it: its grammar has no '[' within a word."""
    found = re.fullmatch(r"([^-=][^=]*=)([A-Za-z][\w./+-]*\[.*)", override, re.DOTALL)
    return "{}'{}'".format(found[1], found[2].replace("'", r"\'")) if found else override


def compose(overrides: list[str]) -> Config:
    """The configuration that conf/train.yaml and `overrides` give. Of two values for one key the last one counts."""
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return to_config(hydra.compose(config_name="train", overrides=overrides))


def config_of_run(run_dir: Path, overrides: list[str]) -> Config:
    """The configuration that a run was last started with, and `overrides` on top. Raises ConfigError if unknown."""
    try:
        recorded = json.loads((run_dir / "run.json").read_bytes())["overrides"]
    except (OSError, ValueError, KeyError) as error:
        known = sorted(d.parent.name for d in run_dir.parent.glob("*/run.json"))
        remedy = (
            f"there are: {', '.join(known) or 'none'}; give run.name, and run.root where it is not {run_dir.parent}"
        )
        raise ConfigError(f"there is no trained run {run_dir.name} in {run_dir.parent.absolute()}; {remedy}") from error
    return compose(recorded + overrides)


def _explain(error: Exception) -> int:
    """Print one line on the rank that has to say it; return the exit code."""
    own = isinstance(error, RunError)
    mine = os.environ.get("RANK", "0") == "0" and not isinstance(error, PeerFailed)
    if mine or (own and error.only_here):
        print(f"alexnet_ddp: {error if own else _hydra_line(error)}", file=sys.stderr, flush=True)
    return error.exit_code if own else ConfigError.exit_code


def _hydra_line(error: Exception) -> str:
    """What Hydra says in several lines and an exception chain, without its own advice, as one line."""
    text = "\n".join(str(e) for e in (error, error.__cause__) if e is not None)
    text = re.sub(
        r"Config search path:(.|\n)*|To append to your config.*|See https?:.*|(full_key|\w+_type)[=:].*", "", text
    )
    return "; ".join(line.strip().rstrip(".") for line in text.splitlines() if line.strip()).replace(":; ", ": ")


class _Say(logging.Handler):
    """What the package logs, as plain lines on stderr: everything from rank 0, skipped images from every rank."""

    def emit(self, record: logging.LogRecord) -> None:
        if os.environ.get("RANK", "0") == "0" or record.name == "alexnet_ddp.data.fill":
            prefix = "warning: " if record.levelno >= logging.WARNING else ""
            print(prefix + record.getMessage(), file=sys.stderr, flush=True)  # sys.stderr of now: a progress bar's
