"""What to write instead: one line for an option, a choice or a value that does not exist."""

import re
from difflib import get_close_matches

from alexnet_ddp.config.option import shown
from alexnet_ddp.config.schema import ROOTS, choice_of, group_names, groups, options, sections

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
# Options of earlier versions.
_MOVED = {
    "replay": "replaying a step is a command now; "
    "write python -m alexnet_ddp.replay run.name=NAME file=runs/NAME/replay.json",
}
_ARTICLES = {"integer": "an integer", "number": "a number", "text": "a text"}


def unknown(key: str, value: str, root: type) -> str:
    """The line for KEY=VALUE if the command has no such key."""
    if key in _MOVED:
        return f"{key}={shown(value)}: {_MOVED[key]}"
    if key == "experiment":  # the values of such a file would be below this key
        return "a file of the group experiment must begin with the line # @package _global_"
    if key in sections(root):
        rule = f"is refused: {key} is not a group"
        return f"{key}={shown(value)} {rule}; {_instead(key, value, root)}"
    return f"{key} is not a key; {_nearest_or_all(key, root)}"


def in_other_choices(key: str, owner: type, root: type) -> str:
    """The line for a key that its group has, but not the chosen class `owner`."""
    group, option = key.split(".")[0], options(root).get(key)
    if option is None or group not in groups(root):
        return unknown(key, "", root)
    readers = " and ".join(f"{group}={choice}" for choice in option.choices)
    chosen = f"{group}={choice_of(group, owner)}"
    return f"{key} is only read by {readers}, this is {chosen}; leave it out, or change {group}"


def no_choice(group: str, value: str, available: list[str], root: type) -> str:
    """The line for a choice that the group does not have."""
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
    having = [name for name, choices in groups(root).items() if argument in choices]
    example = f"{having[0]}={argument}" if having else "OPTION=VALUE, without spaces around ="
    return f"'{shown(argument)}' is not OPTION=VALUE; write {example}"


def dashed(argument: str, value: str | None, root: type) -> str:
    """The line for --NAME with VALUE, if the command has no such option."""
    name = argument.lstrip("-")
    near = [name] if name in options(root) else nearest(name, root)
    if not near:
        remedy = "write OPTION=VALUE, without dashes; --help lists the options"
        return f"{argument} is not supported; {remedy}"
    example = " or ".join(f"{key}={'...' if value is None else value}" for key in near)
    return f"{argument} is not supported; write {example}"


def one_value(key: str, value: str, root: type) -> str:
    """The line for several values of one option."""
    remedy = "start one command per value"
    if root is ROOTS["train"]:
        remedy = "alexnet-ddp sweep trains one run per value"
    return f"{key}={shown(value)}: {key} takes one value; {remedy}"


def one_by_one(section: str, value: str) -> str:
    """The line for a dictionary of Python, as wandb's sweep agent writes nested parameters."""
    found = re.match(r"\{'(\w+)': ([^{},]+)", value)
    name, example = found.groups() if found else ("OPTION", "VALUE")
    remedy = (
        f"such as {section}.{name}={example}; in sweep.yaml, name the parameter {section}.{name}"
    )
    return f"{section} ({shown(value)}) is a dictionary of Python; give each option, {remedy}"


def type_line(key: str, value: str, root: type) -> str:
    """The line for a value of the wrong type."""
    option = options(root)[key]
    words = option.type_words
    if option.item is not None:
        words = f"a {words}"
    null = ", or null" if option.is_optional else ""
    return f"{key} ({shown(value)}) must be {_ARTICLES.get(words, words)}{null}"


def nearest(key: str, root: type) -> list[str]:
    """Up to three options, groups or sections that `key` may stand for, the best one first."""
    known = options(root)
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
    if section not in sections(root) and section not in group_names(root):
        begins = _beginning_with(leaf, leaves)
        if begins:
            return begins[:3]
    if inside:  # the section is right, so only the last part is compared
        near = [inside[name] for name in get_close_matches(leaf, inside, 1)]
    else:
        names = [*known, *group_names(root), *sections(root)]
        near = get_close_matches(f"{section}.{leaf}" if section else leaf, names, 1, 0.75)
    similar = [path for name in get_close_matches(leaf, leaves, 1, 0.75) for path in leaves[name]]
    return near or similar[:3]


def _beginning_with(leaf: str, leaves: dict[str, list[str]]) -> list[str]:
    if len(leaf) < 3:
        return []
    return [path for name, paths in leaves.items() if name.startswith(leaf) for path in paths]


def _instead(section: str, value: str, root: type) -> str:
    option = options(root).get(f"{section}.{value}")
    if option is not None:
        values = [*reversed(option.names)] or ["true" if bool in option.kinds else "..."]
        others = f" (or {', '.join(values[1:])})" if values[1:] else ""
        return f"write {section}.{value}={values[0]}{others}"
    for name, choices in groups(root).items():
        if value in choices:
            return f"write {name}={value}"
    known = [path for path in options(root) if path.startswith(f"{section}.")]
    return f"its options: {', '.join(known)}"


def _nearest_or_all(key: str, root: type) -> str:
    near = nearest(key, root)
    if near:
        return f"nearest: {', '.join(near)}"
    section = key.split(".")[0]
    below = sorted(path for path in options(root) if path.startswith(f"{section}."))
    top = {path.split(".")[0] for path in options(root)} | set(group_names(root))
    return f"known here: {', '.join(below or sorted(top))}"
