"""Write report.html into the directory of a run or a sweep.

alexnet-ddp report run.name=X [compare=[Y,Z]]
"""

import logging
import os
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields
from typing import Any

import yaml

from alexnet_ddp import cli
from alexnet_ddp.config import Config, ConfigError
from alexnet_ddp.config.compose import to_yaml
from alexnet_ddp.config.option import MISSING, key_of
from alexnet_ddp.config.report import ReportConfig
from alexnet_ddp.config.schema import GROUPS, choices_of
from alexnet_ddp.plugins import load_plugins
from alexnet_ddp.report import facts
from alexnet_ddp.report.classes import class_results
from alexnet_ddp.report.curves import charts
from alexnet_ddp.report.images import Findings, examine, first_batch
from alexnet_ddp.report.page import Looked, Page, render
from alexnet_ddp.report.sweep import SweepPage, sweep_page
from alexnet_ddp.report.timeline import timeline
from alexnet_ddp.report.times import profiles, times
from alexnet_ddp.runtime import distributed
from alexnet_ddp.runtime.accuracy import metric_interval
from alexnet_ddp.runtime.environment import read_ranks
from alexnet_ddp.runtime.errors import (
    DataError,
    MachineError,
    Preempted,
    RunError,
    out_of_memory,
)
from alexnet_ddp.runtime.files import write_bytes
from alexnet_ddp.runtime.printing import say
from alexnet_ddp.runtime.run_command import command_of
from alexnet_ddp.runtime.run_record import RunRecord, flat, open_run
from alexnet_ddp.runtime.sweep_record import is_sweep
from alexnet_ddp.training.calibration import expected_calibration_error
from alexnet_ddp.training.precision import check_precision

log = logging.getLogger("alexnet_ddp")

FILE = "report.html"
# Options that the page reads: of every page, of one with images, and those of the command itself.
_OF_RECORDS = ("run.name", "run.root", "plugins")
_OF_IMAGES = ("data", "device", "trainer.eval_batch_size", "trainer.precision", "trainer.tf32")
_OWN = {one.name for one in fields(ReportConfig)} - {one.name for one in fields(Config)}


def main(options: ReportConfig, overrides: list[str]) -> None:
    """Write report.html. What cannot be computed is replaced by the reason.

    Raises ConfigError if a run does not exist or its records cannot be read, ConfigError or
    DataError if an option of the command line is wrong for the run, and MachineError if the page
    cannot be written.
    """
    num_ranks = read_ranks(os.environ).world_size
    if num_ranks > 1:
        raise ConfigError(f"report takes one process, not {num_ranks}; start it without torchrun")
    _refuse_ignored(options, overrides)
    distributed.choose_device(options.device, 0)  # a wrong one is no reason on the page
    if is_sweep(options.run_dir):
        directory = options.run_dir
        page: Page | SweepPage = sweep_page(directory)
    else:
        runs = _open_runs(options)
        directory = runs[0].directory
        page = build_page(runs, options, overrides)
    html = render(page).encode(errors="backslashreplace")  # a path may have other bytes than UTF-8
    file = directory / FILE
    try:
        write_bytes(file, html)
    except OSError as error:
        rule = f"{file} could not be written ({error.strerror or error})"
        raise MachineError(f"{rule}; free some space, or fix its permissions") from error
    say(f"{file}: {len(html) / 1e6:.2f} MB")


def _open_runs(options: ReportConfig) -> list[RunRecord]:
    """The run, and those to compare it with. Raises ConfigError if two of them are the same."""
    root = options.run.root
    run = open_run("run.name", options.run.name, root, "run.root")
    runs = [run, *(open_run("compare", name, root, "run.root") for name in options.compare)]
    if len({one.directory.resolve() for one in runs}) < len(runs):
        rule = f"must name other runs than run.name ({run.name}), each of them once"
        raise ConfigError(f"compare ({', '.join(options.compare)}) {rule}")
    return runs


def _refuse_ignored(options: ReportConfig, overrides: list[str]) -> None:
    """Raise ConfigError for an option that the page does not read."""
    is_of_sweep = is_sweep(options.run_dir)
    for override in overrides:
        key = key_of(override)
        is_of_images = key in _OF_IMAGES or key.startswith("data.")
        if is_of_sweep and key not in _OF_RECORDS:
            why = f"{options.run.name} is a sweep, whose page shows the metrics of all trials"
        elif is_of_images and options.max_images == 0:
            why = "max_images=0 uses no images"
        elif not is_of_images and key not in (*_OF_RECORDS, *_OWN):
            why = "the page shows the run as it was trained"
        else:
            continue
        raise ConfigError(f"{override} would be ignored: {why}; leave it out")


