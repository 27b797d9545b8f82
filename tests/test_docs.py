"""The documentation agrees with the code: links, commands, options, files and published numbers."""

import ast
import importlib.util
import json
import re
import shlex
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

import alexnet_ddp
from alexnet_ddp.cli import with_positions
from alexnet_ddp.config.compose import compose
from alexnet_ddp.config.overrides import find_option
from alexnet_ddp.config.schema import ROOTS, group_names, groups, options, sections
from alexnet_ddp.config.space import first_point
from alexnet_ddp.runtime import errors
from tests.drills.__main__ import table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
FRONT = [ROOT / "README.md", ROOT / "README.zh.md"]
DOCS = sorted((ROOT / "docs").glob("*.md"))
OTHERS = [ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "slurm/README.md")]
PAGES = [*FRONT, *DOCS, *OTHERS]
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
# Attributes of load_run()'s result, which look like options.
ATTRIBUTES = {"run.model", "run.transform", "run.classes", "run.config", "run.checkpoint"}
# Options that may be given as the first arguments.
POSITIONS = {"runs": ("root",), "compare": ("first", "second")}
FOLDERS = ("alexnet_ddp", "benchmarks", "conf", "docs", "launch", "slurm", "tests")


# --- the adapters to the configuration ----------------------------------------------------------------------------


def is_option(name: str) -> bool:
    return any(find_option(name, root) is not None for root in ROOTS.values())


@cache
def heads() -> set[str]:
    """The first parts of option names, such as `trainer`."""
    return {head for root in ROOTS.values() for head in (*sections(root), *groups(root))}


def no_options() -> set[str]:
    """What may stand before `=` without a dot: options of the top level, and groups."""
    return {name for root in ROOTS.values() for name in (*options(root), *group_names(root))}


# --- reading Markdown -----------------------------------------------------------------------------------------------


