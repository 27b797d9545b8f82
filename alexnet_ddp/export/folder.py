"""The files beside an exported model: JSON for programs, and README.md for people."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from alexnet_ddp import __version__
from alexnet_ddp.config import Config, DataConfig, ModelConfig
from alexnet_ddp.config.data import Interpolation
from alexnet_ddp.config.export import ExportFormat
from alexnet_ddp.config.schema import choice_of
from alexnet_ddp.export import examples
from alexnet_ddp.export.check import RELATIVE_TOLERANCE, Comparison
from alexnet_ddp.export.formats import FILES, INPUT, OPSET
from alexnet_ddp.runtime.accuracy import interval_text, percent_interval
from alexnet_ddp.runtime.files import plain, write_bytes, write_json
from alexnet_ddp.training.trained import Trained


def preprocessing_of(data: DataConfig, in_graph: bool) -> dict[str, Any]:
    """The content of preprocessing.json: from an image file to the input of the exported model.

    in_graph: the model normalises the images itself and returns probabilities.
    """
    mean, std = data.normalisation
    how = data.eval_interpolation or Interpolation.bilinear
    return {
        "resize": data.resized_side,
        "resize_rule": "shorter side to `resize`; longer side: int(resize * long / short)",
        "interpolation": how.value,
        "antialias": True,
        "crop": "centre",
        "size": data.image_size,
        "colour_order": "RGB",
        "layout": "NCHW",
        "divide_by": 255,
        "mean": list(mean),
        "std": list(std),
        "normalised_by": "model" if in_graph else "caller",
        "input": {"name": INPUT, "dtype": "uint8" if in_graph else "float32"},
        "output": {"name": "probabilities" if in_graph else "logits", "dtype": "float32"},
    }


def model_options(model: ModelConfig) -> list[str]:
    """The content of model.json: options, as on the command line, that build the network."""
    found = [f"model={choice_of('model', type(model))}"]
    for one in fields(model):
        value = getattr(model, one.name)
        if one.name not in ("weights", "head") and value not in (None, {}):
            found.append(f"model.{one.name}={_as_option(value)}")
    return found


def _as_option(value: Any) -> str:
    if isinstance(value, dict):
        items = (f"{key}: {json.dumps(plain(item))}" for key, item in value.items())
        return f"{{{', '.join(items)}}}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def write_inputs(folder: Path, trained: Trained, how: dict[str, Any]) -> None:
    """Write what is needed to use the model: classes.json, preprocessing.json and model.json."""
    write_json(folder / "classes.json", trained.names)
    write_json(folder / "preprocessing.json", how)
    write_json(folder / "model.json", {"options": model_options(trained.config)})


def metrics_of(form: ExportFormat, run: str, trained: Trained, result: Comparison) -> dict:
    """The content of metrics.json: the evaluation of the exported file, and of the run's model."""
    n, exported, ours = result.num_images, result.exported.tolist(), result.run.tolist()
    return {
        "format": form.value,
        "num_images": n,
        "num_bad_images": result.num_bad_images,
        "correct1": exported[0],
        "correct5": exported[1],
        "top1": 100 * exported[0] / n,
        "top5": 100 * exported[1] / n,
        "top1_interval_95": percent_interval(exported[0], n),
        "top5_interval_95": percent_interval(exported[1], n),
        "loss": result.loss_sum / n,
        "run": {"name": run, **trained.origin, "correct1": ours[0], "correct5": ours[1]},
        "num_ties": result.num_ties,
        "largest_difference": result.worst * RELATIVE_TOLERANCE,
    }


