"""Writes the model of a run for other programs, and evaluates the written file.

- command: the steps of an export; formats: writes and loads each format
- folder, examples, timm_folder: the files beside the model
- hub: uploads the folder
- check: compares the written file with the run's model
"""
