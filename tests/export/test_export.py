"""Exports: real files, which the libraries that they are made for load and run."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, safe_open

import alexnet_ddp
from alexnet_ddp.api import TrainedRun
from alexnet_ddp.config import ConfigError
from alexnet_ddp.config.compose import compose
from alexnet_ddp.config.export import ExportFormat
from alexnet_ddp.data.effects import IMAGENET
from alexnet_ddp.export import command, folder, formats
from alexnet_ddp.export.check import Comparison
from alexnet_ddp.export.formats import FILES, WithPreprocessing
from alexnet_ddp.model import build_model
from alexnet_ddp.runtime.errors import MachineError, WrongExport
from tests.conftest import make_folder
from tests.ranks import run_command

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.xdist_group("export")  # in one worker, which trains and exports once
OTHER_FILES = {"README.md", "classes.json", "metrics.json", "model.json", "preprocessing.json"}


def run(module: str, *arguments: str, cwd: Path, ranks: int = 0) -> subprocess.CompletedProcess:
    env = {**os.environ, "WANDB_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    env["XDG_CACHE_HOME"] = str(cwd / "cache")
    return run_command(f"alexnet_ddp.{module}", list(arguments), ranks, cwd, env)


def train(place: Path, name: str, *overrides: str) -> None:
    done = run(
        "train", "device=cpu", "data=folder", f"data.root={place / 'data'}", f"run.name={name}",
        "logger.tensorboard=false", *overrides, cwd=place,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with data/ and the run `small`, which has averaged weights and its own std."""
    place = tmp_path_factory.mktemp("export")
    make_folder(place / "data", 103, 61)
    small = ["data.image_size=64", "trainer.epochs=2", "trainer.ema_decay=0.9"]
    train(place, "small", *small, "data.std=[0.3,0.25,0.2]", "model=alexnet_small")
    assert run("evaluate", "run.name=small", "calibrate=true", cwd=place).returncode == 0
    return place


def export_here(place: Path, *overrides: str, name: str = "small") -> None:
    """The command in this process, without its exit code."""
    given = [f"run.root={place / 'runs'}", f"run.name={name}", *overrides]
    command.main(compose("export", given), given)


class Exports(dict[str, Path]):
    """The folder of each kind, which its own command writes when it is first asked for."""

    OPTIONS: ClassVar = {
        **{one: [f"format={one}"] for one in ("safetensors", "onnx", "torch_export")},
        "onnx_uint8": ["format=onnx", "preprocessing=true"],
    }

    def __init__(self, place: Path) -> None:
        self._place = place

    def __missing__(self, kind: str) -> Path:
        arguments = ["run.name=small", *self.OPTIONS[kind], f"output=out_{kind}"]
        done = run("export", *arguments, cwd=self._place)
        assert done.returncode == 0, done.stdout
        assert done.stdout.count("\n") == 1, done.stdout
        assert re.match(rf"out_{kind}: .* top-1 .* of 61 images, as the run", done.stdout)
        self[kind] = self._place / f"out_{kind}"
        return self[kind]


@pytest.fixture(scope="module")
def exported(place) -> Exports:
    return Exports(place)


KINDS = [
    "safetensors",
    "onnx",
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("onnx_uint8", "torch_export")),
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_holds_the_model_and_the_counts_of_evaluate(exported, place, kind):
    found = {path.name for path in exported[kind].iterdir()}
    assert found == OTHER_FILES | {FILES[ExportFormat(kind.removesuffix("_uint8"))]}
    assert len({path.stat().st_mode for path in exported[kind].iterdir()}) == 1
    assert not list(place.glob(".out*"))
    expected = json.loads((place / "runs/small/evaluation.json").read_text())
    metrics = json.loads((exported[kind] / "metrics.json").read_text())
    assert metrics["run"]["weights"] == expected["weights"] == "averaged"
    assert metrics["run"]["checkpoint"] == expected["checkpoint"]
    for count in ("num_images", "correct1", "correct5"):
        assert metrics[count] == expected[f"val/{count}"]
    assert metrics["loss"] == pytest.approx(expected["val/loss"], rel=1e-5)
    assert metrics["num_ties"] == 0
    known = json.loads((place / "runs/small/calibration.json").read_text())["temperature"]
    assert metrics["temperature"] == known
    written = known if kind != "onnx_uint8" else 1 / known
    assert f" {written:.6g} " in (exported[kind] / "README.md").read_text()
    assert 0 < metrics["largest_difference"] < 1e-4 or kind == "safetensors"
    classes = json.loads((exported[kind] / "classes.json").read_text())
    assert classes == [f"class{k}" for k in range(5)]


