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
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from alexnet_ddp.config import Config, PrepareConfig, RunConfig
from alexnet_ddp.config.advice import dashed, one_line
from alexnet_ddp.config.door import to_config
from alexnet_ddp.config.files import refuse_numbers_as_text
from alexnet_ddp.config.overrides import quoted, to_hydra
from alexnet_ddp.config.plugins import TimmConfig
from alexnet_ddp.config.schema import CONF_DIR, ROOTS, group_names, options
from alexnet_ddp.plugins import load_plugins
from alexnet_ddp.runtime import startup
from alexnet_ddp.runtime.errors import (
    ConfigError,
    PeerFailed,
    RunError,
    speaks_for_all,
    write_exit_code,
)
from alexnet_ddp.runtime.printing import say
from alexnet_ddp.runtime.redaction import HIDDEN, redact

# Hydra's options that only show something. --experimental-rerun would unpickle a file.
_SHOWING = (
    "--help",
    "-h",
    "--cfg",
    "-c",
    "--resolve",
    "--package",
    "-p",
    "--info",
    "-i",
    "--hydra-help",
    "--version",
)
# Hydra 1.3 warns if version_base is missing, Hydra 1.4 warns if it is given. Both then behave in the same way.
HYDRA_BASE = {"version_base": "1.3"} if hydra.__version__.startswith("1.3.") else {}
_SWEEPS = ("--multirun", "-m")
_HYDRAS = (
    "--config-name",
    "-cn",
    "--config-path",
    "-cp",
    "--run",
    "-r",
    "--shell-completion",
    "-sc",
    "--exp",
)


def run(root: str, story: Callable[[Config, list[str]], None]) -> None:
    """Compose conf/`root`.yaml with the command line, call story(config, overrides), and exit with the run's code."""
    show_trace = os.environ.get("HYDRA_FULL_ERROR") == "1"
    logger = logging.getLogger("alexnet_ddp")
    logger.setLevel(logging.INFO)
    logger.addHandler(_Say())
    sys.excepthook = _show_trace
    try:
        for cfg, overrides in _composed(root):  # none after --help and --cfg
            config = to_config(cfg)
            load_plugins([] if isinstance(config, PrepareConfig) else config.plugins)
            story(config, overrides)
        code = 0
    except (HydraException, OmegaConfBaseException, RunError) as error:
        if show_trace:
            raise
        code = _explain(error, root)
    except (
        Exception
    ):  # a bug: here it keeps its trace, and the others, who only lost a peer, do not speak for it
        write_exit_code(1)
        raise
    startup.ignore_stop()
    write_exit_code(code)
    sys.exit(code)


def _composed(root: str) -> list[tuple[DictConfig, list[str]]]:
    """What Hydra makes of conf/`root`.yaml and the command line: one configuration, or none if it only shows one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd")
    own, rest = parser.parse_known_args(sys.argv[1:])
    rest = [_undashed(argument, root) for argument in rest]
    options = [argument.split("=")[0] for argument in rest if argument.startswith("-")]
    for option, argument in zip(
        options, [argument for argument in rest if argument.startswith("-")]
    ):
        if option not in _SHOWING:
            following = rest[rest.index(argument) + 1 :]
            raise ConfigError(_refusal(argument, following[0] if following else None, root))
    if options:
        shown = [
            to_hydra(part, ROOTS[root]) if "=" in part and part[0] != "-" else part for part in rest
        ]
        sys.argv[1:] = shown + [f"--config-dir={own.config_dir}"] * (own.config_dir is not None)
        os.environ["HYDRA_FULL_ERROR"] = (
            "1"  # hydra.main() then raises its errors instead of printing them
        )
        hydra.main(**HYDRA_BASE, config_path=str(CONF_DIR), config_name=root)(lambda cfg: None)()
        return []
    return [(_compose(root, rest, own.config_dir), rest)]


def _undashed(argument: str, root: str) -> str:
    """--optimizer.lr=0.1 as optimizer.lr=0.1: wandb's sweep agent writes it so."""
    name, equals, _ = argument.removeprefix("--").partition("=")
    is_key = "." in name or name in options(ROOTS[root]) or name in group_names(ROOTS[root])
    return argument[2:] if argument.startswith("--") and equals and is_key else argument


def _refusal(argument: str, following: str | None, root: str) -> str:
    """The line for an argument that begins with a dash and is no option of ours."""
    name, equals, value = argument.partition("=")
    if name in _SWEEPS:
        command = "start one command per value"
        if root == "train":
            command = "start one run per value: for seed in 1 2; do python -m alexnet_ddp.train seed=$seed "
            command += "run.name=seed-$seed; done"
        return f"{name} (a sweep) is not supported; {command}"
    if name.startswith("--experimental") or name in _HYDRAS:
        return f"{name} is not supported: known: --config-dir {' '.join(_SHOWING)}"
    is_value = following is not None and "=" not in following and not following.startswith("-")
    return dashed(name, value if equals else following if is_value else None, ROOTS[root])


