"""Line and scatter charts: scales, ticks and SVG paths, which the template draws."""

import math
from dataclasses import dataclass, field
from typing import Any

# Units of the SVG. The page scales it to the width of its column.
WIDTH, HEIGHT = 420, 220
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 10, 26
_MAX_POINTS, _FEWEST = 800, 60  # of all lines together; of one line
_NUM_TICKS = 5
_LOG_RATIO = 200  # values that differ by this factor get a logarithmic axis, if that is allowed
_INSET = 14  # of the dots of a scatter chart, from the ends of the axis
_MAX_NAME = 14  # characters of a text on an axis
_MIN_DISTANCE = 36  # of two texts on an axis

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """A line. Points are in the order of x; a value that is not finite interrupts the line."""

    label: str
    colour: int  # position among the colours of the page
    points: Points
    is_faint: bool = False
    has_dots: bool = False  # a dot for each value


@dataclass(frozen=True)
class Line:
    """A drawn series."""

    label: str
    colour: int
    path: str  # the attribute d of an SVG path
    dots: Points
    is_faint: bool


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Chart:
    """A chart in the units of the SVG. values: for the tooltips of the page's script."""

    title: str
    unit: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    values: dict[str, Any] = field(default_factory=dict)
    is_log: bool = False
    note: str = ""


