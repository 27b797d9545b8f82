"""Drills D20 to D26: images that are broken, gone, giant or odd; classes that differ; numbers that do not divide."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from alexnet_ddp.config import Device, ShardsConfig, Shuffle
from alexnet_ddp.data.sampler import GlobalBatchSampler, Windows, evaluation_batches, index_hash
from alexnet_ddp.data.sources.index import index_folder
from alexnet_ddp.data.sources.shard_index import INDEX
from alexnet_ddp.data.sources.shards import open_shards
from alexnet_ddp.data.sources.tars import TarWriter
from alexnet_ddp.runtime.distributed import all_gather_objects, session
from alexnet_ddp.training.vote import StepVote, VoteExchange
from tests.conftest import make_folder
from tests.data.test_decode import damaged_header
from tests.drills.harness import PROJECT
from tests.packing import pack
from tests.ranks import run_ranks

pytestmark = pytest.mark.drill

BAD = (17, 88, 150)  # of 205 training images
SKIP = "data.on_bad_image=skip"


def quarantine(job):
    path = job.run_dir / "quarantine.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def lost_by_epoch(job):
    """How many images each epoch did without."""
    lost = Counter()
    for row in job.rows("train/loss"):
        lost[(row["step"] - 1) // 26 + 1] += row.get("data/num_bad_images", 0)
    return dict(lost)


def warnings(job):
    return [line for line in job.said().splitlines() if line.startswith("warning: skipped")]


def test_d20_truncated_images_are_left_out_of_every_epoch_on_any_world_or_end_the_run(
    images, calm, new_job, tmp_path, measured
):
    root = shutil.copytree(images, tmp_path / "cut")
    index = index_folder(root, "train")
    paths = [Path(index.name(i)) for i in BAD]
    for path in paths:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    val = next((root / "val/class1").iterdir())
    val.write_bytes(b"")

    strict = new_job("strict", f"data.root={root}").start()
    few = new_job("few", f"data.root={root}", SKIP, "data.max_bad_images=2", ranks=1).start()
    assert strict.wait() == strict.status()["exit_code"] == 65
    assert any(str(path) in strict.status()["message"] for path in paths)
    assert few.wait() == 65
    assert (
        f"more than data.max_bad_images (2); fix or remove those that {few.run_dir}"
        in few.status()["message"]
    )

    two = new_job("two", f"data.root={root}", SKIP)
    one = new_job("one", f"data.root={root}", SKIP, "trainer.max_steps=26", ranks=1)
    assert two.run() == one.run() == 0, two.said() + one.said()
    assert lost_by_epoch(two) == {1: 3, 2: 3}
    assert lost_by_epoch(one) == {1: 3}
    for job in (two, one):
        train = [row for row in quarantine(job) if row["split"] == "train"]
        assert sorted(row["name"] for row in train) == sorted(map(str, paths))
        assert {row["kind"] for row in train} == {"damaged"}
        assert {row["name"] for row in quarantine(job)} - {str(p) for p in paths} == {str(val)}
        assert len(warnings(job)) == 2  # damaged, empty
        assert all(row["val/num_images"] == 20 for row in job.rows("val/top1"))
    first = [[row for row in quarantine(job) if row["step"] <= 26] for job in (two, one)]
    assert first[0] == first[1]
    assert two.index_hashes() == calm.index_hashes()

    measured |= {"quarantined": len(paths), "lost in each epoch": 3, "worlds": "1, 2"}


def test_d21_images_that_vanish_during_a_run_are_left_out_and_named(
    images, calm, new_job, tmp_path, measured
):
    root = shutil.copytree(images, tmp_path / "gone")
    index = index_folder(root, "train")
    paths = [Path(index.name(i)) for i in BAD]
    job = new_job("vanish", f"data.root={root}", SKIP).start()
    job.until_step(3)
    for path in paths:
        path.unlink()
    seen = job.step()
    assert job.wait() == 0, job.said()
    rows = quarantine(job)
    assert sorted(row["name"] for row in rows) == sorted(map(str, paths))
    assert all("cannot be read (No such file or directory)" in row["reason"] for row in rows)
    assert {row["kind"] for row in rows} == {"unreadable"}
    assert lost_by_epoch(job)[2] == 3
    assert lost_by_epoch(job)[1] <= 3
    assert len(warnings(job)) == 1
    assert job.index_hashes() == calm.index_hashes()
    measured |= {
        "deleted at step": seen,
        "lost in epoch 1": lost_by_epoch(job)[1],
        "lost in epoch 2": 3,
    }


def test_d22_classes_that_differ_are_named_before_the_first_step(
    images, new_job, tmp_path, measured
):
    def spoil(name, change):
        root = shutil.copytree(images, tmp_path / name)
        change(root)
        return new_job(name, f"data.root={root}", "trainer.max_steps=2", ranks=1).start()

    def another(root):
        shutil.copytree(root / "val/class0", root / "val/zebra")

    def notebook(root):
        for split in ("train", "val"):
            shutil.copytree(root / split / "class0", root / split / ".ipynb_checkpoints")

    refused = {
        spoil("less", lambda root: shutil.rmtree(root / "val/class1")): "only train has class1",
        spoil("more", another): "only val has zebra",
        spoil("empty", lambda root: (root / "train/unicorn").mkdir()): "holds no images of unicorn",
    }
    for job, difference in refused.items():
        assert job.wait() == 65, job.said()
        assert difference in job.status()["message"]
        assert job.status()["step"] == 0
        assert not job.rows("train/loss")
        assert "Traceback" not in job.said()
    hidden = spoil("hidden", notebook)  # no class, and no reason to stop: said, and left out
    assert hidden.wait() == 0, hidden.said()
    assert "ignored 1 entry (hidden), such as" in hidden.said()
    assert json.loads((hidden.run_dir / "classes.json").read_text())["ids"] == [
        f"class{c}" for c in range(5)
    ]
    measured |= {"refused before step 1": len(refused), "hidden folders": "ignored and said"}


PEAK = """
import sys
from pathlib import Path
import numpy as np, torch
from alexnet_ddp.config import BasicAugmentConfig, FolderConfig, OnBadImage
from alexnet_ddp.data.augment import build_augment
from alexnet_ddp.data.sources.index import index_folder
from alexnet_ddp.data.loader import build_loader
from alexnet_ddp.data.sampler import MicroBatch

