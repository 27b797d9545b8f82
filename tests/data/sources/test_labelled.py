"""evaluate images=DIR: folders of some classes get the labels of the network."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from alexnet_ddp.data.sources.labelled import open_labelled
from alexnet_ddp.evaluate import PresentClasses
from alexnet_ddp.runtime.errors import ConfigError, DataError

IDS = ["n01", "n02", "n03", "n04", "n05"]
NAMES = ["tench", "crane", "goldfish", "crane", "cock"]  # two classes are called crane


def folder(root: Path, *classes: str) -> str:
    for name in classes:
        (root / name).mkdir(parents=True)
        for k in range(2):
            (root / name / f"{name}-{k}.jpg").write_bytes(b"x")
    return str(root)


def found(root: str, class_map: str | None = None) -> dict[str, int]:
    index = open_labelled(root, IDS, NAMES, class_map)
    assert index.classes == IDS
    assert index.labels.tolist() == sorted(index.labels.tolist())
    return {Path(index.name(i)).name: int(label) for i, label in enumerate(index.labels)}


@pytest.mark.parametrize(
    ("classes", "labels"),
    [
        (("n05", "n02"), (4, 1)),
        (("goldfish", "cock"), (2, 4)),
        (("cock", "n01"), (4, 0)),
        (("3", "0", "4"), (3, 0, 4)),
    ],
)
def test_a_folder_has_the_id_the_name_or_the_label_of_its_class(tmp_path, classes, labels):
    expected = {f"{one}-{k}.jpg": label for one, label in zip(classes, labels) for k in range(2)}
    assert found(folder(tmp_path, *classes)) == expected


@pytest.mark.parametrize("has_map", [False, True])
def test_numbers_are_either_labels_or_ids(tmp_path, has_map):
    file = tmp_path / "map.json"
    file.write_text(json.dumps({str(k): k for k in range(5)}))
    class_map = str(file) if has_map else None
    root, ids = folder(tmp_path / "images", *"0124"), list("12345")
    with pytest.raises(DataError, match=r"unknown classes: 0; the network knows 1, 2, 3, 4, 5"):
        open_labelled(root, ids, ids, class_map)
    assert set(open_labelled(root, list("01234"), ids, class_map).labels) == {0, 1, 2, 4}
    root = folder(tmp_path / "ids", "1", "2")
    if has_map:  # it has a 0, which is no id
        with pytest.raises(DataError, match="unknown"):
            open_labelled(root, ids, ids, class_map)
    else:
        assert set(open_labelled(root, ids, ids, None).labels) == {0, 1}


def test_a_map_states_the_class_of_each_folder(tmp_path):
    root = folder(tmp_path / "images", "a", "b", "c")
    classes = {"a": "n05", "b": "tench", "c": 3, "other": "n02"}
    (tmp_path / "map.json").write_text(json.dumps(classes))
    labels = found(root, str(tmp_path / "map.json"))
    assert {name[0]: label for name, label in labels.items()} == {"a": 4, "b": 0, "c": 3}


def test_folders_of_unknown_classes_are_named_with_a_remedy(tmp_path):
    root = folder(tmp_path / "images", "n01", "pike", "crane", "1")
    with pytest.raises(DataError) as error:
        open_labelled(root, IDS, NAMES, None)
    assert str(error.value) == (
        f"images ({root}) has folders of unknown classes: 1, crane, pike; the network knows n01, n02, n03, "
        "n04, n05; give class_map=FILE.json, {folder: class}"
    )


@pytest.mark.parametrize(
    ("text", "error", "line"),
    [
        ('{"a": "n01"}', DataError, "has no b; add these folders"),
        ('["a"]', ConfigError, "must be a JSON file with the class of each folder, such as"),
        ('{"a": 1.5}', ConfigError, "must be a JSON file with the class of each folder, such as"),
        ("{", ConfigError, "and cannot be read"),
        (None, ConfigError, "and cannot be read"),
        (
            '{"a": "n01", "b": "pike"}',
            DataError,
            "json. has unknown classes: pike; the network knows",
        ),
    ],
)
def test_a_wrong_map_is_one_line(tmp_path, text, error, line):
    root, file = folder(tmp_path / "images", "a", "b"), tmp_path / "map.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(error, match=line):
        open_labelled(root, IDS, NAMES, str(file))


def test_only_classes_with_images_can_win():
    network = PresentClasses(nn.Identity(), np.array([1, 3, 3]), 5)
    logits = network(torch.tensor([[9.0, 1.0, 8.0, 2.0, 7.0]]))
    assert logits.softmax(1).nonzero()[:, 1].tolist() == [1, 3]
    assert logits.argmax(1).tolist() == [3]
