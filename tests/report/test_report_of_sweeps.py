"""The page of a sweep: its table, the result against each swept option, the curves of all trials."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from alexnet_ddp.config.compose import compose
from alexnet_ddp.config.report import ReportConfig
from alexnet_ddp.config.space import read_space
from alexnet_ddp.report.charts import Mark, scatter_chart
from alexnet_ddp.report.command import main
from alexnet_ddp.report.sweep import sweep_page
from alexnet_ddp.runtime.errors import ConfigError
from alexnet_ddp.runtime.files import write_json
from alexnet_ddp.runtime.sweep_record import Evaluation, State, SweepRecord, Trial
from alexnet_ddp.sweep.table import show_results
from tests.report.browser import PROGRAM, browser
from tests.report.test_report import EVIL, train_row, val_row
from tests.test_runs import make_run

IDENTITY = {
    "sweep.sampler": "grid",
    "sweep.pruner": "asha",
    "sweep.metric": "val/top1",
    "optimizer.lr": "0.003,0.01,0.03,0.1",
    "model": "choice(alexnet,alexnet_bn)",
}


def make_sweep(directory: Path) -> SweepRecord:
    """Eight trials, of which 002 is the best complete one. One diverged, and one is running."""
    trials = []
    for number in range(8):
        lr, model = ("0.003", "0.01", "0.03", "0.1")[number // 2], ("alexnet", EVIL)[number % 2]
        results = [20 + number, 40 - (number - 2) ** 2]
        state = (State.complete, State.pruned, State.complete, State.failed)[number % 4]
        one = Trial(number, {"optimizer.lr": lr, "model": model}, state, hours=0.25)
        one.evaluations = [
            Evaluation(10 * k, float(v), counts=(v, 100)) for k, v in enumerate(results, 1)
        ]
        if state is State.failed:
            one.exit_code, one.message, one.evaluations = 70, f"diverged {EVIL}", []
        trials.append(one)
        rows = [train_row(5, 1.0), *(val_row(10 * k, 9.0 * k, v) for k, v in enumerate(results, 1))]
        overrides = ["data=folder", f"optimizer.lr={lr}", f"run.name={one.name}", "run.root=x"]
        make_run(directory / one.name, rows, overrides=overrides)
    trials[-1].state = State.running
    record = SweepRecord(directory, dict(IDENTITY), trials)
    record.write()
    return record


def options(directory: Path, *more: str) -> tuple[ReportConfig, list[str]]:
    given = [f"run.root={directory.parent}", f"run.name={directory.name}", *more]
    return compose("report", given), given


def test_a_sweep_has_a_page_with_all_its_trials_and_the_command_of_the_best(tmp_path, capsys):
    make_sweep(tmp_path / "s")
    main(*options(tmp_path / "s"))
    assert re.search(r"/s/report\.html: 0\.\d\d MB", capsys.readouterr().out)
    html = (tmp_path / "s/report.html").read_text()
    for text in (
        ">not complete</span>", "4 complete, 2 pruned, 1 failed", ">40 %</b>", "trial 002, step 20; 95 % interval", "30.9–49.8 %</span>, 100 images</small>",
        "<span>optimizer.lr</span><b>0.01</b>", "failed (70)", "logarithmic", "2 h", "run.name=s-best",
        "python -m alexnet_ddp.train data=folder optimizer.lr=0.01",
    ):  # fmt: skip
        assert text in html, text
    # 000: 36 of 100 images. 003 failed.
    cell = '<td class="n"><span class="nowrap">27.3–45.8 %</span></td>'
    assert f'<td class="n">36.0000</td>{cell}' in html
    assert html.count('<td class="n"></td><td class="n"></td><td class="n"></td><td>failed') == 1
    assert EVIL not in html
    assert "&lt;script&gt;" in html
    for wrong in ("max_images=0", "compare=[a]"):
        with pytest.raises(ConfigError, match=r"would be ignored: s is a sweep, .*; leave it out"):
            main(*options(tmp_path / "s", wrong))


def test_the_sweep_and_its_page_state_the_same_command_with_the_ranks_of_the_trial(
    tmp_path, capsys
):
    record = make_sweep(tmp_path / "s")
    space = read_space(
        ["data=folder", *(f"{key}={IDENTITY[key]}" for key in record.trials[0].values)]
    )
    recorded = tmp_path / "s/002/run.json"
    write_json(recorded, json.loads(recorded.read_text()) | {"world_size": 2, "num_nodes": 1})
    show_results(record, space)
    *_, said, command = capsys.readouterr().out.splitlines()
    assert said == f"best: trial 002, in {tmp_path}/s/002; to train it again:"
    assert command.split() == [
        *("torchrun", "--nproc_per_node=2", "-m", "alexnet_ddp.train"),
        *("data=folder", "optimizer.lr=0.01", "run.name=s-best"),
    ]
    assert sweep_page(tmp_path / "s").command == command.strip()
    recorded.unlink()
    show_results(record, space)
    assert capsys.readouterr().out.endswith(f"best: trial 002, in {tmp_path}/s/002\n")
    assert sweep_page(tmp_path / "s").command == ""


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (("searches",), [], "AttributeError"),
        (("searches",), {}, "it names no metric"),
        (("trials",), 3, "TypeError"),
        (("trials", 0, "hours"), "long", "ValueError"),
        (("trials", 0, "hours"), [1], "TypeError"),
        (("trials", 0, "exit_code"), "x", "ValueError"),
        (("trials", 0, "number"), float("inf"), "OverflowError"),
        (("trials", 0, "evaluations"), [[1, 90.0, 8, 7]], "8 correct of 7 images"),
        (("trials", 0, "values"), {"seed": "1"}, "its trials have values of different options"),
    ],
)
def test_a_damaged_record_of_a_sweep_is_one_line(tmp_path, path, value, reason):
    make_sweep(tmp_path / "s")
    file = tmp_path / "s/sweep.json"
    content = json.loads(file.read_text())
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=rf"^{file} cannot be read \(.*{reason}"):
        main(*options(tmp_path / "s"))


def test_each_swept_option_has_a_chart_of_the_results(tmp_path):
    page = sweep_page(make_sweep(tmp_path / "s").directory)
    lr, model = page.scatters
    assert (lr.title, lr.is_log_x, model.is_log_x) == ("optimizer.lr", True, False)
    assert [tick.text for tick in lr.x_ticks] == ["0.003", "0.01", "0.03", "0.1"]
    assert [tick.text for tick in model.x_ticks] == [EVIL[:14], "alexnet"]
    assert len(lr.marks) == len(model.marks) == 6  # trial 003 failed, 007 has no result
    x, y, best = lr.marks[-1]
    assert (
        best.text
        == "trial 002 (complete), optimizer.lr=0.01: val/top1 40 (95 % interval 30.9–49.8)"
    )
    assert (best.colour, y) == (0, min(y for _, y, _ in lr.marks))
    assert x == lr.x_ticks[1].at
    assert [kind for _, kind in page.kinds] == [
        "best trial", "complete", "pruned", "failed or running",
    ]  # fmt: skip
    metric, loss = page.charts
    assert len(metric.lines) == len(loss.lines) == 8
    assert metric.lines[-1].label == "trial 002"
    assert not metric.lines[-1].is_faint
    assert metric.values["series"][0]["label"] == "trial 002"


def test_a_trial_with_an_infinite_loss_is_in_the_table_and_not_in_a_chart(tmp_path):
    record = make_sweep(tmp_path / "s")
    record.identity["sweep.metric"] = "val/loss"
    for trial, loss in zip(record.trials, (1.5, 2.7e36, float("inf"))):
        trial.state, trial.evaluations = State.complete, [Evaluation(1, loss)]
    del record.trials[3:]
    record.write()
    main(*options(tmp_path / "s"))
    html = (tmp_path / "s/report.html").read_text()
    assert ">1.5000</td>" in html
    assert "interval" not in html
    assert ">2.7e+36</td>" in html
    assert [len(one.marks) for one in sweep_page(tmp_path / "s").scatters] == [2, 2]


def test_a_scatter_chart_has_an_axis_for_one_value_for_many_and_for_less_than_a_decade():
    def marks(*values: float) -> list[Mark]:
        return [Mark(x, 1.0 + k, 0, "") for k, x in enumerate(values)]

    one = scatter_chart("a", "", marks(0.1, 0.1), is_log=True)
    assert [tick.text for tick in one.x_ticks] == ["0.1"]
    many = scatter_chart("a", "", marks(*(k / 10 for k in range(11))))
    assert [tick.text for tick in many.x_ticks] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    narrow = scatter_chart("a", "", marks(*(2 + k / 2 for k in range(10))), is_log=True)
    places = [tick.at for tick in narrow.x_ticks]
    assert len(places) > 2
    assert min(b - a for a, b in pairwise(places)) >= 36


@pytest.mark.slow
@pytest.mark.skipif(PROGRAM is None, reason="no Chromium: apt-get install chromium")
def test_the_page_of_a_sweep_fits_a_phone_and_shows_a_trial_at_the_pointer(tmp_path):
    make_sweep(tmp_path / "s")
    main(*options(tmp_path / "s"))
    (tmp_path / "profile").mkdir()
    with browser(tmp_path / "profile") as page:
        for size in (1200, 390):
            page.open(tmp_path / "s/report.html", size)
            assert page.value("document.documentElement.scrollWidth") == size
            assert len(page.requests) == 1
        page.open(tmp_path / "s/report.html", 1200)
        page.value("document.querySelector('[data-chart]').scrollIntoView()")
        x, y = page.value("(r => [r.x + r.width / 2, r.y + r.height / 2])"
                          "(document.querySelector('[data-chart] svg').getBoundingClientRect())")  # fmt: skip
        page.move(x, y)
        tip = page.value("document.querySelector('.tip').innerText").splitlines()
        assert tip[0].startswith("step ")
        assert tip[1].startswith("trial 002: ")
        assert len(tip) == 9
