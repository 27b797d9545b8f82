"""The rules that options are checked by. A message contains the value, the rule and the remedy."""

import math
import os
import unicodedata
from typing import Any

from alexnet_ddp.runtime.errors import ConfigError

MISSING: Any = "???"  # OmegaConf's mark of a value that has to be given
MAX_SEED = (
    2**32 - 1
)  # rng.py hashes 32 bits: a larger seed would give the same order as a smaller one
_MAX_PATH, _MAX_PART = 4095, 255  # bytes that Linux takes
_SHOWN = 60  # characters of a value in a message


def require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def positive(section: str, cfg: Any, *names: str) -> None:
    """section: "" for options without one."""
    for name in names:
        value = getattr(cfg, name)
        rule = "must be greater than 0 and finite"
        require(value is None or 0 < value < math.inf, f"{_path(section, name)} ({value}) {rule}")


def within(section: str, cfg: Any, low: float, high: float, *names: str) -> None:
    """section: "" for options without one."""
    for name in names:
        value = getattr(cfg, name)
        rule = f"must lie in [{low}, {high}]"
        require(
            value is None or low <= value <= high, f"{_path(section, name)} ({shown(value)}) {rule}"
        )


def check_value(path: str, value: Any) -> None:
    """Raise ConfigError for a text that no file system takes, or an integer of more than 64 bits."""
    if isinstance(value, str):
        _check_text(path, value)
    elif isinstance(value, int):
        require(
            -(2**63) <= value < 2**63,
            f"{path} ({shown(value)}) must be an integer of at most 64 bits",
        )


def check_finite(path: str, value: Any) -> None:
    """Raise ConfigError for nan and infinity."""
    require(
        not isinstance(value, float) or math.isfinite(value),
        f"{path} ({value}) must be a finite number",
    )


def shown(value: Any) -> str:
    """A value for a message: one line, and not too long."""
    text = (
        str(value)
        if not isinstance(value, int) or abs(value) < 10**_SHOWN
        else f"an integer of {value.bit_length()} bits"
    )
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"


def _check_text(path: str, text: str) -> None:
    require(text != "", f"{path} ('') is empty; give a text")
    kinds = {unicodedata.category(character) for character in text}
    rule = "contains bytes that are not UTF-8; rename the file or folder"
    require("Cs" not in kinds, f"{path} ({shown(text)}) {rule}")
    rule = "contains a control character, such as a newline; leave it out"
    require(not kinds & {"Cc", "Zl", "Zp"}, f"{path} ({shown(text)}) {rule}")
    if path.startswith("engine.conf"):  # settings of Spark, such as lists of Java options: no paths
        return
    size = len(os.fsencode(text))
    require(
        size <= _MAX_PATH,
        f"{path} ({shown(text)}) is {size} bytes long; at most {_MAX_PATH} are possible",
    )
    longest = 0 if "://" in text else max(len(os.fsencode(part)) for part in text.split("/"))
    rule = f"has a part of {longest} bytes; a file system takes at most {_MAX_PART} between two /"
    require(longest <= _MAX_PART, f"{path} ({shown(text)}) {rule}")
    is_home = text.split("/")[0] == "~" and not os.path.lexists("~")
    require(
        not is_home,
        f"{path} ({shown(text)}) begins with ~, which only a shell expands; write $HOME{shown(text[1:])}",
    )


def _path(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name
