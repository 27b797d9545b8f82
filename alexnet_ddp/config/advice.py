"""What to write instead: one line for an option, a choice or a value that does not exist."""

import re
from difflib import get_close_matches
from enum import Enum
from typing import Any

from alexnet_ddp.config.checks import shown
from alexnet_ddp.config.schema import group_names, groups, options, sections

# Option names of other frameworks, and the last part of ours.
_SYNONYMS = {
    "batch_size": "global_batch_size",
    "learning_rate": "lr",
    "max_epochs": "epochs",
    "num_epochs": "epochs",
    "num_workers": "num_threads",
    "workers": "num_threads",
    "wd": "weight_decay",
}

_MOVED = {  # options of earlier versions
    "replay": "replaying a step is a command now; "
    "write python -m alexnet_ddp.replay run.name=NAME file=runs/NAME/replay.json",
}


def unknown(key: str, value: str, root: type) -> str:
    """The line for KEY=VALUE with a key that the command does not have."""
    if key in _MOVED:
        return f"{key}={shown(value)}: {_MOVED[key]}"
    if key in sections(root):
        return (
            f"{key}={shown(value)} is refused: {key} is not a group; {_instead(key, value, root)}"
        )
    return f"{key} is not a key; {_nearest_or_all(key, root)}"


def in_other_choices(key: str, owner: str, root: type) -> str:
    """The line for a key that its group has, but not in the chosen class, which is called `owner`."""
    group, option = key.split(".")[0], options(root).get(key)
    if option is None or group not in groups(root):
        return unknown(key, "", root)
    chosen = next(
        (name for name, node in groups(root)[group].items() if node.__name__ == owner), owner
    )
    having = " and ".join(f"{group}={choice}" for choice in option.choices)
    return (
        f"{key} is only read by {having}, this is {group}={chosen}; leave it out, or change {group}"
    )


def no_choice(group: str, value: str, available: list[str], root: type) -> str:
    """The line for a group's choice that does not exist."""
    near = get_close_matches(value, available, 1)
    others = [name for name, choices in groups(root).items() if value in choices and name != group]
    if "/" in value and group == "data":
        remedy = f"write data=folder data.root={value} (or data=imagenet, data=shards)"
    elif others:
        remedy = f"write {others[0]}={value}"
    elif near:
        remedy = f"nearest: {group}={near[0]}"
    else:
        remedy = f"choices: {', '.join(available)}"
        if group == "model":
            remedy += f"; a network of torchvision: model=torchvision model.name={value}"
    return f"{group}={shown(value)} does not exist; {remedy}"


def no_value(argument: str, root: type) -> str:
    """The line for an argument without a key or without `=`."""
    of = [name for name, choices in groups(root).items() if argument in choices]
    example = f"{of[0]}={argument}" if of else "OPTION=VALUE, without spaces around ="
    return f"'{shown(argument)}' is not OPTION=VALUE; write {example}"


def dashed(argument: str, value: str | None, root: type) -> str:
    """The line for --NAME with VALUE, if this command has no such option."""
    name = argument.lstrip("-")
    near = [name] if name in options(root) else nearest(name, root)
    shown = "..." if value is None else value
    if not near:
        return f"{argument} is not supported; write OPTION=VALUE, without dashes; --help lists the options"
    return f"{argument} is not supported; write {' or '.join(f'{key}={shown}' for key in near)}"


def one_value(key: str, value: str, root: type) -> str:
    """The line for several values of one option."""
    remedy = (
        "run per value, each with its own run.name"
        if "run.name" in options(root)
        else "command per value"
    )
    return f"{key}={shown(value)}: {key} takes one value; start one {remedy}"


def nearest(key: str, root: type) -> list[str]:
    """Up to three options, groups or sections that `key` may stand for, the best first."""
    known = options(root)
    names = [*known, *group_names(root), *sections(root)]
    wanted = key.lower().replace("-", "_")
    section, _, leaf = wanted.rpartition(".")
    leaf = _SYNONYMS.get(leaf, leaf)
    leaves: dict[str, list[str]] = {}
    for path in known:
        leaves.setdefault(path.rpartition(".")[2], []).append(path)
    inside = {
        path.rpartition(".")[2]: path
        for path in known
        if section and path.startswith(f"{section}.")
    }
    if leaf in inside:
        return [inside[leaf]]
    if leaf in leaves:
        likely = sorted(leaves[leaf], key=lambda path: path.split(".")[0] not in ("run", "model"))
        return likely[:3]
    begins = [
        path
        for name, paths in leaves.items()
        if len(leaf) > 2 and name.startswith(leaf)
        for path in paths
    ]
    if begins and section not in sections(root) and section not in group_names(root):
        return begins[:3]
    found = [inside[name] for name in get_close_matches(leaf, inside, 1)]
    if (
        not found and not inside
    ):  # with a right section, its length alone would make any name similar
        found = get_close_matches(f"{section}.{leaf}" if section else leaf, names, 1, 0.75)
    return (
        found
        or [path for name in get_close_matches(leaf, leaves, 1, 0.75) for path in leaves[name]][:3]
    )


