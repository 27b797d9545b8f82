"""Reads weight files in the formats of other programs. Code in a file is never executed."""

import io
import json
import pickle
import pickletools
import re
import struct
import zipfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from alexnet_ddp.runtime.errors import ConfigError

# Classes of data that files contain in addition to weights (arguments, paths, numbers). Each is
# replaced by Ignored, so that not even their code runs. A file that names other classes is refused.
_DATA = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace|pathlib\.(_local\.)?\w+|datetime\.\w+"
    r"|uuid\.UUID|decimal\.Decimal|collections\.(defaultdict|deque)"
    r"|builtins\.(int|float|str|bool|dict|list|tuple|frozenset|slice|range)"
    r"|numpy\.(_?core\.multiarray\.(scalar|_reconstruct)|ndarray|dtype|dtypes\.\w+|\w+_|float\d+|u?int\d+)"
    r"|typing\.\w+|torch\.torch_version\.TorchVersion|torch\.optim\.[\w.]+"
    r"|(omegaconf|yacs|easydict|ml_collections|pytorch_lightning|lightning\w*|composer|timm)\.[\w.]+"
)
_LEGACY_PICKLES = 4  # in a file of torch.save before 1.6: magic number, protocol, system, content

# Other kinds of files: (pattern of the first bytes, name, remedy).
_KINDS = (
    (
        re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE),
        "an HTML page",
        "download the file itself",
    ),
    (
        re.compile(rb"version https://git-lfs"),
        "a Git LFS pointer",
        "fetch the file itself with `git lfs pull`",
    ),
    (re.compile(rb"\x89HDF"), "a Keras or HDF5 file", "convert it to a torch state_dict"),
    (re.compile(rb"GGUF"), "a GGUF file", "convert it to a torch state_dict"),
    (
        re.compile(rb"....TFL3", re.DOTALL),
        "a TensorFlow Lite file",
        "convert it to a torch state_dict",
    ),
    (
        re.compile(rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|\x28\xb5\x2f\xfd"),
        "a compressed file",
        "unpack it first",
    ),
    (re.compile(rb"\x93NUMPY"), "a NumPy array", "save model.state_dict() with torch.save"),
    (
        re.compile(rb"\s*[{\[]\s*[\"{\[\]}]"),
        "a JSON file",
        "give the file of weights that belongs to it",
    ),
)
_SUFFIXES = {
    ".onnx": ("an ONNX file", "save the network's state_dict() with torch.save"),
    ".pb": ("a TensorFlow graph", "convert it to a torch state_dict"),
    ".h5": ("a Keras file", "convert it to a torch state_dict"),
    ".keras": ("a Keras file", "convert it to a torch state_dict"),
    ".tflite": ("a TensorFlow Lite file", "convert it to a torch state_dict"),
    ".index": ("a part of a TensorFlow checkpoint", "convert it to a torch state_dict"),
}


