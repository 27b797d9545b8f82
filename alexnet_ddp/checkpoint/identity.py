"""The identity of a run: what must not change between a checkpoint and its resumption."""

import hashlib
import json
import logging
import platform
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alexnet_ddp.checkpoint.format import classes_of, read_state
from alexnet_ddp.config import Config, ConfigError, DataConfig
from alexnet_ddp.config.option import Options, spec_of
from alexnet_ddp.config.plugins import PluginOptimizerConfig, TorchOptimizerConfig
from alexnet_ddp.config.schema import specs
from alexnet_ddp.runtime.printing import listed

log = logging.getLogger(__name__)

_MAX_OPTIONS_SHOWN = 6
_ADAPTER_GROUPS = ("adapters", "ranks", "ema_adapters")
# Options of data that choose which images are trained on: data.X.
_CHOICE = ("limit_train", "val_fraction", "fold")
# A newer option with one of these values, or Spec.as_unset, has no effect: older checkpoints match.
_OFF = (None, 0, "none")


def identity(cfg: Config, fingerprint: str, windows: str | None = None) -> dict[str, object]:
    """Return all options that affect an update, and fingerprints of the data, as a flat dict.

    Each option states in alexnet_ddp/config/ whether it is left out: may_change or selects.
    The same files in directories, archives or shards have the same fingerprint; resized or raw
    shards have another one.

    Args:
        cfg: the configuration.
        fingerprint: of the training images.
        windows: fingerprint of the shuffle windows, which depend on the shards; None without them.
    """
    flat: dict[str, object] = {"data": fingerprint}
    if windows:
        flat["data.windows"] = windows
    for section, values in asdict(cfg).items():
        owner = getattr(cfg, section)
        if isinstance(owner, Options):
            compared = {key: value for key, value in values.items() if _is_compared(owner, key)}
            flat |= {f"{section}.{key}": value for key, value in compared.items()}
        elif _is_compared(cfg, section):
            flat[section] = values
    for section in ("augment", "model", "optimizer", "scheduler"):
        flat[section] = type(getattr(cfg, section)).__name__.removesuffix("Config")
    if isinstance(cfg.optimizer, TorchOptimizerConfig | PluginOptimizerConfig):
        flat["optimizer"] = f"{flat['optimizer']} {cfg.optimizer.name}"  # another name: other state
    return flat


def _is_compared(owner: Options, name: str) -> bool:
    spec = spec_of(type(owner), name)
    return not (spec.may_change or spec.selects)


@dataclass(frozen=True)
class DataFacts:
    """Facts about the data that state.json records, to describe later what has changed."""

    # "ids": directory names ordered by label; "names": names for people
    classes: dict[str, list[str]]
    images_per_class: list[int]  # of the training images
    labels: str  # labels_fingerprint() of the training images
    evaluation: str  # fingerprint of the validation images
    # Option -> value of those that choose the training images. Older checkpoints have none.
    choice: dict[str, object]


def choice_of_images(cfg: DataConfig) -> dict[str, object]:
    """Return option -> value of the options in `cfg` that choose which images are trained on."""
    return {f"data.{name}": getattr(cfg, name, None) for name in _CHOICE}


def labels_fingerprint(classes: list[str], labels: np.ndarray) -> str:
    """Return the data fingerprint of older versions: without names and sizes of the images.

    Args:
        classes: ids ordered by label.
        labels: integers [number of images].
    """
    digest = hashlib.sha256(json.dumps([len(labels), classes]).encode())
    digest.update(labels.astype("<i4").tobytes())
    return digest.hexdigest()


def check_same_run(
    name: str, checkpoint: Path, now: dict[str, object], data: DataFacts | None = None
) -> None:
    """Raise ConfigError if a checkpoint belongs to a run with other options or data.

    The message names the differences and how to continue.

    Args:
        name: of the run.
        checkpoint: its directory. It may be older than some options.
        now: the identity of this run.
        data: the current data, if it should be described.
    """
    record = read_state(checkpoint)
    then = record["identity"]
    now = {key: value for key, value in now.items() if key in then or not _is_off(key, value)}
    changed = [
        key
        for key in sorted(then.keys() | now.keys())
        if _effective(key, then.get(key)) != _effective(key, now.get(key))
    ]
    if data is not None and "data" in changed and then.get("data") == data.labels:
        changed.remove("data")
        log.info(
            "the checkpoint is from a version that did not record names and sizes of images: "
            "only the classes and the number of their images were compared"
        )
    if data is not None and "data" not in changed:
        _warn_of_other_evaluation(record, data)
    if not changed:
        return
    shown = [
        f"{key}={_shorten(now.get(key))} (was {_shorten(then.get(key))})"
        for key in changed
        if key != "data"
    ][:_MAX_OPTIONS_SHOWN]
    remedy = "choose another run.name, or continue with resume.allow_changes=true"
    if "data" in changed and data is not None:
        classes = classes_of(checkpoint, record)
        shown.insert(0, data_difference(classes, record, data, checkpoint.parent.parent))
        other, restore = _choice_difference(record.get("choice"), data.choice)
        shown[1:1] = other
        remedy = f"{restore}, {remedy}: rows of the head then follow their class names"
    elif "data" in changed:
        shown.insert(0, f"data={_shorten(now.get('data'))} (was {_shorten(then.get('data'))})")
    raise ConfigError(f"run.name={name} was started as another run: {', '.join(shown)}; {remedy}")


def _is_off(key: str, value: object) -> bool:
    return _effective(key, value) in _OFF


