"""The structure of the package, as a test: which package may import which, and how long a module may be."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "alexnet_ddp"
# A command may import everything, and nothing imports a command. test_module_keeps_its_place knows `cli` too.
COMMANDS = {
    *("train", "evaluate", "predict", "prepare", "plan", "doctor", "replay", "lr_find"),
    *("launch", "export", "report", "runs", "compare", "sweep"),
    "api",
}
SHARED = {"config", "plugins", "rng", "runtime"}  # every package may import these
MAY_IMPORT = {  # package -> the others that it may import
    "__init__": {"api"},  # when a name of the API is used
    "checkpoint": set(),
    "cli": set(),
    "config": {"model"},  # what a network of timm expects of its input
    "cost_model": {"parallel"},  # which layers a hybrid splits
    "data": set(),
    "model": set(),
    "parallel": set(),
    "runtime": set(),
    "tracking": set(),
    "training": {"checkpoint", "cost_model", "data", "model", "parallel", "tracking"},
}
ONLY_IN = {  # library -> the modules that may import it: packages, or files of a package
    r"hydra|omegaconf": {"config", "cli"},
    r"wandb|tensorboard|torch\.utils\.tensorboard": {"tracking"},
    # doctor: a store without a group, and messages that only a timing sends
    r"torch\.distributed": {"runtime/distributed", "parallel", "doctor/rendezvous", "doctor/links"},
    r"PIL|cv2|simplejpeg": {"data", "prepare", "api"},  # api: the type of an argument
    r"scipy": {"data"},
    r"rich": {"runtime/terminal", "tracking/console"},  # console: the progress bar of a training
    r"matplotlib": {"cost_model/sweep"},
    r"onnx|onnxruntime|onnxscript": {"export/formats"},
    r"peft": {"model/adapters", "training/adalora"},
    r"jinja2|markupsafe": {"report/page"},
    # File locks; wandb_process imports nothing of this package.
    r"fcntl": {"runtime/files", "tracking/wandb_process"},
    r"pyspark": {"prepare/spark"},
    r"pyarrow": {"runtime/tables", "data/sources/table", "prepare/tables"},
    r"sklearn": {"training/class_metrics"},
    r"optuna": {"sweep/samplers"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def package(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in (node for node in nodes if isinstance(node, ast.ImportFrom)):
        names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_module_keeps_its_place(path):
    here, names = package(path), imports(path)
    module = str(path.relative_to(PACKAGE).with_suffix(""))
    known = {
        n.split(".")[1]
        for n in names
        if n.startswith("alexnet_ddp.") and n != "alexnet_ddp.__version__"
    }
    if here not in COMMANDS:
        others = known - SHARED - {here} - MAY_IMPORT.get(here, set())
        assert not others, f"{module} imports {sorted(others)}"
    for libraries, allowed in ONLY_IN.items():
        used = [n for n in names if re.match(rf"({libraries})(\.|$)", n)]
        assert not used or {here, module} & allowed, f"{module} must not import {used}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_grows_too_long(path):
    assert path.read_text().count("\n") <= 600, "split the module by subject, or cut it"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} has more than 60 lines"
            count = len([a for a in node.args.args if a.arg not in ("self", "cls")])
            assert count <= 6, f"{node.name} has {count} positional parameters"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_what_is_printed_is_escaped(path):
    """Names come from anywhere: say(), Table and Console escape them; rich's own classes and print() do not."""
    if (
        path.name == "printing.py" or path.parent.name + path.name == "checkpointwriter.py"
    ):  # a pipe to another process
        return
    calls = {
        n.func.id
        for n in ast.walk(ast.parse(path.read_text()))
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
    }
    assert "print" not in calls, "use say() of runtime/printing.py"
    if path.name != "terminal.py":
        assert not calls & {"TextColumn", "RichTable", "RichConsole", "Panel", "Markdown"}, (
            "use terminal.py"
        )
        assert not re.search(
            r"rich\.(table|console import .*Console|markup)|markup=True|emoji=True",
            path.read_text(),
        )


RUNS_CODE = r"""
    \b(pickle|cPickle|_pickle|dill|cloudpickle|joblib|shelve|marshal)\.(loads?|Unpickler|open)\b  # unpickles
    | \bread_pickle\b | allow_pickle\ *=\ *True | \bpickle_load
    | \bnp\.load\( (?! [^\n]* allow_pickle=False )
    | \btorch\.load\( (?! [^\n]* weights_only=True ) | weights_only\ *=\ *False | \btorch\.(jit\.load|package|hub\.load\w*)\b | \bfrom\ torch\.hub\b
    | \.extract(all)?\( | \bunpack_archive\b  # writes where an archive says
    | \byaml\.(load|unsafe_load|full_load)\b | \bloadmat\( (?! io\.BytesIO )
    | \bos\.(system|popen)\b | shell\ *=\ *True | (?<![.\w])(eval|exec|__import__)\(
    | \bhydra\.utils\b | \binstantiate\(  # calls what a configuration names
"""


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_that_is_read_can_run_code(path):
    found = re.search(RUNS_CODE, path.read_text(), re.VERBOSE)
    assert found is None, f"{found[0]!r} may run what a file says; see SECURITY.md"


def test_the_search_for_code_that_may_run_finds_it():
    for text in (
        "pickle.load(f)", "np.load(path)", "torch.load(path, map_location=x)", "archive.extractall(x)", "eval(text)",
        "torch.hub.load_state_dict_from_url(x)", "yaml.load(f)", "subprocess.run(x, shell=True)", "np.load(p, allow_pickle=True)", "instantiate(cfg)",
    ):  # fmt: skip
        assert re.search(RUNS_CODE, text, re.VERBOSE), text
    for text in (
        "np.load(p, allow_pickle=False)",
        "torch.load(p, weights_only=True)",
        "model.eval()",
        "safe_load(f)",
    ):
        assert not re.search(RUNS_CODE, text, re.VERBOSE), text


def test_objects_are_pickled_only_between_the_ranks_of_a_run():
    users = {
        p.name
        for p in FILES
        if re.search(r"(broadcast|gather|scatter|send|recv)_object(_list)?\(", p.read_text())
    }
    assert users <= {"distributed.py"}


def test_the_config_is_the_only_schema_and_the_tree_has_no_junk_modules():
    names = {p.stem for p in FILES} | {p.name for p in PACKAGE.iterdir()}
    assert not names & {"utils", "misc", "helpers", "common", "core"}


def test_the_top_level_is_what_the_readers_expect():
    import subprocess

    listed = subprocess.run(
        ["git", "ls-files"], capture_output=True, text=True, cwd=PACKAGE.parent, check=False
    ).stdout
    if not listed:
        pytest.skip(
            "not a git checkout"
        )  # an sdist carries the tests too; beside its files there may lie anything
    top = {line.split("/")[0] for line in listed.splitlines()}
    visible = {name for name in top if not name.startswith(".")}
    assert visible <= {
        *(
            "pyproject.toml",
            "README.md",
            "SECURITY.md",
            "LICENSE",
            "conf",
            "alexnet_ddp",
            "launch",
            "tests",
            "slurm",
        ),
        *("benchmarks", "docs", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "README.zh.md"),
    }


@pytest.mark.xdist_group("some group")
def test_pytest_xdist_keeps_groups_together(request):
    """It reads a group from the end of a test's id. pytest-xdist 3.8 under pytest 9.2 adds none, without a word."""
    if hasattr(request.config, "workerinput"):
        assert request.node.nodeid.endswith("@some group")
