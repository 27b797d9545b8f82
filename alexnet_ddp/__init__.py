"""Trains AlexNet, and any other image classifier, with DistributedDataParallel.

Start reading at train.py.

The names in __all__ are the public API. They are imported when they are used: importing the package
imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alexnet_ddp.api import build_model, load_run, open_dataset
    from alexnet_ddp.plugins import (
        Callback,
        register_augment,
        register_callback,
        register_metric,
        register_model,
        register_optimizer,
        register_source,
    )

__version__ = "0.1.0"

__all__ = [
    "Callback",
    "__version__",
    "build_model",
    "load_run",
    "open_dataset",
    "register_augment",
    "register_callback",
    "register_metric",
    "register_model",
    "register_optimizer",
    "register_source",
]

_API = ("build_model", "load_run", "open_dataset")


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used.

    Python calls this for names that are not defined here.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{'api' if name in _API else 'plugins'}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
