"""evaluate images=DIR and model.weights as on the command line: what is used, refused and written."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from alexnet_ddp import cli, register_model
from alexnet_ddp.checkpoint.format import write_checkpoint

CLASSES = ["cat", "cow", "dog", "hen", "pig", "rat"]
SMALL = ["data.image_size=32", "device=cpu", "model=plugin", "model.name=linear"]


@register_model("linear")
class Linear(nn.Module):
    """The smallest network whose outputs differ between images."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.flatten, self.classifier = nn.Flatten(), nn.Linear(3 * 32**2, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.flatten(images))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a run `a` in runs, which has six classes, and images of three."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = safetensors.torch.save(Linear(len(CLASSES)).state_dict())
    named = {"ids": CLASSES, "names": CLASSES}
    state = json.dumps({"step": 10, "best": {"step": 10}, "classes": named}).encode()
    files = {"model.safetensors": model, "optimizer.safetensors": safetensors.torch.save({})}
    run_dir = tmp_path / "runs/a"
    write_checkpoint(run_dir / "checkpoints", 10, files | {"state.json": state})
    recorded = {"overrides": ["data=folder", "data.root=gone", *SMALL]}
    (run_dir / "run.json").write_text(json.dumps(recorded))
    (run_dir / "classes.json").write_text(json.dumps(named))
    draw(tmp_path / "others", ["dog", "hen", "rat"])
    return tmp_path


def draw(folder: Path, classes: list[str]) -> None:
    """Four images of noise for each class."""
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for k in range(4):
            noise = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / name / f"{k}.png")


@pytest.fixture
def evaluate(place, monkeypatch, capsys):
    """evaluate(overrides) in this process -> (exit code, the text that it prints)."""

    def start(*overrides: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["evaluate", *overrides])
        threads = torch.get_num_threads()
        try:
            with pytest.raises(SystemExit) as end:
                cli.run("evaluate", "alexnet_ddp.evaluate:main", cli.without_data_options)
        finally:
            torch.set_num_threads(threads)
        said = capsys.readouterr()
        return end.value.code, said.out + said.err

    return start


def rows_of(file: str) -> list[dict[str, str]]:
    with open(file) as lines:
        return list(csv.DictReader(lines))


@pytest.mark.parametrize(
    "option",
    ["data.limit_val=2", "data.root=/nonexistent", "data.class_order=numeric", "data=synthetic"],
)
def test_options_of_data_that_images_ignores_are_refused(evaluate, option):
    code, said = evaluate("run.name=a", "images=others", option)
    key, _, value = option.partition("=")
    assert said == (
        f"alexnet_ddp: {key} ({value}) would be ignored: all images in images (others) are "
        f"evaluated; leave {key} or images out\n"
    )
    assert code == 64


def test_options_of_the_preprocessing_and_of_bad_images_are_used_with_images(evaluate, place):
    assert evaluate("run.name=a", "images=others")[0] == 0
    written = place / "runs/a/evaluation_images.json"
    first = json.loads(written.read_text())
    assert first["val/num_images"] == 12
    (place / "others/rat/0.png").write_bytes(b"no image")
    more = ["data.eval_resize=40", "data.mean=[0.4,0.4,0.4]", "data.num_threads=1"]
    code, said = evaluate("run.name=a", "images=others", "data.on_bad_image=skip", *more)
    assert code == 0, said
    second = json.loads(written.read_text())
    assert second["val/num_images"] == 11
    assert second["val/loss"] != pytest.approx(first["val/loss"], abs=1e-3)


def test_images_that_are_no_folder_are_named_with_the_option(evaluate):
    code, said = evaluate("run.name=a", "images=nowhere")
    rule = "images (nowhere) is not a folder; give one that contains CLASS/*"
    assert (code, said) == (65, f"alexnet_ddp: {rule}\n")


def test_predictions_list_no_classes_that_only_present_excludes(evaluate):
    given = ["run.name=a", "images=others", "predictions=p.csv"]
    assert evaluate(*given, "only_present=true")[0] == 0
    rows = rows_of("p.csv")
    assert len(rows) == 12
    for row in rows:
        assert list(row)[-4:] == ["class_3", "probability_3", "loss", "error"]
        assert sorted(row[f"class_{k}"] for k in (1, 2, 3)) == ["dog", "hen", "rat"]
    assert evaluate(*given)[0] == 0
    assert "class_5" in rows_of("p.csv")[0]