def _effective(key: str, value: object) -> object:
    return None if value == _as_unset().get(key) else value


@cache
def _as_unset() -> dict[str, object]:
    """Spec.as_unset of the options that have one."""
    return {key: spec.as_unset for key, spec in specs(Config) if spec.as_unset is not None}


def _warn_of_other_evaluation(record: dict[str, Any], data: DataFacts) -> None:
    if record.get("evaluation", data.evaluation) != data.evaluation:
        log.warning(
            "the validation images differ from the checkpoint's: "
            "do not compare val/top1 with earlier values"
        )


def groups_to_restore(
    saved: list[str], then: dict[str, object], now: dict[str, object]
) -> list[str]:
    """Return which of a checkpoint's groups of tensors this run restores. Logs what is left out.

    Args:
        saved: the groups in the checkpoint.
        then: the identity in the checkpoint.
        now: the identity of this run.
    """
    groups = list(saved)
    if _adapters(then) != _adapters(now):
        log.warning(
            "other adapters than the checkpoint's (finetune.method, rank, alpha): training "
            "continues from the merged weights, and the state of the optimizer starts afresh"
        )
        groups = [group for group in groups if group not in ("optimizer", *_ADAPTER_GROUPS)]
    elif then.get("optimizer") != now.get("optimizer"):
        log.warning("another optimizer than the checkpoint's: its state starts afresh")
        groups.remove("optimizer")
    has_averages = now.get("trainer.ema_decay") is not None
    if has_averages and "ema" not in groups:
        log.warning(
            "the checkpoint has no averaged weights (trainer.ema_decay): "
            "they are initialised with its weights"
        )
    left_out = set() if has_averages else {"ema", "ema_adapters"}
    return [group for group in groups if group not in left_out]


def _adapters(of: dict[str, object]) -> tuple[object, ...] | None:
    """The options that define the adapters of a run with the identity `of`; None without any."""
    method = of.get("finetune.method")
    if method not in ("lora", "adalora"):
        return None
    return method, of.get("finetune.rank"), of.get("finetune.alpha")


# --- differences of the data --------------------------------------------------------------------


def data_difference(
    then: dict[str, list[str]] | None, record: dict[str, Any], now: DataFacts, run_dir: Path
) -> str:
    """Describe how the training data differ from a checkpoint's.

    Args:
        then: the checkpoint's classes, if known.
        record: its state.json.
        now: the current data.
        run_dir: may contain quarantine.jsonl.
    """
    ids = now.classes["ids"]
    counts = dict(zip(ids, now.images_per_class))
    if then is None:
        return "other training images or classes"
    if set(then["ids"]) != set(ids):
        return _class_difference(then["ids"], ids)
    if then["ids"] != ids:
        order, old_order = listed(ids), listed(then["ids"])
        return f"the classes have another order: {order} (was {old_order})"
    before = dict(zip(then["ids"], record.get("images_per_class", [])))
    if not before:
        return "the number of training images differs"
    differ = [
        f"{c}: {before[c]} -> {counts[c]}" for c in ids if c in before and before[c] != counts[c]
    ]
    if differ:
        totals = f"{sum(before.values()):,} training images then, {sum(counts.values()):,} now"
        return f"{totals} ({listed(differ)}){_removed_bad_images(run_dir)}"
    return (
        "the training images differ: as many in each class, but other files or sizes "
        "(resized or raw shards are other files, too)"
    )


def _choice_difference(
    then: dict[str, object] | None, now: dict[str, object]
) -> tuple[list[str], str]:
    """Return which options chose other training images than before, and what to restore.

    then: None for a checkpoint that does not record it.
    """
    if then is None:
        return [], f"restore the data, or the value of {', '.join(now)}"
    changed = [key for key, value in now.items() if value != then.get(key)]
    if not changed:
        return [], "restore the data"
    restore = f"restore {', '.join(changed)}"
    if changed != ["data.limit_train"]:
        restore = f"images that were trained on may now be validated on; {restore}"
    shown = [f"{key}={_shorten(now[key])} (was {_shorten(then.get(key))})" for key in changed]
    return shown, restore


def _class_difference(then: list[str], now: list[str]) -> str:
    removed = [c for c in then if c not in set(now)]
    added = [c for c in now if c not in set(then)]
    changes = []
    if removed:
        changes.append(f"class {listed(removed)} is gone")
    if added:
        changes.append(f"class {listed(added)} is new")
    hint = " (a renamed folder?)" if len(removed) == len(added) else ""
    return f"the classes differ: {', '.join(changes)}{hint}"


def _removed_bad_images(run_dir: Path) -> str:
    """Return a hint if images that data.on_bad_image=skip left out were removed since, else ""."""
    path = run_dir / "quarantine.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(errors="replace").splitlines()]
        names = [row["name"] for row in rows if row["split"] == "train"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    removed = [name for name in names if not Path(name).exists()]
    if not removed:
        return ""
    return (
        f"; removed, of those that {path} lists as bad: {listed(removed)}; "
        "the order of an epoch counts bad images too, so a removed one changes the batches; "
        "put them back, data.on_bad_image=skip leaves them out"
    )


def _shorten(value: object) -> str:
    """Return a value for a message: the first characters identify a fingerprint."""
    return "unset" if value is None else str(value)[:24]


# --- numerics -----------------------------------------------------------------------------------


def numerics() -> dict[str, object]:
    """Return the properties of the machine and libraries that affect rounding.

    If they differ between a checkpoint and its resumption, results are equal to rounding, not bit
    for bit.
    """
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
