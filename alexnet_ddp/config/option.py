"""How an option is declared and checked.

    lr: float = option(0.05, "Learning rate.", above=0)

Type, default, bounds, unit and description are given once. The constructor of an option class
checks the bounds, `--help` and docs/configuration.md print all of them. Imports no Hydra.

The option classes are dataclasses and not pydantic models: Hydra checks the types of every file
and override against dataclasses only, so pydantic would be a second schema after it. It would also
add 0.3 s to every start, and its messages would have to be replaced by ours all the same.
"""

import math
import os
import unicodedata
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, ClassVar

from alexnet_ddp.runtime.errors import ConfigError

MISSING: Any = "???"  # OmegaConf's mark of a value that the user has to give
# rng.py hashes 32 bits of the seed, so a larger seed would repeat the order of a smaller one.
MAX_SEED = 2**32 - 1
_MAX_PATH_BYTES = 4095  # Linux's limits
_MAX_NAME_BYTES = 255
_MAX_SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True)
class Spec:
    """What an option is, besides its type and its default: the metadata of a dataclass field."""

    description: str
    unit: str = ""
    # What null means, or a missing value that is derived. A number: the value, see value_of().
    null: str | float = ""
    kind: str = ""  # the type in words, for an option whose annotation is Any
    minimum: float | None = None  # inclusive
    maximum: float | None = None  # inclusive
    above: float | None = None  # exclusive lower bound
    below: float | None = None  # exclusive upper bound
    may_change: bool = False  # a run may continue with another value
    selects: bool = False  # it selects the run or its data: these are compared, not its value
    # This value has the effect of null, or of a version without the option. It may be a list.
    as_unset: Any = field(default=None, hash=False)

    def allows(self, value: float) -> bool:
        """True if `value` lies within the bounds. NaN does not."""
        bounds = (
            self.minimum is None or value >= self.minimum,
            self.maximum is None or value <= self.maximum,
            self.above is None or value > self.above,
            self.below is None or value < self.below,
        )
        return all(bounds)

    @property
    def rule(self) -> str:
        """The bounds in words, such as "at least 1" or "in [0, 1)"; "" if there are none."""
        low = self.minimum if self.above is None else self.above
        high = self.maximum if self.below is None else self.below
        if low is not None and high is not None:
            brackets = "[" if self.above is None else "(", "]" if self.below is None else ")"
            return f"in {brackets[0]}{low}, {high}{brackets[1]}"
        if low is not None:
            return f"at least {low}" if self.above is None else f"greater than {low}"
        if high is not None:
            return f"at most {high}" if self.below is None else f"less than {high}"
        return ""


def option(default: Any, description: str, **spec: Any) -> Any:
    """A dataclass field. spec: unit, null, kind, minimum, may_change, ...: the fields of Spec."""
    metadata = {"spec": Spec(description, **spec)}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def with_default(owner: "type[Options]", name: str, default: Any) -> Any:
    """The option `name` of `owner` for a subclass in which it has another default."""
    metadata = owner.__dataclass_fields__[name].metadata
    return field(default=default, metadata=metadata)


class Options:
    """Base of all option classes: the constructor checks the bounds of every field.

    section: the prefix of the options in messages, such as "trainer" in trainer.epochs.
    may_change: a run may continue with other values of all options of the class.
    """

    section: ClassVar[str] = ""
    may_change: ClassVar[bool] = False
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]  # every subclass is a dataclass

    def __init_subclass__(cls, section: str | None = None, may_change: bool | None = None) -> None:
        if section is not None:
            cls.section = section
        if may_change is not None:
            cls.may_change = may_change

    def __post_init__(self) -> None:
        """Raise ConfigError for a number that is not finite or not within the option's bounds."""
        for one in fields(self):
            spec, value = one.metadata.get("spec"), getattr(self, one.name)
            if spec is None or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            path = f"{self.section}.{one.name}" if self.section else one.name
            check_finite(path, value)
            if not spec.allows(value):
                raise ConfigError(f"{path} ({shown(value)}) must be {spec.rule}")

    def value_of(self, name: str) -> Any:
        """The option `name`, or the number that its Spec gives for null."""
        value = getattr(self, name)
        return spec_of(type(self), name).null if value is None else value

    def default_of(self, name: str) -> Any:
        """The schema's default of the field `name`."""
        return self.__dataclass_fields__[name].default


def spec_of(owner: type, name: str) -> Spec:
    """What the option `name` of an option class is, with may_change of the class."""
    assert issubclass(owner, Options)
    spec: Spec = owner.__dataclass_fields__[name].metadata.get("spec", Spec(""))
    return replace(spec, may_change=owner.may_change or spec.may_change)


def check_value(path: str, value: Any) -> None:
    """Raise ConfigError for a text that no file system takes, or an integer of over 64 bits."""
    if isinstance(value, str):
        _check_text(path, value)
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{path} ({shown(value)}) must be an integer of at most 64 bits")


def check_finite(path: str, value: Any) -> None:
    """Raise ConfigError for NaN and infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path} ({value}) must be a finite number")


def check_suffix(path: str, value: str | None, known: tuple[str, ...]) -> None:
    """Raise ConfigError unless the file `value`, if there is one, ends in one of `known`."""
    if value is not None and not value.endswith(known):
        ends = f"{', '.join(known[:-1])} or {known[-1]}"
        raise ConfigError(f"{path} ({value}) must end in {ends}, which choose the format")


def key_of(override: str) -> str:
    """The key of KEY=VALUE or +KEY=VALUE."""
    return override.partition("=")[0].lstrip("+")


def shown(value: Any) -> str:
    """A value for a message: one line, and not too long."""
    if isinstance(value, int) and abs(value) >= 10**_MAX_SHOWN:
        return f"an integer of {value.bit_length()} bits"
    text = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value)
    )
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}... ({len(text)} characters)"


def _check_text(path: str, text: str) -> None:
    if text == "":
        raise ConfigError(f"{path} ('') is empty; give a text")
    kinds = {unicodedata.category(character) for character in text}
    if "Cs" in kinds:
        rule = "contains bytes that are not UTF-8; rename the file or folder"
        raise ConfigError(f"{path} ({shown(text)}) {rule}")
    if kinds & {"Cc", "Zl", "Zp"}:
        rule = "contains a control character, such as a newline; leave it out"
        raise ConfigError(f"{path} ({shown(text)}) {rule}")
    if not path.startswith("engine.conf"):  # Spark's settings are no paths and may be long
        _check_path(path, text)


def _check_path(path: str, text: str) -> None:
    size = len(os.fsencode(text))
    if size > _MAX_PATH_BYTES:
        rule = f"is {size} bytes long; at most {_MAX_PATH_BYTES} are possible"
        raise ConfigError(f"{path} ({shown(text)}) {rule}")
    longest = 0 if "://" in text else max(len(os.fsencode(part)) for part in text.split("/"))
    if longest > _MAX_NAME_BYTES:
        rule = f"has a part of {longest} bytes; a file system takes at most {_MAX_NAME_BYTES}"
        raise ConfigError(f"{path} ({shown(text)}) {rule} between two /")
    if text.split("/")[0] == "~" and not os.path.lexists("~"):
        remedy = f"write $HOME{shown(text[1:])}"
        raise ConfigError(
            f"{path} ({shown(text)}) begins with ~, which only a shell expands; {remedy}"
        )
