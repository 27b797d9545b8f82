"""Checkpoints: the format on disk, the writer process, the manager, and the identity of a run."""
