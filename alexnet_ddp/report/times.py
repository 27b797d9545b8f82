"""Where a run's time goes: the parts of a step, and what is not a step."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from alexnet_ddp.report.timeline import read_events
from alexnet_ddp.runtime.run_record import RunRecord

_STEP = ("data", "forward", "backward", "exchange", "update")  # time/PART_s of a row
_NAMES = {
    "data": "wait for data",
    "forward": "forward",
    "backward": "backward",
    "exchange": "exchange with other ranks",
    "update": "update",
    "evaluation": "evaluations",
    "checkpoint": "checkpoints",
}
_COLOURS = {part: k for k, part in enumerate(_NAMES)}
_OF_PROFILE = {
    "data": "wait for data",
    "compute": "compute",
    "communication": "exchange while nothing is computed",
    "other": "everything else",
}
_MAX_RANKS, _MAX_PROFILES = 16, 4
_LARGE, _SMALL = 0.3, 0.05  # shares of a step that wait for data, for the sentence


@dataclass(frozen=True)
class Part:
    """A part of some time. colour: position among the colours of the page; None: grey."""

    name: str
    seconds: float
    share: float
    colour: int | None


@dataclass(frozen=True)
class Profile:
    """A profile of some steps on a rank (trainer.profile_steps). operators: a table of text."""

    name: str
    conclusion: str
    parts: list[Part]
    operators: str


@dataclass(frozen=True)
class Times:
    """step: the parts of a mean step. run: of all hours of work."""

    step: list[Part]
    run: list[Part]
    sentences: list[str]
    slowest: list[tuple[int, float]]  # ranks, with their share of the rows in which they were last
    ranks: list[tuple[int, list[Part]]]  # share: of the longest of these ranks' steps
    num_ranks_left_out: int


def times(run: RunRecord) -> Times | None:
    """The times of rank 0; None if the run has no row of training metrics."""
    totals, steps = _totals(run)
    step_s = totals.pop("step", 0.0)
    if not step_s or not steps:
        return None
    parts = [
        Part(_NAMES[part], seconds / steps, seconds / step_s, _COLOURS[part])
        for part, seconds in totals.items()
    ]
    rest_s = max(0.0, step_s - sum(totals.values()))
    parts.append(Part("everything else", rest_s / steps, rest_s / step_s, None))
    shares = {part: seconds / step_s for part, seconds in totals.items()}
    ranks, num_left_out = _ranks(run.directory / "rank_times.json")
    work, sentences = _work(run, step_s), _sentences(shares)
    return Times(parts, work, sentences, _slowest(run), ranks, num_left_out)


def _work(run: RunRecord, step_s: float) -> list[Part]:
    """The parts of all work. step_s: seconds of all training steps."""
    events = read_events(run.directory / "events.jsonl")
    waits = [one.get("seconds") for one in events if one["event"] == "save"]
    seconds = {
        "step": step_s,
        "evaluation": sum(run.values("time/evaluation_s").values()),
        "checkpoint": sum(s for s in waits if isinstance(s, int | float)),
    }
    # time_s of the last row is before the last checkpoint.
    known_s, work_s = sum(seconds.values()), max(run.values("time_s").values(), default=0.0)
    whole_s = max(known_s, work_s)
    parts = [
        Part(_NAMES.get(part, "training steps"), s, s / whole_s, _COLOURS.get(part, 0))
        for part, s in seconds.items()
    ]
    rest_s = whole_s - known_s
    return [*parts, Part("everything else", rest_s, rest_s / whole_s, None)]


def profiles(run: RunRecord) -> list[Profile]:
    """The profiles that the run has written. A damaged one is left out."""
    found = []
    for file in sorted((run.directory / "profile").glob("rank*.json"))[:_MAX_PROFILES]:
        try:
            known = json.loads(file.read_bytes())
            shares = {name: float(known[name]) for name in _OF_PROFILE}
            step_s, conclusion = float(known["step_ms"]) / 1000, str(known["conclusion"])
            operators = file.with_suffix(".txt").read_text(errors="replace")
        except (OSError, ValueError, KeyError, TypeError):
            continue
        parts = [
            Part(_OF_PROFILE[name], share * step_s, share, k if name != "other" else None)
            for k, (name, share) in enumerate(shares.items())
        ]
        found.append(Profile(file.stem.replace("rank", "rank "), conclusion, parts, operators))
    return found


def _totals(run: RunRecord) -> tuple[dict[str, float], int]:
    """Seconds of rank 0 by part, over all steps that rows cover, and the number of steps."""
    totals, steps, last = dict[str, float](), 0, 0
    for step, row in run.rows.items():
        if "time/step_s" not in row:
            continue
        num, last = step - last, step
        steps += num
        for part in ("step", *_STEP):
            if (metric := f"time/{part}_s") in row:
                totals[part] = totals.get(part, 0.0) + float(row[metric]) * num
    return totals, steps


def _sentences(shares: dict[str, float]) -> list[str]:
    """What the shares of a step by part mean."""
    waited = shares.get("data", 0.0)
    share = f"a step waits {100 * waited:.1f} % of its time for data"
    if waited >= _LARGE:
        remedy = "more cores or threads (data.num_threads), or packed shards, would speed it up"
        found = [f"The loader is the bottleneck: {share}; {remedy}."]
    elif waited > _SMALL:
        found = [f"{share[0].upper()}{share[1:]}, so a faster loader would help a little."]
    else:
        found = [f"The loader is no bottleneck: {share}."]
    exchanged = shares.get("exchange", 0.0)
    if exchanged >= _LARGE:
        share = f"Rank 0 waits {100 * exchanged:.1f} % of a step for the exchange with other ranks"
        remedy = "a faster link shortens it; docs/parallelism.md describes how to exchange less"
        found.append(f"{share}. If no rank is slow, {remedy}.")
    return found


def _ranks(file: Path) -> tuple[list[tuple[int, list[Part]]], int]:
    """The ranks that spend most time before they wait for the others, and how many are left out."""
    try:
        known = json.loads(file.read_bytes())
        rows = [
            {part: float(s) for part, s in zip(known["phases"], row) if part in _NAMES}
            for row in known["seconds"]
        ]
    except (OSError, ValueError, KeyError, TypeError):  # one rank
        return [], 0
    busy = [row.get("data", 0.0) + row.get("forward", 0.0) for row in rows]
    busiest = sorted(range(len(rows)), key=lambda rank: -busy[rank])[:_MAX_RANKS]
    longest = max((sum(row.values()) for row in rows), default=0.0) or 1.0
    found = [
        (rank, [Part(_NAMES[p], s, s / longest, _COLOURS[p]) for p, s in rows[rank].items()])
        for rank in sorted(busiest)
    ]
    return found, len(rows) - len(found)


def _slowest(run: RunRecord) -> list[tuple[int, float]]:
    counts = Counter(int(rank) for rank in run.values("train/slowest_rank").values())
    total = sum(counts.values())
    return [(rank, count / total) for rank, count in counts.most_common(8)]
