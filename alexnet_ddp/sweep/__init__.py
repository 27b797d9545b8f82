"""Trains once for each of several values of options, and compares the trials.

- command: the steps of a sweep; schedule: which trial runs, ends or is pruned next; array: trials
  as tasks of Slurm
- samplers, pruners: the values of a trial, and whether it is stopped
- slots: the devices of a trial; trial, start_trial: its process; results: its run
- record: sweep.json, which runtime/sweep_record.py reads and writes
- table: the results
"""