def write_report(
    folder: Path,
    form: ExportFormat,
    cfg: Config,
    metrics: dict[str, Any],
    num_train: int,
    is_for_hub: bool,
) -> None:
    """Write metrics.json and README.md. The other files exist.

    num_train: training images. is_for_hub: begin with the metadata that the Hugging Face Hub reads.
    """
    write_json(folder / "metrics.json", metrics)
    how = json.loads((folder / "preprocessing.json").read_bytes())
    names = json.loads((folder / "classes.json").read_bytes())
    files = [path.name for path in sorted(folder.iterdir())]
    lines = [
        *(_hub_metadata(form) if is_for_hub else []),
        f"# {cfg.run.name}",
        "",
        f"An image classifier of {len(names):,} classes: "
        f"`{' '.join(model_options(cfg.model))}`, exported as {form.value} "
        f"by alexnet_ddp {__version__}.",
        "",
        "## Results",
        "",
        f"The file `{FILES[form]}` was evaluated on {metrics['num_images']:,} validation images:",
        "",
        "| metric | value | 95 % interval | n |",
        "|---|---|---|---|",
        *(
            f"| top-{k} accuracy | {metrics[f'top{k}']:.2f} % | "
            f"{interval_text(metrics[f'top{k}_interval_95'], 2)} % | "
            f"{metrics[f'correct{k}']:,} of {metrics['num_images']:,} |"
            for k in (1, 5)
        ),
        f"| loss (cross-entropy) | {metrics['loss']:.4f} | | {metrics['num_images']:,} |",
        "",
        "Its outputs equal those of the training framework up to rounding.",
        *_calibration(metrics["temperature"], how),
        "",
        "## Training",
        "",
        *_training(cfg, metrics, num_train),
        "",
        "## Use",
        "",
        f"Run this in the folder of this file. {_interface(how, form)}",
        "",
        "```python",
        examples.code(form, how).rstrip(),
        "```",
        "",
        "## Files",
        "",
        *(f"- `{name}`{_ABOUT.get(name, ': the model')}" for name in files if name != "README.md"),
    ]
    write_bytes(folder / "README.md", ("\n".join(lines) + "\n").encode())


_ABOUT = {
    "classes.json": ": the class names in the order of the outputs",
    "preprocessing.json": ": from an image to the model's input",
    "metrics.json": ": the evaluation of this model file, and of the run that it comes from",
    "config.json": ": the network and its input for timm",
    "model.json": ": the options that build this network in alexnet_ddp",
}


def _hub_metadata(form: ExportFormat) -> list[str]:
    library = {ExportFormat.huggingface: "timm", ExportFormat.onnx: "onnx"}.get(form)
    lines = ["pipeline_tag: image-classification", "tags: [alexnet_ddp]"]
    return ["---", *([f"library_name: {library}"] if library else []), *lines, "---", ""]


def _calibration(temperature: float | None, how: dict[str, Any]) -> list[str]:
    """temperature: of `evaluate calibrate=true`, or None if the run is not calibrated."""
    if temperature is None:
        return []
    if how["normalised_by"] == "model":
        change = f"raise them to the power {1 / temperature:.6g} and divide them by their sum"
        return ["", f"The probabilities are not calibrated. To calibrate them, {change}."]
    return ["", f"For calibrated probabilities, divide the logits by {temperature:.6g} first."]


def _training(cfg: Config, metrics: dict[str, Any], num_train: int) -> list[str]:
    """No path: the card is for publication, and paths may name people or customers."""
    run, start = metrics["run"], cfg.model.weights
    optimizer = choice_of("optimizer", type(cfg.optimizer))
    origin = "random weights" if start is None else f"the weights `{Path(start).name}`"
    averaged = ", averaged over the steps" if "weights" in run else ""
    return [
        f"- data: {num_train:,} training images (`data={choice_of('data', type(cfg.data))}`)",
        f"- start: {origin}",
        f"- steps: {run['step']:,} of {cfg.trainer.global_batch_size:,} images each{averaged}",
        f"- optimizer: {optimizer}, learning rate {cfg.optimizer.lr:g} "
        f"before scaling and schedule; seed {cfg.seed}",
    ]


def _interface(how: dict[str, Any], form: ExportFormat) -> str:
    size, kind = how["size"], how["input"]["dtype"]
    shape = f"`{INPUT}`, {kind} [n, 3, {size}, {size}] in RGB, with any n"
    result = f"`{how['output']['name']}`, float32 [n, classes]"
    text = f"Input: {shape}. Output: {result}."
    return f"{text} ONNX opset {OPSET}." if form is ExportFormat.onnx else text
