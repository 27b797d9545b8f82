"""Texts in YAML files: `name: 1.10` is the number 1.1 for YAML, and OmegaConf would make the text 1.1 of it."""

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from alexnet_ddp.config.overrides import misread
from alexnet_ddp.runtime.errors import ConfigError


def refuse_numbers_as_text(
    folders: list[Path], main: str, choices: Mapping[str, str | None], root: type
) -> None:
    """Raise ConfigError if a file that was composed has a number or a boolean for an option that is a text.

    folders: where Hydra finds NAME.yaml, the first one first. choices: of each group, as Hydra recorded them.
    """
    names = [
        main,
        *(f"{group}/{choice}" for group, choice in choices.items() if choice is not None),
    ]
    for name, package, values in _loaded(folders, names, set()):
        for path, value in misread(values, package, root):
            remedy = f"write '{value}' with quotes, or the text that you mean"
            raise ConfigError(
                f"{path} is a text, but {name}.yaml gives the number or boolean {value}; {remedy}"
            )


def _loaded(
    folders: list[Path], names: list[str], seen: set[str]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Each file with the package that it fills, and those that its own defaults list names."""
    for name in names:
        file = next(
            (path for folder in folders if (path := folder / f"{name}.yaml").is_file()), None
        )
        if file is None or name in seen or name.startswith("hydra/"):
            continue
        seen.add(name)
        group = name.rpartition("/")[0]
        stat = file.stat()
        package, values = _read(file, stat.st_mtime_ns, stat.st_size)
        also = [
            entry
            for entry in values.get("defaults") or []
            if isinstance(entry, str) and entry != "_self_"
        ]
        yield name, group.replace("/", ".") if package is None else package, values
        yield from _loaded(folders, [f"{group}/{entry}".lstrip("/") for entry in also], seen)


@lru_cache
def _read(file: Path, changed: int, size: int) -> tuple[str | None, dict[str, Any]]:
    """The package in a file's header (None: it has none), and its values. changed and size only key the cache."""
    header = re.search(r"^#\s*@package\s+(\S+)", file.read_text(), re.MULTILINE)
    values = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    package = header and header[1].replace("_global_", "").strip(".")
    return package, values if isinstance(values, dict) else {}