def build_page(runs: list[RunRecord], options: ReportConfig, overrides: list[str]) -> Page:
    """The content of the page of runs[0]; the other runs are compared with it."""
    run = runs[0]
    cfg, found, why_not = _examine(options, overrides)
    different, num_left_out = facts.differences(runs)
    sizes = (None, None) if found is None else (found.num_train, found.num_val)
    return Page(
        runs=[facts.summary(one) for one in runs],
        charts=charts(runs),
        times=times(run),
        profiles=profiles(run),
        timeline=timeline(run),
        looked=None if found is None else _looked(found),
        why_not=why_not,
        first_batch=first_batch(run.directory),
        data=facts.describe_data(run, *sizes),
        options=facts.option_rows(run, {} if cfg is None else defaults(cfg)),
        differences=different,
        num_differences_left_out=num_left_out,
        environment=facts.environment(run),
        command=command_of(run),
        subtitle=facts.subtitle(run),
    )


def defaults(cfg: Config) -> dict[str, Any]:
    """OPTION -> its value without a command line, for the same choices of the groups.

    Options that have no default have the run's value. Empty if these choices alone are refused.
    """
    choices = choices_of(cfg)
    given = [f"{group}={choice}" for group, choice in choices.items()]
    for group, choice in choices.items():
        for one in fields(GROUPS[group][choice]):
            if one.default == MISSING or (
                one.default is NO_DEFAULT and one.default_factory is NO_DEFAULT
            ):
                given.append(f"{group}.{one.name}={getattr(getattr(cfg, group), one.name)}")
    try:
        found = yaml.safe_load(to_yaml(cli.compose([*given, f"run.name={cfg.run.name}"])))
    except ConfigError as error:
        log.info("the defaults are not shown: %s", error)
        return {}
    return choices | dict(flat(found))


def _examine(
    options: ReportConfig, overrides: list[str]
) -> tuple[Config | None, Findings | None, str]:
    """The run's configuration, what its weights do with its images, and why that is unknown.

    Raises ConfigError or DataError if the reason is an option of the command line: without these
    options there is no error, or another one.
    """
    # The device is that of the report: the run's own may be missing on this machine.
    kept = [one for one in overrides if key_of(one) not in {*_OWN, "device"}]
    of_records = [one for one in kept if key_of(one) in _OF_RECORDS]
    cfg, found, error = _attempt(options, kept)
    if error is None:
        why_not = "no images were used, because max_images is 0" if found is None else ""
        return cfg, found, why_not
    may_be_chosen = isinstance(error, ConfigError | DataError) and kept != of_records
    if may_be_chosen and str(_attempt(options, of_records)[2]) != str(error):
        raise error
    return cfg, None, str(error)


def _attempt(
    options: ReportConfig, overrides: list[str]
) -> tuple[Config | None, Findings | None, RunError | None]:
    """The run's configuration, what its weights do with its images, and why that failed.

    Raises Preempted after a stop signal.
    """
    try:
        cfg = cli.config_of_run(options.run_dir, overrides)
        load_plugins(cfg.plugins)
    except RunError as error:
        return None, None, error
    if options.max_images == 0:
        return cfg, None, None
    try:
        with distributed.session(options.device, cfg.trainer.tf32) as world:
            if "trainer.precision" in map(key_of, overrides):
                check_precision(cfg.trainer.precision, world)
            return cfg, examine(cfg, options.max_images, world), None
    except Preempted:  # the page of an earlier report stays
        raise
    except (RunError, RuntimeError, MemoryError) as error:
        reason = error if isinstance(error, RunError) else out_of_memory(error)
        if reason is None:
            raise
        return cfg, None, reason


def _looked(found: Findings) -> Looked:
    scores, row = found.scores, found.evaluation.row
    num_images = int(row["val/num_images"])
    return Looked(
        found.checkpoint,
        num_images,
        found.num_val,
        float(row["val/top1"]),
        metric_interval(row, "val/top1"),
        100 * expected_calibration_error(scores.logits, scores.labels, 1.0),
        class_results(scores, found.names),
        found.largest_losses,
        found.confident,
        found.filters,
    )
