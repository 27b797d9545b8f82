"""Renders report.html: a template with its style and script, and nothing from outside."""

import hashlib
from base64 import b64encode
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from alexnet_ddp import __version__
from alexnet_ddp.report import charts, timeline
from alexnet_ddp.report.charts import Chart
from alexnet_ddp.report.classes import Classes
from alexnet_ddp.report.facts import Data, OptionRow, Summary
from alexnet_ddp.report.images import Filters, Shown
from alexnet_ddp.report.sweep import SweepPage
from alexnet_ddp.report.timeline import Timeline, duration
from alexnet_ddp.report.times import Profile, Times
from alexnet_ddp.runtime.accuracy import Interval, interval_text
from alexnet_ddp.runtime.sweep_record import result_text

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Looked:
    """What the best weights do with validation images. checkpoint: its name."""

    checkpoint: str
    num_images: int  # that were used
    num_val: int  # of all validation images
    top1: float  # of the used images, in percent
    top1_interval: Interval | None  # 95 %, in percent
    calibration_error: float  # in percent
    classes: Classes
    largest_losses: list[Shown]
    confident: list[Shown]
    filters: Filters | None


@dataclass(frozen=True)
class Page:
    """Everything that the page shows. Texts are escaped by the template."""

    runs: list[Summary]  # the first one is the page's own
    charts: list[Chart]
    times: Times | None
    profiles: list[Profile]
    timeline: Timeline | None
    looked: Looked | None
    why_not: str  # the reason if looked is None
    first_batch: str | None  # a data URI
    data: Data
    options: list[OptionRow]
    differences: list[tuple[str, list[str]]]
    num_differences_left_out: int
    environment: list[tuple[str, str]]
    command: str
    subtitle: str

    @property
    def name(self) -> str:
        return self.runs[0].name

    @property
    def values(self) -> list[dict[str, Any]]:
        """For the tooltips of the script."""
        return [chart.values for chart in self.charts]


def render(page: Page | SweepPage) -> str:
    """The HTML of a page."""
    template = "sweep.html.j2" if isinstance(page, SweepPage) else "page.html.j2"
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = {"duration": duration, "result": result_text, "interval": interval_text}
    environment.filters |= filters
    script = (_HERE / "page.js").read_text()
    digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        page=page,
        chart=charts,
        axis=timeline,
        style=Markup((_HERE / "page.css").read_text()),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
        version=__version__,
        now=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
