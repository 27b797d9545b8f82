"""What makes a run the same run: what may not change between a checkpoint and its resumption."""

import platform
from dataclasses import asdict

import torch

from alexnet_ddp.config import Config, ConfigError

# Free to change: they move work or watch it, but leave every update what it is (hooks: almost).
_FREE_SECTIONS = {"run", "replay", "device", "checkpoint", "resume", "logger", "parallel"}
_FREE = {
    *(
        "data.root",
        "data.num_threads",
        "data.on_bad_image",
        "data.max_bad_images",
        "data.limit_train",
        "data.limit_val",
        "model.weights",
    ),
    *("data.num_train", "data.num_val", "data.num_classes", "data.class_order"),  # the fingerprint covers them
    *("data.shuffle", "data.window_shards", "data.cache_dir", "data.cache_gb"),  # `windows` covers them
    *("trainer.epochs", "trainer.max_steps", "trainer.micro_batch_size", "trainer.eval_batch_size", "trainer.compile"),
    *("trainer.tf32", "trainer.log_every_steps", "trainer.eval_every_epochs", "trainer.hang_timeout_s"),
    *("trainer.on_nan", "trainer.spike_factor", "trainer.check_every_steps"),
}

_OFF = (None, 0, "none")  # values of a knob that leaves everything as it was before there was the knob


def identity(cfg: Config, fingerprint: str, windows: str | None = None) -> dict[str, object]:
    """Flat, JSON: every knob that decides an update, and the fingerprints of the training images and of their windows.

    The same images as folders, archives or shards are the same; windows are not, for they follow the shards.
    """
    flat: dict[str, object] = {"data": fingerprint} | ({"data.windows": windows} if windows else {})
    for section, values in asdict(cfg).items():
        if section not in _FREE_SECTIONS:
            flat |= {f"{section}.{k}": v for k, v in values.items()} if isinstance(values, dict) else {section: values}
    for section in ("augment", "model", "optimizer", "scheduler"):
        flat[section] = type(getattr(cfg, section)).__name__.removesuffix("Config")
    return {key: value for key, value in flat.items() if key not in _FREE}


def check_same_run(name: str, then: dict[str, object], now: dict[str, object]) -> None:
    """Raises ConfigError naming what differs, and both ways on. A checkpoint may be older than some knobs."""
    now = {key: value for key, value in now.items() if key in then or value not in _OFF}
    changed = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
    if changed:
        shown = ", ".join(f"{key}={_short(now.get(key))} (was {_short(then.get(key))})" for key in changed[:6])
        remedy = "choose another run.name, or go on regardless with resume.allow_changes=true"
        raise ConfigError(f"run.name={name} was started as another run: {shown}; {remedy}")


def _short(value: object) -> str:
    """A fingerprint is recognised by its beginning."""
    return "unset" if value is None else str(value)[:24]


def numerics() -> dict[str, object]:
    """Where these differ between a checkpoint and its resumption, equal means equal to rounding, not bit for bit."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
