"""Runs a command: its arguments become a checked configuration, its end becomes an exit code.

    python -m alexnet_ddp.train KEY=VALUE ...

A foreseen end (runtime/errors.py) is one line without a traceback; a bug keeps its traceback.
HYDRA_FULL_ERROR=1 shows the traceback of both. Hydra is imported to compose, and the command,
with torch, after the configuration is valid: --help and a misspelt key need neither.
"""

import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

from alexnet_ddp import __version__
from alexnet_ddp.config import Config, RunConfig
from alexnet_ddp.config.advice import dashed
from alexnet_ddp.config.option import key_of
from alexnet_ddp.config.overrides import check_key
from alexnet_ddp.config.reference import help_lines
from alexnet_ddp.config.schema import ROOTS, group_names, options
from alexnet_ddp.plugins import load_plugins
from alexnet_ddp.runtime import startup
from alexnet_ddp.runtime.errors import (
    ConfigError,
    PeerFailed,
    RunError,
    code_for_caller,
    is_rank_zero,
    write_exit_code,
)
from alexnet_ddp.runtime.printing import listed, say
from alexnet_ddp.runtime.redaction import HIDDEN, redact

Main = Callable[[Any, list[str]], object]
Points = Callable[[list[str]], list[str]]

_KNOWN = "--help [NAME], --cfg job, --resolve, --package NAME, --config-dir DIR, --version"
_LONG = {"-h": "--help", "-c": "--cfg", "-p": "--package", "-cd": "--config-dir"}
_WITH_VALUE = ("--cfg", "--package", "--config-dir")
_config_dir: str | None = None  # --config-dir of this process, for config_of_run
_SWEEPS = ("--multirun", "-m")
# Hydra's options, which nothing here would read. --experimental-rerun would unpickle a file.
_HYDRAS = (
    *("--config-name", "-cn", "--config-path", "-cp", "--run", "-r", "--exp", "--info", "-i"),
    *("--hydra-help", "--shell-completion", "-sc"),
)


@dataclass
class Arguments:
    """A command line. names: of --help, None without it. shows: --cfg is given."""

    overrides: list[str] = field(default_factory=list)
    config_dir: str | None = None
    names: list[str] | None = None
    shows: bool = False
    resolves: bool = False
    package: str | None = None
    is_version: bool = False


def run(command: str, main: str | Main, one_point: Points | None = None) -> None:
    """Call main(configuration, overrides) for the arguments of this process, and exit.

    main: a function, or "module:function", which is imported after the configuration is valid.
    one_point: returns the overrides that are composed here, if they are not all of `overrides`:
    one of several values, or those that need no run.
    """
    shows_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    logger = logging.getLogger("alexnet_ddp")
    logger.setLevel(logging.INFO)
    logger.addHandler(_Say())
    sys.excepthook = _show_trace
    try:
        arguments = _parse(sys.argv[1:], command)
        global _config_dir
        _config_dir = arguments.config_dir
        given = arguments.overrides
        if one_point is not None and arguments.names is None and not arguments.is_version:
            arguments.overrides = one_point(given)
        if not _show(arguments, command):
            cfg = _compose(command, arguments.overrides, arguments.config_dir)
            load_plugins(getattr(cfg, "plugins", ()))
            function = _imported(main)
            startup.resume_garbage_collection()
            function(cfg, given)
        code = 0
    except RunError as error:
        if shows_traceback:
            raise
        code = _report(error)
    except Exception:
        # A bug keeps its traceback. Other ranks, which only lost this one, must not report for it.
        write_exit_code(1)
        raise
    startup.ignore_stop_signals()
    write_exit_code(code)
    sys.exit(code_for_caller(code))


def compose(overrides: list[str]) -> Config:
    """The checked configuration of a training with `overrides`. The last value of a key counts.

    --config-dir of this process counts, too.
    """
    return _compose("train", overrides, _config_dir)


def config_dir_arguments() -> list[str]:
    """The arguments by which another command gets --config-dir of this process."""
    return [] if _config_dir is None else ["--config-dir", _config_dir]


def compose_for_python(overrides: list[str]) -> Config:
    """As compose, for Python programs: imports the plugins as well."""
    cfg = compose(overrides)
    load_plugins(cfg.plugins)
    return cfg


