"""evaluate images=DIR and model.weights as on the command line: what is used, refused and written."""

import csv
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

from alexnet_ddp import cli, register_model
from alexnet_ddp.checkpoint.format import write_checkpoint
from alexnet_ddp.model.published import imagenet_ids

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


def test_images_have_no_statistics_for_the_mean(evaluate, place):
    recorded = {"overrides": ["data=shards", "data.root=gone", *SMALL]}
    (place / "runs/a/run.json").write_text(json.dumps(recorded))
    code, said = evaluate("run.name=a", "images=others", "data.mean=auto")
    assert said == (
        "alexnet_ddp: data.mean (auto) takes the statistics of shards, and images (others) has "
        "none; leave it out, or give data.mean=[r,g,b] and data.std=[r,g,b]\n"
    )
    assert code == 64


def test_images_that_are_no_folder_are_named_with_the_option(evaluate):
    code, said = evaluate("run.name=a", "images=nowhere")
    rule = "images (nowhere) is not a folder; give one that contains CLASS/*"
    assert (code, said) == (65, f"alexnet_ddp: {rule}\n")
    code, said = evaluate("run.name=a", "images=others/dog")
    assert said.startswith("alexnet_ddp: images (others/dog): ")
    assert "4 images but no class folders; if it is one class, give the folder above it" in said
    assert (code, said.count("\n")) == (65, 1)


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


# --- model.weights -----------------------------------------------------------------------------


