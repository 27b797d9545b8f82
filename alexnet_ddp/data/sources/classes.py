"""Class names: the order that turns them into labels, and the comparison of two lists of them.

The default order is that of torchvision's ImageFolder: sorted by code point.
"""

import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass

from alexnet_ddp.data.sources import scan
from alexnet_ddp.runtime.errors import ConfigError, DataError

NAME, NUMERIC = (
    "name",
    "numeric",
)  # choices of class_order; any other value is the path of a text file

_WHOLE_NUMBER = re.compile(r"-?[0-9]+")


@dataclass(frozen=True)
class ClassOrder:
    """The order of the classes: a class's label is its position in it."""

    choice: str = NAME  # as the user wrote it
    names: tuple[str, ...] | None = None  # the classes in order, if they are stated
    is_binding: bool = (
        True  # False: other classes than `names` are ordered by name, and the caller compares them
    )

    def arrange(self, found: list[str], where: str) -> list[str]:
        """The class names `found`, in order. Raises DataError, naming `where` they are from, if they do not fit."""
        if self.names is not None and (self.is_binding or set(self.names) == set(found)):
            return self._as_stated(found, where)
        if self.choice == NAME:
            return sorted(found)
        others = sorted(name for name in found if not _WHOLE_NUMBER.fullmatch(name))
        if others:
            rule = "needs class names that are whole numbers"
            remedy = (
                "use class_order=name, or the path of a text file that lists the classes in order"
            )
            raise DataError(
                f"class_order={NUMERIC} {rule}, {where} has {scan.listed(others)}; {remedy}"
            )
        twice = [value for value, count in Counter(map(int, found)).items() if count > 1]
        if twice:
            same = sorted(name for name in found if int(name) == twice[0])
            raise DataError(
                f"{where} has {scan.listed(same)}, which are one number; rename or join these classes"
            )
        return sorted(found, key=int)

    def key(self) -> str:
        """Differs if the order may differ."""
        return self.choice if self.names is None else "\n".join((str(self.is_binding), *self.names))

    def _as_stated(self, found: list[str], where: str) -> list[str]:
        remedy = f"list exactly the classes of {where}, one a line"
        difference = class_difference(self.choice, list(self.names), where, found, remedy)
        if difference:
            raise DataError(f"class_order={self.choice} does not fit: {difference}")
        return list(self.names)


BY_NAME = ClassOrder()


def read_order(choice: str) -> ClassOrder:
    """The order that an option `class_order` names. Raises ConfigError, or DataError if its file is wrong."""
    if choice in (NAME, NUMERIC):
        return ClassOrder(choice)
    try:
        with open(
            os.path.expanduser(choice), encoding="utf-8-sig", errors="surrogateescape"
        ) as file:
            names = tuple(line for line in file.read().split("\n") if line)
    except OSError as error:
        rule = f"must be {NAME}, {NUMERIC} or the path of a text file with one class name a line"
        raise ConfigError(
            f"class_order ({choice}) {rule}, but that file cannot be read ({error.strerror})"
        ) from error
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(
            f"class_order={choice} lists {scan.listed(twice)} more than once; list each class once"
        )
    return ClassOrder(choice, names)


def numeric_order_note(classes: list[str]) -> str | None:
    """What to tell the user if `classes` are numbers that are sorted as text, which gives other labels."""
    if classes != sorted(classes) or not all(map(_WHOLE_NUMBER.fullmatch, classes)):
        return None
    by_value = sorted(classes, key=int)
    k = next((k for k, (one, other) in enumerate(zip(classes, by_value)) if one != other), None)
    if k is None:
        return None
    return (
        f"class names are whole numbers and are sorted as text: label {k} is class {classes[k]}, by value it would be "
        f"{by_value[k]}"
    )


def same_looking(classes: list[str]) -> list[str]:
    """Names that another name of `classes` equals after Unicode normalisation, one of each kind."""
    return [name for name, count in Counter(map(_nfc, classes)).items() if count > 1]


def class_difference(
    one: str, its: list[str], other: str, others: list[str], remedy: str = ""
) -> str:
    """'only ONE has a, b; only OTHER has c; REMEDY', or nothing if both have the same classes.

    Names that differ only in Unicode normalisation look the same, so they are reported as such, with their own remedy.
    """
    mine, theirs = set(its) - set(others), set(others) - set(its)
    twins = {_nfc(name) for name in mine} & {_nfc(name) for name in theirs}
    pairs = [(_twin(mine, name), _twin(theirs, name)) for name in sorted(twins)]
    sides = ((one, mine), (other, theirs))
    alone = [
        (side, sorted(name for name in names if _nfc(name) not in twins)) for side, names in sides
    ]
    parts = [f"only {side} has {scan.listed(names)}" for side, names in alone if names]
    parts += [remedy] * bool(parts and remedy)
    if pairs:
        a, b = pairs[0]
        forms = f"{_form(a)} in {one}, {_form(b)} in {other}"
        names = scan.listed([name for name, _ in pairs])
        rename = "rename the folders of one of them, for example with convmv -r --nfc -f utf8 -t utf8 --notest DIR"
        parts.append(
            f"{names} of {one} and of {other} differ only in Unicode normalisation ({forms}); {rename}"
        )
    return "; ".join(parts)


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _twin(names: set[str], normalised: str) -> str:
    return min(name for name in names if _nfc(name) == normalised)


def _form(name: str) -> str:
    return next(
        (form for form in ("NFC", "NFD") if unicodedata.is_normalized(form, name)),
        "neither NFC nor NFD",
    )
