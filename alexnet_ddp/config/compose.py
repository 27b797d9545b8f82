"""Hydra composes conf/COMMAND.yaml with the overrides; plain, checked dataclasses come out.

The only module that imports Hydra when it is imported. Hydra composes and does nothing else: its
own main() would create folders, configure logging and call whatever a configuration names.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
    ValidationError,
)

from alexnet_ddp.config import advice
from alexnet_ddp.config.data import (
    AUTO,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Interpolation,
    default_resize,
)
from alexnet_ddp.config.option import check_finite, check_value
from alexnet_ddp.config.overrides import check_key, misread, quoted, to_hydra
from alexnet_ddp.config.plugins import TimmConfig
from alexnet_ddp.config.recipe import LOW_LR_NETWORKS, ModelConfig
from alexnet_ddp.config.schema import CONF_DIR, GROUPS, ROOTS, choice_of, group_names, options
from alexnet_ddp.runtime.errors import ConfigError
from alexnet_ddp.runtime.run_record import RunRecord, run_of_weights

# Hydra 1.3 warns if version_base is missing, Hydra 1.4 if it is given. Both then do the same.
_IS_1_3 = hydra.__version__.startswith("1.3.")
HYDRA_BASE = {"version_base": "1.3"} if _IS_1_3 else {}
_REPLACE: dict[str, Any] = {} if _IS_1_3 else {"replace": True}  # 1.3 always replaces an entry
# Groups of Hydra's own application. Nothing here reads them, and they take a quarter of the time.
_OF_HYDRA = ("env", "help", "hydra_help", "hydra_logging", "job_logging", "launcher", "output")
_WITHOUT = [f"~hydra/{group}" for group in (*_OF_HYDRA, "sweeper")]
_MAX_NAME_BYTES = 90  # of each half of a derived name


def compose(
    command: str,
    overrides: list[str],
    config_dir: str | None = None,
    run_dir: Path | None = None,
) -> Any:
    """The checked configuration of `command`: an instance of its class in schema.ROOTS.

    config_dir: a folder with further YAML files. Of two values for one key the last one counts.
    run_dir: of the run, if it is not the one that the options name. Raises ConfigError with one
    line.
    """
    return to_config(compose_yaml(command, overrides, config_dir), command, run_dir)


def compose_yaml(command: str, overrides: list[str], config_dir: str | None = None) -> DictConfig:
    """What Hydra composes, before its values are checked. Raises ConfigError with one line."""
    root = ROOTS[command]
    for override in overrides:
        check_key(override, root)
    translated = [to_hydra(override, root) for override in overrides]
    folders = [CONF_DIR]
    if config_dir is not None:
        if not os.path.isdir(config_dir):
            raise ConfigError(
                f"--config-dir ({config_dir}) is not a folder; give one of YAML files"
            )
        folders.append(Path(config_dir))
        translated.append(f"hydra.searchpath=[{quoted('file://' + os.path.abspath(config_dir))}]")
    _register(root)
    try:
        with hydra.initialize_config_dir(str(CONF_DIR), **HYDRA_BASE):
            cfg = hydra.compose(command, [*translated, *_WITHOUT], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, root)) from error
    _refuse_numbers_as_text(folders, command, cfg.hydra.runtime.choices, root)
    _refuse_plugins_of_files(cfg, translated)
    callbacks = OmegaConf.select(cfg, "hydra.callbacks")
    if callbacks:
        rule = "are refused: nothing here is called by a YAML file; remove them"
        raise ConfigError(f"hydra.callbacks ({', '.join(callbacks)}) {rule}")
    with open_dict(cfg):
        del cfg["hydra"]
    if command == "train":
        _name_after_sweep(cfg, overrides)
    return cfg


def to_config(cfg: DictConfig, command: str, run_dir: Path | None = None) -> Any:
    """Plain, checked dataclasses of what Hydra composed for `command`. Raises ConfigError.

    run_dir: see compose.
    """
    root = ROOTS[command]
    try:
        _fill_name(cfg)
        _refuse_unknown(cfg, "", root)
        if command == "train" and run_dir is None:
            run_dir = Path(cfg.run.root, cfg.run.name)
        _fill_inputs(cfg, run_dir)
        for path, value in _leaves(OmegaConf.to_container(cfg, resolve=True), ""):
            check_value(path, value)
        config: Any = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, root)) from error
    for path, value in _leaves(asdict(config), ""):
        check_finite(path, value)
    return config


def shown_yaml(cfg: DictConfig, root: type, package: str | None, resolves: bool) -> str:
    """What Hydra composed, or its part `package`, as YAML. Raises ConfigError."""
    part = OmegaConf.select(cfg, package) if package else cfg
    if package in options(root):
        raise ConfigError(f"--package {package} must name a part, such as {package.split('.')[0]}")
    if package and not OmegaConf.is_config(part):
        raise ConfigError(f"--package {package}: {advice.unknown(package, '', root)}")
    try:
        return OmegaConf.to_yaml(part, resolve=resolves)
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, root)) from error


def to_yaml(cfg: Any) -> str:
    """The whole configuration, resolved, as YAML for people and for the run's record."""
    return OmegaConf.to_yaml(OmegaConf.structured(cfg))


