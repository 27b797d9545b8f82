"""Translates KEY=VALUE as a user types it into Hydra's grammar, by the type of the key.

The values of text, number, boolean and enum options are quoted here, so Hydra's grammar sees none
of their characters. Three things keep a meaning: `null` for an optional option, quotes around a
whole value ('...' or "..."), and ${other.key} or ${oc.env:NAME} of OmegaConf. A list is [a,b,c].
Mappings, and options of any type, follow Hydra's grammar.
"""

import re
from collections.abc import Iterator
from typing import Any

from alexnet_ddp.config import advice
from alexnet_ddp.config.option import shown
from alexnet_ddp.config.schema import Option, group_names, groups, options, sections
from alexnet_ddp.runtime.errors import ConfigError

_OVERRIDE = re.compile(r"(\+{0,2})([^=+~][^=]*)=(.*)", re.DOTALL)
# Hydra's rule for a quoted value: backslashes count only before a quote.
_QUOTED = re.compile(r"""'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)\"""", re.DOTALL)
_ITEM = re.compile(r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\$\{[^}]*\}|[^,])+""", re.DOTALL)
_LONGEST_NUMBER = 500  # characters; no number, boolean or name of a choice needs more
_HYDRAS_KEY = re.compile(r"hydra\b|.*@hydra\b")


def check_key(override: str, root: type) -> None:
    """Raise ConfigError if the key of `override` is none of the command's. Needs no Hydra."""
    key = override.split("=")[0].lstrip("+~")
    if _HYDRAS_KEY.match(key):
        rule = "is refused: Hydra only composes here, and calls nothing"
        raise ConfigError(f"{key} {rule}; leave it out")
    if override.startswith("~"):
        if "/" in key:
            raise ConfigError(advice.no_value(override, root))
        return
    _, key, value = _split(override, root)
    is_group = key in group_names(root)
    if is_group and value.lower() == "null":
        choices = ", ".join(groups(root).get(key, ()))
        remedy = f"choices: {choices}" if choices else f"leave {key} out for its default"
        raise ConfigError(f"{key}=null is refused; {remedy}")
    if is_group and value.startswith("default/"):
        remedy = "leave it out, and copy the values into an experiment of your own"
        rule = "is refused: data=... chooses the files in conf/experiment/default"
        raise ConfigError(f"{key}={shown(value)} {rule}; {remedy}")
    is_known = is_group or find_option(key, root) is not None
    if not is_known and not _follows_grammar(override, key, value, root):
        raise ConfigError(advice.unknown(key, value, root))


def to_hydra(override: str, root: type) -> str:
    """The override in Hydra's grammar, for the command with the options of `root`.

    Raises ConfigError if its value cannot be read. check_key() has accepted the key.
    """
    if override.startswith("~"):
        return override
    sign, key, value = _split(override, root)
    option = find_option(key, root)
    if key in options(root) or key in group_names(root):
        sign = ""  # + adds a key, and this one exists
    if key in group_names(root):
        return _checked(f"{sign}{key}={_choice(value)}", root)
    if option is not None:
        if ".args." in key:
            sign = "++"  # Hydra's mark for a key that may be new in a mapping
        return _checked(f"{sign}{key}={_value(key, value, option, root)}", root)
    return _checked(override, root)


def find_option(key: str, root: type) -> Option | None:
    """The option `key`. Below engine.conf every name is a text, below `args` of any type."""
    option = options(root).get(key)
    if option is not None:
        return option
    known = options(root).items()
    parents = [path for path, one in known if one.is_any and key.startswith(f"{path}.")]
    if not parents:
        return None
    return Option((Any,) if parents[0].endswith(".args") else (str,))


def misread(values: Any, prefix: str, root: type) -> Iterator[tuple[str, Any]]:
    """The text options among `values` (a mapping, or one value) that YAML read as another type."""
    if isinstance(values, dict) and prefix not in options(root):
        for name, value in values.items():
            yield from misread(value, f"{prefix}.{name}" if prefix else str(name), root)
        return
    option = options(root).get(prefix)
    if option is None:
        return
    is_list = option.item is str and isinstance(values, list)
    for value in values if is_list else [values]:
        if (option.is_text or is_list) and isinstance(value, int | float):
            yield prefix, value


def quoted(text: str) -> str:
    """`text` as a quoted value of Hydra's grammar, which OmegaConf then reads as the same text."""
    text = re.sub(r"(\\*)'", r"\1\1\\'", _escaped(text))
    at_end = text[len(text.rstrip("\\")) :]
    return f"'{text}{at_end}'"