@cache
def blocks(page: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """The lines of text, and the code blocks as (language, text). Indented blocks have the language "indented"."""
    text, code = [], []
    language, lines = "", None
    previous_blank = True
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            if lines is None:
                language, lines = line[3:].strip() or "fenced", []
            else:
                code.append((language, "\n".join(lines)))
                lines = None
        elif lines is not None:
            lines.append(line)
        elif line.startswith("    ") and (previous_blank or (code and code[-1][0] == "open")):
            if not (code and code[-1][0] == "open"):
                code.append(("open", ""))
            code[-1] = ("open", f"{code[-1][1]}{line[4:]}\n")
        elif line.strip():
            if code and code[-1][0] == "open":
                code[-1] = ("indented", code[-1][1])
            text.append(line)
        elif code and code[-1][0] == "open":
            code[-1] = ("open", code[-1][1] + "\n")
        previous_blank = not line.strip()
    return text, [("indented" if kind == "open" else kind, body) for kind, body in code]


@cache
def spans(page: Path) -> list[str]:
    """Inline code."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", "\n".join(blocks(page)[0]))


@cache
def command_lines(page: Path) -> list[str]:
    """Lines of code blocks, continuations joined, and inline code that has several words."""
    bodies = [body for language, body in blocks(page)[1] if language != "python"]
    joined = "\n".join(bodies).replace("\\\n", " ")
    return [line.strip() for line in (*joined.splitlines(), *spans(page)) if line.strip()]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of the headings."""
    found = [re.match(r"#+ (.*)", line) for line in blocks(page)[0]]
    titles = [re.sub(r"[^\w\- ]", "", match[1].lower()) for match in found if match]
    return {title.replace(" ", "-") for title in titles}


def links(page: Path) -> list[str]:
    text = re.sub(r"(?<!`)`[^`\n]+`(?!`)", "", "\n".join(blocks(page)[0]))
    return re.findall(r"\]\(([^)\s]+)\)", text)


# --- command lines --------------------------------------------------------------------------------------------------

SCRIPTS = {"demo.sh": None, "local.sh": None, "node.sh": None, "spark.sh": "prepare"}


def words(line: str) -> list[str]:
    """The words of a command line without its comment; none if it is not shell."""
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # a table or a drawing
        return []


def command_of(line: str) -> tuple[str, list[str]] | None:
    """The command of this project that a line runs, and its options; None for any other line."""
    parts, env = words(line), {}
    while parts and re.fullmatch(r"[A-Z_]+=\S*", parts[0]):
        name, _, value = parts.pop(0).partition("=")
        env[name] = value
    program, *rest = parts or [""]
    launched = env.get("COMMAND", "train")
    if program in ("python", "torchrun") and "-m" in rest:
        return of_module(*rest[rest.index("-m") + 1 :])
    if program == "alexnet-ddp":
        return of_module("alexnet_ddp", *rest)
    if program in ("sbatch", "spark-submit"):
        return of_job(rest, launched)
    folder, _, script = program.removeprefix("./").partition("/")
    if folder == "launch" and script in SCRIPTS:
        return SCRIPTS[script] or launched, rest
    return None


def of_module(module: str, *arguments: str) -> tuple[str, list[str]] | None:
    """`launch` has no options to compose, and neither has --version; some commands take paths, too."""
    name, rest = module.removeprefix("alexnet_ddp."), list(arguments)
    if module == "alexnet_ddp":
        name, rest = (rest[0], rest[1:]) if rest else ("launch", [])
    if (name == module and module != "alexnet_ddp") or name == "launch" or name.startswith("-"):
        return None
    if name in POSITIONS:
        return name, with_positions(rest, POSITIONS[name])
    return name, [word for word in rest if "=" in word] if name == "replay" else rest


def of_job(rest: list[str], launched: str) -> tuple[str, list[str]] | None:
    at = next((i for i, word in enumerate(rest) if word.endswith((".sbatch", ".py"))), None)
    if at is None:
        return None
    name = Path(rest[at]).stem
    if name == "sweep":  # the file of lines comes first
        at += 1
    return {"train": launched, "sweep": "train", "__main__": "prepare"}.get(name, name), rest[
        at + 1 :
    ]


def shown(overrides: list[str]) -> list[str]:
    """Without Hydra's options, which only show something. Placeholders are ordinary texts."""
    values = {overrides.index(word) + 1 for word in overrides if word in ("--cfg", "-c")}
    return [
        word for i, word in enumerate(overrides) if not word.startswith("-") and i not in values
    ]


def cases() -> list[tuple[str, tuple[str, ...]]]:
    found: dict[tuple[str, tuple[str, ...]], None] = {}
    for page in PAGES:
        for line in command_lines(page):
            command = command_of(line)
            is_only_named = line in spans(page) and not (command and shown(command[1]))
            if (
                command is not None
                and not is_only_named
                and not any("..." in w for w in command[1])
            ):
                found[command[0], tuple(shown(command[1]))] = None
    return list(found)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "overrides"), cases(), ids=lambda x: str(x)[:100])
def test_every_command_line_of_the_documentation_composes(command, overrides):
    command = command.replace("-", "_")
    assert command in ROOTS, f"{command} is not a command"
    given = list(overrides)
    compose(command, first_point(given) if command == "sweep" else given)