def check_example(folder: Path, trained: TrainedRun, photo: Path, end: str = "") -> None:
    """Run the README's code, and `end` after it, in the folder; compare its output with the run's network."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    shutil.copy(photo, folder / "photo.jpg")
    done = subprocess.run(
        [sys.executable, "-c", code + end],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        check=False,
    )
    (folder / "photo.jpg").unlink()
    assert done.returncode == 0, done.stderr
    name, probability = done.stdout.split()
    with torch.inference_mode():
        expected = trained.model(trained.transform(Image.open(photo))[None]).softmax(1)[0]
    assert name == trained.classes[int(expected.argmax())]
    assert float(probability) == pytest.approx(float(expected.max()), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_example_of_the_readme_runs_and_prints_what_predict_does(exported, place, kind):
    # With onnxruntime, neither torch nor this package is needed.
    plain = "\nimport sys\nassert not {'torch', 'alexnet_ddp'} & set(sys.modules)\n"
    photo = next((place / "data/val/class3").iterdir())
    trained = alexnet_ddp.load_run(place / "runs/small")
    check_example(exported[kind], trained, photo, plain if kind.startswith("onnx") else "")
    text = (exported[kind] / "README.md").read_text()
    assert "of 61 |" in text
    assert str(place) not in text


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 5])
def test_the_graph_takes_any_batch_and_has_neither_dropout_nor_random_numbers(exported, count):
    path = exported["onnx"] / "model.onnx"
    model = onnx.load(path)
    onnx.checker.check_model(model)
    operators = {node.op_type for node in model.graph.node}
    assert "Conv" in operators
    assert not [name for name in operators if "Dropout" in name or "Random" in name]
    assert model.opset_import[0].version == formats.OPSET
    session = onnxruntime.InferenceSession(path)
    images = np.random.default_rng(0).normal(size=(count, 3, 64, 64)).astype(np.float32)
    (logits,) = session.run(["logits"], {"images": images})
    program = torch.export.load(exported["torch_export"] / "model.pt2").module()
    with torch.inference_mode():
        theirs = program(torch.from_numpy(images)).numpy()
        ours = alexnet_ddp.load_run(exported["safetensors"]).model(torch.from_numpy(images))
    np.testing.assert_allclose(logits, ours.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(theirs, ours.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_preprocessing_in_the_graph_returns_probabilities(exported):
    session = onnxruntime.InferenceSession(exported["onnx_uint8"] / "model.onnx")
    assert [(one.name, one.type) for one in session.get_inputs()] == [("images", "tensor(uint8)")]
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 64, 64), dtype=np.uint8)
    (found,) = session.run(["probabilities"], {"images": images})
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)


@pytest.mark.slow
def test_load_run_takes_an_exported_folder(exported, place):
    there, here = (
        alexnet_ddp.load_run(one) for one in (place / "runs/small", exported["safetensors"])
    )
    assert here.classes == there.classes
    assert here.temperature == there.temperature is not None
    assert here.checkpoint == exported["safetensors"]
    assert not here.model.training
    image = Image.open(next((place / "data/val/class1").iterdir()))
    assert torch.equal(here.transform(image), there.transform(image))
    for name, tensor in there.model.state_dict().items():
        assert torch.equal(here.model.state_dict()[name], tensor), name
    with pytest.raises(ConfigError, match=r"no export that load_run reads .*format=safetensors"):
        alexnet_ddp.load_run(exported["onnx"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [["model=${oc.env:HOME}"], ["plugins=[os]"], ["trainer.epochs=2"]]
)
def test_a_record_of_an_export_chooses_the_network_only(exported, tmp_path, options):
    shutil.copytree(exported["safetensors"], tmp_path / "copy")
    (tmp_path / "copy/model.json").write_text(json.dumps({"options": options}))
    with pytest.raises(ConfigError, match="must hold plain options of the model only"):
        alexnet_ddp.load_run(tmp_path / "copy")


@pytest.mark.slow
def test_the_weights_file_names_its_classes_and_can_start_a_run(exported, place):
    path = exported["safetensors"] / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["class_names"]) == [f"class{k}" for k in range(5)]
    assert json.loads(metadata["classes"]) == json.loads(metadata["class_names"])
    own = load_file(next((place / "runs/small/checkpoints").iterdir()) / "ema.safetensors")
    assert set(load_file(path)) == set(own)
    options = [
        "model=alexnet_small",
        "data=folder",
        f"data.root={place / 'data'}",
        "data.image_size=64",
    ]
    given = [*options, f"model.weights={path}", "data.std=[0.3,0.25,0.2]", "device=cpu"]
    done = run("evaluate", *given, cwd=place)
    assert done.returncode == 0, done.stdout
    metrics = json.loads((exported["safetensors"] / "metrics.json").read_text())
    assert (
        f"(top-1: {metrics['correct1']}, top-5: {metrics['correct5']}, of 61 images)" in done.stdout
    )


# --- wrong exports --------------------------------------------------------------------------------------------------


def wrong_mean(data, in_graph):
    how = RIGHT(data, in_graph)
    return how | {"mean": [how["mean"][0] + 0.02, *how["mean"][1:]]}


RIGHT = folder.preprocessing_of


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["format=onnx"],
        ["format=onnx", "preprocessing=true"],
        ["format=torch_export", "preprocessing=true"],
        ["format=safetensors"],
    ],
    ids=" ".join,
)
def test_a_wrong_mean_is_caught_and_leaves_nothing(place, tmp_path, monkeypatch, options):
    monkeypatch.setattr(command, "preprocessing_of", wrong_mean)
    with pytest.raises(
        WrongExport, match=r"the exported model is wrong: .* times the tolerance; it gets top-1"
    ) as end:
        export_here(place, *options, f"output={tmp_path / 'out'}")
    assert (end.value.exit_code, "\n" in str(end.value)) == (70, False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_other_counts_than_those_of_evaluate_are_a_note(place, tmp_path, caplog):
    file = place / "runs/small/evaluation.json"
    caplog.set_level("INFO", "alexnet_ddp.export")
    content = file.read_text()
    known = json.loads(content)
    changed = {"val/correct1": known["val/correct1"] - 2}
    notes = []
    try:
        others = [{"checkpoint": "step-00000001"}, {"batch_norm_images": 100}]
        for k, change in enumerate(({}, *(one | changed for one in others), changed)):
            file.write_text(json.dumps(known | change))
            export_here(place, "format=safetensors", "device=cpu", f"output={tmp_path}/{k}")
            notes.append([one for one in caplog.messages if "evaluation.json" in one])
    finally:
        file.write_text(content)
    assert notes[:3] == [[], [], []]
    ((note,),) = notes[3:]
    before, now = known["val/correct1"] - 2, known["val/correct1"]
    assert f"evaluation.json has top-1 {before} and top-5" in note
    assert f"the export on cpu in fp32 has top-1 {now} and top-5" in note
    assert note.endswith("(rounding), other options of data, or other images")


@pytest.mark.slow
def test_a_file_that_does_not_load_is_caught_and_leaves_nothing(place, tmp_path, monkeypatch):
    def damaged(model, example, path):
        path.write_bytes(b"no model")

    monkeypatch.setattr(formats, "_write_onnx", damaged)
    with pytest.raises(WrongExport, match=r"the exported model\.onnx cannot be run \("):
        export_here(place, "format=onnx", f"output={tmp_path / 'out'}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_nothing(place, tmp_path, monkeypatch):
    def full(model, example, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(formats, "_write_onnx", full)
    with pytest.raises(
        MachineError, match=r"could not be written \(No space left on device\); free"
    ):
        export_here(place, "format=onnx", f"output={tmp_path / 'out'}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_stop_signal_leaves_nothing_though_files_are_being_written(tmp_path):
    code = """
        from alexnet_ddp.runtime import startup
        startup.begin("export")
        from pathlib import Path
        from alexnet_ddp.export.command import _draft
        with _draft(Path("stopped")) as folder:
            print("ready", flush=True)
            for number in range(10**9):
                (folder / f"{number}").write_text("")
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=tmp_path, env=env, text=True, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
        assert process.stderr.read() == "alexnet_ddp: stopped by SIGTERM\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "was"),
    [
        ("data.mean=[0.1,0.1,0.1]", "[0.485, 0.456, 0.406]"),
        ("data.std=[0.2,0.25,0.2]", "[0.3, 0.25, 0.2]"),
        ("data.image_size=32", "64"),
        ("data.eval_resize=64", "73"),
        ("data.eval_interpolation=bicubic", "bilinear"),
    ],
)
def test_other_inputs_than_the_runs_are_refused(place, tmp_path, given, was):
    output = tmp_path / "out"
    with pytest.raises(ConfigError) as end:
        export_here(place, "format=safetensors", f"output={output}", given)
    option, _, value = given.partition("=")
    rule = f"is not that of the run ({was}), whose preprocessing is exported; leave {option} out"
    assert str(end.value) == f"{option} ({value.replace(',', ', ')}) {rule}"
    assert not output.exists()
    if option == "data.std":  # the run's own value
        export_here(place, "format=safetensors", f"output={output}", "data.std=[0.3,0.25,0.2]")