@pytest.fixture
def published(monkeypatch, tmp_path) -> nn.Module:
    """A random SqueezeNet, which is in the cache of torch.hub as the published one."""
    torch.manual_seed(1)
    model = torchvision.models.squeezenet1_1().eval()
    rows = model.classifier[1].weight.detach()  # without what all images have in common
    with torch.inference_mode():
        shared = model.features(torch.randn(8, 3, 224, 224)).mean((0, 2, 3))
    rows -= (rows[:, :, 0, 0] @ shared / shared.square().sum()).outer(shared)[:, :, None, None]
    weights = torchvision.models.SqueezeNet1_1_Weights.DEFAULT
    folder = tmp_path / "torch/hub/checkpoints"
    folder.mkdir(parents=True)
    torch.save(model.state_dict(), folder / Path(weights.url).name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return model


def arrange(folder: Path, model: nn.Module, named: list[str]) -> set[int]:
    """Images in folders of the classes that torchvision's own preprocessing and `model` find."""
    rng, how = (
        np.random.default_rng(0),
        torchvision.models.SqueezeNet1_1_Weights.DEFAULT.transforms(),
    )
    found = set()
    for k in range(8):
        pixels = np.zeros((260, 300, 3), np.uint8)
        pixels[:] = rng.integers(0, 256, 3)
        pixels[:, : 30 * k] = rng.integers(0, 256, 3)
        image = Image.fromarray(pixels)
        with torch.inference_mode():
            label = int(model(how(image)[None]).argmax())
        (folder / named[label]).mkdir(parents=True, exist_ok=True)
        image.save(folder / named[label] / f"{k}.png")
        found.add(label)
    return found


NAMES = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.meta["categories"]
SQUEEZENET = ["model=torchvision", "model.name=squeezenet1_1", "model.weights=IMAGENET1K_V1", "device=cpu"]  # fmt: skip


@pytest.mark.parametrize("named", [imagenet_ids(), NAMES, [str(k) for k in range(1000)]])
def test_published_weights_are_evaluated_on_folders_named_in_any_way(
    evaluate, published, place, named
):
    labels = arrange(place / "new", published, named)
    assert len(labels) > 1
    code, said = evaluate(*SQUEEZENET, "images=new", "predictions=p.csv")
    assert code == 0, said
    assert "top-1 100.00 %" in said
    assert {row["label"] for row in rows_of("p.csv")} == {NAMES[label] for label in labels}
    assert not (place / "runs/synthetic-squeezenet1_1").exists()
    (place / "classes.txt").write_text("\n".join(["x", *named[1:]]))
    code, said = evaluate(*SQUEEZENET, "images=new", "classes=classes.txt", "only_present=true")
    assert code == 0, said
    assert "top-1 100.00 %" in said


def test_the_ids_of_imagenet_are_those_of_timm_in_the_order_of_torchvisions_names():
    timm_data = pytest.importorskip("timm.data")
    info = timm_data.ImageNetInfo("imagenet-1k")
    assert imagenet_ids() == info.label_names() == sorted(imagenet_ids())
    described = [info.index_to_description(k).lower() for k in range(1000)]
    differ = [name for name, text in zip(NAMES, described) if name.lower() not in text]
    assert differ == ["crane bird", "maillot tank suit"]


@pytest.fixture
def files(place: Path) -> Path:
    """The network of the run in files: w.pt has no class names, w.safetensors has them."""
    model = safetensors.torch.load_file(next(place.glob("runs/a/checkpoints/*/model.safetensors")))
    torch.save(model, place / "w.pt")
    named = {"classes": json.dumps(CLASSES)}
    safetensors.torch.save_file(model, place / "w.safetensors", named)
    (place / "names.txt").write_text("\n".join(CLASSES))
    return place


def loss_of(said: str) -> str:
    return said.partition("  loss ")[2].split()[0]


@pytest.mark.parametrize(
    "given",
    ["model.weights=w.safetensors", "model.weights=run:a", "model.weights=w.pt classes=names.txt"],
)
def test_files_of_weights_are_evaluated_as_their_run(evaluate, files, given):
    code, of_run = evaluate("run.name=a", "images=others", "only_present=true")
    assert code == 0, of_run
    more = [*SMALL, "images=others", "only_present=true", *given.split()]
    code, of_file = evaluate(*more)
    assert code == 0, of_file
    assert loss_of(of_file) == loss_of(of_run)
    code, other = evaluate(*more, "data.eval_resize=64")
    assert loss_of(other) != loss_of(of_run)
    (files / "map.json").write_text(json.dumps({"dog": 2, "hen": "hen", "rat": "rat"}))
    code, of_map = evaluate(*more, "class_map=map.json")
    assert (code, loss_of(of_map)) == (0, loss_of(of_run))


def test_weights_of_a_run_know_its_readable_names(evaluate, place):
    state = next(place.glob("runs/a/checkpoints/*/state.json"))
    named = {"ids": CLASSES, "names": ["Katze", "Kuh", "Hund", "Huhn", "Schwein", "Ratte"]}
    content = json.loads(state.read_text()) | {"classes": named}
    files = {file.name: file.read_bytes() for file in state.parent.glob("*.safetensors")}
    checkpoints = place / "runs/b/checkpoints"
    write_checkpoint(checkpoints, 10, files | {"state.json": json.dumps(content).encode()})
    for name in ("dog", "hen", "rat"):
        (place / "others" / name).rename(place / "others" / named["names"][CLASSES.index(name)])
    for weights in ("run:b", "runs/b", next(checkpoints.iterdir())):
        given = [*SMALL, f"model.weights={weights}", "images=others", "predictions=p.csv"]
        code, said = evaluate(*given)
        assert code == 0, said
        assert {row["label"] for row in rows_of("p.csv")} == {"Hund", "Huhn", "Ratte"}


def test_two_classes_with_one_name_are_told_apart_by_a_map(evaluate, files):
    (files / "names.txt").write_text("\n".join(["dog", "cow", "dog", "hen", "pig", "rat"]))
    more = [*SMALL, "images=others", "model.weights=w.pt", "classes=names.txt"]
    code, said = evaluate(*more)
    assert code == 65
    assert (
        "images (others) has folders of unknown classes: dog; the network knows dog (0), " in said
    )
    (files / "map.json").write_text(json.dumps({"dog": "dog (2)", "hen": "hen", "rat": "rat"}))
    assert evaluate(*more, "class_map=map.json")[0] == 0


@pytest.mark.parametrize(
    ("given", "code", "line"),
    [
        ("images=others", 64, "model.weights (w.pt) contains no class names; give classes=FILE.txt"),
        ("images=others classes=map.json", 64, "classes (map.json) must be a text file with one"),
        ("images=nowhere classes=names.txt", 65, "images (nowhere) is not a folder; give one that"),
        ("images=others data.root=x", 64, "data.root (x) would be ignored: all images in images"),
        ("images=others data=imagenet", 64, "data (imagenet) would be ignored: all images in im"),
        ("images=others calibrate=true", 64, "calibrate=true is stored with a run, and model.wei"),
        ("classes=names.txt data=synthetic", 64, "classes (names.txt) would be ignored without im"),
        ("images=others model.head=new", 64, "model.head=new would evaluate an untrained head"),
    ],
)  # fmt: skip
def test_what_does_not_fit_a_file_of_weights_is_refused(evaluate, files, given, code, line):
    assert evaluate(*SMALL, "model.weights=w.pt", *given.split())[0] == code
    _, said = evaluate(*SMALL, "model.weights=w.pt", *given.split())
    assert said.startswith(f"alexnet_ddp: {line}")
    assert said.count("\n") == 1


@pytest.mark.parametrize("given", ["run.name=a", "model.weights=w.pt classes=names.txt"])
def test_an_unknown_option_of_data_is_refused_as_unknown(evaluate, files, given):
    code, said = evaluate(*given.split(), "images=others", "data.limit_vl=20")
    assert said.startswith("alexnet_ddp: data.limit_vl is not a key; nearest: data.limit_val")
    assert (code, said.count("\n")) == (64, 1)


@pytest.mark.parametrize("images", [["images=others", "classes=names.txt"], ["data=synthetic"]])
def test_a_run_and_a_file_of_weights_are_two_networks(evaluate, files, images):
    code, said = evaluate(*SMALL, "run.name=a", "model.weights=w.pt", *images)
    rule = "run.name (a) and model.weights are two networks; give one of them"
    assert (code, said) == (64, f"alexnet_ddp: {rule}\n")


def test_classes_of_a_run_cannot_be_given(evaluate):
    rule = "classes (c.txt) would be ignored: a run knows its classes"
    code, said = evaluate("run.name=a", "images=others", "classes=c.txt")
    assert (code, said) == (64, f"alexnet_ddp: {rule}; leave it out, or give model.weights=FILE\n")


# --- output ------------------------------------------------------------------------------------


def test_output_has_the_files_of_a_file_of_weights(evaluate, files):
    given = [*SMALL, "model.weights=w.safetensors", "images=others", "metrics=true"]
    before = sorted(files.rglob("*"))
    code, printed = evaluate(*given)
    assert code == 0, printed
    assert "balanced accuracy" in printed
    assert sorted(files.rglob("*")) == before
    assert evaluate(*given, "output=found") == (0, printed)
    written = json.loads((files / "found/evaluation_images.json").read_text())
    assert written["weights"] == "w.safetensors"
    assert f"F1 (macro) {written['metrics']['f1']['macro']:.4f}" in printed
    table = rows_of("found/evaluation_images_classes.csv")
    assert [(row["class"], row["num_images"]) for row in table] == [
        (name, "4" if name in ("dog", "hen", "rat") else "0") for name in CLASSES
    ]
    assert evaluate(*given[:-1], "output=found")[0] == 0  # without metrics
    assert [file.name for file in (files / "found").iterdir()] == ["evaluation_images.json"]
    own = ["data=synthetic", "data.num_classes=6", "data.num_val=8"]
    code, said = evaluate(*SMALL, *own, "model.weights=w.pt", "metrics=true", "output=found")
    assert code == 0, said
    names = {"evaluation.json", "evaluation_classes.csv", "evaluation_images.json"}
    assert {file.name for file in (files / "found").iterdir()} == names


def test_output_takes_the_files_of_a_run_that_its_directory_would_have(evaluate, place):
    assert evaluate("run.name=a", "images=others", "output=found")[0] == 0
    assert (place / "found/evaluation_images.json").exists()
    assert not (place / "runs/a/evaluation_images.json").exists()
    assert evaluate("run.name=a", "images=others", "output=new/found")[0] == 0
    code, said = evaluate("run.name=a", "images=others", "output=runs/a/run.json")
    rule = "cannot be created (File exists); give another one"
    assert (code, said) == (64, f"alexnet_ddp: output (runs/a/run.json) {rule}\n")


def test_a_folder_without_permission_is_refused_before_the_evaluation(evaluate, place):
    folder = place / "read-only"
    folder.mkdir(mode=0o555)
    is_mounted = not os.geteuid() and not os.system(f"mount -t tmpfs -o ro tmpfs {folder}")
    if os.access(folder, os.W_OK):
        pytest.skip("needs a user other than root, or the right to mount")
    try:
        code, said = evaluate("run.name=a", "images=others", "output=read-only")
    finally:
        if is_mounted:
            os.system(f"umount {folder}")
    rule = "the results cannot be written to read-only: no permission; give another output=DIR"
    assert (code, said) == (64, f"alexnet_ddp: {rule}\n")
