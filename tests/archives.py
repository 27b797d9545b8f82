"""Data sets in miniature: folders, ImageNet's archives as they are distributed, and the tree extracted from them."""

import io
import os
import random
import tarfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import loadmat, savemat

TRAIN, VAL, DEVKIT = (
    "ILSVRC2012_img_train.tar",
    "ILSVRC2012_img_val.tar",
    "ILSVRC2012_devkit_t12.tar.gz",
)
DATA = "ILSVRC2012_devkit_t12/data"
TRUTH = f"{DATA}/ILSVRC2012_validation_ground_truth.txt"
META = f"{DATA}/meta.mat"


def make_archives(root: Path, classes: int = 4, per_class: int = 12, num_val: int = 10) -> Path:
    """Write train, val and devkit archives of `classes` WordNet ids into `root`, an hour old; the same ones each time.

    As in the real ones, members are in no useful order, ids are in another order than WordNet ids, and meta.mat has an
    inner node that is no class. `per_class` > 10 makes the order of names differ from the order of numbers.
    """
    root.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    wnids = [f"n{10_000_000 + 7919 * k:08d}" for k in range(classes)]
    shuffled = draw.sample(wnids, classes)
    tars = {
        f"{w}.tar": tar({f"{w}_{j}.JPEG": jpeg(k, j) for j in range(per_class)})
        for k, w in enumerate(wnids)
    }
    write(root / TRAIN, tar({name: tars[name] for name in draw.sample(sorted(tars), classes)}))
    write(
        root / VAL,
        tar({f"ILSVRC2012_val_{i:08d}.JPEG": jpeg(99, i) for i in range(1, num_val + 1)}),
    )
    truth = draw.sample([1 + i % classes for i in range(num_val)], num_val)
    write_devkit(root / DEVKIT, meta_mat(shuffled, per_class), truth)
    return root


def jpeg(k: int, j: int) -> bytes:
    pixels = np.random.default_rng([k, j]).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((20, 16)).save(stream, "JPEG")
    return stream.getvalue()


def tar(files: dict[str, bytes], mode: str = "w", tar_format: int = tarfile.GNU_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode, format=tar_format) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def meta_mat(wnids_by_id: list[str], per_class: int = 1) -> bytes:
    """meta.mat: class i + 1 is wnids_by_id[i], and one inner node comes last."""
    rows = [
        (i + 1, w, f"thing {w}, {w} thing", "a thing", 0, [], 0, per_class)
        for i, w in enumerate(wnids_by_id)
    ]
    rows.append((len(rows) + 1, "n00001740", "entity", "everything", len(rows), [1, 2], 1, 0))
    names = [
        "ILSVRC2012_ID",
        "WNID",
        "words",
        "gloss",
        "num_children",
        "children",
        "wordnet_height",
    ]
    synsets = np.zeros(
        (len(rows), 1), dtype=[(name, object) for name in [*names, "num_train_images"]]
    )
    for i, row in enumerate(rows):
        synsets[i, 0] = tuple(np.array(x, float) if isinstance(x, list) else x for x in row)
    stream = io.BytesIO()
    savemat(stream, {"synsets": synsets})
    return stream.getvalue()


def write_devkit(path: Path, meta: bytes, truth: list[int]) -> None:
    write(path, tar({META: meta, TRUTH: "".join(f"{i}\n" for i in truth).encode()}, mode="w:gz"))


def write(path: Path, data: bytes) -> None:
    """Write a file and make it an hour old: what changed just now is not cached."""
    path.write_bytes(data)
    age(path)


def age(*paths: Path, seconds: float = 3600) -> None:
    for path in paths:
        os.utime(path, (time.time() - seconds,) * 2)


def age_tree(root: Path, seconds: float = 3600) -> None:
    age(root, *(p for p in root.rglob("*") if p.is_dir()), seconds=seconds)


def val_wnids(root: Path) -> list[str]:
    """The WordNet id of each validation image by number, worked out here with tarfile and scipy only."""
    with tarfile.open(root / DEVKIT) as kit:
        synsets = loadmat(io.BytesIO(kit.extractfile(META).read()), squeeze_me=True)["synsets"]
        truth = kit.extractfile(TRUTH).read().split()
    wnid = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets}
    return [wnid[int(i)] for i in truth]


def extract(root: Path, out: Path) -> Path:
    """Lay the archives in `root` out as out/train/WNID/* and out/val/WNID/*, an hour old."""
    with tarfile.open(root / TRAIN) as outer:
        for member in outer:
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                inner.extractall(out / "train" / Path(member.name).stem, filter="data")
    wnids = val_wnids(root)
    with tarfile.open(root / VAL) as archive:
        for member in archive:
            number = int(member.name.split("_")[2].split(".")[0])
            archive.extract(member, out / "val" / wnids[number - 1], filter="data")
    age_tree(out)
    return out


def lay_out(root: Path, *paths: str) -> Path:
    """Files below `root` whose content is their path, in folders an hour old."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"" if path.endswith("/.") else path.encode())
    age_tree(root)
    return root


def small(root: Path, split: str = "train") -> Path:
    """Three classes of eleven images each."""
    return lay_out(
        root, *(f"{split}/{c}/{c}_{i}.jpg" for c in ("cat", "dog", "emu") for i in range(11))
    )


def names(index) -> list[str]:
    return [index.name(i) for i in range(len(index))]
