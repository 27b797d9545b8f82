"""Where a run's time goes: the parts of a step, and what is not a step."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from alexnet_ddp.runtime.run_record import RunRecord

# Metric of a row -> its name. In a step, one follows the other.
_PARTS = {
    "time/data_s": "wait for data",
    "time/forward_s": "forward",
    "time/backward_s": "backward, gradients exchanged",
    "time/update_s": "update",
}
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
    sentence: str
    slowest: list[tuple[int, float]]  # ranks, with their share of the rows in which they were last
    ranks: list[tuple[int, list[Part]]]  # share: of the longest of these ranks' steps
    num_ranks_left_out: int


def times(run: RunRecord) -> Times | None:
    """The times of rank 0; None if the run has no row of training metrics."""
    totals, steps = _totals(run)
    step_s = totals.pop("time/step_s", 0.0)
    work_s = max(run.values("time_s").values(), default=0.0)
    if not step_s or not steps:
        return None
    known = {metric: totals[metric] for metric in _PARTS if metric in totals}
    named = [
        Part(_PARTS[metric], seconds / steps, seconds / step_s, k)
        for k, metric in enumerate(_PARTS)
        if (seconds := known.get(metric)) is not None
    ]
    rest = max(0.0, step_s - sum(known.values()))
    rest_name = "everything else" if len(known) > 1 else "compute, and exchange of gradients"
    named.append(Part(rest_name, rest / steps, rest / step_s, None if len(known) > 1 else 1))
    other_s = max(0.0, work_s - step_s)
    whole_s = max(work_s, step_s)
    whole = [
        Part("training steps", step_s, step_s / whole_s, 0),
        Part("start, evaluations and checkpoints", other_s, other_s / whole_s, None),
    ]
    waited = known.get("time/data_s", 0.0) / step_s
    ranks, num_left_out = _ranks(run.directory / "rank_times.json")
    return Times(named, whole, _sentence(waited), _slowest(run), ranks, num_left_out)


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
    """Seconds of rank 0 by metric, over all steps that rows cover, and the number of steps."""
    totals, steps, last = dict[str, float](), 0, 0
    for step, row in run.rows.items():
        if "time/step_s" not in row:
            continue
        num, last = step - last, step
        steps += num
        for metric in ("time/step_s", *_PARTS):
            if metric in row:
                totals[metric] = totals.get(metric, 0.0) + float(row[metric]) * num
    return totals, steps


def _sentence(waited: float) -> str:
    share = f"{100 * waited:.1f} %"
    if waited >= _LARGE:
        remedy = "more cores or threads (data.num_threads), or packed shards, would speed it up"
        return f"The loader is the bottleneck: a step waits {share} of its time for data; {remedy}."
    if waited > _SMALL:
        return f"A step waits {share} of its time for data, so a faster loader would help a little."
    return f"The loader is no bottleneck: a step waits {share} of its time for data."


def _ranks(file: Path) -> tuple[list[tuple[int, list[Part]]], int]:
    """The ranks that spend most time before they wait for the others, and how many are left out."""
    try:
        seconds = [[float(one) for one in row] for row in json.loads(file.read_bytes())["seconds"]]
    except (OSError, ValueError, KeyError, TypeError):  # one rank, or an older run
        return [], 0
    busiest = sorted(range(len(seconds)), key=lambda rank: -sum(seconds[rank][:2]))[:_MAX_RANKS]
    longest = max((sum(row) for row in seconds), default=0.0) or 1.0
    found = [
        (
            rank,
            [
                Part(name, s, s / longest, k)
                for k, (name, s) in enumerate(zip(_PARTS.values(), seconds[rank]))
            ],
        )
        for rank in sorted(busiest)
    ]
    return found, len(seconds) - len(found)


def _slowest(run: RunRecord) -> list[tuple[int, float]]:
    counts = Counter(int(rank) for rank in run.values("train/slowest_rank").values())
    total = sum(counts.values())
    return [(rank, count / total) for rank, count in counts.most_common(8)]
