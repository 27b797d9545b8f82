"""Reads the search space of a sweep: which of its overrides have several values, and which ones.

Several values are written in Hydra's grammar: a,b,c; choice(a,b); range(1,9,2); interval(0,0.2);
tag(log, interval(1e-4,1)); int(interval(1,9)); shuffle(...) and sort(...) of the first three.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from itertools import count, islice
from typing import Any

from alexnet_ddp.config.option import shown
from alexnet_ddp.config.overrides import check_key, find_option, quoted
from alexnet_ddp.config.schema import ROOTS, group_names
from alexnet_ddp.config.sweep import MAX_TRIALS
from alexnet_ddp.runtime.errors import ConfigError
from alexnet_ddp.runtime.redaction import redact

_ROOT = ROOTS["sweep"]
# A value that begins so is meant for Hydra's grammar, and no text.
_FUNCTION = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag|int|float|str|bool)\(")
_PLAIN = re.compile(r"[\w./:@+-]+", re.ASCII)  # a text that needs no quotes
_EXAMPLE = "for example optimizer.lr=0.01,0.03,0.1"
_NOT_SWEPT = {
    "run.name": "names the run of a trial, which the sweep does; give sweep.name",
    "run.root": "is the folder of all trials; give one value",
    "device": "is divided between the trials; give one value",
    "plugins": "is imported by the sweep itself; give one value",
    "logger.wandb_id": "would be that of all trials, each of which gets its own; leave it out",
    "logger.report": "is written for the whole sweep; give one value",
}


@dataclass(frozen=True)
class Dimension:
    """A swept option, with its values as texts of an override, or its interval.

    text: the values as they were given. An interval has no `values`.
    """

    key: str
    text: str
    values: tuple[str, ...] = ()
    is_shuffled: bool = False
    low: float = 0.0
    high: float = 0.0
    is_int: bool = False
    is_log: bool = False

    @property
    def first(self) -> str:
        """One of the values."""
        return self.values[0] if self.values else self.text_of(self.low)

    @property
    def num_values(self) -> int | None:
        """The number of values; None for an interval of real numbers."""
        if self.values:
            return len(self.values)
        return round(self.high) - round(self.low) + 1 if self.is_int else None

    def text_of(self, number: float) -> str:
        """A number of the interval as a value of an override, with six digits."""
        if self.is_int:
            return str(min(max(round(number), round(self.low)), round(self.high)))
        rounded = float(f"{number:.6g}")
        return repr(min(max(rounded, self.low), self.high))


@dataclass(frozen=True)
class Space:
    """The overrides of a sweep: those of the sweep itself, those of all trials, and the swept."""

    dimensions: tuple[Dimension, ...]
    fixed: tuple[str, ...]
    options: tuple[str, ...]

    @property
    def num_points(self) -> int | None:
        """The number of combinations; None if there is an interval of real numbers."""
        sizes = [dimension.num_values for dimension in self.dimensions]
        known = [size for size in sizes if size is not None]
        return math.prod(known) if len(known) == len(sizes) else None

    def overrides(self, values: Mapping[str, str]) -> list[str]:
        """The overrides of the trial with these values: key -> text."""
        return [*self.fixed, *(f"{key}={value}" for key, value in values.items())]


def first_point(overrides: list[str]) -> list[str]:
    """The overrides of a sweep, with one value for each swept option."""
    space = read_space(overrides)
    values = {dimension.key: dimension.first for dimension in space.dimensions}
    return [*space.options, *space.overrides(values)]


def read_space(overrides: list[str]) -> Space:
    """Divide the overrides of a sweep. Raises ConfigError for what cannot be swept."""
    for override in overrides:
        check_key(override, _ROOT)  # before Hydra is imported
    dimensions, fixed, options = list[Dimension](), list[str](), list[str]()
    for override in overrides:
        key, _, text = override.partition("=")
        name = key.lstrip("+")
        found = None if key.startswith("~") else _dimension(name, text)
        if name.startswith("sweep."):
            if found is not None:
                raise ConfigError(f"{name}={shown(text)}: {name} takes one value")
            options.append(override)
        elif name == "run.name":
            raise ConfigError(f"{name}={shown(text)} {_NOT_SWEPT[name]}")
        elif found is None:
            fixed.append(override)
        elif name in _NOT_SWEPT:
            raise ConfigError(f"{name}={shown(text)} {_NOT_SWEPT[name]}")
        else:
            dimensions.append(found)
    _check_space(dimensions, fixed)
    return Space(tuple(dimensions), tuple(fixed), tuple(options))


def _check_space(dimensions: list[Dimension], fixed: list[str]) -> None:
    if not dimensions:
        raise ConfigError(f"no option has several values; give them, {_EXAMPLE}")
    given = [override.partition("=")[0].lstrip("+~") for override in fixed]
    given += [dimension.key for dimension in dimensions]
    for dimension in dimensions:
        if given.count(dimension.key) > 1:
            raise ConfigError(f"{dimension.key} is given twice; give it once, with all its values")
        one = f"{dimension.key}={dimension.first}"
        if redact(one) != one:
            rule = "would hold a secret, which is not recorded; give one value"
            raise ConfigError(f"{dimension.key} {rule}")


def _dimension(key: str, text: str) -> Dimension | None:
    """The swept option KEY=TEXT; None if it has one value."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, RangeSweep
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_override(f"{key}={text}")
    except (HydraException, ValueError) as error:
        if not _FUNCTION.match(text):
            return None  # a text that Hydra's grammar does not know, such as a path with a bracket
        why = str(error).splitlines()[-1].strip() or "it cannot be read"
        raise ConfigError(f"{key} ({shown(text)}) is not in Hydra's grammar: {why}") from error
    if not parsed.is_sweep_override():
        return None
    sweep: Any = parsed.value()
    if isinstance(sweep, IntervalSweep):
        return _interval(key, text, sweep)
    if not isinstance(sweep, ChoiceSweep | RangeSweep):
        rule = "is no list of values; name them, as in choice(a,b)"
        raise ConfigError(f"{key} ({shown(text)}) {rule}")
    if sweep.tags:
        rule = "has a tag, which only an interval reads: tag(log, interval(...)); leave it out"
        raise ConfigError(f"{key} ({shown(text)}) {rule}")
    found = _in_range(key, text, sweep) if isinstance(sweep, RangeSweep) else sweep.list
    values = [_value(key, value) for value in found]
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise ConfigError(f"{key} ({shown(text)}) has the value {shown(twice)} twice; give it once")
    return Dimension(key, text, tuple(values), is_shuffled=sweep.shuffle)


