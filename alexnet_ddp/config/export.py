"""Options of `alexnet-ddp export`."""

import re
from dataclasses import dataclass
from enum import StrEnum

from alexnet_ddp.config.evaluate import AveragingConfig
from alexnet_ddp.config.option import MISSING, option
from alexnet_ddp.runtime.errors import ConfigError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


class ExportFormat(StrEnum):
    safetensors = "safetensors"
    onnx = "onnx"
    torch_export = "torch_export"
    huggingface = "huggingface"


@dataclass(kw_only=True)
class ExportConfig(AveragingConfig):
    """A run, and the file that its model becomes."""

    format: ExportFormat = option(
        MISSING,
        "safetensors: weights under the names of torchvision; onnx: for onnxruntime; "
        "torch_export: for torch.export.load; huggingface: a folder for timm.create_model.",
    )
    output: str = option(
        MISSING, "The folder to create. It must not exist; the folder above it must exist."
    )
    preprocessing: bool = option(
        False,
        "With format=onnx or torch_export: the model takes uint8 images [n, 3, height, width], "
        "normalises them and returns probabilities. Otherwise it takes normalised float32 images "
        "and returns logits.",
    )
    push: str | None = option(
        None,
        "ORG/NAME of a repository of the Hugging Face Hub, to which the folder is uploaded after "
        "its evaluation. A new repository is private. Needs pip install 'alexnet-ddp[hub]'.",
        null="nothing is uploaded",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preprocessing and self.format not in (ExportFormat.onnx, ExportFormat.torch_export):
            rule = f"needs a graph, and format={self.format} holds only weights"
            raise ConfigError(f"preprocessing=true {rule}; use format=onnx, or leave it out")
        if self.model.weights is not None:
            rule = "is refused: export takes the weights of run.name"
            raise ConfigError(f"model.weights ({self.model.weights}) {rule}; leave it out")
        if self.push is not None and not _REPOSITORY.fullmatch(self.push):
            rule = "must be ORG/NAME, in letters, digits, '-', '_' and '.'"
            raise ConfigError(f"push ({self.push}) {rule}; for example push=my-name/photos")
