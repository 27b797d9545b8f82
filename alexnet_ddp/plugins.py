"""Extension points: networks, optimizers, data sources, metrics, callbacks, ... of the user's own
package.

    from alexnet_ddp import register_model

    @register_model("tiny")
    def tiny(num_classes): ...

A module with such calls is imported if the command line names it (`plugins=[my_package.nets]`) or
if an installed package names it as an entry point of the group `alexnet_ddp.plugins`. A YAML file
or the record of a run can choose a registered name, but it can never make a module be imported.
This module imports no torch.
"""

import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

from alexnet_ddp.runtime.errors import ConfigError

ENTRY_POINTS = "alexnet_ddp.plugins"
_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")

Build = TypeVar("Build", bound=Callable[..., Any])


class Callback:
    """Base class of callbacks. Methods are called on rank 0 only; override those that you need.

    An exception in a method ends the run. A method that takes long delays every rank.
    """

    def on_step_end(self, step: int, metrics: dict[str, float]) -> None:
        """After optimizer step number `step` (from 1).

        If its gradient is not finite, the device has cancelled the update, and the run reports
        that one step later: see trainer.on_nan.
        metrics: train/loss and train/lr of the step.
        """

    def on_evaluation(self, step: int, row: dict[str, float | int]) -> None:
        """After an evaluation. row: what metrics.jsonl records, such as val/top1 in percent."""

    def on_checkpoint(self, step: int, path: Path) -> None:
        """After the checkpoint of `step` was written completely. path: its directory."""

    def on_run_end(self) -> None:
        """Once, when the run is complete. Not called if the run is stopped or fails."""


class Registry(Generic[Build]):
    """Builders of one kind by name."""

    def __init__(self, kind: str, option: str) -> None:
        """kind: for messages, such as "model".

        option: the option that chooses a name, such as "model.name".
        """
        self._kind, self._option = kind, option
        self._known: dict[str, Build] = {}

    def add(self, name: str, build: Build) -> None:
        """Raises ConfigError if another builder has this name, or if `build` cannot be called."""
        if not isinstance(name, str) or not name or not callable(build):
            raise ConfigError(
                f"register_{self._kind}({name!r}, {build!r}): give a name and a function or class"
            )
        before = self._known.get(name)
        if before is not None and _origin(before) != _origin(build):
            raise ConfigError(
                f"register_{self._kind}: {_origin(before)} and {_origin(build)} both register "
                f"{name!r}; rename one of them"
            )
        self._known[name] = build

    def get(self, name: str) -> Build:
        """The builder `name`.

        Loads the installed entry points if it is not known yet. Raises ConfigError.
        """
        if name not in self._known:
            _load_entry_points()
        if name in self._known:
            return self._known[name]
        near = get_close_matches(name, self._known, 1)
        known = f"registered: {', '.join(sorted(self._known)) or 'none'}"
        hint = f"nearest: {near[0]}" if near else known
        rule = f"no plugin has registered a {self._kind} of this name"
        raise ConfigError(
            f"{self._option} ({name}): {rule} ({hint}); "
            "give the module that registers it: plugins=[MODULE]"
        )


def _origin(build: Callable[..., Any]) -> str:
    return f"{getattr(build, '__module__', '?')}.{getattr(build, '__qualname__', repr(build))}"


MODELS: Registry[Callable[..., Any]] = Registry("model", "model.name")
OPTIMIZERS: Registry[Callable[..., Any]] = Registry("optimizer", "optimizer.name")
SOURCES: Registry[Callable[..., Any]] = Registry("source", "data.name")
AUGMENTS: Registry[Callable[..., Any]] = Registry("augment", "augment.name")
METRICS: Registry[Callable[..., Any]] = Registry("metric", "trainer.metrics")
CALLBACKS: Registry[Callable[..., Any]] = Registry("callback", "trainer.callbacks")
_elementwise: set[str] = set()  # names of optimizers


