"""A folder of labelled images, CLASS/*, with classes of a trained network: all of them or some."""

import json
from collections import Counter
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from alexnet_ddp.data.sources.classes import is_whole_number
from alexnet_ddp.data.sources.index import SampleIndex, index_classes
from alexnet_ddp.runtime.errors import ConfigError, DataError
from alexnet_ddp.runtime.printing import listed


def open_labelled(
    folder: str, ids: list[str], names: list[str], class_map: str | None
) -> SampleIndex:
    """The images of folder/CLASS/**, with the labels of a network.

    Args:
        folder: contains one folder per class; some classes of the network may be missing.
        ids: the folder names of the network's classes, in the order of its labels.
        names: their readable names.
        class_map: a JSON file {folder: class}; a class is an id, a name or a label. None: a folder
            has the id or the name of its class, or all folders have the numbers of the labels.
            Numbers are labels only if none of them is an id or a name.

    Raises:
        ConfigError: the file cannot be read.
        DataError: there is no such folder, or it has no images or folders of unknown classes.
            The message names the option.
    """
    if not Path(folder).is_dir():
        raise DataError(f"images ({folder}) is not a folder; give one that contains CLASS/*")
    try:
        found = index_classes(Path(folder))
    except DataError as error:
        raise DataError(f"images ({folder}): {error}") from error
    given = {} if class_map is None else _read_map(class_map)
    missing = [name for name in found.classes if class_map is not None and name not in given]
    if missing:
        raise DataError(f"class_map ({class_map}) has no {listed(missing)}; add these folders")
    wanted = [given.get(name, name) for name in found.classes]
    numbers = [one for one in given.values() or wanted if is_whole_number(one)]
    known = _labels(ids, names)
    if (given or len(numbers) == len(wanted)) and not any(one in known for one in numbers):
        known |= {str(k): k for k in range(len(ids))}
    # Numbers of other folders in class_map count too: all are labels, or all are ids or names.
    unknown = [one for one in dict.fromkeys([*wanted, *numbers]) if one not in known]
    if unknown:
        rule = f"images ({folder}) has folders of unknown classes: {listed(unknown)}"
        remedy = "give class_map=FILE.json, {folder: class}"
        if class_map is not None:
            rule = f"class_map ({class_map}) has unknown classes: {listed(unknown)}"
            remedy = "a class is an id, a name or a label of it"
        near = get_close_matches(unknown[0], known, n=1)
        nearest = f" (nearest to {unknown[0]}: {near[0]})" if near else ""
        raise DataError(f"{rule}; the network knows {listed(ids)}{nearest}; {remedy}")
    labels = np.array([known[name] for name in wanted], np.int32)[found.labels]
    order = np.argsort(labels, kind="stable")
    return SampleIndex(ids, labels[order], found.store.take(order), found.names)


def _labels(ids: list[str], names: list[str]) -> dict[str, int]:
    """The label of each id, and of each name that only one class has. Ids win over names."""
    counts = Counter(names)
    unique = {name: k for k, name in enumerate(names) if counts[name] == 1}
    return unique | {one: k for k, one in enumerate(ids)}


def _read_map(file: str) -> dict[str, str]:
    rule = f"class_map ({file}) must be a JSON file with the class of each folder"
    try:
        found = json.loads(Path(file).expanduser().read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{rule}, and cannot be read ({error})") from error
    if not isinstance(found, dict) or not all(isinstance(v, str | int) for v in found.values()):
        raise ConfigError(f'{rule}, such as {{"00": "n01440764"}}')
    return {folder: str(value) for folder, value in found.items()}
