"""A row of the doctor's report, and the formatting of its texts."""

from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Self

from alexnet_ddp.runtime.printing import listed


class Level(StrEnum):
    """fail: the run would not start, hang, or end early. warn: it would be slower or less safe."""

    ok = "ok"
    warn = "warn"
    fail = "FAIL"


@dataclass(frozen=True)
class Finding:
    """The result of a check: what was found, what is needed, and a remedy unless it is ok."""

    check: str
    found: str
    needed: str
    level: Level = Level.ok
    remedy: str = ""

    def ok_if(self, condition: bool) -> Self:
        """Return this finding, with level ok and without remedy if `condition` holds."""
        return replace(self, level=Level.ok, remedy="") if condition else self

    def to_json(self) -> dict[str, str]:
        """Return the row of doctor.json, in which the level is named "verdict"."""
        row = asdict(self)
        return {("verdict" if key == "level" else key): value for key, value in row.items()}


def group_by_value(values: Iterable[tuple[str, Hashable]]) -> dict[Hashable, list[str]]:
    """Group pairs (owner, value) into {value: its owners}, the most frequent value first."""
    owners: dict[Hashable, list[str]] = defaultdict(list)
    for owner, value in values:
        owners[value].append(owner)
    return dict(sorted(owners.items(), key=lambda item: -len(item[1])))


def describe(owners: dict[Hashable, list[str]]) -> str:
    """Format the result of group_by_value: the only value, or the values with their owners."""
    if len(owners) == 1:
        return str(next(iter(owners)))
    return "; ".join(f"{value} on {shorten(names)}" for value, names in list(owners.items())[:4])


def shorten(names: list[str], most: int = 4) -> str:
    """Format distinct names as `A, B, C, D and 29 more`."""
    return listed(list(dict.fromkeys(names)), most)


def format_bytes(num_bytes: float) -> str:
    """Format bytes with 3 digits and a decimal unit: 4 kB, 244 MB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return (
                f"{num_bytes / scale:,.3g} {unit}"
                if num_bytes < 1e12
                else f"{num_bytes / scale:,.0f} {unit}"
            )
    return f"{num_bytes:.0f} B"


def format_seconds(s: float) -> str:
    """Format a duration with 3 digits: 2.5 s, 12.3 ms, 4.2 µs."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if s >= scale:
            return f"{s / scale:.3g} {unit}"
    return f"{s / 1e-6:.3g} µs"