def _in_range(key: str, text: str, sweep: Any) -> list[Any]:
    """The numbers of a range(start, stop, step)."""
    if sweep.step == 0:
        raise ConfigError(f"{key} ({shown(text)}) has the step 0; give another one")
    found = list(islice(_numbers(sweep.start, sweep.stop, sweep.step), MAX_TRIALS + 1))
    if not found:
        rule = "contains no number: the stop is not included"
        raise ConfigError(f"{key} ({shown(text)}) {rule}; write range(start, stop, step)")
    if len(found) > MAX_TRIALS:
        rule = f"has more than {MAX_TRIALS:,} values"
        raise ConfigError(f"{key} ({shown(text)}) {rule}; use int(interval(...)), or a larger step")
    return found


def _numbers(start: float, stop: float, step: float) -> Iterator[float]:
    """start, start + step, ..., without stop. In decimals, so that 0.1 + 0.2 is 0.3."""
    is_whole = all(isinstance(one, int) for one in (start, stop, step))
    first, end, each = (Decimal(str(one)) for one in (start, stop, step))
    for k in count():
        number = first + k * each
        if number >= end if each > 0 else number <= end:
            return
        yield int(number) if is_whole else float(number)


def _interval(key: str, text: str, sweep: Any) -> Dimension:
    option = find_option(key, _ROOT)
    kinds = () if option is None else option.kinds
    where = f"{key} ({shown(text)})"
    if key in group_names(_ROOT) or not (option and (option.is_any or {int, float} & {*kinds})):
        raise ConfigError(f"{where}: an interval has numbers, and {key} is none; write {key}=a,b")
    unknown = sorted(sweep.tags - {"log"})
    if unknown:
        raise ConfigError(f"{where} has the tag {unknown[0]}; the only known tag is log")
    low, high = sweep.start, sweep.end
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(f"{where} must have finite bounds, of which the first one is lower")
    if "log" in sweep.tags and low <= 0:
        raise ConfigError(f"{where} is logarithmic, so its bounds must be greater than 0")
    is_int = isinstance(low, int) or (int in kinds and float not in kinds)
    if is_int and (low != round(low) or high != round(high)):
        raise ConfigError(f"{where} must have whole numbers as bounds, as {key} is an integer")
    return Dimension(
        key, text, low=float(low), high=float(high), is_int=is_int, is_log="log" in sweep.tags
    )


def _value(key: str, value: Any) -> str:
    """A value of Hydra's grammar as the text after `=` in an override of a training."""
    from hydra.core.override_parser.types import QuotedString, Transformer

    option = find_option(key, _ROOT)
    if option is not None and option.is_text and isinstance(value, int | float):
        rule = f"is a text, but one of its values is the number or boolean {value}"
        remedy = f"put it in quotes: \"{key}='{value}',...\""
        raise ConfigError(f"{key} {rule}; {remedy}")
    if not isinstance(value, str | QuotedString):
        text = Transformer.str(value)
        return text.lower() if isinstance(value, bool) else text
    text = value if isinstance(value, str) else value.text
    is_plain = _PLAIN.fullmatch(text) and text.lower() != "null"
    return text if is_plain else quoted(text)
