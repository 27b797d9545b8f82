"""One line of the doctor's report.

FAIL: the run would not start, would hang, or would end early. warn: it would be slower, or easier to lose.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Self


class Level(StrEnum):
    ok = "ok"
    warn = "warn"
    fail = "FAIL"


@dataclass(frozen=True)
class Finding:
    """What was found, what is needed, and, unless all is well, the remedy."""

    check: str
    found: str
    needed: str
    verdict: Level = Level.ok
    remedy: str = ""

    def unless(self, holds: bool) -> Self:
        """The same, with nothing to remedy where the rule holds."""
        return replace(self, verdict=Level.ok, remedy="") if holds else self


def by_value(values: Iterable[tuple[str, Hashable]]) -> dict[Hashable, list[str]]:
    """(who, what) -> what: all who have it, the most frequent first."""
    owners: dict[Hashable, list[str]] = defaultdict(list)
    for who, what in values:
        owners[what].append(who)
    return dict(sorted(owners.items(), key=lambda item: -len(item[1])))


def tell(owners: dict[Hashable, list[str]]) -> str:
    """by_value's answer as text: the value where there is one, else who has which."""
    if len(owners) == 1:
        return str(next(iter(owners)))
    return "; ".join(f"{what} on {shortened(who)}" for what, who in list(owners.items())[:4])


def shortened(names: list[str], most: int = 4) -> str:
    """A, B, C and 29 more."""
    names = list(dict.fromkeys(names))
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def size(num_bytes: float) -> str:
    """Bytes as people say them: powers of ten, as network and disk vendors count."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return (
                f"{num_bytes / scale:,.3g} {unit}"
                if num_bytes < 1e12
                else f"{num_bytes / scale:,.0f} {unit}"
            )
    return f"{num_bytes:.0f} B"


def seconds(s: float) -> str:
    """A duration as people say it."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if s >= scale:
            return f"{s / scale:.3g} {unit}"
    return f"{s / 1e-6:.3g} µs"
