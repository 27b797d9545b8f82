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
from alexnet_ddp.config.option import MISSING
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
from alexnet_ddp.runtime.errors import MachineError, RunError, out_of_memory
from alexnet_ddp.runtime.files import write_bytes
from alexnet_ddp.runtime.printing import say
from alexnet_ddp.runtime.run_record import RunRecord, flat, open_run
from alexnet_ddp.runtime.sweep_record import is_sweep
from alexnet_ddp.training.calibration import expected_calibration_error

log = logging.getLogger("alexnet_ddp")

FILE = "report.html"


def main(options: ReportConfig, overrides: list[str]) -> None:
    """Write report.html. What cannot be computed is replaced by the reason.

    Raises ConfigError if a run does not exist or its records cannot be read, and MachineError if
    the page cannot be written.
    """
    num_ranks = read_ranks(os.environ).world_size
    if num_ranks > 1:
        raise ConfigError(f"report takes one process, not {num_ranks}; start it without torchrun")
    if is_sweep(options.run_dir):
        _check_for_sweep(options.run.name, overrides)
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


def _check_for_sweep(name: str, overrides: list[str]) -> None:
    """Raise ConfigError for options that the page of a sweep does not read."""
    for override in overrides:
        if override.partition("=")[0].lstrip("+") in ("compare", "max_images"):
            rule = (
                f"would be ignored: {name} is a sweep, whose page shows the metrics of all trials"
            )
            raise ConfigError(f"{override} {rule}; leave it out")


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
        command=facts.command(run),
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
    """The run's configuration, what its weights do with its images, and why that is unknown."""
    own = {one.name for one in fields(ReportConfig)} - {one.name for one in fields(Config)}
    # The device is that of the report: the run's own may be missing on this machine.
    kept = [one for one in overrides if one.partition("=")[0].lstrip("+") not in own | {"device"}]
    try:
        cfg = cli.config_of_run(options.run_dir, kept)
        load_plugins(cfg.plugins)
    except RunError as error:
        return None, None, str(error)
    if options.max_images == 0:
        return cfg, None, "no images were used, because max_images is 0"
    try:
        with distributed.session(options.device, cfg.trainer.tf32) as world:
            return cfg, examine(cfg, options.max_images, world), ""
    except (RunError, RuntimeError, MemoryError) as error:
        reason = error if isinstance(error, RunError) else out_of_memory(error)
        if reason is None:
            raise
        return cfg, None, str(reason)


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
