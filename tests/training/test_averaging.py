"""The mean of several checkpoints: weights in float64, BatchNorm's statistics for any number of ranks."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from alexnet_ddp import register_model, rng
from alexnet_ddp.checkpoint.format import find_several, mean_tensors, write_checkpoint
from alexnet_ddp.config import Config, ConfigError, Device
from alexnet_ddp.data.loader import build_loader
from alexnet_ddp.data.sampler import MicroBatch
from alexnet_ddp.data.sources.sets import open_data
from alexnet_ddp.runtime import distributed
from alexnet_ddp.runtime.errors import NoCheckpoint
from alexnet_ddp.training.averaging import read_average
from tests.ranks import run_ranks

STEPS = (10, 20, 30)
RUN = ["data=synthetic", "data.image_size=32", "data.num_classes=3", "data.num_train=53", "data.num_val=23"]  # fmt: skip
RUN += ["model=plugin", "model.name=tiny_bn", "device=cpu", "trainer.eval_batch_size=10"]
NUM_IMAGES = 50  # full batches of 10


@register_model("tiny_bn")
class TinyBN(nn.Module):
    """The statistics of the second BatchNorm depend on those of the first. The third is frozen."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 5, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3),
            nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.5),
        )  # fmt: skip
        self.classifier = nn.Linear(100, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))


@cache
def config(command: str, *more: str) -> Config:
    from alexnet_ddp.config.compose import compose

    return compose(command, [*RUN, "run.name=x", *more])


