"""Removes secrets from everything that a run prints or writes.

Values of names such as key, token, secret, password or signature, and credentials in URLs, become
***. Only names are compared: a secret under any other name is not detected.
"""

import re
from typing import Any

HIDDEN = "***"

_WORDS = r"(?:(?<![a-z])(?:key|token|credential|sig)|api_?key|passw(?:or)?d|secret|signature)s?"
_NAME = rf"[\w.\-]*{_WORDS}(?![a-z])[\w\-]*"
_SECRET_NAME = re.compile(_NAME, re.IGNORECASE)
_OVERRIDE = re.compile(rf"[~+]*({_NAME})=.*", re.IGNORECASE | re.DOTALL)
# Not a secret: the examples in Hydra's messages, key=value and key=[value1,value2].
_EXAMPLE = r"(?!(?:null|value|\.\.\.)(?![^\s,;'\"\]}])|(?:\[|['\"])value1,)"
_ASSIGNED = re.compile(  # name=value or "name": value within a text
    rf"({_NAME}(?:=|['\"]?: ?)(?=\S){_EXAMPLE})(?:'[^']*'|\"[^\"]*\"|\[[^\]]*\]|[^\s,'\"\]}}&]+)",
    re.IGNORECASE,
)
_YAML_LINE = re.compile(rf"^([ \-]*{_NAME}:) +(?!null$).+$", re.IGNORECASE | re.MULTILINE)
_URL = re.compile(r"(\b[a-z][a-z0-9+.\-]*://)[^/\s'\"]+@", re.IGNORECASE)


def redact(value: Any, name: str = "") -> Any:
    """Return a copy of a text, list or dict without secrets.

    Args:
        value: any JSON value; values that are not text are returned unchanged.
        name: the key of `value` in its dict.
    """
    if isinstance(value, dict):
        return {key: redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item, name) for item in value]
    if isinstance(value, str):
        override = _OVERRIDE.fullmatch(value)
        if override:
            return f"{override[1]}={HIDDEN}"
        hidden = value and _SECRET_NAME.fullmatch(name)
        return HIDDEN if hidden else _ASSIGNED.sub(rf"\1{HIDDEN}", _URL.sub(rf"\1{HIDDEN}@", value))
    return value


def redact_yaml(text: str) -> str:
    """Return a YAML document, which has one key per line, without secrets."""
    return _YAML_LINE.sub(rf"\1 '{HIDDEN}'", redact(text))
