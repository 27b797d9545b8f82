"""Bad images: each named once, whatever the ranks, the epochs and the restarts, and too many end the run."""

import json

import pytest
import torch

from alexnet_ddp.config import Device
from alexnet_ddp.data.quarantine import Quarantine
from alexnet_ddp.data.sources.index import index_folder
from alexnet_ddp.data.sources.source import Skipped
from alexnet_ddp.runtime.distributed import World, session
from alexnet_ddp.runtime.errors import DataError
from tests.ranks import run_ranks

ALONE = World(0, 0, 1, 1, torch.device("cpu"))


@pytest.fixture
def opened(image_folder, tmp_path):
    """opened(start_step, max_train): the quarantine of one rank in tmp_path."""
    sets = {split: index_folder(image_folder, split) for split in ("train", "val")}
    with session(Device.cpu):
        yield lambda start_step=0, max_train=100: Quarantine(
            tmp_path, sets, max_train, start_step, ALONE
        )


def bad(*indices, kind="damaged"):
    return [Skipped(k, index, kind, f"image {index}: {kind}") for k, index in enumerate(indices)]


def listed(directory):
    return [json.loads(line) for line in (directory / "quarantine.jsonl").read_text().splitlines()]


def test_an_image_is_listed_once_with_its_name_reason_and_first_step(
    opened, tmp_path, image_folder
):
    quarantine = opened()
    quarantine.note("train", bad(7, 3), 1, 0.1)
    quarantine.note("train", bad(3, 5), 12, 1.2)
    quarantine.note("val", bad(3), 12, 1.2)
    rows = listed(tmp_path)
    assert [(row["split"], row["index"], row["step"], row["epoch"]) for row in rows] == [
        ("train", 3, 1, 0.1), ("train", 7, 1, 0.1), ("train", 5, 12, 1.2), ("val", 3, 12, 1.2)
    ]  # fmt: skip
    assert rows[0]["name"] == index_folder(image_folder, "train").name(3)
    assert (rows[0]["kind"], rows[0]["reason"]) == ("damaged", "image 3: damaged")
    assert (quarantine.count("train"), quarantine.count("val")) == (3, 1)


def test_a_kind_of_reason_is_one_warning_also_after_a_restart(opened, caplog):
    quarantine = opened()
    quarantine.note("train", [*bad(1, 2), *bad(4, kind="empty")], 1, 0.1)
    quarantine.note("val", bad(9), 2, 0.2)
    opened(start_step=2).note("train", bad(11), 3, 0.3)
    said = [record.getMessage() for record in caplog.records]
    assert [text.split(";")[0] for text in said] == [
        "skipped image 1: damaged",
        "skipped image 4: empty",
    ]
    assert said[0].endswith("quarantine.jsonl")


def test_a_restart_knows_what_was_bad_up_to_its_step_and_forgets_what_comes_again(opened, tmp_path):
    opened().note("train", bad(1), 2, 0.2)
    opened(start_step=2).note("train", bad(1, 4), 5, 0.5)
    assert [row["index"] for row in listed(tmp_path)] == [1, 4]
    resumed = opened(start_step=3)
    assert [row["index"] for row in listed(tmp_path)] == [1]
    resumed.note("train", bad(4), 5, 0.5)
    assert [(row["index"], row["step"]) for row in listed(tmp_path)] == [(1, 2), (4, 5)]
    assert opened(start_step=0).count("train") == 0


@pytest.mark.parametrize("torn", ["{", "3", '{"split": "train"}', "\xff", ""])
def test_a_torn_line_is_dropped_and_the_others_stay(opened, tmp_path, torn):
    opened().note("train", bad(1), 2, 0.2)
    with (tmp_path / "quarantine.jsonl").open("a") as file:
        file.write(torn + "\n")
    assert opened(start_step=2).count("train") == 1
    assert len(listed(tmp_path)) == 1


def test_more_bad_training_images_than_allowed_end_the_run_after_they_were_listed(opened, tmp_path):
    quarantine = opened(max_train=2)
    quarantine.note("val", bad(*range(10)), 1, 0.1)
    quarantine.note("train", bad(1, 2), 1, 0.1)
    quarantine.note("train", bad(1, 2), 9, 1.1)
    with pytest.raises(DataError) as error:
        quarantine.note("train", bad(1, 3), 9, 1.1)
    assert error.value.exit_code == 65
    rule = "3 training images are bad, more than data.max_bad_images (2); fix or remove those that "
    assert str(error.value) == f"{rule}{tmp_path}/quarantine.jsonl lists, or allow more"
    assert len(listed(tmp_path)) == 13


def test_a_disk_that_refuses_costs_the_list_and_not_the_run(opened, tmp_path, caplog):
    quarantine = opened(max_train=1)
    (tmp_path / "quarantine.jsonl").mkdir()
    quarantine.note("train", bad(1), 1, 0.1)
    assert "quarantine.jsonl could not be written" in caplog.text
    with pytest.raises(DataError, match="2 training images are bad"):
        quarantine.note("train", bad(2), 1, 0.1)


def _of_a_rank(folder, run_dir):
    with session(Device.cpu) as world:
        quarantine = Quarantine(run_dir, {"train": index_folder(folder, "train")}, 5, 0, world)
        quarantine.note("train", bad(10 - world.rank, 20) if world.rank else [], 1, 0.1)
        try:
            quarantine.note("train", bad(*range(30, 33)) if world.rank == 2 else [], 2, 0.2)
        except DataError as error:
            return quarantine.count("train"), str(error)[:30]


def test_all_ranks_know_what_one_of_them_found_and_end_together(image_folder, tmp_path):
    results = run_ranks(_of_a_rank, 3, image_folder, tmp_path)
    assert results == [(6, "6 training images are bad, mor")] * 3
    assert [row["index"] for row in listed(tmp_path)] == [8, 9, 20, 30, 31, 32]
