"""The rules that knobs are checked by. A message says value, rule and remedy."""

import math
from typing import Any

from alexnet_ddp.errors import ConfigError

MISSING: Any = "???"  # OmegaConf's mark of a value that has to be given


def require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def positive(section: str, cfg: Any, *names: str) -> None:
    for name in names:
        value = getattr(cfg, name)
        require(value is None or 0 < value < math.inf, f"{section}.{name} ({value}) must be greater than 0 and finite")


def within(section: str, cfg: Any, low: float, high: float, *names: str) -> None:
    for name in names:
        value = getattr(cfg, name)
        require(value is None or low <= value <= high, f"{section}.{name} ({value}) must lie in [{low}, {high}]")