def test_ties_may_flip_and_other_differences_may_not():
    labels = torch.tensor([0, 1])
    logits = torch.tensor([[1.0, 1.0 - 1e-5, -9.0], [0.0, 4.0, 1.0]])
    tied = torch.tensor([[1.0 - 1e-5, 1.0, -9.0], [0.0, 4.0, 1.0]])
    same = Comparison()
    same.add(logits, tied, labels, False)
    same.require_equal()
    assert (same.run.tolist(), same.exported.tolist(), same.num_ties) == ([2, 2], [1, 2], 1)
    probable = Comparison()
    probable.add(logits, tied.softmax(1), labels, True)
    probable.require_equal()
    assert probable.loss_sum == pytest.approx(same.loss_sum, rel=1e-6)
    for wrong in (logits + torch.tensor([0.0, 0.05, 0.0]), logits * torch.nan):
        other = Comparison()
        other.add(logits, wrong, labels, False)
        with pytest.raises(WrongExport, match="it gets top-1"):
            other.require_equal()
    with pytest.raises(WrongExport, match=r"returns float64 \(2, 3\), not float32 \(2, 3\)"):
        Comparison().add(logits, logits.double(), labels, False)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["run.name=none", "format=onnx", "output=new"], r"no trained run none .*there are: .*small.*; give run\.name"),
        (["run.name=small", "format=onnx", "output=data"], r"output \(data\) exists; give another folder"),
        (["run.name=small", "format=onnx", "output=no/new"], r"output \(no/new\) must be in an existing directory"),
        (["run.name=small", "format=onx", "output=new"], r"format \(onx\) must be one of safetensors, onnx, torch_export"),
        (["run.name=small", "output=new"], r"format is required and has no value"),
        (["run.name=small", "format=onnx"], r"output is required and has no value"),
        (["run.name=small", "format=safetensors", "output=new", "preprocessing=true"], "preprocessing=true needs a graph"),
        (["run.name=small", "format=huggingface", "output=new"], "format=huggingface takes networks of timm, and those of"),
        (["run.name=small", "format=onnx", "output=new", "model.weights=x"], r"model\.weights \(x\) is refused: export"),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, list) else "",
)  # fmt: skip
def test_bad_input_is_one_line(place, options, line):
    done = run("export", *options, cwd=place)
    assert done.returncode == 64
    assert re.search(line, done.stdout), done.stdout
    assert done.stdout.count("\n") == 1
    assert not (place / "new").exists()