def test_the_reader_of_command_lines_finds_them_and_wrong_ones_are_refused():
    known = {
        "python -m alexnet_ddp.plan nodes=2  # a comment": ("plan", ["nodes=2"]),
        "torchrun --nproc_per_node=8 -m alexnet_ddp.train seed=1": ("train", ["seed=1"]),
        "COMMAND=doctor NPROC=2 launch/local.sh seed=1": ("doctor", ["seed=1"]),
        "sbatch --array=1-2%1 slurm/sweep.sbatch lr.txt seed=1": ("train", ["seed=1"]),
        "COMMAND=doctor sbatch --nodes=4 slurm/train.sbatch": ("doctor", []),
        "spark-submit --master yarn alexnet_ddp/prepare/__main__.py root=x": (
            "prepare",
            ["root=x"],
        ),
        "WORKERS=2 launch/spark.sh root=x": ("prepare", ["root=x"]),
        "alexnet-ddp plan nodes=2": ("plan", ["nodes=2"]),
        "python -m alexnet_ddp.replay runs/x/replay.json": ("replay", []),
        "alexnet-ddp runs sweeps sort=top1": ("runs", ["root=sweeps", "sort=top1"]),
        "alexnet-ddp compare a b": ("compare", ["first=a", "second=b"]),
        "alexnet-ddp launch DIR": None,
        "alexnet-ddp --version": None,
        "pip install x": None,
    }
    for line, expected in known.items():
        assert command_of(line) == expected
    assert len(cases()) > 40
    with pytest.raises(Exception, match="epoch"):
        compose("train", ["trainer.epoch=3"])


@EACH_PAGE
def test_every_link_and_anchor_resolves(page):
    for link in links(page):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} in {page.name}"
        if anchor:
            assert anchor in anchors(target), f"{link} in {page.name}"


@EACH_PAGE
def test_every_file_that_is_named_exists(page):
    names = [
        word
        for line in command_lines(page)
        for word in re.split(r"[\s'\"(),]+", line)
        if word.removeprefix("./").startswith(tuple(f"{folder}/" for folder in FOLDERS))
    ]
    for name in names:
        if re.search(
            r"NAME|OUT|GROUP|[{}$<]|\.json$|\.png$", name
        ):  # a placeholder, or what a command writes
            continue
        found = list(ROOT.glob(name.removeprefix("./").rstrip("/").rstrip(".,;:")))
        assert found, f"{name} in {page.name}"


@EACH_PAGE
def test_every_option_that_is_named_exists(page):
    code = [*command_lines(page), *spans(page)]
    given = {
        name
        for line in code
        for name in re.findall(r"(?<![\w.-])\+?([a-z_]+(?:\.[a-z_0-9]+)+)=", line)
    }
    for name in given:
        assert is_option(name), f"{name}= in {page.name}"
    named = re.compile(rf"(?:{'|'.join(sorted(heads()))})\.[a-z][a-z_0-9]+")
    for span in set(spans(page)) - ATTRIBUTES:
        if named.fullmatch(span) and not re.search(
            r"\.(py|json|csv|npy|yaml|safetensors|jsonl|onnx|onnx\.data|pt2)$", span
        ):
            assert is_option(span), f"{span} in {page.name}"
        found = re.fullmatch(r"([a-z_]+)=[^=]*", span)
        if found and not span.endswith(("=True", "=False")):  # these are Python's
            assert found[1] in no_options(), f"{span} in {page.name}"