class Ignored:
    """Replaces objects that are no tensors: accepts any arguments and state, and stores nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> "Ignored":
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, item: object) -> None:
        pass

    def extend(self, items: object) -> None:
        pass


@dataclass(frozen=True)
class WeightsFile:
    """The content of a weight file: tensors by name, possibly in nested dicts, and metadata."""

    path: Path
    content: dict[Any, Any]
    classes: list[str] | None = None  # class folder names in the order of the head's rows
    facts: dict[str, str] = field(default_factory=dict)  # other metadata of a safetensors file


def read_weights_file(path: Path) -> WeightsFile:
    """Read a safetensors or torch file.

    Raises ConfigError if it is missing, damaged or of another kind.
    """
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "is not a file"
        remedy = "give a .safetensors or a torch file of tensors by name, or runs/NAME"
        raise ConfigError(f"{_named(path)} {what}; {remedy}")
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError as error:
        raise ConfigError(
            f"{_named(path)} cannot be read: {error.strerror}; check its permissions"
        ) from error
    if not start:
        raise ConfigError(f"{_named(path)} cannot be read: it is empty; copy the file again")
    if _is_safetensors(start):
        return _read_safetensors(path)
    _refuse_other_kinds(path, start)
    content = _read_torch(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{_named(path)} holds no tensors by name; save model.state_dict()")
    return WeightsFile(path, content)


def _named(path: Path) -> str:
    return f"model.weights ({path})"


def _is_safetensors(start: bytes) -> bool:
    """Whether a file starts with 8 bytes for the length of the header, and a JSON header."""
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 40


def _read_safetensors(path: Path) -> WeightsFile:
    try:
        content = safetensors.torch.load_file(path)
        with safetensors.safe_open(path, "pt") as file:
            facts = file.metadata() or {}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    try:
        classes = json.loads(facts.pop("classes", "null"))
    except ValueError:
        classes = None
    known = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    return WeightsFile(path, content, classes if known else None, facts)


def _zip_names(path: Path) -> list[str]:
    """The names in a zip archive; empty for another kind of file.

    Raises ConfigError if the archive is damaged.
    """
    try:
        if not zipfile.is_zipfile(path):
            return []
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    # zipfile raises NotImplementedError for archives of later versions of the format.
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, struct.error) as error:
        raise _unreadable(path, error) from error


def _refuse_other_kinds(path: Path, start: bytes) -> None:
    names = _zip_names(path)
    if names and not any(name.endswith("data.pkl") for name in names):
        is_numpy = any(name.endswith(".npy") for name in names)
        known = "a NumPy archive" if is_numpy else "a zip file without torch's data"
        raise ConfigError(f"{_named(path)} is {known}; save model.state_dict() with torch.save")
    if any("/code/" in name or name.endswith("constants.pkl") for name in names):
        remedy = "save its state_dict() with torch.save in a program that may run it"
        raise ConfigError(
            f"{_named(path)} is a TorchScript program, which is not run here; {remedy}"
        )
    for pattern, kind, remedy in _KINDS:
        if pattern.match(start):
            raise ConfigError(f"{_named(path)} is {kind}, not a file of weights; {remedy}")
    kind, remedy = _SUFFIXES.get(path.suffix.lower(), ("", ""))
    if kind and not names and not start.startswith(b"\x80"):
        raise ConfigError(f"{_named(path)} is {kind}, not a file of weights for torch; {remedy}")


def _read_torch(path: Path) -> Any:
    try:
        names = _globals(path)
        data = sorted(name for name in names if _DATA.fullmatch(name))
        allowed = torch.serialization.safe_globals([(Ignored, name) for name in data])
        with allowed, open(path, "rb") as file:  # for a path, torch.load would check the suffix
            return torch.load(file, map_location="cpu", weights_only=True)
    # torch's unpickler also raises the last three types for text files.
    except (pickle.UnpicklingError, LookupError, AttributeError, TypeError) as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        rule = "it holds more than tensors, or is no torch file"
        if found is not None:
            rule = f"it holds more than tensors and plain data ({found[1]})"
            if re.match(r"torch\.nn\.|torchvision\.models\.", found[1]):
                rule += ", a whole module"
        rule += "; nothing in it was run"
        raise ConfigError(f"{_named(path)} is refused: {rule}; save model.state_dict()") from error
    except (RuntimeError, OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ConfigError:
    # The first sentence of the error; torch appends advice.
    reason = str(error).partition("\n")[0].split(". ")[0] or "it ends too early"
    return ConfigError(f"{_named(path)} cannot be read: {reason}; copy the file again")


def _globals(path: Path) -> set[str]:
    """The classes and functions named in the pickles of a torch file, as module.name.

    Nothing is unpickled.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            return _globals_of(io.BytesIO(archive.read(name)), 1)
    with open(path, "rb") as file:
        return _globals_of(file, _LEGACY_PICKLES)


def _globals_of(file: Any, num_pickles: int) -> set[str]:
    found: set[str] = set()
    with suppress(ValueError):  # no pickle, or fewer of them: torch.load reports it
        for _ in range(num_pickles):
            for op, argument, _position in pickletools.genops(file):
                if op.name == "GLOBAL" and isinstance(argument, str):
                    found.add(argument.replace(" ", "."))
    return found
