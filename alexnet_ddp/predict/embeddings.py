"""Embeddings: the input of the classifier, or the output of a named layer, one row per image."""

import json
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from alexnet_ddp.config import ConfigError
from alexnet_ddp.config.predict import embedding_files
from alexnet_ddp.model import find_head
from alexnet_ddp.predict.output import Prediction, Sink
from alexnet_ddp.runtime.tables import TEXT, ParquetFile, open_file


class LayerOutput:
    """Keeps what a layer computes in each forward pass of `model`.

    layer: a name in model.named_modules(), whose output is kept; None for the input of the head.
    Raises ConfigError if there is no such layer.
    """

    def __init__(self, model: nn.Module, layer: str | None) -> None:
        self._kept: Any = None
        self._name = layer or f"the input of {find_head(model)}"
        if layer is None:
            model.get_submodule(find_head(model)).register_forward_pre_hook(self._keep_input)
            return
        modules = dict(model.named_modules())
        if layer not in modules:
            near = get_close_matches(layer, modules, 3, 0.0)
            rule = f"is not a layer of {type(model).__name__}"
            raise ConfigError(f"layer ({layer}) {rule}; nearest: {', '.join(near)}")
        modules[layer].register_forward_hook(self._keep_output)

    def width(self, model: nn.Module, image_size: int) -> int:
        """Compute one image, and return the length of its row.

        Raises ConfigError if the layer does not return a tensor with one row per image.
        """
        with torch.inference_mode():
            device = next(model.parameters()).device
            model(torch.zeros(1, 3, image_size, image_size, device=device))
        if not isinstance(self._kept, Tensor) or self._kept.shape[:1] != (1,):
            rule = "does not return one row per image when the network is evaluated"
            raise ConfigError(f"layer ({self._name}) {rule}; choose another layer")
        return self.rows().shape[1]

    def rows(self) -> np.ndarray:
        """float32 [n, d]: the n images of the latest forward pass, the other dimensions as one."""
        return self._kept.flatten(1).cpu().numpy()

    def _keep_input(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._keep(inputs[0])

    def _keep_output(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._keep(output)

    def _keep(self, value: Any) -> None:
        # A copy: the next layer may change the tensor in place, as ReLU often does.
        is_tensor = isinstance(value, Tensor)
        self._kept = value.detach().to(torch.float32, copy=True) if is_tensor else value


class Npy:
    """A .npy file, float32 [images, d], and a .jsonl file with the path of each row."""

    def __init__(self, file: str, width: int) -> None:
        array, paths = embedding_files(file)
        self._width, self._num_rows = width, 0
        self._file = open_file("embeddings", str(array), "wb")
        self._paths = open_file("embeddings", str(paths), "w")
        self._write_header()

    def write(self, path: str, one: Prediction) -> None:
        if one.embedding is not None:
            self._file.write(one.embedding.astype("<f4").tobytes())
            self._paths.write(json.dumps({"image": path}) + "\n")
            self._num_rows += 1

    def close(self) -> None:
        self._file.seek(0)
        self._write_header()  # numpy reserves space for a larger number of rows
        self._file.close()
        self._paths.close()

    def _write_header(self) -> None:
        shape = (self._num_rows, self._width)
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)


class EmbeddingTable:
    """A Parquet file with the columns image and embedding."""

    def __init__(self, file: str, width: int) -> None:
        self._file = ParquetFile(file, {"image": TEXT, "embedding": width})

    def write(self, path: str, one: Prediction) -> None:
        if one.embedding is not None:
            self._file.write({"image": path, "embedding": one.embedding})

    def close(self) -> None:
        self._file.close()


def build_embedding_sink(file: str, width: int) -> Sink:
    """The sink for the option `embeddings`, by its suffix. width: the length of a row."""
    return Npy(file, width) if file.endswith(".npy") else EmbeddingTable(file, width)