def to_plain(cfg: Any) -> dict[str, Any]:
    """The whole configuration as JSON's types."""
    plain = OmegaConf.to_container(OmegaConf.structured(cfg), enum_to_str=True)
    return cast(dict[str, Any], plain)  # OmegaConf's annotation knows no options classes


def _register(root: type) -> None:
    """Define what conf/ refers to: the `schema` entries of its defaults lists, and a resolver."""
    # OmegaConf 2.3 has another function of the newer name.
    register: Callable[..., None] = (
        OmegaConf.register_new_resolver if _IS_1_3 else OmegaConf.register_resolver
    )
    register("lr_by_network", _lr_by_network, replace=True)
    _register_groups()
    ConfigStore.instance().store(name="schema", node=root, **_REPLACE)


@cache
def _register_groups() -> None:
    """What all commands share. Once per process: it takes a fifth of the time of a composition."""
    store = ConfigStore.instance().store
    for group, choices in GROUPS.items():
        for name, node in choices.items():
            store(group=f"{group}/schema", name=name, node=node, package=group)
            if not (CONF_DIR / group / f"{name}.yaml").exists():
                store(group=group, name=name, node=node, package=group)


def _lr_by_network(lr: float, low_lr: float, *, _root_: DictConfig) -> float:
    """The resolver ${lr_by_network:LR,LOW_LR} of the default recipe: one of its two values."""
    name = OmegaConf.select(_root_, "model.name", default=None)
    network = OmegaConf.get_type(_root_, "model")
    is_low = network is not None and network.needs_low_lr
    return low_lr if is_low or name in LOW_LR_NETWORKS else lr


def _explain(error: BaseException, root: type) -> str:
    """An exception of Hydra or OmegaConf, and what caused it, as one line with the remedy."""
    first = str(error).splitlines()[0].rstrip(".:")
    # Hydra begins with the file, if it is in one. Its other words are not used.
    file = first.split("'")[1] if first.startswith("In '") else ""
    prefix = f"{file}.yaml: " if file and file not in ROOTS else ""
    cause: BaseException | None = error
    while cause is not None:
        line = _line_of(cause, root)
        if line is not None:
            return prefix + line
        cause = cause.__cause__ or cause.__context__
    return first


def _line_of(error: BaseException, root: type) -> str | None:
    if isinstance(error, MissingConfigException) and error.options:
        file = str(error.missing_cfg_file)
        group = next((name for name in group_names(root) if file.startswith(f"{name}/")), "")
        choice = file.removeprefix(f"{group}/")
        return advice.no_choice(group, choice, list(error.options), root) if group else None
    if not isinstance(error, OmegaConfBaseException) or not error.full_key:
        return None
    # The items of a list have the key of the list.
    path = ".".join(
        part
        for part in error.full_key.replace("[", ".").split(".")
        if not part.rstrip("]").isdigit()
    )
    if isinstance(error, InterpolationResolutionError):
        return _line_of_interpolation(error, path)
    if isinstance(error, ConfigKeyError | ConfigAttributeError) and error.object_type:
        return advice.in_other_choices(path, error.object_type, root)
    if isinstance(error, ValidationError) and path in options(root):
        value = "null" if error.value is None else error.value
        return advice.type_line(path, value, root)
    return None