@pytest.mark.slow
def test_several_ranks_are_refused_in_one_line(place):
    done = run("export", "run.name=small", "format=onnx", "output=new", cwd=place, ranks=2)
    assert done.returncode == 1
    lines = [line for line in done.stdout.splitlines() if line.startswith("alexnet_ddp: ")]
    assert lines == ["alexnet_ddp: export takes one process, not 2; start it without torchrun"]


@pytest.mark.slow
def test_a_missing_extra_gives_the_command_of_pip(place, tmp_path, monkeypatch):
    for name in ("onnxruntime", "onnx"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ConfigError,
        match=r"format=onnx needs onnx, onnxruntime; pip install 'alexnet-ddp\[export\]'",
    ):
        export_here(place, "format=onnx", f"output={tmp_path / 'out'}")


@pytest.mark.slow
def test_a_network_that_torch_cannot_export_is_one_line(tmp_path):
    class Branching(torch.nn.Module):
        def forward(self, images):
            return images.mean((2, 3)) * (2 if images.sum() > 0 else 3)

    example = torch.zeros(2, 3, 8, 8)
    classes = {"ids": ["a"], "names": ["a"]}
    for form in (ExportFormat.onnx, ExportFormat.torch_export):
        with pytest.raises(
            ConfigError, match=r"torch cannot export this network \(.*use format=safetensors"
        ) as end:
            formats.write_model(form, Branching().eval(), example, classes, tmp_path)
        assert "\n" not in str(end.value)


