"""Real faults in real processes, one test a row of README's table: python -m pytest -n 0 -m drill tests/drills"""