def _line_of_interpolation(error: InterpolationResolutionError, path: str) -> str | None:
    if not isinstance(error.parent_node, DictConfig):
        return None
    values: Any = OmegaConf.to_container(error.parent_node, resolve=False)
    text = values[error.key]
    if isinstance(error, InterpolationKeyError):
        rule = "refers to a key that does not exist; a literal ${ is written \\${"
    else:
        rule = "refers to an environment variable that is not set, or cannot be resolved"
    return f"{path} ({text}) {rule}"


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every value of a nested configuration with its key; items of a list have the list's key."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(item, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, path)
    else:
        yield path, value


def _refuse_unknown(cfg: DictConfig, prefix: str, root: type) -> None:
    """Raise ConfigError for a key that `+key=value` added, and that nothing would read."""
    owner = OmegaConf.get_type(cfg)
    assert owner is not None  # an options class
    known = {one.name for one in fields(owner)}
    for key in map(str, cfg):
        path = f"{prefix}{key}"
        if key not in known:
            raise ConfigError(advice.in_other_choices(path, owner, root))
        if isinstance(cfg[key], DictConfig) and is_dataclass(OmegaConf.get_type(cfg[key])):
            _refuse_unknown(cfg[key], f"{path}.", root)


def _fill_name(cfg: DictConfig) -> None:
    """Derive the name of a training without one. Raises ConfigError for other missing values."""
    missing = sorted(OmegaConf.missing_keys(cfg))
    if "run.name" in missing and "data" in cfg:
        missing.remove("run.name")
        if not missing:
            cfg.run.name = _derived_name(cfg)
    if missing:
        remedy = f"give it on the command line: {missing[0]}=..."
        raise ConfigError(f"{missing[0]} is required and has no value; {remedy}")


def _fill_inputs(cfg: DictConfig, run_dir: Path | None) -> None:
    """Give the data the mean, std and evaluation of model.weights or of a network of timm.

    Options that are given stay. run_dir: of a training. Raises ConfigError for unknown weights or
    an unknown network.
    """
    if "model" not in cfg or "mean" not in cfg.get("data", {}):
        return
    model = cast(ModelConfig, OmegaConf.to_object(cfg.model))
    found = _known_inputs(model, cfg, run_dir)
    if cfg.data.mean == AUTO:
        found.pop("std", None)
    for key, value in found.items():
        if cfg.data[key] is None:
            cfg.data[key] = value


def _known_inputs(model: ModelConfig, cfg: DictConfig, run_dir: Path | None) -> dict[str, Any]:
    """Options of data, by name, that the weights or the network were made for; {} if unknown."""
    size = cfg.data.image_size
    if model.weights is not None and model.published is None:
        # A run that has checkpoints keeps its inputs, also if the run of its weights is gone.
        has_begun = run_dir is not None and any(run_dir.glob("checkpoints/step-*"))
        source = run_dir if has_begun else run_of_weights(model.weights, cfg.run.root)
        if source is not None and (source / "config.yaml").exists():
            return _inputs_of_run(RunRecord(source, source.name), size)
    if isinstance(model, TimmConfig):
        from alexnet_ddp.model.timm_models import input_options  # imports torch and timm

        return input_options(model, size)
    if model.published is not None:
        from alexnet_ddp.model.published import input_options_of  # imports torch

        return input_options_of(model, size)
    return {}


def _inputs_of_run(run: RunRecord, image_size: int) -> dict[str, Any]:
    """Options of data, by name, that the run recorded. Raises ConfigError if they are unreadable.

    eval_resize keeps the share that the crop covers. Options that the run did not know had the
    effect of null.
    """
    known = {key.removeprefix("data."): value for key, value in run.options.items()}
    found = {
        "mean": known.get("mean") or list(IMAGENET_MEAN),
        "std": known.get("std") or list(IMAGENET_STD),
        "eval_interpolation": known.get("eval_interpolation") or Interpolation.bilinear,
    }
    size, resize = known.get("image_size"), known.get("eval_resize")
    # The default is left out: the ratio of its rounded value is another one.
    if size and resize and resize != default_resize(size):
        found["eval_resize"] = round(image_size * resize / size)
    return found


