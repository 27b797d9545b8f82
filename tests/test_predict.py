"""The images that predict finds, and its output."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from alexnet_ddp.data.sources.index import index_folder
from alexnet_ddp.predict import find_images
from alexnet_ddp.runtime.errors import DataError
from tests.conftest import make_folder

ROOT = Path(__file__).parents[1]


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """photos/: images, a linked folder, hidden entries and other types. Changes to its parent."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "photos/a.jpg",
        "photos/b.PNG",
        "photos/sub/c.jpeg",
        "ext/linked.jpg",
        "photos/.hidden/d.jpg",
    ):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"x")
    for name in ("photos/._a.jpg", "photos/e.jfif", "photos/notes.txt"):
        Path(name).write_bytes(b"x")
    os.symlink("../ext", "photos/link")
    return tmp_path


def test_a_folder_is_searched_as_for_training_and_ignored_entries_are_reported(photos, caplog):
    assert find_images("photos") == [
        "photos/a.jpg",
        "photos/b.PNG",
        "photos/link/linked.jpg",
        "photos/sub/c.jpeg",
    ]
    notes = {record.getMessage() for record in caplog.records}
    assert len(notes) == 2
    assert any(note.startswith("ignored 2 entries (hidden), such as photos/.") for note in notes)
    assert any(
        note.startswith("ignored 2 entries (other types), such as photos/") for note in notes
    )
    os.makedirs("data/train")
    shutil.move("photos", "data/train/photos")
    os.symlink("../../../ext", "data/train/photos/link2")
    os.unlink("data/train/photos/link")
    index = index_folder(Path("data"), "train")
    listed = find_images("data/train/photos")
    assert [os.path.abspath(path) for path in listed] == [index.name(i) for i in range(len(index))]


def test_a_folder_that_links_to_itself_is_refused(photos):
    os.symlink("..", "photos/sub/up")
    with pytest.raises(
        DataError, match="links to a folder that contains it, without end; remove that link"
    ):
        find_images("photos")
    with pytest.raises(
        DataError, match="is below a link to a folder that contains it; remove that link"
    ):
        find_images("photos/**/*.jpg")
    os.unlink("photos/sub/up")
    assert find_images("photos/**/*.jpeg") == ["photos/sub/c.jpeg"]
    assert find_images(f"{os.getcwd()}/./photos/**/*.jpeg") == [
        f"{os.getcwd()}/./photos/sub/c.jpeg"
    ]


@pytest.mark.parametrize(
    "name", ["photos/e.jfif", "photos/._a.jpg", "photos/notes.txt", "./photos/a.jpg"]
)
def test_a_given_file_is_used_regardless_of_its_name(photos, name):
    assert find_images(name) == [name]


@pytest.mark.parametrize(
    "name",
    ["photos[/x].jpg", "a[b]c.jpg", "*.jpg", "?.jpg", "d[1]/e[2].jpg", os.fsdecode(b"\xff.jpg")],
)
def test_a_file_with_the_characters_of_a_glob_is_found(photos, name):
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_bytes(b"x")
    assert find_images(name) == [name]


def test_a_glob_below_a_folder_with_brackets_is_found(photos):
    for name in ("d[1]/e.jpg", "d[1]/f.jfif", "d[1]/sub/g.jpg", "d1/no.jpg"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"x")
    assert find_images("d[1]/*.jpg") == ["d[1]/e.jpg"]
    assert find_images("d[1]/*") == ["d[1]/e.jpg", "d[1]/f.jfif"]
    assert find_images(f"{photos}/d[1]/*/*.jpg") == [f"{photos}/d[1]/sub/g.jpg"]
    assert find_images("*/no.jpg") == ["d1/no.jpg"]


@pytest.mark.parametrize(
    "pattern", ["nowhere", "nowhere/*.jpg", "empty", "photos/.hidden/*.png", ""]
)
def test_no_image_is_an_error_of_one_line(photos, pattern, caplog):
    os.makedirs("empty")
    Path("empty/notes.txt").write_bytes(b"x")
    with pytest.raises(DataError, match="matches no image") as error:
        find_images(pattern)
    assert "\n" not in str(error.value)
    assert caplog.records == []


@pytest.mark.slow
def test_names_are_printed_and_recorded_unchanged_even_if_a_pipe_is_closed(tmp_path):
    """Train for an epoch on classes with names that look like markup; evaluate and predict."""
    folder = make_folder(tmp_path / "data", 24, 10)
    classes = ["cat [female]", "cat [male]", "[/]", ":smile:", "\x1b[31mred"]
    for split in ("train", "val"):
        for i, name in enumerate(c.replace("/", "∕") for c in classes):
            (folder / split / f"class{i}").rename(folder / split / name)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}

    def run(command, *arguments, **options):
        line = [sys.executable, "-m", f"alexnet_ddp.{command}", *arguments]
        return subprocess.run(
            line, cwd=tmp_path, env=environment, timeout=120, text=True, check=False, **options
        )

    overrides = ("data=folder", f"data.root={folder}", "data.image_size=64", "trainer.epochs=1")
    done = run("train", *overrides, "logger.tensorboard=false", capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/data-alexnet_small/checkpoints").is_dir()
    name = "run.name=data-alexnet_small"
    read, write = os.pipe()
    os.close(read)
    assert run("evaluate", name, stdout=write, stderr=subprocess.DEVNULL).returncode == 0
    os.close(write)
    record = json.loads((tmp_path / "runs/data-alexnet_small/evaluation.json").read_text())
    assert len(record["per_class"]) == 5
    shown = run("evaluate", name, capture_output=True)
    assert shown.returncode == 0
    assert "\x1b" not in shown.stdout + shown.stderr
    assert all(
        text in shown.stdout
        for text in ("cat [female]", "cat [male]", "[∕]", ":smile:", r"\x1b[31mred")
    )

    target = folder / "val" / ("long" * 40)
    target.mkdir()
    shutil.copy(next((folder / "val/cat [male]").iterdir()), target / "photos[x].jpg")
    (target / "broken.jpg").write_bytes(b"no image")
    shown = run("predict", name, f"images={target}", "output=o.jsonl", capture_output=True)
    assert shown.returncode == 65
    assert f"{target}/broken.jpg: not an image" in shown.stderr
    assert f"{target}/photos[x].jpg" in shown.stdout
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == [f"{target}/photos[x].jpg"]