def _compose(root: str, overrides: list[str], more: str | None = None) -> DictConfig:
    """Hydra composes and does no more: its own main() would call whatever a configuration names in `hydra`.

    more: a folder of further YAML files. Raises ConfigError if `hydra` is touched, because nothing would read it.
    """
    for override in overrides:
        key = override.split("=")[0].lstrip("+~")
        if re.match(r"hydra\b|.*@hydra\b", key):
            raise ConfigError(
                f"{key} is refused: Hydra only composes here, and calls nothing; leave it out"
            )
    overrides = [to_hydra(override, ROOTS[root]) for override in overrides]
    if more is not None:
        if not os.path.isdir(more):
            raise ConfigError(f"--config-dir ({more}) is not a folder; give one of YAML files")
        overrides = [*overrides, f"hydra.searchpath=[{quoted('file://' + os.path.abspath(more))}]"]
    try:
        with hydra.initialize_config_dir(str(CONF_DIR), **HYDRA_BASE):
            cfg = hydra.compose(config_name=root, overrides=overrides, return_hydra_config=True)
    except ValueError as error:  # Hydra's own, of `group=null`
        raise ConfigError(str(error).splitlines()[0].rstrip(".")) from error
    folders = [CONF_DIR] if more is None else [CONF_DIR, Path(more)]
    refuse_numbers_as_text(folders, root, cfg.hydra.runtime.choices, ROOTS[root])
    _refuse_plugins_of_files(cfg, overrides)
    callbacks = OmegaConf.select(cfg, "hydra.callbacks")
    if callbacks:
        raise ConfigError(
            f"hydra.callbacks ({', '.join(callbacks)}) are refused: nothing here is called by a YAML file"
        )
    with open_dict(cfg):
        del cfg["hydra"]
    if "model" in cfg and OmegaConf.get_type(cfg.model) is TimmConfig and "trainer" in cfg:
        from alexnet_ddp.model.timm_models import input_options  # imports torch and timm

        for key, value in input_options(cfg.model.name, cfg.data.image_size).items():
            if cfg.data[key] is None:
                cfg.data[key] = value
    return cfg


def _refuse_plugins_of_files(cfg: DictConfig, overrides: list[str]) -> None:
    """Raise ConfigError unless cfg.plugins is the command line's: files must not name code."""
    given: list[str] = []
    for override in OverridesParser.create().parse_overrides(overrides):
        if override.key_or_group == "plugins":
            given = override.value()
    if any("${" in str(module) for module in given):
        raise ConfigError("plugins must name modules, not ${...}; write plugins=[MODULE]")
    found = OmegaConf.select(cfg, "plugins") or []
    if list(found) != [str(module) for module in given]:
        rule = "comes from a YAML file, which must not choose what is imported"
        raise ConfigError(
            f"plugins=[{','.join(found)}] {rule}; remove it there and give it on the command line"
        )


def compose(overrides: list[str]) -> Config:
    """The configuration that conf/train.yaml and `overrides` give. Of two values for one key the last one counts."""
    return to_config(_compose("train", overrides))


def compose_for_python(overrides: list[str]) -> Config:
    """As compose, for Python programs: imports the plugins and raises ConfigError only."""
    try:
        cfg = compose(overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(one_line(error, ROOTS["train"])) from error
    load_plugins(cfg.plugins)
    return cfg


def config_of_run(run_dir: Path, overrides: list[str]) -> Config:
    """The configuration that a run was last started with, and `overrides` on top. Raises ConfigError if unknown.

    It stays the run in `run_dir`, whatever its record says.
    """
    try:
        recorded = [
            str(override)
            for override in json.loads((run_dir / "run.json").read_bytes())["overrides"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        known = sorted(d.parent.name for d in run_dir.parent.glob("*/run.json"))
        remedy = f"there are: {', '.join(known) or 'none'}; give run.name, and run.root where it is not {run_dir.parent}"
        raise ConfigError(
            f"there is no trained run {run_dir.name} in {run_dir.parent.absolute()}; {remedy}"
        ) from error
    given = {override.split("=")[0].lstrip("+") for override in overrides}
    _refuse_plugins_of_record(run_dir, recorded, given)
    recorded = [
        override
        for override in recorded
        if override.split("=")[0].lstrip("+") not in given or "=" not in override
    ]
    for override in recorded:
        if HIDDEN in override:
            key = override.split("=")[0]
            raise ConfigError(
                f"{key} of {run_dir.name} holds a secret, which is not recorded; give {key}=... again"
            )
    cfg = compose(recorded + overrides)
    return replace(cfg, run=RunConfig(name=run_dir.name, root=str(run_dir.parent)))


def _refuse_plugins_of_record(run_dir: Path, recorded: list[str], given: set[str]) -> None:
    """Raise ConfigError if the record names plugins and the command line has no `plugins`."""
    modules = [o.partition("=")[2] for o in recorded if o.split("=")[0].lstrip("+") == "plugins"]
    if modules and modules[-1] != "[]" and "plugins" not in given:
        rule = "and a record must not choose what is imported"
        remedy = f"give plugins={modules[-1]} again if you trust it, or plugins=[] to do without"
        raise ConfigError(f"run {run_dir.name} was started with plugins, {rule}; {remedy}")


def _explain(error: Exception, root: str) -> int:
    """Print one line on the rank that has to say it; return the exit code."""
    own = isinstance(error, RunError)
    mine = speaks_for_all() and not isinstance(error, PeerFailed)
    if mine or (own and error.only_here):
        say(redact(f"alexnet_ddp: {error if own else one_line(error, ROOTS[root])}"), sys.stderr)
    return error.exit_code if own else ConfigError.exit_code


def _show_trace(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Of a bug, as Python shows it, but without secrets."""
    for line in redact("".join(traceback.format_exception(kind, error, trace))).splitlines():
        say(line, sys.stderr)


class _Say(logging.Handler):
    """What the package logs on rank 0, as plain lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        if speaks_for_all():
            prefix = "warning: " if record.levelno >= logging.WARNING else ""
            say(
                prefix + redact(record.getMessage()), sys.stderr
            )  # sys.stderr of now: a progress bar's