def _refuse_plugins_of_files(cfg: DictConfig, overrides: list[str]) -> None:
    """Raise ConfigError unless cfg.plugins is the command line's: files must not name code."""
    given: list[str] = []
    for override in OverridesParser.create().parse_overrides(overrides):
        if override.key_or_group == "plugins":
            value = override.value()
            given = [str(module) for module in value] if isinstance(value, list) else []
    if any("${" in module for module in given):
        raise ConfigError("plugins must name modules, not ${...}; write plugins=[MODULE]")
    found = OmegaConf.select(cfg, "plugins") or []
    if list(found) != given:
        rule = "comes from a YAML file, which must not choose what is imported"
        remedy = "remove it there and give it on the command line"
        raise ConfigError(f"plugins=[{','.join(found)}] {rule}; {remedy}")


def _derived_name(cfg: DictConfig) -> str:
    """DATA-MODEL, such as photos-resnet18: the same command gets the same name, and resumes."""
    data, model = (choice_of(group, OmegaConf.get_type(cfg[group])) for group in ("data", "model"))
    root = str(cfg.data.get("name") or cfg.data.get("root") or data)
    url, _, path = root.partition("?")[0].rpartition("://")
    # rpartition("@") drops a URL's user name and password.
    place = path.rpartition("@")[2].rstrip("/") if url else os.path.abspath(root)
    halves = place.rpartition("/")[2], str(cfg.model.get("name") or model)
    return "-".join(_as_name(half) or "data" for half in halves)


def _name_after_sweep(cfg: DictConfig, overrides: list[str]) -> None:
    """Name a run after its sweep and its id in wandb, if the sweep agent of wandb started it.

    A name on the command line stays. One of a YAML file would be the same for the whole sweep.
    """
    sweep, run_id = os.environ.get("WANDB_SWEEP_ID"), os.environ.get("WANDB_RUN_ID")
    is_named = any(one.split("=")[0].lstrip("+") in ("run", "run.name") for one in overrides)
    if sweep and run_id and not is_named:
        cfg.run.name = f"{_as_name(sweep)}-{_as_name(run_id)}"


def _as_name(text: str) -> str:
    name = re.sub(r"[^\w.]+", "-", text).strip("-.")
    return name.encode()[:_MAX_NAME_BYTES].decode(errors="ignore")


# YAML reads `name: 1.10` as the number 1.1, of which OmegaConf would make the text 1.1.


def _refuse_numbers_as_text(
    folders: list[Path], main: str, choices: Mapping[str, str | None], root: type
) -> None:
    """Raise ConfigError if a composed file has a number or a boolean for an option that is a text.

    folders: in which Hydra finds NAME.yaml, the first one first. choices: of each group, as Hydra
    recorded them.
    """
    chosen = [f"{group}/{choice}" for group, choice in choices.items() if choice is not None]
    for name, package, values in _loaded(folders, [main, *chosen], set()):
        for path, value in misread(values, package, root):
            rule = f"is a text, but {name}.yaml gives the number or boolean {value}"
            remedy = f"write '{value}' with quotes, or the text that you mean"
            raise ConfigError(f"{path} {rule}; {remedy}")


def _loaded(
    folders: list[Path], names: list[str], seen: set[str]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(name, package, values) of each file, and of those that its own defaults list names."""
    for name in names:
        paths = (folder / f"{name}.yaml" for folder in folders)
        file = next((path for path in paths if path.is_file()), None)
        if file is None or name in seen or name.startswith("hydra/"):
            continue
        seen.add(name)
        group = name.rpartition("/")[0]
        stat = file.stat()
        package, values = _read(file, stat.st_mtime_ns, stat.st_size)
        defaults = values.get("defaults") or []
        also = [one for one in defaults if isinstance(one, str) and one != "_self_"]
        yield name, group.replace("/", ".") if package is None else package, values
        yield from _loaded(folders, [f"{group}/{one}".lstrip("/") for one in also], seen)


@lru_cache
def _read(file: Path, changed: int, size: int) -> tuple[str | None, dict[str, Any]]:
    """The package in a file's header, or None, and its values. changed, size: the cache's key."""
    header = re.search(r"^#\s*@package\s+(\S+)", file.read_text(), re.MULTILINE)
    values: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    package = header[1].replace("_global_", "").strip(".") if header else None
    return package, values if isinstance(values, dict) else {}