def _split(override: str, root: type) -> tuple[str, str, str]:
    """Sign (+, ++ or nothing), key and value. Raises ConfigError if it is not KEY=VALUE."""
    found = _OVERRIDE.fullmatch(override)
    if found is None or found[2] != found[2].strip():
        raise ConfigError(advice.no_value(override, root))
    return found[1], found[2], found[3]


def _follows_grammar(override: str, key: str, value: str, root: type) -> bool:
    """True for a section={...}, a package (@), a path of groups (/), and +NAME=... ."""
    is_mapping = key in sections(root) and value.lstrip().startswith("{")
    is_addition = re.match(r"\+[^+]", override) is not None and "." not in key
    return is_mapping or "/" in key or "@" in key or is_addition


def _choice(value: str) -> str:
    """A group's choice is a text too: a recipe may be called 2026_11_28."""
    in_grammar = value[:1] in "[{'\"" or "," in value or "${" in value
    return value if in_grammar else quoted(value)


def _value(key: str, value: str, option: Option, root: type) -> str:
    if value.lower() == "null" and (option.is_optional or not option.is_text):
        return value
    if value == "None" and option.is_optional and not option.is_text:
        return "null"  # as the sweep agent of wandb writes a null of the sweep's YAML
    if option.item is str:
        return _text_list(key, value)
    if option.item is not None and not value.startswith("[") and "${" not in value:
        raise ConfigError(f"{key} ({shown(value)}) must be a list; write {key}=[{value}]")
    if not option.is_scalar:
        return value
    text = _unquoted(value)
    if text == "???":
        rule = "is OmegaConf's mark of a value that is missing"
        raise ConfigError(f"{key} (???) {rule}; give another text")
    if option.is_text or "${" in text:
        return quoted(text)
    if "," in value and text == value:
        raise ConfigError(advice.one_value(key, value, root))
    if len(text) > _LONGEST_NUMBER:
        raise ConfigError(advice.type_line(key, text, root))
    return quoted(text)


def _text_list(key: str, value: str) -> str:
    if not (value.startswith("[") and value.endswith("]")):
        raise ConfigError(f"{key} ({shown(value)}) must be a list; write {key}=[{value}]")
    inside = value[1:-1]
    items = _ITEM.findall(inside)
    if ",".join(items) != inside or not all(map(str.strip, items)):
        raise ConfigError(f"{key} ({value}) has an empty item; leave it out, or write ''")
    return f"[{','.join(quoted(_unquoted(item.strip())) for item in items)}]"


def _unquoted(value: str) -> str:
    """The text in quotes around the whole value, as Hydra reads it; else the value itself."""
    found = _QUOTED.fullmatch(value)
    if found is None:
        return value
    quote, inside = value[0], value[1:-1]
    inside = re.sub(rf"(\\+){quote}", lambda m: m[1][1::2] + quote, inside)
    backslashes = len(inside) - len(inside.rstrip("\\"))
    return inside[: len(inside) - backslashes // 2]


def _escaped(text: str) -> str:
    """`text`, with OmegaConf's escapes if it has a ${ that begins no interpolation."""
    if "${" not in text:
        return text
    from omegaconf import OmegaConf
    from omegaconf.errors import GrammarParseError

    try:
        OmegaConf.create([text])
    except GrammarParseError:
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    return text


def _checked(override: str, root: type) -> str:
    """The override itself.

    Raises ConfigError if Hydra's grammar cannot read it, if it has several values, and if a
    mapping has a number for a text.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, _, value = override.lstrip("+").partition("=")
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException as error:
        if value.startswith("{'") and key in {*sections(root), *group_names(root)}:
            raise ConfigError(advice.one_by_one(key, value)) from error
        rule = "is not in Hydra's grammar for mappings and lists"
        remedy = f"write {key}={_example(key, root)}"
        raise ConfigError(f"{key} ({shown(value)}) {rule}; {remedy}") from error
    if parsed.is_sweep_override():
        raise ConfigError(advice.one_value(key, value, root))
    for path, read in misread(parsed.value(), key, root):
        kind = "boolean" if isinstance(read, bool) else "number"
        rule = f"is a text, but {override} gives the {kind} {read}"
        raise ConfigError(f"{path} {rule}; write {path}=...")
    return override


def _example(key: str, root: type) -> str:
    option = find_option(key, root)
    return "[1,2]" if option is not None and option.item is not None else "'{a: 1, b: \"x y\"}'"
