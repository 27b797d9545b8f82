"""Data of the loader benchmark: the same images in every format, created on first use."""

import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from alexnet_ddp.config import ShardsConfig
from alexnet_ddp.data.sources.index import SampleIndex, index_folder
from alexnet_ddp.data.sources.sets import open_data
from alexnet_ddp.data.sources.tars import ArchiveStore
from alexnet_ddp.data.storage import Storage

SHORTER_SIDE = 256
CLASSES = 16


@dataclass
class Materials:
    """`count` images below `scratch`: links to the files of `images`; None: synthetic ones.

    large: (number of classes, images per class) of the large indices.
    """

    scratch: Path
    images: Path | None
    count: int
    large: tuple[int, int]

    @cached_property
    def originals(self) -> Path:
        """A folder with train/CLASS/* and val/CLASS/*. Files are repeated to reach `count`."""
        files = (
            _photographs(self.scratch / "photographs", min(self.count, 300))
            if self.images is None
            else self.images
        )
        jpegs = sorted(
            p.resolve() for p in files.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg")
        )
        if not jpegs:
            sys.exit(
                f"--images {files} contains no .jpg or .jpeg files; "
                "use a directory with such files, or leave it out"
            )
        root = self.scratch / "originals"
        for split, count in (("train", self.count), ("val", CLASSES)):
            for i, path in zip(range(count), itertools.cycle(jpegs)):
                folder = root / split / f"class{i % CLASSES:02d}"
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{i:06d}.jpg").symlink_to(path)
        return root

    @cached_property
    def jpeg_shards(self) -> Path:
        return self._prepare("jpeg", f"shorter_side={SHORTER_SIDE}")

    @cached_property
    def raw_shards(self) -> Path:
        return self._prepare("raw", "encoding=raw", f"size={SHORTER_SIDE}")

    @cached_property
    def packed_files(self) -> Path:
        """A folder with the files of jpeg_shards, as train/CLASS/* and val/CLASS/*."""
        root = self.scratch / "files"
        sets = open_data(ShardsConfig(root=str(self.jpeg_shards)))
        for split, index in (("train", sets.train), ("val", sets.val)):
            for i, label in enumerate(index.labels.tolist()):
                folder = root / split / index.classes[label]
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{i:06d}.jpg").write_bytes(index.read(i))
        return root

    @cached_property
    def archive(self) -> SampleIndex:
        """The originals in one tar archive, which is read like ILSVRC2012's (data=imagenet)."""
        found, path = index_folder(self.originals, "train"), self.scratch / "originals.tar"
        with tarfile.open(path, "w", dereference=True) as tar:
            for i in range(len(found)):
                tar.add(found.name(i))
        with tarfile.open(path) as tar:
            places = np.array([(member.offset_data, member.size) for member in tar], dtype=np.int64)
        return SampleIndex(
            found.classes, found.labels, ArchiveStore(str(path), places[:, 0], places[:, 1])
        )

    def packed_for(self, peer: str) -> Path:
        """packed_files in the format of `peer`. Raises CalledProcessError."""
        out = self.scratch / peer
        _run("peers.py", peer, str(self.packed_files), str(out))
        return out

    @cached_property
    def large_tree(self) -> Path:
        """A tree of many hard links: train/CLASS/*, and one image per class in val."""
        root, (classes, each) = self.scratch / "tree", self.large
        copies, made = _copies(self.originals / "train", self.scratch / "copies"), 0
        for label in range(classes):
            for split, count in (("train", each), ("val", 1)):
                folder = root / split / f"n{label:08d}"
                folder.mkdir(parents=True)
                for i in range(count):
                    _link(copies, made, folder / f"n{label:08d}_{i}.JPEG")
                    made += 1
        return root

    @cached_property
    def large_jpeg_shards(self) -> Path:
        return self._enlarge(self.jpeg_shards)

    @cached_property
    def large_raw_shards(self) -> Path:
        return self._enlarge(self.raw_shards)

    def _prepare(self, name: str, *recipe: str) -> Path:
        out = self.scratch / name
        command = [
            sys.executable,
            "-m",
            "alexnet_ddp.prepare",
            f"source={self.originals}",
            f"root={out}",
            "num_shards=4",
        ]
        subprocess.run([*command, *recipe], check=True, stdout=subprocess.DEVNULL)
        return out

    def _enlarge(self, shards: Path) -> Path:
        """The same shards, with an index of size `large` that contains each image many times."""
        out, (classes, each) = shards.with_name(f"large-{shards.name}"), self.large
        out.mkdir()
        for file in shards.iterdir():
            if (
                file.is_file()
                and file.name != "index.json"
                and not file.name.endswith(".samples.npy")
            ):
                os.link(file, out / file.name)
        index = json.loads((shards / "index.json").read_text())
        names = [f"n{label:08d}" for label in range(classes)]
        index["classes"] = index["class_names"] = names
        for split, total in (("train", classes * each), ("val", classes)):
            samples = np.load(shards / f"{split}.samples.npy")
            samples = samples[np.arange(total) % len(samples)]
            samples["label"] = np.arange(total) // (total // classes)
            np.save(out / f"{split}.samples.npy", samples)
            index["splits"][split]["images"] = total
            index["splits"][split]["files"][f"{split}.samples.npy"] = Storage(str(out)).sha256(
                f"{split}.samples.npy"
            )
        (out / "index.json").write_text(json.dumps(index))
        return out


def _photographs(folder: Path, count: int) -> Path:
    """Create JPEG files as large as ImageNet's: 500 x 375 pixels, about 110 kB."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        photo = cv2.resize(coarse, (500, 375), interpolation=cv2.INTER_CUBIC).astype(np.int16)
        photo = np.clip(photo + rng.normal(0, 14, photo.shape), 0, 255).astype(np.uint8)
        Image.fromarray(photo).save(folder / f"{i:04d}.jpg", quality=93)
    return folder


def _copies(tree: Path, folder: Path) -> list[Path]:
    """At least 64 copies on the file system of the scratch folder, as targets of hard links."""
    folder.mkdir()
    sources = sorted(tree.rglob("*.jpg"))[:300]
    wanted = max(64, len(sources))
    return [
        Path(shutil.copyfile(source, folder / f"{i}.JPEG"))
        for i, source in zip(range(wanted), itertools.cycle(sources))
    ]


def _link(copies: list[Path], number: int, target: Path) -> None:
    """Create a hard link to copy `number`, or to a new copy if that file has too many links."""
    at = number % len(copies)
    try:
        os.link(copies[at], target)
    except OSError as error:
        if error.errno != errno.EMLINK:
            raise
        copies[at] = Path(shutil.copyfile(copies[at], copies[at].with_name(f"{at}-{number}.JPEG")))
        os.link(copies[at], target)


def _run(script: str, *arguments: str) -> None:
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
