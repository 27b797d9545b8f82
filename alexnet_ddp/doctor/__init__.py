"""Checks the machines for a run: prints what was found, what is needed and the remedy."""
