"""Staying alive: stop signals, the health of a step, replicas, stragglers, the watchdog. One file each."""
