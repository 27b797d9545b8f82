"""lr-find: a curve of the loss against the learning rate, the same for any number of ranks."""

import json
import math

import pytest
from PIL import Image

from alexnet_ddp.lr_find import Point, suggestion
from tests.test_train import SMALL, run


def points_of(file):
    return json.loads(file.read_text())["points"]


@pytest.mark.slow
def test_the_curve_is_the_same_for_one_and_two_ranks_and_a_run_stays_as_it_is(
    image_folder, tmp_path
):
    same = [*SMALL, f"data.root={image_folder}", f"run.root={tmp_path}", "run.name=x"]
    search = [*same, "num_steps=16", "min_lr=1e-5", "trainer.global_batch_size=16"]
    found = {}
    for ranks in (0, 2):
        done = run("lr_find", *search, f"output=r{ranks}.png", ranks=ranks, cwd=tmp_path)
        assert done.returncode == 0, done.stdout
        assert "steps of 16 images, rates 1e-05 to " in done.stdout
        found[ranks] = points_of(tmp_path / f"r{ranks}.json")
    with Image.open(tmp_path / "r2.png") as picture:
        assert picture.size == (980, 560)
    assert not (tmp_path / "x").exists()
    # The rounding of the first steps grows with the rate, up to the divergence.
    for one, other in zip(found[0][:10], found[2][:10], strict=True):
        assert one["lr"] == other["lr"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    rates = [point["lr"] for point in found[0]]
    assert rates[1] / rates[0] == pytest.approx((10 / 1e-5) ** (1 / 15))


@pytest.mark.slow
def test_with_gradual_fine_tuning_all_layers_are_trained_in_the_search(image_folder, tmp_path):
    same = [*SMALL, f"data.root={image_folder}", "trainer.global_batch_size=16", "trainer.epochs=2"]
    first = run("train", *same, "run.name=first", "trainer.max_steps=1", cwd=tmp_path)
    assert first.returncode == 0, first.stdout
    same += ["num_steps=9", "model.weights=run:first"]
    points = {}
    for method in ("full", "gradual"):
        more = [f"finetune.method={method}", f"output={method}.png"]
        done = run("lr_find", *same, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stdout
        points[method] = points_of(tmp_path / f"{method}.json")
    assert points["gradual"] == points["full"]


def curve(losses):
    return [Point(10 ** (-5 + k / 4), loss, loss) for k, loss in enumerate(losses)]


def test_the_suggestion_is_the_steepest_fall_before_the_minimum():
    falling = [2.0, 2.0, 1.99, 1.9, 1.75, 1.3, 1.0, 0.95, 1.2, 3.0]
    assert math.log10(suggestion(curve(falling))) == pytest.approx(-5 + 5 / 4)  # 1.75 to 1.0
    assert suggestion(curve([2.0 + k for k in range(9)])) is None
    assert suggestion(curve(falling[:5])) is None
    noisy = [Point(10 ** (-5 + k / 4), 2 + 0.1 * (-1) ** k, 2 - 0.01 * k) for k in range(12)]
    assert suggestion(noisy) is None


@pytest.mark.slow
def test_the_suggestion_is_a_value_of_the_option_at_the_global_batch(image_folder, tmp_path):
    same = [*SMALL, f"data.root={image_folder}", f"run.root={tmp_path}", "num_steps=20"]
    same += ["trainer.global_batch_size=16", "optimizer.lr=0.1", "optimizer.base_batch_size=256"]
    done = run("lr_find", *same, "output=s.png", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "s.json").read_text())["suggestion"]
    assert found is not None
    assert f"suggestion: optimizer.lr={found * 16:.2g}, " in done.stdout
    assert f" (a rate of {found:.2g} at 16 images)" in done.stdout
    assert json.loads((tmp_path / "s.json").read_text())["optimizer.lr"] == pytest.approx(
        16 * found
    )


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["output=x.pdf"], "output (x.pdf) must end in .png"),
        (["output=no/x.png"], "must be in an existing directory"),
        (["min_lr=1", "max_lr=0.1"], "min_lr (1.0) must be less than max_lr (0.1)"),
        (["num_steps=3"], "num_steps (3) must be at least 8"),
    ],
)
def test_what_cannot_be_done_is_one_line(image_folder, tmp_path, options, message):
    done = run("lr_find", *SMALL, f"data.root={image_folder}", *options, cwd=tmp_path)
    assert done.returncode == 64, done.stdout
    assert message in done.stdout
    assert "Traceback" not in done.stdout