def states() -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    found = []
    for step in STEPS:
        state = TinyBN(3).state_dict()
        for name in ("features.1.running_mean", "features.4.running_mean"):
            state[name].uniform_()
        state["features.1.num_batches_tracked"].fill_(step)
        found.append(state)
    return found


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with three checkpoints of random weights."""
    directory, classes = tmp_path / "x", [f"class{k}" for k in range(3)]
    named = {"ids": classes, "names": classes}
    for step, tensors in zip(STEPS, states()):
        state = {"step": step, "best": {"step": 10}, "classes": named}
        files = {"model": tensors, "optimizer": {}}
        contents = {f"{name}.safetensors": safetensors.torch.save(one) for name, one in files.items()}  # fmt: skip
        contents["state.json"] = json.dumps(state).encode()
        write_checkpoint(directory / "checkpoints", step, contents)
    (directory / "run.json").write_text(json.dumps({"overrides": RUN}))
    (directory / "classes.json").write_text(json.dumps(named))
    return directory


def expected_state(cfg: Config) -> dict[str, Tensor]:
    """By torch's own update_bn, over the first images of the first epoch's order."""
    model, all_states = TinyBN(3), states()
    mean = {name: torch.stack([one[name].double() for one in all_states]).mean(0).float() for name in all_states[0]}  # fmt: skip
    model.load_state_dict(mean)
    frozen = [model.features[6], model.features[8]]
    order = rng.permutation(rng.fold(cfg.seed, rng.ORDER, 0), 53)[:NUM_IMAGES].reshape(5, 10)
    loader = build_loader(cfg.data, open_data(cfg.data).train, None, 1, torch.device("cpu"))
    works = [MicroBatch(k, 0, rows, k == 4) for k, rows in enumerate(order)]
    images = [batch.inputs().clone() for batch in loader.batches(works)]
    loader.close()
    for layer in frozen:
        layer.train = lambda mode=True, layer=layer: layer  # dropout and this layer stay off
        layer.training = False
    update_bn(images, model)
    return model.state_dict()


def averaged(cfg: Config) -> dict[str, list]:
    with distributed.session(Device.cpu) as world:
        data = open_data(cfg.data)
        classes = data.val.classes
        found = read_average(cfg, list(STEPS), 10_000, classes, lambda: data.train, world)
        assert found.origin["batch_norm_images"] == NUM_IMAGES
        assert not any(module.training for module in found.model.modules())
        return {name: tensor.tolist() for name, tensor in found.model.state_dict().items()}


def test_weights_are_averaged_and_batch_norm_is_estimated_for_any_number_of_ranks(run_dir):
    cfg = config("train")
    cfg = replace(cfg, run=replace(cfg.run, root=str(run_dir.parent)))
    expected = expected_state(cfg)
    for found in (averaged(cfg), run_ranks(averaged, 3, cfg)[1]):
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            if not name.endswith("num_batches_tracked"):
                torch.testing.assert_close(torch.tensor(found[name]), tensor, rtol=1e-5, atol=1e-6)
    assert found["features.1.num_batches_tracked"] >= 30
    assert found["features.6.running_mean"] == [0.0] * 4  # the same in all checkpoints


def test_evaluate_states_the_checkpoints_and_export_writes_their_mean(run_dir, tmp_path, capsys):
    # Each rank of the other test imports this module, and needs neither.
    from alexnet_ddp import evaluate
    from alexnet_ddp.export import command as export

    root = f"run.root={tmp_path}"
    options = config("evaluate", root, "average=2", "batch_norm_images=20")
    evaluate.main(options, [root, "run.name=x", "average=2", "batch_norm_images=20"])
    written = json.loads((run_dir / "evaluation.json").read_text())
    assert written["checkpoint"] == "mean of step-00000020, step-00000030"
    assert (written["batch_norm_images"], written["val/num_images"]) == (20, 23)
    folder = tmp_path / "others/class1"
    folder.mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(folder / "a.png")
    more = [root, "average=[10,30]", f"images={folder.parent}"]
    evaluate.main(config("evaluate", *more), [*more, "run.name=x"])
    written = json.loads((run_dir / "evaluation_images.json").read_text())
    assert (written["batch_norm_images"], written["val/num_images"]) == (NUM_IMAGES, 1)
    output = tmp_path / "exported"
    more = [root, "average=[10,20,30]", "format=safetensors", f"output={output}"]
    export.main(config("export", *more), [*more, "run.name=x"])
    exported = json.loads((output / "metrics.json").read_text())
    assert exported["run"]["checkpoint"].startswith("mean of step-00000010, ")
    assert exported["temperature"] is None
    assert exported["top1_interval_95"][0] <= exported["top1"] <= exported["top1_interval_95"][1]
    weights = safetensors.torch.load_file(output / "model.safetensors")
    mean = torch.stack([one["classifier.weight"] for one in states()]).mean(0)
    torch.testing.assert_close(weights["classifier.weight"], mean)
    said = capsys.readouterr().out
    assert interval_of(exported) in said
    assert interval_of(exported) in (output / "README.md").read_text()


def interval_of(metrics: dict) -> str:
    return "{:.2f}–{:.2f} %".format(*metrics["top1_interval_95"])


def test_a_mean_is_computed_in_float64_and_names_what_varies(tmp_path):
    half = torch.tensor([1.0, 2.0]).half()
    for k, value in enumerate((1e8, 1.0, -1e8)):
        folder = tmp_path / str(k)
        folder.mkdir()
        tensors = {"a": torch.tensor([value]), "same": half, "count": torch.tensor(k)}
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
    folders = [tmp_path / str(k) for k in range(3)]
    mean, varying = mean_tensors(folders, "model")
    assert mean["a"].item() == pytest.approx(1 / 3)  # 0 in float32
    assert torch.equal(mean["same"], half)
    assert mean["count"].item() == 2
    assert varying == {"a", "count"}
    safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "1/model.safetensors")
    with pytest.raises(ConfigError, match=r"^average: 1 has other tensors than 2; leave it out$"):
        mean_tensors(folders, "model")


def test_checkpoints_are_found_by_their_number_or_steps_and_damage_is_refused(run_dir):
    folder = run_dir / "checkpoints"
    assert [one.name[-2:] for one in find_several(folder, 2)] == ["20", "30"]
    assert [one.name[-2:] for one in find_several(folder, [30, 10])] == ["10", "30"]
    with pytest.raises(ConfigError, match=r"^average \(4\): .* has 3 checkpoints; .*keep_last=4$"):
        find_several(folder, 4)
    with pytest.raises(ConfigError, match=r"^average \(15\): .* it has 10, 20, 30$"):
        find_several(folder, [10, 15])
    with (folder / "step-00000020/model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(
        NoCheckpoint, match=r"step-00000020 is rejected: .*; leave it out of average"
    ):
        find_several(folder, 3)


@pytest.mark.parametrize(
    ("command", "override", "line"),
    [
        ("evaluate", "average=1", "average (1) must be a number of checkpoints of at least 2, or a list of different steps, such as [100,200]"),
        ("export", "average=[5,5]", "average ([5, 5]) must be a number of checkpoints of at least 2, or a list of different steps, such as [100,200]"),
        ("evaluate", "average=best", "average (best) must be a number of checkpoints of at least 2, or a list of different steps, such as [100,200]"),
        ("evaluate", "batch_norm_images=5", "batch_norm_images (5) would be ignored without average; give average=3 too, or leave it out"),
        ("evaluate", "average=3 at_step=last", "at_step (last) would be ignored with average (3); give one of them"),
        ("evaluate", "average=3 calibrate=true", "calibrate=true stores a temperature for one checkpoint; leave average out"),
        ("evaluate", "average=3 model.weights=a.pth", "average (3) takes checkpoints of a run, and model.weights is a file; give run.name instead"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(command, override, line):
    more = ["format=safetensors", "output=x"] if command == "export" else []
    with pytest.raises(ConfigError) as error:
        config(command, *override.split(), *more)
    assert str(error.value) == line