@overload
def register_model(name: str) -> Callable[[Build], Build]: ...
@overload
def register_model(name: str, build: Build) -> Build: ...
def register_model(name: str, build: Build | None = None) -> Build | Callable[[Build], Build]:
    """Register a network for `model=plugin model.name=NAME`; usable as a decorator and as a call.

    build(num_classes, **model.args) returns a torch.nn.Module that maps images, float [n, 3, size,
    size], to logits, float [n, num_classes]. The random numbers of its initialisation come from
    torch's generator, which is seeded.
    """
    return _register(MODELS, name, build)


@overload
def register_optimizer(
    name: str, build: None = None, *, elementwise: bool = False
) -> Callable[[Build], Build]: ...
@overload
def register_optimizer(name: str, build: Build, *, elementwise: bool = False) -> Build: ...
def register_optimizer(
    name: str, build: Build | None = None, *, elementwise: bool = False
) -> Build | Callable[[Build], Build]:
    """Register an optimizer for `optimizer=plugin optimizer.name=NAME`; usable as a decorator and
    as a call.

    build(groups, lr, **optimizer.args) returns a torch.optim.Optimizer; a subclass of it can be
    registered itself. groups: dicts with `params`, `weight_decay` and `lr_factor`. Before each step
    group["lr"] is set by the schedule. State must be in `optimizer.state[parameter]`, as tensors
    and numbers: it is saved and resumed. elementwise: each element's update depends only on its own
    gradient and state; parallel=hybrid requires it.
    """

    def decorate(build: Build) -> Build:
        OPTIMIZERS.add(name, build)
        (_elementwise.add if elementwise else _elementwise.discard)(name)
        return build

    return decorate if build is None else decorate(build)


@overload
def register_source(name: str) -> Callable[[Build], Build]: ...
@overload
def register_source(name: str, build: Build) -> Build: ...
def register_source(name: str, build: Build | None = None) -> Build | Callable[[Build], Build]:
    """Register a data source for `data=plugin data.name=NAME`; usable as a decorator and as a call.

    build(root, split, **data.args) is called with data.root (default: .) and "train" or "val". It
    returns an object with classes (a list of names in the order of the labels), labels (a sequence
    of N integers), and read(i), which returns the bytes of image i, encoded as JPEG, PNG or another
    format that is read from folders. read is called from several threads, in any order. Optional:
    names, a list of N texts that identify the images, for messages and the record.
    """
    return _register(SOURCES, name, build)


@overload
def register_augment(name: str) -> Callable[[Build], Build]: ...
@overload
def register_augment(name: str, build: Build) -> Build: ...
def register_augment(name: str, build: Build | None = None) -> Build | Callable[[Build], Build]:
    """Register an augmentation for `augment=plugin augment.name=NAME`; as a decorator or a call.

    build(image, random, **augment.args) is called for each training image after its crop and flip.
    image: uint8 [size, size, 3], RGB. random: a numpy.random.Generator, seeded by the seed, the
    epoch and the image: take all random numbers from it. It returns an array like image, or changes
    image in place and returns None. It is called from several threads.
    """
    return _register(AUGMENTS, name, build)


@overload
def register_metric(name: str) -> Callable[[Build], Build]: ...
@overload
def register_metric(name: str, build: Build) -> Build: ...
def register_metric(name: str, build: Build | None = None) -> Build | Callable[[Build], Build]:
    """Register a metric of evaluations for `trainer.metrics=[NAME]`; usable as a decorator and as a
    call.

    build(logits, labels) is called with float [n, num_classes] and int64 [n] on the device, and
    returns one number per image, a tensor [n]. An evaluation reports their mean over all validation
    images as val/NAME.
    """
    return _register(METRICS, name, build)


@overload
def register_callback(name: str) -> Callable[[Build], Build]: ...
@overload
def register_callback(name: str, build: Build) -> Build: ...
def register_callback(name: str, build: Build | None = None) -> Build | Callable[[Build], Build]:
    """Register a callback for `trainer.callbacks=[NAME]`; usable as a decorator and as a call.

    build(run_dir) returns a Callback; a subclass whose constructor takes the run's directory can be
    registered itself.
    """
    return _register(CALLBACKS, name, build)


