"""What is printed: names of files and classes are data, never markup and never control sequences."""

import contextlib
import os
import pty
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from alexnet_ddp import evaluate
from alexnet_ddp.cli import compose
from alexnet_ddp.data.sources import scan
from alexnet_ddp.doctor import command as doctor
from alexnet_ddp.doctor.findings import Finding
from alexnet_ddp.prepare import report
from alexnet_ddp.runtime.printing import printable, say
from alexnet_ddp.runtime.terminal import Console, Table
from alexnet_ddp.tracking.console import PlainConsole
from alexnet_ddp.training.evaluation import Evaluation

ROOT = Path(__file__).parents[2]
NAMES = ["cat [male]", "[/]", "[red]x", ":smile:", "[link=http://x]y[/link]", "\\[b]", "a" * 300]
UNSAFE = {
    "\x1b[31mred": r"\x1b[31mred",
    "a\nb": r"a\nb",
    "\udcff": r"\udcff",
    "\u202eexe": r"\u202eexe",
    "\x9b2J": r"\x9b2J",
}


def show_evaluation(names):
    result = Evaluation.__new__(Evaluation)
    row = {
        "val/top1": 1.0,
        "val/top5": 1.0,
        "val/loss": 1.0,
        "val/correct1": 1,
        "val/correct5": 1,
        "val/num_images": 1,
    }
    object.__setattr__(result, "row", row)
    object.__setattr__(result, "per_class", torch.ones(len(names), 3, dtype=torch.int64))
    evaluate._report(result, names, {"weights": names[0]})


def show_doctor(names):
    report = doctor.Report([Finding(name, name, name) for name in names], [], [], 1)
    doctor._print_report(report, type("Asked", (), {"json": None}))


def show_stats(names):
    report._print_groups("groups", [[name] for name in names[:4]] + [names[4:]])


def show_plain(names):
    for name in names:
        PlainConsole(1).say(name)


def show_table(names):
    table = Table(*names, title=names[0])
    table.add_row(*names)
    Console().print(table)


SHOWN = [show_evaluation, show_doctor, show_plain, show_table, show_stats]


@pytest.mark.parametrize("show", SHOWN, ids=lambda f: f.__name__)
def test_names_are_printed_completely_and_literally(show, capsys):
    show(NAMES)
    out = capsys.readouterr().out
    if show is show_doctor:  # its cells are folded at a width for reading
        assert out.count("a") >= len(NAMES[-1])
        assert all(name in out for name in NAMES[:-1])
    else:
        assert all(name in out for name in NAMES)


@pytest.mark.parametrize("show", SHOWN, ids=lambda f: f.__name__)
def test_control_characters_are_escaped(show, capsys):
    show(list(UNSAFE))
    out = capsys.readouterr().out
    assert all(shown in out for shown in UNSAFE.values())
    assert "\x1b" not in out
    assert "\udcff" not in out


def test_printable_keeps_letters_of_all_alphabets():
    assert printable("Ω 猫 é 😀 a_b-c.jpg") == "Ω 猫 é 😀 a_b-c.jpg"
    assert {name: printable(name) for name in UNSAFE} == UNSAFE


def in_process(body, **options):
    code = "import sys\nfrom alexnet_ddp.runtime.printing import say\nfrom alexnet_ddp.runtime.terminal import Console, Table\n"
    code += (
        "def table(text):\n    t = Table('image')\n    t.add_row(text)\n    Console().print(t)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)} | options.pop("env", {})
    return subprocess.Popen(
        [sys.executable, "-c", code + textwrap.dedent(body)], env=env, **options
    )


def test_a_reader_that_ended_does_not_change_the_exit_code():
    read, write = os.pipe()
    os.close(read)
    ended = in_process(
        "table('x'); say('y'); table('z'); sys.exit(3)", stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert ended.communicate(timeout=20)[1] == b""
    assert ended.returncode == 3


def test_names_outside_of_the_locale_are_escaped():
    env = {"PYTHONIOENCODING": "latin-1"}
    ended = in_process("table('Ω'); say('猫')", env=env, stdout=subprocess.PIPE)
    out = ended.communicate(timeout=20)[0].decode("latin-1")
    assert ended.returncode == 0
    assert r"\u03a9" in out
    assert r"\u732b" in out


def test_the_dash_of_an_interval_is_printed_in_ascii_if_the_locale_has_no_other():
    body = ascii("table('94.1–97.3'); say('猫–猫 94.1–97.3 %'); say('1–2', sys.stderr)")[1:-1]
    env = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    ended = in_process(body, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, error = (text.decode("ascii") for text in ended.communicate(timeout=20))
    assert out.count("94.1-97.3") == 2
    assert r"\u732b-\u732b 94.1-97.3 %" in out
    assert error == "1-2\n"
    utf8 = in_process(body, env={"PYTHONUTF8": "1"}, stdout=subprocess.PIPE)
    assert utf8.communicate(timeout=20)[0].decode().count("94.1–97.3") == 2


def test_on_a_terminal_long_names_are_folded_and_not_cut():
    terminal, end = pty.openpty()
    program = in_process(
        "table('0123456789' * 20)", env={"TERM": "xterm", "COLUMNS": "40"}, stdout=end
    )
    os.close(end)
    output = b""
    with contextlib.suppress(OSError):  # EIO: the other side is closed
        while chunk := os.read(terminal, 65536):
            output += chunk
    os.close(terminal)
    assert program.wait(10) == 0
    assert sum(output.decode().count(digit) for digit in "0123456789") >= 200
    assert "…" not in output.decode()


def test_the_description_of_a_progress_bar_is_plain_text(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(scan.watched([1], 1, "indexing photos[/x] \x1b[2J")) == [1]
    from alexnet_ddp.runtime.terminal import column, progress_bar

    bar = progress_bar()
    bar.add_task("indexing photos[/x] :smile:", total=1)
    assert column("{task.description}").render(bar.tasks[0]).plain == "indexing photos[/x] :smile:"


def test_the_first_line_of_a_run_has_its_recipe():
    from alexnet_ddp.tracking.console import recipe

    own = ["data=folder", "data.root=x"]
    assert (
        recipe(compose(own), 47)
        == "30 epochs of SGD, lr 0.025 = 0.1 x 64 / 256, Cosine after 47 steps of warm-up"
    )
    assert recipe(compose(["scheduler=constant"]), 0) == "8 epochs of SGD, lr 0.05, Constant"


def test_say_prints_one_line(capsys):
    say("a\nb")
    assert capsys.readouterr().out == "a\\nb\n"
