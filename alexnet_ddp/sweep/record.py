"""Opens sweep.json for the sweep that a command describes, and refuses another one."""

from pathlib import Path

from alexnet_ddp.config import ConfigError
from alexnet_ddp.config.option import shown
from alexnet_ddp.config.space import Space
from alexnet_ddp.config.sweep import SweepConfig
from alexnet_ddp.runtime.redaction import redact
from alexnet_ddp.runtime.run_record import RunRecord
from alexnet_ddp.runtime.sweep_record import State, SweepRecord, is_sweep, read_sweep

# Results that another start would repeat: a wrong configuration, and a divergence.
FINAL_CODES = (64, 70)
# These distribute or monitor the work, or say where it is: the results are the same.
_FREE = ("run.root", "data.root", "data.num_threads", "trainer.hang_timeout_s", "device", "plugins")
_FREE_SECTIONS = ("logger.", "checkpoint.")


def open_record(directory: Path, cfg: SweepConfig, space: Space) -> SweepRecord:
    """The record of the sweep in `directory`, or a new one.

    Trials that failed through the machine become `running` again. Raises ConfigError if the file
    belongs to another sweep, or cannot be read, or if the directory is that of a run.
    """
    identity = identity_of(cfg, space)
    if not is_sweep(directory):
        if RunRecord(directory, directory.name).exists:
            raise ConfigError(
                f"sweep.name ({directory.name}) is the name of a run; give another one"
            )
        return SweepRecord(directory, identity, [])
    record = read_sweep(directory)
    if record.identity != identity:
        raise ConfigError(_difference(directory.name, record.identity, identity))
    for trial in record.trials:
        if trial.state is State.failed and trial.exit_code not in FINAL_CODES:
            trial.state, trial.exit_code, trial.message = State.running, None, ""
    return record


def identity_of(cfg: SweepConfig, space: Space) -> dict[str, str]:
    """What determines the results of the trials: option -> text. Secrets are hidden."""
    options = cfg.sweep
    found = {
        "sweep.sampler": options.sampler.value,
        "sweep.pruner": options.pruner.value,
        "sweep.metric": options.metric,
        "sweep.seed": str(options.seed),
    }
    for override in redact(list(space.fixed)):
        key, _, text = override.partition("=")
        if key.lstrip("+") not in _FREE and not key.lstrip("+").startswith(_FREE_SECTIONS):
            found[key.lstrip("+")] = text
    return found | {dimension.key: dimension.text for dimension in space.dimensions}


def _difference(name: str, recorded: dict[str, str], given: dict[str, str]) -> str:
    keys = [key for key in recorded | given if recorded.get(key) != given.get(key)]
    before, now = (
        shown(one[keys[0]]) if keys[0] in one else "not given" for one in (recorded, given)
    )
    more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
    rule = f"is another sweep: its {keys[0]} is {before}, here it is {now}{more}"
    return f"sweep.name ({name}) {rule}; give another sweep.name"