def _register(
    registry: Registry[Any], name: str, build: Build | None
) -> Build | Callable[[Build], Build]:
    def decorate(build: Build) -> Build:
        registry.add(name, build)
        return build

    return decorate if build is None else decorate(build)


def is_elementwise(name: str) -> bool:
    """Whether the optimizer that was registered as `name` updates each element by itself."""
    OPTIMIZERS.get(name)
    return name in _elementwise


class Callbacks:
    """The callbacks of a run, called in the order of trainer.callbacks.

    On other ranks than 0 there are none.
    """

    def __init__(self, names: Iterable[str], run_dir: Path, is_main: bool) -> None:
        """Raises ConfigError on every rank if a name is unknown, and on rank 0 for an object of
        another class.
        """
        builders = {name: CALLBACKS.get(name) for name in names}
        self._all = (
            [_build_callback(*item, run_dir) for item in builders.items()] if is_main else []
        )
        self._reported: tuple[int, Path] | None = None

    def on_step_end(self, step: int, metrics: dict[str, float]) -> None:
        for callback in self._all:
            callback.on_step_end(step, metrics)

    def on_evaluation(self, step: int, row: dict[str, float | int]) -> None:
        for callback in self._all:
            callback.on_evaluation(step, row)

    def on_checkpoint(self, last_saved: tuple[int, Path] | None) -> None:
        """last_saved: step and directory of the newest checkpoint. Each one is reported once."""
        if last_saved is None or last_saved == self._reported:
            return
        self._reported = last_saved
        for callback in self._all:
            callback.on_checkpoint(*last_saved)

    def on_run_end(self) -> None:
        for callback in self._all:
            callback.on_run_end()


def _build_callback(name: str, build: Callable[..., Any], run_dir: Path) -> Callback:
    try:
        callback = build(run_dir)
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"trainer.callbacks ({name}) could not be built: {text}") from error
    if not isinstance(callback, Callback):
        rule = f"the plugin returned {type(callback).__name__}"
        raise ConfigError(
            f"trainer.callbacks ({name}): {rule}; derive it from alexnet_ddp.Callback"
        )
    return callback


def call_plugin(option: str, build: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return build(*args, **kwargs). Raises ConfigError, naming `option`, for wrong arguments.

    An error within `build` is not caught: its traceback shows where the plugin fails.
    """
    check_arguments(option, build, *args, **kwargs)
    return build(*args, **kwargs)


def check_arguments(option: str, build: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Raise ConfigError, naming `option`, if build(*args, **kwargs) does not fit its signature."""
    try:
        inspect.signature(build).bind(*args, **kwargs)
    except TypeError as error:
        raise ConfigError(f"{option}: {error}; correct the args") from error


def load_plugins(modules: Iterable[str]) -> None:
    """Import the modules that the command line names. The current directory is searched, too.

    Raises ConfigError, in one line, if a name is not a module's or if an import fails.
    """
    for module in modules:
        if _MODULE.fullmatch(module) is None or module.endswith(".py"):
            folder, _, name = module.removesuffix(".py").rpartition("/")
            where = f" and add {folder or '/'} to PYTHONPATH" if "/" in module else ""
            raise ConfigError(
                f"plugins ({module}) must be names of modules, as in an import statement; "
                f"write plugins=[{name}]{where}"
            )
        if not sys.flags.safe_path and not {"", os.getcwd()} & set(sys.path):
            sys.path.append(os.getcwd())  # `python -m` has it already, the console script does not
        _import(partial(importlib.import_module, module), f"plugins=[{module}]")


def _load_entry_points() -> None:
    for point in metadata.entry_points(group=ENTRY_POINTS):
        _import(point.load, f"the entry point {point.name} = {point.value} of {ENTRY_POINTS}")


def _import(action: Callable[[], object], what: str) -> None:
    try:
        action()
    except ConfigError:
        raise
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename != __file__ and "importlib" not in frame.filename
        ]
        place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        remedy = "correct the module, or its name"
        if isinstance(error, ModuleNotFoundError):
            remedy = f"install {error.name}, or add its folder to PYTHONPATH"
        raise ConfigError(f"{what} cannot be imported ({text}{place}); {remedy}") from error