def config_of_run(run_dir: Path, overrides: list[str], opens_data: bool = True) -> Config:
    """The configuration that the run was last started with, with `overrides` on top.

    A run that was started with --config-dir needs it again. opens_data: the caller opens data.root.
    Its run.name and run.root are those of `run_dir`. Raises ConfigError if there is no such run.
    """
    try:
        record = json.loads((run_dir / "run.json").read_bytes())
        if not isinstance(record["overrides"], list):
            raise TypeError("overrides is no list")
        recorded = [str(override) for override in record["overrides"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            rule = f"cannot be read ({type(error).__name__}: {error})"
            remedy = "start the training again: it writes a new one"
            raise ConfigError(f"{run_dir / 'run.json'} {rule}; {remedy}") from error
        known = listed(sorted(d.parent.name for d in run_dir.parent.glob("*/run.json")))
        rule = f"there is no trained run {run_dir.name} in {run_dir.parent.absolute()}"
        remedy = f"give run.name, and run.root if it is not {run_dir.parent}"
        raise ConfigError(f"{rule}; there are: {known or 'none'}; {remedy}") from error
    given = {key_of(override) for override in overrides}
    _refuse_plugins_of_record(run_dir, recorded, given)
    kept = [one for one in recorded if "=" not in one or key_of(one) not in given]
    for override in kept:
        if HIDDEN in override:
            key = override.split("=")[0]
            rule = f"{key} of {run_dir.name} holds a secret, which is not recorded"
            raise ConfigError(f"{rule}; give {key}=... again")
    cfg = _compose("train", kept + overrides, _config_dir, run_dir)
    if opens_data:
        _refuse_filled_in_url(run_dir, kept, str(getattr(cfg.data, "root", "")))
    return replace(cfg, run=RunConfig(name=run_dir.name, root=str(run_dir.parent)))


def without_data_options(overrides: list[str]) -> list[str]:
    """The overrides that a command for a run checks before it knows the run.

    Options of data depend on those of the run, such as data.eval_resize on data.image_size, so
    config_of_run checks them. Unknown ones are refused here, without the run. With images and
    model.weights, evaluate opens no data set.
    """
    keys = set(map(key_of, overrides))
    known = {key for key in options(Config) if key.startswith("data.")}
    if {"images", "model.weights"} <= keys:
        from alexnet_ddp.config.evaluate import ignored_with_images

        of_known = [one for one in overrides if key_of(one) in {"data", *known}]
        ignored = ignored_with_images(of_known)  # evaluate refuses them
        return ["data=synthetic", *(one for one in overrides if one not in ignored)]
    if keys & {"data", "model.weights"}:
        return overrides
    return [one for one in overrides if key_of(one) not in known]


def with_positions(arguments: list[str], names: tuple[str, ...]) -> list[str]:
    """The arguments of a command whose first ones may be values of the options `names`, in turn."""
    given = []
    for name, argument in zip(names, arguments):
        is_option = "=" in argument and not os.path.isdir(argument)
        if is_option or argument.startswith("-"):
            break
        given.append(f"{name}={argument}")
    return given + arguments[len(given) :]


def with_record_options(arguments: list[str]) -> list[str]:
    """The arguments of replay, in which the first one may be the path of a record.

    FILE becomes file=FILE, and names the run, whose directory contains the file.
    """
    if not arguments or "=" in arguments[0] or arguments[0].startswith("-"):
        return arguments
    run_dir = Path(arguments[0]).absolute().parent
    of_run = [f"run.root={run_dir.parent}", f"run.name={run_dir.name}"]
    given = {key_of(argument) for argument in arguments[1:]}
    of_run = [override for override in of_run if key_of(override) not in given]
    return [f"file={arguments[0]}", *of_run, *arguments[1:]]


def _refuse_filled_in_url(run_dir: Path, recorded: list[str], root: str) -> None:
    """Raise ConfigError if the record fills data.root, a URL, with a variable of this machine.

    A record of somebody else's would send the variable to the server of the URL.
    """
    is_filled = any("${" in one and key_of(one).startswith("data") for one in recorded)
    if is_filled and "://" in root:
        rule = "is a URL with ${...}, which a record must not fill in"
        raise ConfigError(f"data.root of {run_dir.name} {rule}; give data.root=... again")


def _refuse_plugins_of_record(run_dir: Path, recorded: list[str], given: set[str]) -> None:
    """Raise ConfigError if the record names plugins and the command line has no `plugins`."""
    modules = [one.partition("=")[2] for one in recorded if key_of(one) == "plugins"]
    if modules and modules[-1] != "[]" and "plugins" not in given:
        rule = "and a record must not choose what is imported"
        remedy = f"give plugins={modules[-1]} again if you trust it, or plugins=[] to do without"
        raise ConfigError(f"run {run_dir.name} was started with plugins, {rule}; {remedy}")


def _compose(
    command: str,
    overrides: list[str],
    config_dir: str | None = None,
    run_dir: Path | None = None,
) -> Any:
    for override in overrides:
        check_key(override, ROOTS[command])  # before Hydra is imported
    from alexnet_ddp.config.compose import compose as with_hydra

    return with_hydra(command, overrides, config_dir, run_dir)


def _imported(main: str | Main) -> Main:
    if not isinstance(main, str):
        return main
    module, _, function = main.partition(":")
    return getattr(import_module(module), function)


def _parse(given: list[str], command: str) -> Arguments:
    """Raises ConfigError for an argument that begins with a dash and is no option of ours."""
    found = Arguments()
    rest = [_undashed(argument, command) for argument in given]
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        name = _LONG.get(name, name)
        if not argument.startswith("-"):
            found.overrides.append(argument)
        elif name == "--help":
            found.names = [value] if equals else []
        elif name == "--resolve" and not equals:
            found.resolves = True
        elif name == "--version" and not equals:
            found.is_version = True
        elif name in _WITH_VALUE:
            if not equals and not rest:
                raise ConfigError(f"{name} needs a value; known: {_KNOWN}")
            _set(found, name, value if equals else rest.pop(0))
        else:
            raise ConfigError(_refusal(argument, rest[0] if rest else None, command))
    return found


def _set(found: Arguments, name: str, value: str) -> None:
    if name == "--config-dir":
        found.config_dir = value
    elif name == "--package":
        found.package = value
    elif value == "job":
        found.shows = True
    else:
        raise ConfigError(f"--cfg {value} is not supported; write --cfg job")


def _undashed(argument: str, command: str) -> str:
    """--optimizer.lr=0.1 as optimizer.lr=0.1: wandb's sweep agent writes it so."""
    name, equals, _ = argument.removeprefix("--").partition("=")
    root = ROOTS[command]
    is_key = "." in name or name in options(root) or name in group_names(root)
    return argument[2:] if argument.startswith("--") and equals and is_key else argument


def _refusal(argument: str, following: str | None, command: str) -> str:
    """The line for an argument that begins with a dash and is no option of ours."""
    name, equals, value = argument.partition("=")
    if name in _SWEEPS:
        remedy = "start one command per value"
        if command == "train":
            remedy = "write alexnet-ddp sweep, as in alexnet-ddp sweep optimizer.lr=0.01,0.1"
        elif command == "sweep":
            remedy = "leave it out: every option may have several values here"
        return f"{name} (a sweep) is not supported; {remedy}"
    if name.startswith("--experimental") or name in _HYDRAS:
        return f"{name} is not supported; known: {_KNOWN}"
    is_value = following is not None and "=" not in following and not following.startswith("-")
    return dashed(name, value if equals else following if is_value else None, ROOTS[command])


def _show(arguments: Arguments, command: str) -> bool:
    """Print what --help, --version or --cfg asks for, on rank 0; False if none of them is given."""
    if arguments.is_version:
        lines = [f"alexnet_ddp {__version__}"]
    elif arguments.names is not None:
        # As with other commands, --help may follow a complete command line.
        names = [one for one in arguments.overrides if "=" not in one]
        lines = list(help_lines(command, arguments.names + names))
    elif arguments.shows:
        lines = _composed_lines(arguments, command)
    else:
        return False
    for line in lines if is_rank_zero() else ():
        say(line)
    return True


def _composed_lines(arguments: Arguments, command: str) -> list[str]:
    from alexnet_ddp.config.compose import compose_yaml, shown_yaml

    cfg = compose_yaml(command, arguments.overrides, arguments.config_dir)
    return shown_yaml(cfg, ROOTS[command], arguments.package, arguments.resolves).splitlines()


def _report(error: RunError) -> int:
    """Print one line on the rank that has to print it; return the exit code."""
    is_mine = is_rank_zero() and not isinstance(error, PeerFailed)
    if is_mine or error.only_here:
        say(redact(f"alexnet_ddp: {error}"), sys.stderr)
    return error.exit_code


def _show_trace(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print a traceback as Python does, without secrets."""
    for line in redact("".join(traceback.format_exception(kind, error, trace))).splitlines():
        say(line, sys.stderr)


class _Say(logging.Handler):
    """Prints what the package logs as plain lines on stderr of rank 0.

    sys.stderr is looked up for each line, because a progress bar replaces it.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if is_rank_zero():
            prefix = "warning: " if record.levelno >= logging.WARNING else ""
            say(prefix + redact(record.getMessage()), sys.stderr)