@dataclass(frozen=True)
class Scale:
    """Maps [low, high] to [start, end] in units of the SVG, also with start > end."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.is_log:
            low, high, at = math.log10(low), math.log10(high), math.log10(value)
        share = (at - low) / (high - low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[Tick]:
        values = _log_ticks(self.low, self.high) if self.is_log else _ticks(self.low, self.high)
        return [Tick(self(value), short(value)) for value in values]


def _dots(one: Series, points: Points, x: Scale, y: Scale) -> Points:
    """Where the dots of a series are: on each value, or on its only value, which has no line."""
    finite = [(x(a), y(b)) for a, b in points if math.isfinite(b)]
    return finite if one.has_dots or len(finite) == 1 else []


def line_chart(
    title: str, unit: str, series: list[Series], *, may_be_log: bool = False, note: str = ""
) -> Chart | None:
    """A chart over the steps; None if no series has a finite value.

    may_be_log: use a logarithmic axis if the values are positive and differ by a large factor.
    """
    series = [one for one in series if any(math.isfinite(y) for _, y in one.points)]
    if not series:
        return None
    values = [y for one in series for _, y in one.points if math.isfinite(y)]
    steps = [x for one in series for x, _ in one.points]
    x = Scale(*_apart(min(steps), max(steps)), LEFT, WIDTH - RIGHT)
    y = _y_scale(values, may_be_log)
    limit = max(_FEWEST, _MAX_POINTS // len(series))
    kept = [thinned(one.points, limit) for one in series]
    lines = [
        Line(
            one.label,
            one.colour,
            svg_path(points, x, y),
            _dots(one, points, x, y),
            one.is_faint,
        )
        for one, points in zip(series, kept)
    ]
    shown = {
        "x": [x.low, x.high, LEFT, WIDTH - RIGHT],
        "series": [
            {"label": one.label, "colour": one.colour, "points": _plain(points)}
            for one, points in zip(series, kept)
        ],
    }
    return Chart(title, unit, x.ticks(), y.ticks(), lines, shown, y.is_log, note)


@dataclass(frozen=True)
class Mark:
    """A dot of a scatter chart. x: a number, or one of several texts. text: for the tooltip."""

    x: float | str
    y: float
    colour: int
    text: str
    is_faint: bool = False


@dataclass(frozen=True)
class Scatter:
    """A scatter chart in the units of the SVG. marks: place, and the mark itself."""

    title: str
    unit: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    marks: list[tuple[float, float, Mark]]
    is_log_x: bool
    is_log: bool


def scatter_chart(
    title: str, unit: str, marks: list[Mark], *, is_log: bool = False, may_be_log: bool = False
) -> Scatter:
    """A chart of `marks`, of which all have a number as x, or all have a text.

    Texts are placed in the order in which they first come. is_log: of the axis of x. may_be_log: of
    the axis of y, if its values are positive and differ by a large factor.
    """
    names = list(dict.fromkeys(one.x for one in marks if isinstance(one.x, str)))
    at = {name: float(k) for k, name in enumerate(names)}
    places = [at[one.x] if isinstance(one.x, str) else one.x for one in marks]
    low, high = min(places), max(places)
    if names:
        low, high = low - 0.5, high + 0.5
    y = _y_scale([one.y for one in marks], may_be_log)
    x = Scale(*_apart(low, high), LEFT + _INSET, WIDTH - RIGHT - _INSET, is_log)
    x_ticks = [Tick(x(place), str(name)[:_MAX_NAME]) for name, place in at.items()]
    if not names:
        x_ticks = _ticks_at(x, places)
    shown = [(x(place), y(one.y), one) for place, one in zip(places, marks)]
    return Scatter(title, unit, x_ticks, y.ticks(), shown, is_log, y.is_log)


def _ticks_at(x: Scale, places: list[float]) -> list[Tick]:
    """Ticks at the values if they are few, else as on every axis; without overlapping texts."""
    ticks, values = x.ticks(), sorted(set(places))
    if len(values) <= _NUM_TICKS + 2 or len(ticks) < 2:
        ticks = [Tick(x(value), short(value)) for value in values]
    kept = ticks[:1]
    for tick in ticks:
        if tick.at - kept[-1].at >= _MIN_DISTANCE:
            kept.append(tick)
    return kept


def svg_path(points: Points, x: Scale, y: Scale) -> str:
    """The lines between points, interrupted at values that are not finite."""
    parts, command = list[str](), "M"
    for a, b in points:
        if not math.isfinite(b):
            command = "M"
            continue
        parts.append(f"{command}{x(a):g} {y(b):g}")
        command = "L"
    return "".join(parts)


def thinned(points: Points, limit: int) -> Points:
    """At most about `limit` points: the lowest and the highest of each group of neighbours."""
    if len(points) <= limit:
        return points
    size, kept = -(-2 * len(points) // limit), Points()
    for k in range(0, len(points), size):
        group = sorted(points[k : k + size], key=lambda point: point[1])
        kept += sorted({group[0], group[-1]})
    return kept


def short(value: float) -> str:
    """A number for an axis: 0.05, 1.5k, 20M, 1e-5, 1e36."""
    if value == 0:
        return "0"
    size = abs(value)
    if not 1e-3 <= size < 1e12:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit:
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}"


def _y_scale(values: list[float], may_be_log: bool) -> Scale:
    low, high = min(values), max(values)
    is_log = may_be_log and low > 0 and high / low > _LOG_RATIO
    low, high = (low, high) if is_log else _rounded_out(low, high)
    return Scale(*_apart(low, high), HEIGHT - BOTTOM, TOP, is_log)


def _plain(points: Points) -> list[list[float]]:
    """Points for JSON, which has no NaN."""
    return [[x, float(f"{y:.5g}")] for x, y in points if math.isfinite(y)]


def _ticks(low: float, high: float) -> list[float]:
    step = _step(low, high)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = -(-len(exponents) // (_NUM_TICKS + 1))
    return [10.0**k for k in exponents if k % every == 0 and low <= 10.0**k <= high]


def _step(low: float, high: float) -> float:
    """1, 2 or 5 times a power of ten: the distance of about _NUM_TICKS ticks."""
    rough = (high - low) / _NUM_TICKS
    power = 10 ** math.floor(math.log10(rough))
    return next(power * k for k in (1, 2, 5, 10) if power * k >= rough * 0.999)


def _rounded_out(low: float, high: float) -> tuple[float, float]:
    """The range, widened to whole ticks. It begins at 0 if the values are not far from it."""
    if 0 < low < 0.4 * high:
        low = 0.0
    low, high = _apart(low, high)
    step = _step(low, high)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def _apart(low: float, high: float) -> tuple[float, float]:
    """A range that is not empty."""
    if high > low:
        return low, high
    half = abs(low) / 2 or 1.0
    return low - half, high + half
