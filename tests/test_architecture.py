"""The shape of the house, as a test: who may import whom, how long a room and a function may be."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "alexnet_ddp"
ROOTS = {"train", "evaluate", "predict", "prepare"}  # one command each: know everything, known by nobody
SHARED = {"config", "distributed", "metrics", "errors", "rng", "atomic"}  # may be imported by any room
MEETING = {  # below the roots, the rooms that bring others together
    "engine": {"data", "model", "optim", "parallel", "resilience"},
    "replay": {"cli", "data", "engine", "model", "resilience", "tracking"},
    "cli": set(),
}
ONLY_IN = {  # library -> the modules that may know that it exists
    r"hydra|omegaconf": {"config", "cli"},
    r"wandb|tensorboard|torch\.utils\.tensorboard": {"tracking"},
    r"torch\.distributed": {"distributed", "parallel"},
    r"PIL|cv2|simplejpeg": {"data"},
    r"scipy": {"data"},
    r"pyspark": {"spark"},  # data/packing/spark.py
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in (node for node in nodes if isinstance(node, ast.ImportFrom)):
        names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_module_keeps_its_place(path):
    here, names = room(path), imports(path)
    known = {n.split(".")[1] for n in names if n.startswith("alexnet_ddp.") and n != "alexnet_ddp.__version__"}
    if here not in ROOTS:
        strangers = known - SHARED - {here} - MEETING.get(here, set())
        assert not strangers, f"{here} imports {sorted(strangers)}"
    for libraries, allowed in ONLY_IN.items():
        used = [n for n in names if re.match(rf"({libraries})(\.|$)", n)]
        assert not used or {here, path.stem} & allowed, f"{here} must not import {used}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_grows_too_long(path):
    assert path.read_text().count("\n") <= 250, "split it, or cut it"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"
            count = len([a for a in [*node.args.args, *node.args.kwonlyargs] if a.arg not in ("self", "cls")])
            assert count <= 6, f"{node.name} has {count} parameters"


def test_the_config_is_the_only_schema_and_the_tree_has_no_junk_rooms():
    names = {p.stem for p in FILES} | {p.name for p in PACKAGE.iterdir()}
    assert not names & {"utils", "misc", "helpers", "common", "core"}


def test_the_top_level_is_what_the_readers_expect():
    import subprocess

    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=PACKAGE.parent, check=False).stdout
    if not listed:
        pytest.skip("not a git checkout")  # an sdist carries the tests too; beside its files there may lie anything
    top = {line.split("/")[0] for line in listed.splitlines()}
    visible = {name for name in top if not name.startswith(".")}
    assert visible <= {
        *("pyproject.toml", "README.md", "LICENSE", "conf", "alexnet_ddp", "launch", "tests", "slurm", "benchmarks"),
    }
