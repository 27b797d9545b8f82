"""Real faults in real processes, one test for each row of the table in docs/faults-and-drills.md.

python -m pytest -n 2 -m drill tests/drills     every drill; one that repeats a fault repeats it a few times
python -m pytest -n 0 --full -m drill tests/drills     with all repetitions, one drill at a time, as the table was made
"""
