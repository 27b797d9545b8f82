"""The charts of one or several runs, from the rows of their metrics.jsonl."""

from dataclasses import dataclass
from typing import Any

from alexnet_ddp.report.charts import Chart, Series, line_chart
from alexnet_ddp.runtime.run_record import RunRecord

_TRAINING, _VALIDATION = "training", "validation"


@dataclass(frozen=True)
class Curve:
    """A chart of one to three metrics."""

    title: str
    unit: str
    metrics: dict[str, str]  # metric -> its label
    may_be_log: bool = False


_CURVES = (
    Curve(
        "Loss",
        "cross-entropy",
        {"train/loss": _TRAINING, "val/loss": _VALIDATION},
        may_be_log=True,
    ),
    Curve("Top-1", "%", {"train/top1": _TRAINING, "val/top1": _VALIDATION}),
    Curve("Learning rate", "", {"train/lr": ""}),
    Curve("Gradient norm", "before clipping", {"train/grad_norm": ""}, may_be_log=True),
    Curve("Throughput", "images/s, all ranks", {"train/images_per_sec": ""}),
    Curve(
        "Time of a step",
        "seconds, rank 0",
        {
            "time/step_s": "whole step",
            "time/data_s": "wait for data",
            "time/exchange_s": "exchange with other ranks",
        },
    ),
)


def charts(runs: list[RunRecord]) -> list[Chart]:
    """The charts of the metrics that a run has. The first run is the report's own."""
    found = (_chart(curve, runs) for curve in _CURVES)
    return [chart for chart in found if chart is not None]


def _chart(curve: Curve, runs: list[RunRecord]) -> Chart | None:
    """With one run, the colour tells the metrics apart; with several runs it tells the runs.

    Then two metrics of a run are only drawn if one is of the training, which is pale.
    """
    series, alone = [], len(runs) == 1
    has_validation = any(metric.startswith("val/") for metric in curve.metrics)
    for k, run in enumerate(runs):
        for j, (metric, label) in enumerate(curve.metrics.items()):
            if not (alone or has_validation or j == 0):
                continue
            name = label or run.name if alone else f"{run.name} {label}".rstrip()
            points = [(float(step), value) for step, value in run.values(metric).items()]
            series.append(
                Series(
                    name,
                    j if alone else k,
                    points,
                    is_faint=not alone and has_validation and j == 0,
                    has_dots=metric.startswith("val/") and len(points) <= 60,
                )
            )
    note = _note(curve.title, runs[0].options)
    return line_chart(curve.title, curve.unit, series, may_be_log=curve.may_be_log, note=note)


def _note(title: str, options: dict[str, Any]) -> str:
    """Why the training's curve is not comparable with the validation's."""
    mixes = any(options.get(f"augment.{key}") for key in ("mixup_alpha", "cutmix_alpha"))
    smoothing = options.get("trainer.label_smoothing")
    if title == "Loss" and (smoothing or mixes):
        what = "label smoothing" if smoothing else "mixed images"
        return f"The training loss includes {what}; the validation loss does not."
    if title == "Top-1" and options.get("augment") not in (None, "none"):
        return "Training images are augmented, and counted while the network changes."
    return ""