@EACH_PAGE
def test_options_of_programs_exist(page):
    """Options of benchmarks and launchers that begin with dashes, and the extras of pip."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for line in command_lines(page):
        parts = words(line)
        if parts[:1] == ["sudo"]:
            parts = parts[1:]
        parts[:1] = [word.removeprefix(".venv-bench/bin/") for word in parts[:1]]
        if len(parts) > 1 and parts[0] == "python" and parts[1].startswith("benchmarks/"):
            source = (ROOT / parts[1]).read_text()
            for option in (word for word in parts[2:] if word.startswith("--")):
                assert f'"{option.partition("=")[0]}"' in source, line
        if parts[:2] == ["pip", "install"]:
            for wanted in re.findall(r"\[([\w,-]+)\]", line):
                assert set(wanted.split(",")) <= set(extras), line
        if parts[:3] == ["python", "-m", "pytest"]:
            for word in parts:
                if word.startswith("tests"):
                    assert (ROOT / word).exists(), line


@EACH_PAGE
def test_python_examples_compile_and_their_imports_exist(page):
    for language, body in blocks(page)[1]:
        if language != "python":
            continue
        for node in ast.walk(ast.parse(body)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module]
            for module in modules:
                assert importlib.util.find_spec(module.split(".")[0]) or "my_" in module, module


# --- what the pages state -------------------------------------------------------------------------------------------


def test_readme_is_a_front_door_that_links_every_page():
    assert FRONT[0].read_text().count("\n") <= 150
    linked = {link.partition("#")[0] for link in links(FRONT[0])}
    assert {f"docs/{page.name}" for page in DOCS} <= linked


def test_the_chinese_readme_has_the_same_commands_links_and_tables():
    english, chinese = FRONT

    def commands(page):
        return [
            words(line) for _, body in blocks(page)[1] for line in body.splitlines() if words(line)
        ]

    def targets(page):
        found = [link for link in links(page) if link.startswith(("docs/", "benchmarks/", "http"))]
        return sorted({re.sub(r"#.*[^\x00-\x7f].*", "", link) for link in found})

    def rows(page):
        return sum(line.startswith("|") for line in blocks(page)[0])

    assert commands(english) == commands(chinese)
    assert targets(english) == targets(chinese)
    assert rows(english) == rows(chinese)
    assert len(anchors(english)) == len(anchors(chinese))


def test_the_numbers_of_the_readme_are_those_of_the_benchmarks():
    loader = json.loads((RESULTS / "loader.json").read_text())["results"]
    wire = json.loads((RESULTS / "communication.json").read_text())["results"]
    rows = {row["id"]: row for row in (*loader, *wire) if row["id"]}
    packed = {row["peer"].split(",")[0]: row for row in loader if row["what"] == rows["P6"]["what"]}
    lightning = next(
        row
        for row in wire
        if "64 px, 1 Gbit/s" in row["what"] and "Lightning" in row["what"] and "K=2" in row["what"]
    )
    cells = [
        *(f"{rows[part][side]:,.0f}" for part in ("P5", "P6") for side in ("ours", "theirs")),
        *(f"{packed[peer]['theirs']:,.0f}" for peer in ("litdata", "mosaicml")),
        f"{rows['P1']['ours']:.1f} MB", f"{rows['P1']['theirs']:.0f} MB",
        f"{rows['P2']['ours']:.2f}", f"{rows['P2']['theirs']:.2f}", f"{lightning['ours']:.2f}",
        f"{rows['P12']['theirs']:.1f}",
    ]  # fmt: skip
    for page in FRONT:
        peers = "\n".join(line for line in blocks(page)[0] if line.count("|") == 8)
        for cell in cells:
            assert cell in peers, f"{cell} in {page.name}"


def test_the_tables_that_programs_write_are_current():
    drills = json.loads((RESULTS / "drills.json").read_text())
    assert table(drills) in (ROOT / "docs/faults-and-drills.md").read_text()
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import communication_picture
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    turns = json.loads((RESULTS / "communication.json").read_text())["turns"]
    assert communication_picture.table(turns) in (ROOT / "docs/benchmarks.md").read_text()


def test_the_table_of_exit_codes_is_complete():
    page = (ROOT / "docs/checkpoints-and-resume.md").read_text()
    ends = [
        end
        for end in vars(errors).values()
        if isinstance(end, type) and issubclass(end, errors.RunError)
    ]
    codes = {end.exit_code for end in ends}
    assert codes >= {64, 65, 66, 70, 74, 75, 76}
    for code in codes:
        assert f"| {code} |" in page, code


def test_the_page_of_the_api_has_every_public_name():
    page = (ROOT / "docs/api.md").read_text()
    for name in alexnet_ddp.__all__:
        assert re.search(rf"`{name}[`(]", page), name


@EACH_PAGE
def test_no_page_names_the_place_of_its_making(page):
    assert not re.search(r"(?<![\w.])/work/|\.\./shared|localhost:\d", page.read_text())
