"""The report of a real run, in a real browser without a network."""

import json
import re
import signal
from pathlib import Path

import pytest
from PIL import Image

from alexnet_ddp.tracking.report_process import write_report
from tests.network import STEP_S, WAITING
from tests.ranks import started
from tests.report.browser import PROGRAM, browser
from tests.report.test_report import events_of
from tests.test_train import ENV, SMALL, rows, run

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("report")]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, image_folder) -> Path:
    """A run of two ranks that was killed and resumed, with the report that it wrote at its end."""
    root = tmp_path_factory.mktemp("report")
    options = [*SMALL, *WAITING[1:], f"data.root={image_folder}", f"run.root={root}", "run.name=x"]
    options += ["trainer.epochs=2", "trainer.global_batch_size=16", "checkpoint.save_every_steps=2"]
    options.append("logger.report=true")
    cache = {"XDG_CACHE_HOME": str(root / "cache")}
    with started("alexnet_ddp.train", options, 2, root, ENV | cache) as command:
        while command.is_running() and len(rows(root / "x", "train/loss")) < 5:
            pass
        command.send_signal(signal.SIGKILL)
        assert command.wait(60)
    assert not (root / "x/report.html").exists()
    done = run("train", *options, ranks=2, cwd=root, env=cache)
    assert done.returncode == 0, done.stdout
    assert re.search(r"report\.html: 0\.\d\d MB", done.stdout), done.stdout
    return root / "x"


def test_the_report_at_the_end_of_a_run_has_every_section_and_its_faults(run_dir):
    ends = [event for event, *_ in events_of(run_dir) if event != "save"]
    assert ends == ["lost", "end"]
    found = json.loads((run_dir / "rank_times.json").read_text())
    assert found["phases"] == [
        "data", "forward", "backward", "exchange", "update", "evaluation", "checkpoint",
    ]  # fmt: skip
    ranks = found["seconds"]
    assert len(ranks) == 2
    assert all(len(row) == 7 and row[1] >= STEP_S and min(row[2:]) > 0 for row in ranks)
    assert min(row["time/evaluation_s"] for row in rows(run_dir, "val/top1")) > 0
    events = map(json.loads, (run_dir / "events.jsonl").read_text().splitlines())
    assert min(one["seconds"] for one in events if one["event"] == "save") > 0
    html = (run_dir / "report.html").read_text()
    assert len(html) < 3_000_000
    for text in (
        ">complete</span>", "95 % interval", ">killed", "resumed from step", "Worst classes", "on 61 of 61",
        "Largest losses", "most of these are mistakes of the model", "filters of", "images of the first batch", "103 for training", "All work",
        "run.name=x-again", "A step, by rank", "torchrun --nproc_per_node=2",
    ):  # fmt: skip
        assert text in html, text
    assert "Not computed" not in html
    assert html.count('alt="the same image with its class activation map"') >= 12
    assert not re.search(r"""(src|href)=["']https?://""", html)


def test_a_report_that_fails_is_one_warning(run_dir, tmp_path, caplog):
    write_report(tmp_path / "none", [])
    (one,) = caplog.messages
    assert one.startswith(
        "report.html could not be written: run.name (none) is neither a run below"
    )


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium: apt-get install chromium")
def test_the_page_looks_the_same_without_a_network_and_fits_a_phone(run_dir, tmp_path):
    file, width = run_dir / "report.html", "document.documentElement.scrollWidth"
    shots = {}
    with browser(tmp_path) as page:
        for name, size, scheme in (
            ("light", 1200, "light"),
            ("dark", 1200, "dark"),
            ("phone", 390, "light"),
        ):
            page.open(file, size, scheme)
            assert page.value(width) == size, name
            assert page.requests[0] == file.as_uri()
            assert all(address.startswith("data:") for address in page.requests[1:])
            assert page.value("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
            page.screenshot(tmp_path / f"{name}.png")
            shots[name] = Image.open(tmp_path / f"{name}.png").convert("L")
        page.open(file, 1200)
        x, y = page.value("(r => [r.x + r.width / 2, r.y + r.height / 2])"
                          "(document.querySelector('[data-chart] svg').getBoundingClientRect())")  # fmt: skip
        page.move(x, y)
        tip = page.value("document.querySelector('.tip').innerText")
        assert tip.splitlines()[0].startswith("step ")
        assert re.search(r"^training: \d", tip, re.MULTILINE)
    assert shots["light"].size[0] == shots["dark"].size[0] == 1200
    assert shots["phone"].size[0] == 390
    assert shots["light"].getpixel((2, 2)) > 230 > 60 > shots["dark"].getpixel((2, 2))
