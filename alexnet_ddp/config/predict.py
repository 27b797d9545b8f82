"""Options of `alexnet-ddp predict`."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from alexnet_ddp.config.data import InputConfig, OnBadImage
from alexnet_ddp.config.option import MISSING, Options, check_suffix, option
from alexnet_ddp.config.recipe import ModelConfig
from alexnet_ddp.config.run import Device, RunConfig
from alexnet_ddp.runtime.errors import ConfigError


@dataclass(kw_only=True)
class PredictDataConfig(InputConfig):
    """The input of the network of model.weights."""


@dataclass(kw_only=True)
class PredictConfig(Options):
    """A run, an exported folder or a file of weights, and the images to classify with it."""

    run: RunConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    data: PredictDataConfig = field(default_factory=PredictDataConfig)
    export: str | None = option(
        None,
        "A folder that export format=safetensors wrote, in place of a run.",
        null="run.name, or model.weights",
    )
    classes: str | None = option(
        None,
        "With model.weights, the class names in the order of the outputs: a text file with one "
        "name per line, or a .json list.",
        null="those that the file of weights contains, or ImageNet's for published weights",
    )
    device: Device = option(Device.auto, "The device to compute on. auto: cuda if there is a GPU.")
    images: str = option(
        MISSING,
        "The images: a file, a directory or a glob; - reads one path per line from standard input.",
    )
    output: str | None = option(
        None,
        "A .jsonl, .csv or .parquet file to write the predictions to.",
        null="they are printed, unless embeddings is given",
    )
    on_bad_image: OnBadImage = option(
        OnBadImage.skip,
        "If an image cannot be read: skip writes the reason in place of its classes; raise ends "
        "the command with exit code 65.",
    )
    top_k: int = option(5, "Number of classes to print for each image.", minimum=1)
    min_confidence: float | None = option(
        None,
        'Mark an image with "ask a person" if the probability of its first class is less. '
        "Calibrate the run first: evaluate calibrate=true.",
        null="no mark",
        above=0,
        maximum=1,
    )
    embeddings: str | None = option(
        None,
        "A .npy or .parquet file for the input of the classifier, one float32 row per image.",
        null="not written",
    )
    layer: str | None = option(
        None,
        "Write the output of this layer as embeddings, such as classifier.4.",
        null="the input of the classifier",
    )
    plugins: list[str] = option(
        [], "Modules to import first if the network needs plugins; command line only."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_suffix("output", self.output, (".jsonl", ".csv", ".parquet"))
        check_suffix("embeddings", self.embeddings, (".npy", ".parquet"))
        if self.layer is not None and self.embeddings is None:
            rule = "is the layer of the embeddings, which are not written"
            raise ConfigError(f"layer ({self.layer}) {rule}; give embeddings=FILE.npy too")
        files = [] if self.embeddings is None else embedding_files(self.embeddings)
        written = [os.path.realpath(file) for file in files]
        if self.output is not None and os.path.realpath(self.output) in written:
            rule = f"is also written by embeddings ({self.embeddings})"
            raise ConfigError(f"output ({self.output}) {rule}; choose another name")


def embedding_files(embeddings: str) -> list[Path]:
    """The files that the option `embeddings` writes: beside X.npy, X.jsonl with the paths."""
    file = Path(embeddings)
    return [file, file.with_suffix(".jsonl")] if file.suffix == ".npy" else [file]
