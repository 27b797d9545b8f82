"""Writes a network as a file of each format, and loads such a file to run it."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from alexnet_ddp.api import read_export
from alexnet_ddp.checkpoint.format import weights_metadata
from alexnet_ddp.config import ConfigError
from alexnet_ddp.config.export import ExportFormat
from alexnet_ddp.data.effects import Normalisation
from alexnet_ddp.model import transforms_input
from alexnet_ddp.runtime.errors import WrongExport
from alexnet_ddp.runtime.files import write_bytes

OPSET = 18
INPUT = "images"
FILES = {
    ExportFormat.safetensors: "model.safetensors",
    ExportFormat.onnx: "model.onnx",
    ExportFormat.torch_export: "model.pt2",
    ExportFormat.huggingface: "model.safetensors",
}
# Format -> the libraries that it needs, and the extra of this package that installs them.
_LIBRARIES = {
    ExportFormat.onnx: (("onnx", "onnxscript", "onnxruntime"), "export"),
    ExportFormat.huggingface: (("timm",), "timm"),
}
# A file of protobuf holds at most 2 GiB. Larger weights are written into a second file.
_MAX_ONNX_BYTES = 1_900_000_000
_MAX_REASON = 200  # characters of an exporter's message

# The input of an exported model [n, ...] -> its output [n, num_classes], both on the CPU.
Runner = Callable[[Tensor], Tensor]


class WithPreprocessing(nn.Module):
    """A network that takes images, normalises them and returns probabilities."""

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, normalisation: Normalisation) -> None:
        super().__init__()
        self.network = network
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in normalisation)
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 RGB [n, 3, height, width] -> probabilities, float32 [n, num_classes]."""
        return self.network(images.float() * self.scale + self.shift).softmax(1)


def require_libraries(form: ExportFormat) -> None:
    """Raise ConfigError if a library that the format needs is not installed."""
    libraries, extra = _LIBRARIES.get(form, ((), ""))
    missing = [name for name in libraries if find_spec(name) is None]
    if missing:
        rule = f"needs {', '.join(missing)}"
        raise ConfigError(f"format={form} {rule}; pip install 'alexnet-ddp[{extra}]'")


def write_model(
    form: ExportFormat, model: nn.Module, example: Tensor, classes: dict[str, list[str]], to: Path
) -> None:
    """Write `model`, in evaluation mode on the CPU, as a file of `form` in the folder `to`.

    example: an input of two images, for the formats that hold a graph. classes: "ids" and "names".
    Raises ConfigError if torch cannot export the network.
    """
    path = to / FILES[form]
    if form in (ExportFormat.safetensors, ExportFormat.huggingface):
        tensors = {name: t.detach().clone().contiguous() for name, t in model.state_dict().items()}
        # safetensors' own save_file() makes a file that only its owner can read.
        write_bytes(path, save(tensors, weights_metadata(transforms_input(model), classes)))
        return
    write = _write_onnx if form is ExportFormat.onnx else _write_torch_export
    try:
        with _quiet(), torch.no_grad():
            write(model, example, path)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # the exporters have no common class of errors
        rule = f"torch cannot export this network ({_reason(error)})"
        raise ConfigError(f"format={form}: {rule}; use format=safetensors") from error


def open_model(form: ExportFormat, folder: Path, num_threads: int) -> Runner:
    """Load the exported file in `folder`, independently of the run. Raises WrongExport.

    The runner raises WrongExport too.
    """
    opener = {
        ExportFormat.safetensors: _open_safetensors,
        ExportFormat.onnx: _open_onnx,
        ExportFormat.torch_export: _open_torch_export,
        ExportFormat.huggingface: _open_huggingface,
    }[form]
    path = folder / FILES[form]
    with _as_wrong(path):
        runner = opener(path, num_threads)

    def run(images: Tensor) -> Tensor:
        with _as_wrong(path):
            return runner(images)

    return run


def _write_onnx(model: nn.Module, example: Tensor, path: Path) -> None:
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    torch.onnx.export(
        model,
        (example,),
        path,
        dynamo=True,
        opset_version=OPSET,
        input_names=[INPUT],
        output_names=["probabilities" if isinstance(model, WithPreprocessing) else "logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=size > _MAX_ONNX_BYTES,
        verbose=False,
    )


def _write_torch_export(model: nn.Module, example: Tensor, path: Path) -> None:
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)


def _open_safetensors(path: Path, num_threads: int) -> Runner:
    return read_export(path.parent).model


def _open_onnx(path: Path, num_threads: int) -> Runner:
    import onnxruntime  # an extra

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])


def _open_torch_export(path: Path, num_threads: int) -> Runner:
    with _quiet():
        return torch.export.load(path).module()


def _open_huggingface(path: Path, num_threads: int) -> Runner:
    import timm  # an extra

    return timm.create_model(f"local-dir:{path.parent}", pretrained=True).eval()


@contextmanager
def _as_wrong(path: Path) -> Iterator[None]:
    """Turn any error of the block into WrongExport: each runtime has its own error classes."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        rule = f"the exported {path.name} cannot be run ({_reason(error)})"
        raise WrongExport(f"{rule}; please report this, with the name of the network") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporters' warnings and notes about their own code."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _reason(error: Exception) -> str:
    """The first line of the innermost cause, such as torch's about the operator."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:_MAX_REASON]
