"""From KEY=VALUE as a user types it to Hydra's grammar: the type of the key decides how the value is read.

The values of text, number, boolean and enum options are quoted here, so Hydra's grammar sees none of their characters.
Three things keep a meaning: `null` for an optional option, quotes around a whole value ('...' or "..."), and
${other.key} or ${oc.env:NAME} of OmegaConf. A list is [a,b,c]. Mappings, and options of any type, follow the grammar.
"""

import re
from collections.abc import Iterator
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError

from alexnet_ddp.config.advice import no_value, one_value, type_line, unknown
from alexnet_ddp.config.checks import require, shown
from alexnet_ddp.config.schema import Option, group_names, groups, options, sections
from alexnet_ddp.runtime.errors import ConfigError

_OVERRIDE = re.compile(r"(\+{0,2})([^=+~][^=]*)=(.*)", re.DOTALL)
# Hydra's rule for a quoted value: backslashes count only before a quote.
_QUOTED = re.compile(r"""'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)\"""", re.DOTALL)
_LONGEST_NUMBER = 500  # characters; no number, boolean or name of a choice needs more
_ITEM = re.compile(r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\$\{[^}]*\}|[^,])+""", re.DOTALL)


def to_hydra(override: str, root: type) -> str:
    """The override in Hydra's grammar, for the command whose configuration is `root`. Raises ConfigError."""
    if override.startswith("~"):
        require("/" not in override.partition("=")[0], no_value(override, root))
        return override
    found = _OVERRIDE.fullmatch(override)
    if found is None or found[2] != found[2].strip():
        raise ConfigError(no_value(override, root))
    sign, key, value = found.groups()
    option = find_option(key, root)
    if key in options(root) or key in group_names(root):
        sign = ""  # + adds a key, and this one exists
    if key in group_names(root):
        choices = ", ".join(groups(root).get(key, ()))
        remedy = f"choices: {choices}" if choices else f"leave {key} out for its default"
        require(value.lower() != "null", f"{key}=null is refused; {remedy}")
        return _checked(f"{sign}{key}={_choice(value)}", root)
    if option is not None:
        if ".args." in key:
            sign = "++"  # Hydra's mark for a key that may be new in a mapping
        return _checked(f"{sign}{key}={_value(key, value, option, root)}", root)
    is_mapping = key in sections(root) and value.lstrip().startswith("{")
    if is_mapping or "/" in key or "@" in key or (sign == "+" and "." not in key):
        return _checked(override, root)
    raise ConfigError(unknown(key, value, root))


def find_option(key: str, root: type) -> Option | None:
    """The option `key`. Below engine.conf every name is a text, below `args` of any type."""
    option = options(root).get(key)
    if option is not None:
        return option
    parents = [path for path, _ in _any(root) if key.startswith(f"{path}.")]
    if not parents:
        return None
    return Option((Any,) if parents[0].endswith(".args") else (str,))


def misread(values: Any, prefix: str, root: type) -> Iterator[tuple[str, Any]]:
    """The text options among `values` (a mapping, or one value) that were read as another type than text."""
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


def _any(root: type) -> Iterator[tuple[str, Option]]:
    return ((path, option) for path, option in options(root).items() if Any in option.kinds)


def _choice(value: str) -> str:
    """A group's choice is a text too: a recipe may be called 2026_11_28."""
    in_grammar = value.lower() == "null" or value[:1] in "[{'\"" or "," in value or "${" in value
    return value if in_grammar else quoted(value)


def _value(key: str, value: str, option: Option, root: type) -> str:
    is_null = value.lower() == "null"
    if is_null and (option.is_optional or not option.is_text):
        return value
    if option.item is str:
        return _text_list(key, value)
    if option.item is not None:
        require(
            value.startswith("[") or "${" in value,
            f"{key} ({shown(value)}) must be a list; write {key}=[{value}]",
        )
    if not option.is_scalar or option.item is not None:
        return value
    text = _unquoted(value)
    require(
        text != "???",
        f"{key} (???) is OmegaConf's mark of a value that is missing; give another text",
    )
    is_many = "," in value and text == value and "${" not in value and not option.is_text
    require(not is_many, one_value(key, value, root))
    if len(text) > _LONGEST_NUMBER and not option.is_text and "${" not in text:
        raise ConfigError(type_line(key, text, root))
    return quoted(text)


def _text_list(key: str, value: str) -> str:
    require(
        value.startswith("[") and value.endswith("]"),
        f"{key} ({shown(value)}) must be a list; write {key}=[{value}]",
    )
    inside = value[1:-1]
    items = _ITEM.findall(inside)
    rule = "has an empty item; leave it out, or write ''"
    require(",".join(items) == inside and all(map(str.strip, items)), f"{key} ({value}) {rule}")
    return f"[{','.join(quoted(_unquoted(item.strip())) for item in items)}]"


def _unquoted(value: str) -> str:
    """The text within quotes around the whole value, as Hydra reads it; any other value is its own text."""
    found = _QUOTED.fullmatch(value)
    if found is None:
        return value
    quote, inside = value[0], value[1:-1]
    inside = re.sub(rf"(\\+){quote}", lambda m: m[1][1::2] + quote, inside)
    backslashes = len(inside) - len(inside.rstrip("\\"))
    return inside[: len(inside) - backslashes // 2]


def _escaped(text: str) -> str:
    """OmegaConf's escapes where `text` has a ${ that begins no interpolation."""
    if "${" not in text:
        return text
    try:
        OmegaConf.create([text])
    except GrammarParseError:
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    return text


def _checked(override: str, root: type) -> str:
    """Refuse what Hydra's grammar cannot read, several values, and a mapping with a number for a text."""
    key, _, value = override.lstrip("+").partition("=")
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException as error:
        rule = "is not in Hydra's grammar for mappings and lists"
        raise ConfigError(
            f"{key} ({shown(value)}) {rule}; write {key}={_example(key, root)}"
        ) from error
    require(not parsed.is_sweep_override(), one_value(key, value, root))
    for path, read in misread(parsed.value(), key, root):
        raise ConfigError(
            f"{path} is a text, but {override} gives the {_type(read)} {read}; write {path}=..."
        )
    return override


def _example(key: str, root: type) -> str:
    option = find_option(key, root)
    return "[1,2]" if option is not None and option.item is not None else "'{a: 1, b: \"x y\"}'"


def _type(value: Any) -> str:
    return "boolean" if isinstance(value, bool) else "number"
