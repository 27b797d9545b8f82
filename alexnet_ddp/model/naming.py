"""Finds the tensors of a network in a file: nested, with prefixes, or with older names."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from alexnet_ddp.runtime.errors import ConfigError

# Modules that wrap a network, or a module of it, and add a prefix to the parameter names.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_EXTRA = {"n_averaged"}  # the update counter of torch.optim.swa_utils.AveragedModel
_EMA = re.compile(r"(^|[._])(ema|averaged?|swa)([._]|$)|_ema|ema_", re.IGNORECASE)
# Common keys and prefixes of the network to load.
_USUAL = {"", "state_dict", "model", "model_state_dict", "model_state", "net", "network", "weights"}
_USUAL |= {"state.model"}
# Names of torchvision before 0.2.
_OLD_DENSENET = re.compile(r"(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..+)")
_DEEPEST = 4  # levels of nested dicts that are searched


@dataclass(frozen=True)
class Network:
    """The tensors of a file that belong to one network, by the network's own names."""

    tensors: dict[str, Tensor]
    place: str  # the keys that lead to them, joined by dots; empty for the top level
    example: str  # a name in the file, if the names differ from the network's; otherwise empty
    versions: dict[str, Any]  # the metadata of torch.save: module name -> its version
    remark: str  # which of several networks this is, and what was left out; may be empty


@dataclass(frozen=True)
class _Candidate:
    place: str
    prefix: str
    num_found: int  # names of the network that were found
    group: dict[str, tuple[str, Tensor]]  # name without wrappers -> (name in the file, tensor)

    @property
    def is_average(self) -> bool:
        return _EMA.search(self.place) is not None or _EMA.search(self.prefix) is not None

    @property
    def shown(self) -> str:
        """The location in the file, for messages."""
        parts = [part for part in (self.place, self.prefix.rstrip(".")) if part]
        return ".".join(parts) or "the file itself"


def find_network(content: dict[Any, Any], own: Iterable[str], complaint: str) -> Network:
    """Find the tensors in `content` that have the most names in common with `own`.

    Among equally good ones, averaged weights are preferred, as in timm.
    Raises ConfigError, with a message that begins with `complaint`, if there are no tensors or if
    several networks fit equally well.
    """
    own = set(own)
    groups = dict(_groups(content, ()))
    if not groups:
        raise ConfigError(f"{complaint} holds no tensors by name; save model.state_dict()")
    plain = {place: _without_wrappers(group, own) for place, group in groups.items()}
    candidates = [
        _Candidate(place, prefix, count, group)
        for place, group in plain.items()
        for prefix, count in _prefixes(group, own).items()
        # With fewer names, the prefix is a module of another network that has similar names.
        if not prefix or 2 * count >= len(own)
    ]
    if not candidates:
        place = max(groups, key=lambda place: len(groups[place]))
        return Network(groups[place], place, "", {}, "")
    most = max(c.num_found for c in candidates)
    chosen, others = _choose([c for c in candidates if c.num_found == most], most, own, complaint)
    mine = {
        n.removeprefix(chosen.prefix): pair
        for n, pair in chosen.group.items()
        if n.startswith(chosen.prefix)
    }
    tensors = {n: t for n, (_, t) in mine.items() if n not in _EXTRA or n in own}
    num_left = len(chosen.group) - len(mine)
    remarks = ["averaged weights"] * chosen.is_average
    if others:
        remarks.append(f"not {' or '.join(c.shown for c in others)}")
    if num_left:
        remarks.append(f"{num_left} other tensors of it are left out")
    versions = getattr(_at(content, chosen.place), "_metadata", {})
    example = next((raw for n, (raw, _) in mine.items() if raw != n), "")
    versions = _versions(versions, chosen.prefix)
    return Network(tensors, chosen.place, example, versions, ", ".join(remarks))


def _groups(
    content: dict[Any, Any], at: tuple[str, ...]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield (keys joined by dots, tensors) for each dict that contains tensors by name."""
    tensors = {
        name: t for name, t in content.items() if isinstance(name, str) and isinstance(t, Tensor)
    }
    if tensors:
        yield ".".join(at), tensors
    if len(at) < _DEEPEST:
        for key, value in content.items():
            if isinstance(key, str) and isinstance(value, dict):
                yield from _groups(value, (*at, key))


def _at(content: dict[Any, Any], place: str) -> dict[Any, Any]:
    """The dict at `place`, as returned by _groups(). Keys may contain dots."""
    if not place:
        return content
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, dict):
            if place == key:
                return value
            if place.startswith(f"{key}."):
                return _at(value, place[len(key) + 1 :])
    return {}


def _without_wrappers(group: dict[str, Tensor], own: set[str]) -> dict[str, tuple[str, Tensor]]:
    """`group` by current torchvision names without wrappers, unless two names would collide."""
    wrappers = _WRAPPERS - {part for name in own for part in name.split(".")}
    renamed = {}
    for name, tensor in group.items():
        new = ".".join(part for part in name.split(".") if part not in wrappers)
        old = _OLD_DENSENET.fullmatch(new)
        renamed[f"{old[1]}{old[2]}" if old and new not in own else new] = (name, tensor)
    if len(renamed) == len(group):
        return renamed
    return {name: (name, tensor) for name, tensor in group.items()}


def _prefixes(names: Iterable[str], own: set[str]) -> Counter[str]:
    """Count, for each prefix, how many names are this prefix and a name of the network."""
    found: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        for k in range(len(parts)):
            if ".".join(parts[k:]) in own:
                found["".join(f"{part}." for part in parts[:k])] += 1
    return found


def _choose(
    candidates: list[_Candidate], num_found: int, own: set[str], complaint: str
) -> tuple[_Candidate, list[_Candidate]]:
    """Choose among candidates with equally many names; returns it and the others.

    Raises ConfigError if several complete ones are equally usual.
    """
    ranked = sorted(candidates, key=lambda c: (not c.is_average, not _is_usual(c)))
    first, others = ranked[0], ranked[1:]
    alike = [
        c for c in others if (c.is_average, _is_usual(c)) == (first.is_average, _is_usual(first))
    ]
    needed = sum(not name.endswith("num_batches_tracked") for name in own)
    if alike and num_found >= needed:
        shown = ", ".join(c.shown for c in (first, *alike))
        raise ConfigError(
            f"{complaint} holds several networks that fit: {shown}; "
            "save the one that you mean in a file of its own"
        )
    return first, others if num_found >= needed else []


def _is_usual(candidate: _Candidate) -> bool:
    return candidate.place in _USUAL and candidate.prefix.rstrip(".") in _USUAL


def _plain(name: str) -> str:
    return "".join(f"{part}." for part in name.split(".") if part and part not in _WRAPPERS)


def _versions(recorded: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The version of the network's root module, without those of the modules that wrap it."""
    roots = [name for name in recorded if _plain(f"{name}.") == prefix]
    return {"": recorded[max(roots, key=len)]} if roots else {}