def peak_mb():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) / 1e3

cfg = FolderConfig(root=sys.argv[1], image_size=64, on_bad_image=OnBadImage.skip)
index = index_folder(Path(cfg.root), "train")
bombs = np.array([i for i in range(len(index)) if Path(index.name(i)).name.startswith("bomb")])
good = np.setdiff1d(np.arange(len(index)), bombs)
loaders = [
    build_loader(cfg, index, augment, 2, torch.device("cpu"))
    for augment in (build_augment(BasicAugmentConfig(), 0, 64, 73, None), None)
]
def bad(indices):
    return [one for loader in loaders for batch in loader.batches([MicroBatch(0, 0, indices, True)]) for one in batch.bad]
assert not bad(good)
before = peak_mb()
found = bad(bombs)
assert len(found) == 2 * len(bombs) and {one.kind for one in found} == {"too large"}, found
print(peak_mb() - before)
"""


def test_d23_a_giant_in_the_header_is_refused_before_memory_is_taken(
    images, new_job, tmp_path, measured
):
    root = shutil.copytree(images, tmp_path / "bombs")
    for kind in ("JPEG", "PNG"):
        for k in range(3):
            (root / f"train/class{k}/bomb{kind}{k}.{kind.lower()}").write_bytes(
                damaged_header(kind, 30_000)
            )
    env = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, root], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    more = float(done.stdout)
    assert more < 50

    job = new_job(
        "bombs", f"data.root={root}", SKIP, "trainer.max_steps=27"
    )  # 211 images: one epoch
    assert job.run() == 0, job.said()
    assert [row["kind"] for row in quarantine(job)] == ["too large"] * 6
    assert "30000 x 30000 pixels; the limit is 20000 a side" in quarantine(job)[0]["reason"]
    assert len(warnings(job)) == 1
    measured |= {"more memory, MB": round(more, 1), "quarantined": 6}


def odd_files() -> dict[str, bytes]:
    """Name -> bytes: what cameras, scanners and web pages leave in a folder of images. All of them can be shown."""
    draw = np.random.default_rng(1)
    rgb = Image.fromarray(draw.integers(0, 256, (70, 80, 3), dtype=np.uint8))

    def saved(image, kind, **options):
        out = io.BytesIO()
        image.save(out, kind, **options)
        return out.getvalue()

    deep = Image.fromarray(draw.integers(0, 65_536, (70, 80), dtype=np.uint16))
    clear = rgb.quantize(16)
    clear.info["transparency"] = bytes(range(16))
    plain = saved(rgb, "JPEG")
    bad_exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(range(200))
    return {
        "cmyk.jpg": saved(rgb.convert("CMYK"), "JPEG"),
        "png.JPEG": saved(rgb, "PNG"),
        "grey.jpg": saved(rgb.convert("L"), "JPEG"),
        "greyalpha.png": saved(rgb.convert("LA"), "PNG"),
        "sixteen.png": saved(deep, "PNG"),
        "sixteen.tif": saved(deep, "TIFF"),
        "one.jpg": saved(rgb.resize((1, 1)), "JPEG"),
        "one.png": saved(rgb.resize((1, 1)), "PNG"),
        "exif.jpg": plain[:2]
        + b"\xff\xe1"
        + (len(bad_exif) + 2).to_bytes(2, "big")
        + bad_exif
        + plain[2:],
        "rgba.png": saved(rgb.convert("RGBA"), "PNG"),
        "palette.png": saved(rgb.quantize(16), "PNG"),
        "clear.png": saved(clear, "PNG"),
        "progressive.jpg": saved(rgb, "JPEG", progressive=True),
        "webp.jpg": saved(rgb, "WEBP"),
        "bits.png": saved(rgb.convert("1"), "PNG"),
    }


def test_d24_odd_files_are_decoded_or_named_with_one_warning_a_kind(
    images, new_job, tmp_path, measured
):
    root = shutil.copytree(images, tmp_path / "odd")
    broken = {
        "page.jpg": b"<html>404</html>",
        "page2.png": b"<html>",
        "nothing.jpg": b"",
        "nothing.png": b"",
    }
    files = odd_files()
    for split, label in (("train", 1), ("val", 2)):
        for name, data in (files | broken).items():
            (root / f"{split}/class{label}/{name}").write_bytes(data)
    job = new_job(
        "odd", f"data.root={root}", SKIP, "trainer.max_steps=28", ranks=1
    )  # 224 images: one epoch
    assert job.run() == 0, job.said()
    found = sorted((row["split"], Path(row["name"]).name) for row in quarantine(job))
    assert found == sorted((split, name) for split in ("train", "val") for name in broken)
    assert Counter(row["kind"] for row in quarantine(job)) == {"not an image": 4, "empty": 4}
    assert len(warnings(job)) == 2
    lines = Counter(
        line for line in job.said().splitlines() if "Warning" in line
    )  # a library's own
    assert all(count == 1 for count in lines.values()), lines
    assert "Traceback" not in job.said()
    measured |= {
        "decoded": 2 * len(files),
        "quarantined": 2 * len(broken),
        "warnings": 2 + len(lines),
    }


def _rounds(batch_size):
    """What each step and each evaluation batch holds, over the ranks, with the collective that a step carries."""
    sampler, epochs, evaluated, seen = GlobalBatchSampler(1_003, batch_size, seed=5), [], [], []
    with session(Device.cpu) as world:
        exchange, steps = VoteExchange(world), range(2 * sampler.steps_per_epoch)
        for work in sampler.micro_batches(steps, world.rank, world.world_size, None):
            exchange.start(torch.zeros(()), len(work.indices), StepVote(), torch.zeros(()))
            assert exchange.finish().num_images == len(sampler.batch(work.step))
            seen.append((work.epoch, work.indices.tolist()))
        epochs = all_gather_objects(seen)
        rounds = list(evaluation_batches(1_003, batch_size, world.rank, world.world_size))
        evaluated = all_gather_objects([i for work in rounds for i in work.indices.tolist()])
        return len(seen), epochs, len(rounds), evaluated


@pytest.mark.parametrize("batch_size", [7, 64])
def test_d25_every_image_comes_once_an_epoch_if_nothing_divides(batch_size, measured):
    steps = set()
    for world_size in range(1, 6):
        results = run_ranks(_rounds, world_size, batch_size)
        assert len({(num_steps, rounds) for num_steps, _, rounds, _ in results}) == 1
        num_steps, seen, _, evaluated = results[0]
        steps.add(num_steps)
        for epoch in (0, 1):
            assert sorted(i for e, indices in seen if e == epoch for i in indices) == list(
                range(1_003)
            )
        assert sorted(evaluated) == list(range(1_003))
    assert steps == {2 * -(-1_003 // batch_size)}
    measured |= {"worlds": "1 to 5", "steps": steps.pop(), "images an epoch": 1_003}


def repack(root: Path, sizes: list[int]) -> None:
    """Put the training images of finished shards into as many shards of these sizes, in another order."""
    index = json.loads((root / INDEX).read_text())
    samples, entry = np.load(root / "train.samples.npy"), index["splits"]["train"]
    tars = {k: (root / shard["name"]).read_bytes() for k, shard in enumerate(entry["shards"])}
    order, shards = np.random.default_rng(4).permutation(len(samples)), []
    new = samples.copy()
    for k, size in enumerate(sizes):
        out, (mine, order) = io.BytesIO(), (order[:size], order[size:])
        tar = TarWriter(out)
        for i in mine.tolist():
            one = samples[i]
            data = tars[int(one["shard"])][
                int(one["offset"]) : int(one["offset"]) + int(one["size"])
            ]
            new[i]["offset"], new[i]["shard"] = tar.add(f"{i:09d}.jpg", data), k
        digest = tar.close()
        (root / f"train-{k:06d}.tar").write_bytes(out.getvalue())
        shards.append(
            entry["shards"][k] | {"images": size, "bytes": len(out.getvalue()), "sha256": digest}
        )
    np.save(root / "train.samples.npy", new)
    entry["files"]["train.samples.npy"] = hashlib.sha256(
        (root / "train.samples.npy").read_bytes()
    ).hexdigest()
    entry["shards"] = shards
    (root / INDEX).write_text(json.dumps(index))


def test_d26_shards_of_unequal_size_are_read_whole_by_two_ranks(new_job, tmp_path, measured):
    images = make_folder(tmp_path / "images", 1_003, 21)
    root, sizes = pack(images, tmp_path / "shards"), [500, 400, 103]
    whole = {
        i: (train := open_shards(ShardsConfig(root=str(root)))[0]).read(i)
        for i in range(0, 1_003, 50)
    }
    repack(root, sizes)
    train = open_shards(ShardsConfig(root=str(root)))[0]
    assert np.bincount(train.store.shards).tolist() == sizes
    assert all(train.read(i) == data for i, data in whole.items())

    common = (
        "data=shards",
        f"data.root={root}",
        "trainer.global_batch_size=64",
        "checkpoint.save_every_steps=null",
    )
    for shuffle in Shuffle:
        window = ["data.window_shards=1"] if shuffle is Shuffle.window else []
        job = new_job(
            shuffle.value, *common, f"data.shuffle={shuffle.value}", *window, "trainer.epochs=1"
        )
        assert job.run() == 0, job.said()
        windows = Windows(train.store.shards, 1) if window else None
        sampler = GlobalBatchSampler(1_003, 64, seed=0, windows=windows)
        batches = [sampler.batch(step) for step in range(16)]
        assert job.index_hashes() == {
            step + 1: index_hash(batch) for step, batch in enumerate(batches)
        }
        assert sorted(np.concatenate(batches).tolist()) == list(range(1_003))
        assert not job.rows("data/num_bad_images")
    measured |= {"shards": "500 + 400 + 103", "steps": 16, "images": 1_003}
