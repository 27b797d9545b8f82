"""What the page states about runs: results, data, options and environment."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alexnet_ddp.runtime.accuracy import Interval, metric_interval
from alexnet_ddp.runtime.run_record import RunRecord, differing, option_text

_MAX_BAD = 10  # unreadable images that are listed
_MAX_DIFFERENT = 40  # options in which runs differ


@dataclass(frozen=True)
class Result:
    """The best evaluation of a run by top-1. Shares and their 95 % intervals are in percent.

    Older runs have recorded no counts, and so they have no intervals.
    """

    top1: float
    top1_interval: Interval | None
    top5: float
    top5_interval: Interval | None
    loss: float
    step: int
    epoch: float
    num_images: int | None
    num_evaluations: int


@dataclass(frozen=True)
class Summary:
    """A run in one line."""

    name: str
    status: str
    message: str
    step: int
    epoch: float | None
    result: Result | None
    images_per_sec: float | None
    work_s: float | None
    num_starts: int
    world_size: int | None
    last_loss: float | None
    mfu: float | None  # share of the GPUs' peak, in percent: median of the rows
    joules_per_image: float | None


@dataclass(frozen=True)
class OptionRow:
    """An option of the run. default: None if it has the default value."""

    name: str
    value: str
    default: str | None
    is_given: bool  # on the command line

    @property
    def is_notable(self) -> bool:
        return self.default is not None or self.is_given


@dataclass(frozen=True)
class Data:
    """The images of a run, as far as they are known."""

    kind: str
    root: str
    num_train: int | None
    num_val: int | None
    num_classes: int | None
    per_class: tuple[int, int, int] | None  # training images: fewest, median, most
    smallest: list[tuple[str, int]]  # classes with the fewest training images
    bad: list[tuple[str, str, int]]  # split, kind, number of unreadable images
    examples: list[str]  # reasons


def summary(run: RunRecord) -> Summary:
    last = next(reversed(run.rows.values()), {})
    losses = list(run.values("train/loss").values())
    return Summary(
        run.name,
        run.status,
        run.message,
        run.step,
        float(last["epoch"]) if "epoch" in last else None,
        best_result(run),
        run.images_per_sec,
        None if run.hours is None else 3600 * run.hours,
        len(run.starts),
        run.facts.get("world_size"),
        losses[-1] if losses else None,
        run.median("train/mfu"),
        run.median("train/joules_per_image"),
    )


def _peak(run: RunRecord) -> str:
    """The peak that train/mfu refers to, with its source; "" if it is not known."""
    known = run.facts
    if "peak_tflops" not in known:
        return ""
    return f"{known['peak_tflops']:g} TFLOP/s, {known.get('peak_source')}"


def subtitle(run: RunRecord) -> str:
    """Network, data, batch and optimizer in one line, as far as they are known."""
    known = run.options
    parts = [
        ("{}", "model.name" if known.get("model.name") else "model"),
        ("data={}", "data"),
        ("{} pixels", "data.image_size"),
        ("{}", "optimizer"),
        ("lr {}", "optimizer.lr"),
        ("per {} images", "optimizer.base_batch_size"),
        ("global batch {}", "trainer.global_batch_size"),
        ("{} epochs", "trainer.epochs"),
        ("seed {}", "seed"),
    ]
    return " · ".join(form.format(known[key]) for form, key in parts if known.get(key) is not None)


def best_result(run: RunRecord) -> Result | None:
    """The evaluation with the highest top-1, the first of equal ones; None without evaluations.

    Values that its row does not have are NaN.
    """
    if not run.best_evaluation:
        return None
    row = dict.fromkeys(("val/top5", "val/loss", "epoch"), math.nan) | run.best_evaluation
    return Result(
        float(row["val/top1"]),
        metric_interval(row, "val/top1"),
        float(row["val/top5"]),
        metric_interval(row, "val/top5"),
        float(row["val/loss"]),
        int(row["step"]),
        float(row["epoch"]),
        row.get("val/num_images"),
        len(run.values("val/top1")),
    )


def option_rows(run: RunRecord, defaults: Mapping[str, Any]) -> list[OptionRow]:
    """Every option of the run. defaults: OPTION -> value; an option without one counts as equal."""
    rows = []
    for name, value in run.options.items():
        is_equal = name not in defaults or defaults[name] == value
        default = None if is_equal else option_text(defaults[name])
        rows.append(OptionRow(name, option_text(value), default, name in run.given))
    return rows


def differences(runs: list[RunRecord]) -> tuple[list[tuple[str, list[str]]], int]:
    """The options in which runs differ, with the value of each run, and how many are left out."""
    names = differing(runs) if len(runs) > 1 else []
    rows = [
        (name, [option_text(run.options[name]) if name in run.options else "" for run in runs])
        for name in names[:_MAX_DIFFERENT]
    ]
    return rows, len(names) - len(rows)


def describe_data(run: RunRecord, num_train: int | None, num_val: int | None) -> Data:
    """num_train, num_val: of the images, if they were opened."""
    names, counts = _classes(run)
    order = sorted(range(len(counts)), key=lambda k: (counts[k], k))
    per_class = None
    if counts:
        per_class = (counts[order[0]], counts[order[len(order) // 2]], counts[order[-1]])
    bad = _quarantine(run.directory / "quarantine.jsonl")
    kinds = Counter((str(row.get("split")), str(row.get("kind"))) for row in bad)
    seen = [int(row["val/num_images"]) for row in run.rows.values() if "val/num_images" in row]
    return Data(
        str(run.options.get("data", "")),
        str(run.options.get("data.root", "")),
        num_train if num_train is not None else sum(counts) or None,
        num_val if num_val is not None else max(seen, default=None),
        len(names) or None,
        per_class,
        [(names[k], counts[k]) for k in order[:5]]
        if per_class and per_class[0] < per_class[2]
        else [],
        [(split, kind, num) for (split, kind), num in kinds.most_common()],
        [str(row.get("reason", row.get("name", ""))) for row in bad[:_MAX_BAD]],
    )


def environment(run: RunRecord) -> list[tuple[str, str]]:
    """Where the last start ran, and with which versions."""
    facts, state = run.facts, _newest_state(run.directory)
    git, numerics = facts.get("git") or {}, _object(state.get("numerics"))
    versions = facts.get("versions", {})
    commit = str(git.get("commit", ""))[:12] + (
        " with uncommitted changes" if git.get("dirty") else ""
    )
    rows = {
        "host": facts.get("host"),
        "ranks": facts.get("world_size"),
        "nodes": facts.get("num_nodes"),
        "GPU": numerics.get("gpu"),
        "peak of a GPU": _peak(run),
        "CPU": " ".join(str(numerics[key]) for key in ("machine", "cpu") if key in numerics),
        "threads of a rank": numerics.get("threads"),
        "source": commit,
        **versions,
        "directory": run.directory.absolute(),
    }
    return [(name, str(value)) for name, value in rows.items() if value not in (None, "")]


def _classes(run: RunRecord) -> tuple[list[str], list[int]]:
    """Names of the classes, and their numbers of training images if a checkpoint has them."""
    state = _newest_state(run.directory)
    known = _object(state.get("classes")) or _read(run.directory / "classes.json")
    names, counts = _list(known.get("names")), _list(state.get("images_per_class"))
    are_counts = len(counts) == len(names) and all(isinstance(n, int) for n in counts)
    return [str(name) for name in names], counts if are_counts else []


def _newest_state(run_dir: Path) -> dict[str, Any]:
    """state.json of the newest checkpoint, which is not verified; empty without one."""
    files = sorted((run_dir / "checkpoints").glob("step-*/state.json"))
    return _read(files[-1]) if files else {}


def _read(file: Path) -> dict[str, Any]:
    try:
        return _object(json.loads(file.read_bytes()))
    except (OSError, ValueError, RecursionError):  # the run is only shown without it
        return {}


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _quarantine(file: Path) -> list[dict[str, Any]]:
    found = []
    for line in file.read_text(errors="replace").splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # of a run that was killed while it wrote
        if isinstance(row, dict):
            found.append(row)
    return found
