"""The drills with what they measured, as a table in docs/faults-and-drills.md; and the soak.

python -m tests.drills                  all drills; writes benchmarks/results/drills.json and the table
python -m tests.drills --table          the table from that file
python -m tests.drills --soak 10m       D49: faults at random for so long, then a comparison with an undisturbed run
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.drills.harness import PROJECT
from tests.drills.soak import soak

RESULTS = PROJECT / "benchmarks/results/drills.json"
PAGE = PROJECT / "docs/faults-and-drills.md"
BEGIN, END = "<!-- drills: made by python -m tests.drills -->", "<!-- end of drills -->"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.drills")
    parser.add_argument("--soak", type=minutes, metavar="10m")
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    if asked.soak:
        name = "test_d49_soak"
        found = [row for row in found if row["test"] != name]
        found.append({"test": name, "outcome": "passed", **soak(asked.soak)})
    elif not asked.table:
        found = [row for row in found if row["test"] == "test_d49_soak"] + run_all()
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(found)}\n{END}{rest.partition(END)[2]}")


def minutes(text: str) -> float:
    """Seconds of "90s" or "10m"."""
    number, unit = re.fullmatch(r"(\d+)([sm])", text).groups()
    return int(number) * {"s": 1, "m": 60}[unit]


def run_all() -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "ALEXNET_DDP_DRILLS": folder}
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-n",
            "0",
            "--full",
            "-m",
            "drill",
            "tests/drills",
        ]
        subprocess.run(command, cwd=PROJECT, env=env, check=False)  # what failed is in the table
        return [json.loads(file.read_text()) for file in sorted(Path(folder).iterdir())]


def table(found: list[dict]) -> str:
    """In the order of the drills' numbers."""
    lines = ["| drill | what must hold | seconds | measured in its last run |", "|---|---|---|---|"]
    rows = []
    for row in found:
        test = row["test"].removeprefix("test_")
        numbers = re.findall(r"\[(D\d\d)\]|(?:^|_)(d\d\d)(?=_)", test)
        drill = next((a for a, _ in numbers if a), None) or numbers[0][1].upper()
        claim = re.sub(r"^(d\d\d_)+|\[.*", "", test).replace("_", " ")
        measured = ", ".join(f"{key} {value}" for key, value in row["measured"].items())
        failed = "" if row["outcome"] == "passed" else f"**{row['outcome']}** "
        rows.append(f"| {drill} | {claim} | {row['seconds']:.0f} | {failed}{measured} |")
    return "\n".join([*lines, *sorted(rows)])


if __name__ == "__main__":
    main()
