"""Class names: how they are ordered, which defines the labels, and how two lists are compared.

The default order is that of torchvision's ImageFolder: sorted by code point.
"""

import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass

from alexnet_ddp.runtime.errors import ConfigError, DataError
from alexnet_ddp.runtime.printing import listed

# The named choices of class_order. Any other value is the path of a text file.
NAME = "name"
NUMERIC = "numeric"

_WHOLE_NUMBER = re.compile(r"-?[0-9]+")


@dataclass(frozen=True)
class ClassOrder:
    """The order of the classes: a class's label is its position in it."""

    choice: str = NAME  # the value of the option, as given
    names: tuple[str, ...] | None = None  # the classes in order, if they are listed
    # False: if the data has other classes than `names`, order by name; the caller compares them.
    is_binding: bool = True

    def arrange(self, found: list[str], origin: str) -> list[str]:
        """Return the class names `found` in this order.

        origin: the file or folder that contains them, for messages.
        Raises DataError if this order does not fit the names.
        """
        names = self.names
        if names is not None and (self.is_binding or set(names) == set(found)):
            return self._as_stated(list(names), found, origin)
        if self.choice == NAME:
            return sorted(found)
        others = sorted(name for name in found if not is_whole_number(name))
        if others:
            raise DataError(
                f"class_order={NUMERIC} needs class names that are whole numbers, {origin} has "
                f"{listed(others)}; use class_order=name, or the path of a text file that "
                "lists the classes in order"
            )
        twice = [value for value, count in Counter(map(int, found)).items() if count > 1]
        if twice:
            same = sorted(name for name in found if int(name) == twice[0])
            raise DataError(
                f"{origin} has {listed(same)}, which are the same number; "
                "rename or merge these classes"
            )
        return sorted(found, key=int)

    def key(self) -> str:
        """A cache key: two orders with the same key arrange all names in the same way."""
        return self.choice if self.names is None else "\n".join((str(self.is_binding), *self.names))

    def _as_stated(self, names: list[str], found: list[str], origin: str) -> list[str]:
        remedy = f"list exactly the classes of {origin}, one per line"
        difference = class_difference(self.choice, names, origin, found, remedy)
        if difference:
            raise DataError(f"class_order={self.choice} does not fit: {difference}")
        return names


BY_NAME = ClassOrder()


def read_order(choice: str) -> ClassOrder:
    """Return the class order for the option `class_order`.

    Raises ConfigError if its text file cannot be read, DataError if the file repeats a class.
    """
    if choice in (NAME, NUMERIC):
        return ClassOrder(choice)
    path = os.path.expanduser(choice)
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            names = tuple(line for line in file.read().split("\n") if line)
    except OSError as error:
        raise ConfigError(
            f"class_order ({choice}) must be {NAME}, {NUMERIC} or the path of a text file with one "
            f"class name per line, but that file cannot be read ({error.strerror})"
        ) from error
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(
            f"class_order={choice} lists {listed(twice)} more than once; list each class once"
        )
    return ClassOrder(choice, names)


def is_whole_number(name: str) -> bool:
    return _WHOLE_NUMBER.fullmatch(name) is not None


def numeric_order_note(classes: list[str]) -> str | None:
    """A note for the user if `classes` are numbers sorted as text; None if that is no problem."""
    if classes != sorted(classes) or not all(map(is_whole_number, classes)):
        return None
    by_value = sorted(classes, key=int)
    k = next((k for k, (one, other) in enumerate(zip(classes, by_value)) if one != other), None)
    if k is None:
        return None
    return (
        f"class names are whole numbers and are sorted as text: label {k} is class {classes[k]}, "
        f"by value it would be {by_value[k]}"
    )


def same_looking(classes: list[str]) -> list[str]:
    """The names (in NFC) that several `classes` share after Unicode normalisation."""
    return [name for name, count in Counter(map(_nfc, classes)).items() if count > 1]


def class_difference(
    one: str, its: list[str], other: str, others: list[str], remedy: str = ""
) -> str:
    """Describe how two lists of classes differ: 'only ONE has a, b; only OTHER has c; REMEDY'.

    Returns an empty string if both have the same classes. Names that differ only in Unicode
    normalisation look the same, so they are reported separately, with their own remedy.
    """
    mine, theirs = set(its) - set(others), set(others) - set(its)
    twins = {_nfc(name) for name in mine} & {_nfc(name) for name in theirs}
    pairs = [(_twin(mine, name), _twin(theirs, name)) for name in sorted(twins)]
    sides = ((one, mine), (other, theirs))
    alone = [
        (side, sorted(name for name in names if _nfc(name) not in twins)) for side, names in sides
    ]
    parts = [f"only {side} has {listed(names)}" for side, names in alone if names]
    parts += [remedy] * bool(parts and remedy)
    if pairs:
        a, b = pairs[0]
        forms = f"{_form(a)} in {one}, {_form(b)} in {other}"
        names = listed([name for name, _ in pairs])
        parts.append(
            f"{names} of {one} and of {other} differ only in Unicode normalisation ({forms}); "
            "rename the folders of one of them, for example with "
            "convmv -r --nfc -f utf8 -t utf8 --notest DIR"
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
