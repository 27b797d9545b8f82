"""What makes a run the same run: what may not change between a checkpoint and its resumption."""

import hashlib
import json
import logging
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from alexnet_ddp.checkpoint import files
from alexnet_ddp.checkpoint.files import classes_of
from alexnet_ddp.config import Config, ConfigError
from alexnet_ddp.config.plugins import PluginOptimizerConfig, TorchOptimizerConfig

log = logging.getLogger(__name__)

_SHOWN = 5  # classes or files in a message
# Free to change: they move work or watch it, but leave every update what it is (hooks: almost).
_FREE_SECTIONS = {"run", "plugins", "device", "checkpoint", "resume", "logger", "parallel"}
_FREE = {
    *(
        "data.root",
        "data.num_threads",
        "data.on_bad_image",
        "data.max_bad_images",
        "data.limit_train",
        "data.limit_val",
        "model.weights",
        "model.head",
    ),
    *(
        "data.num_train",
        "data.num_val",
        "data.num_classes",
        "data.class_order",
    ),  # the fingerprint covers them
    *(
        "data.shuffle",
        "data.window_shards",
        "data.cache_dir",
        "data.cache_gb",
    ),  # `windows` covers them
    *(
        "trainer.epochs",
        "trainer.max_steps",
        "trainer.micro_batch_size",
        "trainer.eval_batch_size",
        "trainer.compile",
    ),
    *(
        "trainer.tf32",
        "trainer.log_every_steps",
        "trainer.eval_every_epochs",
        "trainer.hang_timeout_s",
    ),
    *("trainer.on_nan", "trainer.spike_factor", "trainer.check_every_steps"),
    *("trainer.metrics", "trainer.callbacks"),
}

_OFF = (
    None,
    0,
    "none",
)  # values of a knob that leaves everything as it was before there was the knob


def identity(cfg: Config, fingerprint: str, windows: str | None = None) -> dict[str, object]:
    """Flat, JSON: every option that decides an update, and the fingerprints of the training images and their windows.

    The same files in folders, archives or shards have the same fingerprint; resized or raw shards have another one.
    Windows follow the shards.
    """
    flat: dict[str, object] = {"data": fingerprint} | ({"data.windows": windows} if windows else {})
    for section, values in asdict(cfg).items():
        if section not in _FREE_SECTIONS:
            flat |= (
                {f"{section}.{k}": v for k, v in values.items()}
                if isinstance(values, dict)
                else {section: values}
            )
    for section in ("augment", "model", "optimizer", "scheduler"):
        flat[section] = type(getattr(cfg, section)).__name__.removesuffix("Config")
    if isinstance(cfg.optimizer, TorchOptimizerConfig | PluginOptimizerConfig):
        flat["optimizer"] = f"{flat['optimizer']} {cfg.optimizer.name}"  # another name: other state
    return {key: value for key, value in flat.items() if key not in _FREE}


def check_same_run(
    name: str, checkpoint: Path, now: dict[str, object], data: "DataFacts | None" = None
) -> None:
    """Raises ConfigError naming what differs, and how to continue. A checkpoint may be older than some options.

    checkpoint: its directory; data: the training data now.
    """
    record = files.read_state(checkpoint)
    then = record["identity"]
    now = {key: value for key, value in now.items() if key in then or value not in _OFF}
    changed = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
    if data is not None:
        if "data" in changed and then.get("data") == data.labels:
            changed.remove("data")
            old = "the checkpoint is from a version that did not record names and sizes of images"
            log.info("%s: only the classes and the number of their images were compared", old)
        if record.get("evaluation", data.evaluation) != data.evaluation and "data" not in changed:
            log.warning(
                "the validation images are not those of the checkpoint: compare no val/top1 with earlier ones"
            )
    if changed:
        shown = [
            f"{key}={_short(now.get(key))} (was {_short(then.get(key))})"
            for key in changed
            if key != "data"
        ][:6]
        remedy = "choose another run.name, or continue with resume.allow_changes=true"
        if "data" in changed and data is not None:
            shown.insert(
                0,
                data_difference(
                    classes_of(checkpoint, record), record, data, checkpoint.parent.parent
                ),
            )
            remedy = f"restore the data, {remedy}: rows of the head then follow their class names"
        elif "data" in changed:
            shown.insert(0, f"data={_short(now.get('data'))} (was {_short(then.get('data'))})")
        raise ConfigError(
            f"run.name={name} was started as another run: {', '.join(shown)}; {remedy}"
        )


@dataclass(frozen=True)
class DataFacts:
    """What a checkpoint records of the data, to say later what has changed about it. Goes into state.json."""

    classes: dict[
        str, list[str]
    ]  # "ids": folder names in the order of the labels; "names": what people call them
    images_per_class: list[int]  # of the training images
    labels: str  # SHA-256 of the classes and labels of the training images: first_fingerprint()
    evaluation: str  # fingerprint of the validation images


def first_fingerprint(classes: list[str], labels: np.ndarray) -> str:
    """The fingerprint of versions that looked at neither names nor sizes of images."""
    digest = hashlib.sha256(json.dumps([len(labels), classes]).encode())
    digest.update(labels.astype("<i4").tobytes())
    return digest.hexdigest()


def data_difference(
    then: dict[str, list[str]] | None, record: dict, now: DataFacts, run_dir: Path
) -> str:
    """What has changed about the training data since a checkpoint whose state.json is `record`; then: its classes."""
    ids, counts = now.classes["ids"], dict(zip(now.classes["ids"], now.images_per_class))
    if then is None:
        return "other training images or classes"
    gone, new = (
        [c for c in then["ids"] if c not in counts],
        [c for c in ids if c not in then["ids"]],
    )
    if gone or new:
        parts = [f"class {_names(gone)} is gone"] * bool(gone) + [
            f"class {_names(new)} is new"
        ] * bool(new)
        return f"the classes differ: {', '.join(parts)}" + (
            " (a renamed folder?)" if len(gone) == len(new) else ""
        )
    if then["ids"] != ids:
        return f"the classes have another order: {_names(ids)} (was {_names(then['ids'])})"
    before = dict(zip(then["ids"], record.get("images_per_class", [])))
    differ = [
        f"{c}: {before[c]} -> {counts[c]}" for c in ids if c in before and before[c] != counts[c]
    ]
    if differ:
        totals = f"{sum(before.values()):,} training images then, {sum(counts.values()):,} now"
        return f"{totals} ({_names(differ)}){_removed_bad_images(run_dir)}"
    if before:
        differ = "the training images differ: as many in each class, but other files or sizes"
        return f"{differ} (resized or raw shards are other files, too)"
    return "the number of training images differs"


def _removed_bad_images(run_dir: Path) -> str:
    """A hint if images that data.on_bad_image=skip has left out were removed since."""
    path = run_dir / "quarantine.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(errors="replace").splitlines()]
        names = [row["name"] for row in rows if row["split"] == "train"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    gone = [name for name in names if not Path(name).exists()]
    if not gone:
        return ""
    why = "the order of an epoch counts bad images too, so a removed one changes the batches"
    back = "put them back, data.on_bad_image=skip leaves them out"
    return f"; removed, of those that {path} lists as bad: {_names(gone)}; {why}; {back}"


def _names(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (
        f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    )


def _short(value: object) -> str:
    """A fingerprint is recognised by its beginning."""
    return "unset" if value is None else str(value)[:24]


def numerics() -> dict[str, object]:
    """Where these differ between a checkpoint and its resumption, equal means equal to rounding, not bit for bit."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
