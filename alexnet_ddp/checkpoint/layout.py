"""Tensors as the bytes of their safetensors files, in one piece of memory that another process can see.

The format (github.com/huggingface/safetensors): the length of a header, 8 bytes; the header, JSON; the tensors' bytes.
Copying the tensors to where they lie in the files is all that a step has to wait for.
"""

import json
import mmap
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from alexnet_ddp.runtime.helper_process import shared_file

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 64  # bytes, of a file's beginning


class SplitTensor(Protocol):
    """A tensor whose parts lie on several ranks. It looks like the whole one."""

    shape: torch.Size
    dtype: torch.dtype
    nbytes: int

    def element_size(self) -> int: ...

    def is_floating_point(self) -> bool: ...

    def collect(self, there: Tensor | None) -> None:
        """Collective. Copy it to rank 0's memory; the other ranks pass None."""


Tensors = dict[str, Tensor | SplitTensor]  # by name


@dataclass(frozen=True)
class FileLayout:
    """Where a group of tensors lies in its file."""

    header: bytes
    offsets: dict[str, int]  # of the tensors' first bytes, from the beginning of the file
    size: int  # bytes

    @classmethod
    def of(cls, tensors: Tensors, metadata: dict[str, str]) -> "FileLayout":
        """metadata: what the header says beside the tensors."""
        entries, offsets, end = {"__metadata__": metadata} if metadata else {}, {}, 0
        for name, t in sorted(
            tensors.items(), key=lambda item: (-item[1].element_size(), item[0])
        ):  # stays aligned
            entries[name] = {
                "dtype": _DTYPES[t.dtype],
                "shape": list(t.shape),
                "data_offsets": [end, end + t.nbytes],
            }
            offsets[name], end = end, end + t.nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        return cls(
            header, {name: len(header) + at for name, at in offsets.items()}, len(header) + end
        )


class SharedMemory:
    """`size` bytes without a name, which go when the last process that has them goes."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.file = shared_file("checkpoint", size)
        self._map = mmap.mmap(self.file.fileno(), size)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._bytes.zero_()  # page faults now, not within a step

    def store(
        self, groups: dict[str, Tensors], metadata: dict[str, str]
    ) -> dict[str, tuple[int, int]]:
        """Copy the tensors of each file; file stem -> (first byte, end). They must fit: see needed()."""
        places, start, on_gpu = {}, 0, False
        for stem, tensors in groups.items():
            layout = FileLayout.of(tensors, metadata)
            self._map[start : start + len(layout.header)] = layout.header
            for name, tensor in tensors.items():
                at = start + layout.offsets[name]
                there = self._bytes[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                if isinstance(tensor, Tensor):
                    there.copy_(tensor.detach(), non_blocking=True)
                    on_gpu |= tensor.is_cuda
                else:
                    tensor.collect(there)
            places[stem] = (start, start + layout.size)
            start += _aligned(layout.size)
        if on_gpu:
            torch.cuda.synchronize()
        return places

    def close(self) -> None:
        self.file.close()  # the map goes with the last tensor that looks at it


def needed(groups: dict[str, Tensors], metadata: dict[str, str]) -> int:
    """Bytes of the files, laid one behind the other."""
    return sum(_aligned(FileLayout.of(tensors, metadata).size) for tensors in groups.values())


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
