"""Secrets stay out of whatever a run says or writes: each sink passes its text through here.

Values of names like key, token, secret, password or signature, and credentials in URLs, become ***. Names decide, so a
secret under a harmless name is not known as one.
"""

import re
from typing import Any

HIDDEN = "***"

_WORDS = r"(?:(?<![a-z])(?:key|token|credential|sig)|api_?key|passw(?:or)?d|secret|signature)s?"
_NAME = rf"[\w.\-]*{_WORDS}(?![a-z])[\w\-]*"
_SECRET_NAME = re.compile(_NAME, re.IGNORECASE)
_OVERRIDE = re.compile(rf"[~+]*({_NAME})=.*", re.IGNORECASE | re.DOTALL)
_EXAMPLE = r"(?!(?:null|value|\.\.\.)(?![^\s,;'\"\]}])|(?:\[|['\"])value1,)"  # Hydra's advice: key=value, key=[value1,value2]
_ASSIGNED = re.compile(  # within a text: name=value, "name": value
    rf"({_NAME}(?:=|['\"]?: ?)(?=\S){_EXAMPLE})(?:'[^']*'|\"[^\"]*\"|\[[^\]]*\]|[^\s,'\"\]}}&]+)",
    re.IGNORECASE,
)
_YAML_LINE = re.compile(rf"^([ \-]*{_NAME}:) +(?!null$).+$", re.IGNORECASE | re.MULTILINE)
_URL = re.compile(r"(\b[a-z][a-z0-9+.\-]*://)[^/\s'\"]+@", re.IGNORECASE)


def redact(value: Any, name: str = "") -> Any:
    """The same text, list or dict without secrets; `name` is the key that it was found under."""
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
    """A YAML document, a key a line, without secrets."""
    return _YAML_LINE.sub(rf"\1 '{HIDDEN}'", redact(text))