@pytest.mark.slow
def test_large_weights_are_in_a_second_file(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "_MAX_ONNX_BYTES", 1000)
    model = WithPreprocessing(torchvision.models.squeezenet1_1(num_classes=3), IMAGENET).eval()
    example = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    formats.write_model(ExportFormat.onnx, model, example, {"ids": [], "names": []}, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    (tmp_path / "moved").mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    runner = formats.open_model(ExportFormat.onnx, tmp_path / "moved", 1)
    with torch.inference_mode():
        torch.testing.assert_close(runner(example), model(example))


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.parametrize(
    "options",
    [
        ["model=alexnet_bn", "model.dropout=0.25"],
        ["model=torchvision", "model.name=resnet18"],
        [
            "model=timm",
            "model.name=resnet10t",
            "model.args={drop_rate: 0, act_layer: gelu, global_pool: avg}",
        ],
    ],
    ids=" ".join,
)
def test_the_recorded_options_build_the_same_network(options):
    """As strings and numbers, through the grammar of the command line."""
    first = compose("train", [*options, "data=synthetic"]).model
    again = compose("train", [*folder.model_options(first), "data=synthetic"]).model
    assert replace(again, weights=None) == replace(first, weights=None)
    sizes = [build_model(one, 3, 224, 0).state_dict() for one in (first, again)]
    assert {n: t.shape for n, t in sizes[0].items()} == {n: t.shape for n, t in sizes[1].items()}


# --- networks -------------------------------------------------------------------------------------------------------

NETWORKS = {
    "alexnet": (["model=alexnet"], 64),
    "alexnet_2012": (["model=alexnet_2012"], 224),
    "alexnet_bn": (["model=alexnet_bn"], 64),
    "resnet18": (["model=torchvision", "model.name=resnet18"], 32),
    "efficientnet_b0": (["model=torchvision", "model.name=efficientnet_b0"], 32),
    "vit_b_16": (["model=torchvision", "model.name=vit_b_16", "model.dropout=0"], 224),
    "googlenet": (["model=torchvision", "model.name=googlenet", "model.transform_input=true"], 64),
    "timm": (["model=timm", "model.name=resnet10t"], 64),
    "small_vit": (["model=timm", "model.name=test_vit"], 160),
}

IN_TIMM = ("resnet18", "timm", "small_vit")
# Half a minute to a minute each. The others have their layers.
FULL = ("alexnet", "alexnet_bn", "efficientnet_b0", "vit_b_16", "resnet18")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.full] * (name in FULL)) for name in NETWORKS],
)
def test_each_network_is_exported_in_each_format(place, name, tmp_path):
    options, size = NETWORKS[name]
    few = [
        "data.limit_train=8",
        "data.limit_val=12",
        "trainer.global_batch_size=8",
        "trainer.epochs=1",
    ]
    train(place, name, *options, f"data.image_size={size}", *few)
    names = ["safetensors", "onnx", "torch_export"] + ["huggingface"] * (name in IN_TIMM)
    for form in map(ExportFormat, names):
        export_here(place, f"format={form.value}", f"output={tmp_path / form.value}", name=name)
        metrics = json.loads((tmp_path / form.value / "metrics.json").read_text())
        assert metrics["num_images"] == 12
        for count in ("correct1", "correct5"):
            assert metrics[count] == metrics["run"][count]
        assert metrics["largest_difference"] < 2e-4
        card = (tmp_path / form.value / "README.md").read_text()
        begin = "---\nlibrary_name: timm\n" if form is ExportFormat.huggingface else "# "
        assert card.startswith(begin)
    if name == "googlenet":  # which rescales its inputs itself
        export_here(
            place,
            "format=torch_export",
            "preprocessing=true",
            f"output={tmp_path / 'uint8'}",
            name=name,
        )
    if name in IN_TIMM:
        trained = alexnet_ddp.load_run(place / "runs" / name)
        assert set(alexnet_ddp.load_run(tmp_path / "huggingface").model.state_dict()) == set(
            trained.model.state_dict()
        )
        check_example(
            tmp_path / "huggingface", trained, next((place / "data/val/class2").iterdir())
        )
    shutil.rmtree(place / "runs" / name)