def type_line(key: str, value: str, root: type) -> str:
    """The line for a value of the wrong type."""
    option = options(root)[key]
    rules = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
    allowed = []
    for kind in dict.fromkeys(option.kinds):
        is_enum = isinstance(kind, type) and issubclass(kind, Enum)
        allowed.append(
            _one_of([e.name for e in kind])
            if is_enum
            else rules.get(kind, "") or _list_rule(option.item)
        )
    allowed = [
        rule for kind, rule in zip(dict.fromkeys(option.kinds), allowed) if kind is not type(None)
    ]
    null = ", or null" if option.is_optional else ""
    return f"{key} ({shown(value)}) must be {' or '.join(dict.fromkeys(allowed))}{null}"


def one_line(error: Exception, root: type) -> str:
    """What Hydra or OmegaConf says in several lines and a chain of exceptions, as one line with the remedy."""
    text = "\n".join(str(e) for e in (error, error.__cause__) if e is not None)
    for pattern, line in _LINES:
        found = re.search(pattern, text)
        if found is not None:
            made = line(found, root)
            if made is not None:
                return made
    text = re.sub(
        r"Config search path:(?s:.*)|Error when parsing index: .*|"  # the second one: from Hydra 1.4 on
        r"To append to your (config|default).*|See https?:.*|(full_key|\w+_type)[=:].*",
        "",
        text,
    )
    return "; ".join(
        line.strip().rstrip(".") for line in text.splitlines() if line.strip()
    ).replace(":; ", ": ")


def _wrong_type(found: re.Match, root: type) -> str | None:
    key = found["key"].replace("[", ".").split(".")
    path = ".".join(part for part in key if not part.rstrip("]").isdigit())
    return (
        type_line(path, found.groupdict().get("value") or "null", root)
        if path in options(root)
        else None
    )


def _missing_choice(found: re.Match, root: type) -> str | None:
    available = found["available"].split()
    where = "" if found["where"] in _MAINS else f"{found['where']}.yaml: "
    group, choice = found["group"], found["choice"].removeprefix(f"{found['group']}/")
    return where + no_choice(group, choice, available, root)


def _joined(key: str, name: str) -> str:
    """section={name: x} does not contain the name of the option in its key."""
    return key if key.rpartition(".")[2] == name else f"{key}.{name}"


_MAINS = ("train", "evaluate", "predict", "plan", "prepare", "doctor", "replay", None)
_LINES = [
    (
        r"Error resolving interpolation '\$\{(data|model|augment|optimizer|scheduler)\}'",
        lambda found, root: (
            "the files in conf/experiment/default are chosen by data=...; leave out experiment=default/..., "
            "and copy the values into an experiment of your own"
        ),
    ),
    (
        r"Could not override '(?P<key>[^']+)'(?s:.*?)Key '(?P<name>[^']+)' not in '(?P<owner>\w+)'",
        lambda found, root: in_other_choices(
            _joined(found["key"], found["name"]), found["owner"], root
        ),
    ),
    (
        r"(?:In '(?P<where>[^']+)': )?Could not find '(?P<choice>[^'\n]+)'\s*"
        r"Available options in '(?P<group>[^']+)':\n(?P<available>(?:\t.*\n?)+)",
        _missing_choice,
    ),
    (
        r"Value '(?P<value>(?s:.*?))' (?:of type|is not a valid)(?s:.*?)full_key: (?P<key>\S+)",
        _wrong_type,
    ),
    (
        r"Invalid value '(?P<value>(?s:.*?))', expected one of(?s:.*?)full_key: (?P<key>\S+)",
        _wrong_type,
    ),
    (r"field '(?P<key>\S+)' is not Optional", _wrong_type),
    (
        r"Interpolation key '(?P<to>[^']*)' not found(?s:.*?)full_key: (?P<key>\S+)",
        lambda found, root: (
            f"{found['key']} refers to {found['to']}, which is not a key; a literal ${{ is written \\${{"
        ),
    ),
    (
        r"Environment variable '(?P<name>[^']*)' not found(?s:.*?)full_key: (?P<key>\S+)",
        lambda found, root: (
            f"{found['key']} refers to the environment variable {found['name']}, which is not set"
        ),
    ),
]


def _instead(section: str, value: str, root: type) -> str:
    option = options(root).get(f"{section}.{value}")
    of = [name for name, choices in groups(root).items() if value in choices]
    if option is not None:
        kind = option.kinds[0]
        is_enum = isinstance(kind, type) and issubclass(kind, Enum)
        values = (
            [e.name for e in reversed(kind)] if is_enum else ["true"] if kind is bool else ["..."]
        )
        others = f" (or {', '.join(values[1:])})" if values[1:] else ""
        return f"write {section}.{value}={values[0]}{others}"
    if of:
        return f"write {of[0]}={value}"
    return f"its options: {', '.join(path for path in options(root) if path.startswith(f'{section}.'))}"


def _nearest_or_all(key: str, root: type) -> str:
    near = nearest(key, root)
    if near:
        return f"nearest: {', '.join(near)}"
    section = key.split(".")[0]
    below = sorted(
        path for path in options(root) if path.startswith(f"{section}.") and path != section
    )
    top = {path.split(".")[0] for path in options(root)} | set(group_names(root))
    return f"known here: {', '.join(below or sorted(top))}"


def _one_of(names: list[str]) -> str:
    return f"one of {', '.join(names)}"


def _list_rule(item: Any) -> str:
    return "a list of numbers" if item is float else "a list of texts"
