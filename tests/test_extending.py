"""docs/extending.md: its files are written, its commands are run. And what plugins must not do."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision.transforms as T
from PIL import Image
from safetensors.torch import load_file

import alexnet_ddp
from alexnet_ddp import cli, plugins
from alexnet_ddp.config import ConfigError
from alexnet_ddp.config.data import IMAGENET_MEAN
from alexnet_ddp.config.plugins import PluginOptimizerConfig, TorchOptimizerConfig
from alexnet_ddp.training.metrics import UserMetrics
from alexnet_ddp.training.optim import (
    apply_step,
    build_optimizer,
    load_state_by_name,
    needs_full_tensors,
    state_by_name,
)
from tests.ranks import run_command

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
FILES = {
    text.split("\n", 1)[0].removeprefix("# "): text for kind, text in BLOCKS if kind == "python"
}
COMMANDS = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
ENV = {**os.environ, "WANDB_MODE": "disabled", "PYTHONPATH": str(ROOT)}
QUICK = ["trainer.max_steps=4", "trainer.global_batch_size=8", "logger.tensorboard=false", "data.image_size=64"]  # fmt: skip


def run(command: str, *overrides: str, cwd: Path, ranks: int = 0) -> subprocess.CompletedProcess:
    env = {**ENV, "XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"]}
    return run_command(f"alexnet_ddp.{command}", list(overrides), ranks, cwd, env)


@pytest.fixture
def place(tmp_path, image_folder):
    """A folder with the files of the page, and a photo."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "photo.jpg").write_bytes(next(image_folder.rglob("*.jpg")).read_bytes())
    return tmp_path


def documented(name: str, data: Path) -> list[str]:
    """The overrides of the page's command that trains run.name=NAME, shortened for a test."""
    (line,) = [c for c in COMMANDS if f"alexnet_ddp.train run.name={name} " in c]
    arguments = shlex.split(line)[3:]
    quick = [o for o in QUICK if o.split("=")[0] not in {a.split("=")[0] for a in arguments}]
    own = [a for a in arguments if a.startswith("data=")]
    return [*arguments, *quick, *([] if own else ["data=folder", f"data.root={data}"])]


def train(name: str, place: Path, data: Path, *more: str, ranks: int = 0) -> Path:
    done = run("train", *documented(name, data), *more, cwd=place, ranks=ranks)
    assert done.returncode == 0, done.stdout
    names = [o.partition("=")[2] for o in more if o.startswith("run.name=")]
    return place / "runs" / [name, *names][-1]


def last_row(run_dir: Path, key: str) -> dict:
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if key in row][-1]


def test_the_page_has_the_examples_that_are_tested():
    trained = re.findall(r"alexnet_ddp\.train run\.name=(\w+)", "\n".join(COMMANDS))
    assert trained == ["tiny", "wide", "nadam", "signum", "stripes", "darken", "metric", "journal"]
    assert len(COMMANDS) == 12


@pytest.mark.slow
def test_a_network_trains_resumes_evaluates_and_predicts(place, image_folder):
    run_dir = train("tiny", place, image_folder)
    resumed = run("train", *documented("tiny", image_folder), "trainer.max_steps=6", cwd=place)
    assert resumed.returncode == 0, resumed.stdout
    assert (
        last_row(run_dir, "train/loss")["step"] == 6 or last_row(run_dir, "val/top1")["step"] == 6
    )
    for line in COMMANDS:
        if "run.name=tiny" in line and "train" not in line:
            command, *arguments = shlex.split(line)[2:]
            done = run(command.removeprefix("alexnet_ddp."), *arguments, cwd=place)
            assert done.returncode == 0, done.stdout
    done = subprocess.run(
        [sys.executable, "use_run.py"], cwd=place, env=ENV, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("class")
    # Without plugins nothing is imported, and the line says what to give.
    for command, more in (("evaluate", []), ("predict", ["images=photo.jpg"])):
        done = run(command, "run.name=tiny", *more, cwd=place)
        assert done.returncode == 64, done.stdout
        assert "give plugins=[my_nets] again" in done.stdout
        assert done.stdout.count("\n") == 1


@pytest.mark.slow
def test_a_network_with_arguments(place, image_folder):
    run_dir = train("wide", place, image_folder, "trainer.max_steps=2")
    (checkpoint,) = (run_dir / "checkpoints").glob("step-*")
    header = (checkpoint / "model.safetensors").read_bytes()[8:2000]
    assert b'"shape":[16,3,3,3]' in header


@pytest.mark.slow
def test_a_class_of_torch_optim(place, image_folder):
    run_dir = train("nadam", place, image_folder, "model=alexnet_small")
    (checkpoint,) = (run_dir / "checkpoints").glob("step-*")
    assert b'"mu_product/' in (checkpoint / "optimizer.safetensors").read_bytes()[:20_000]


@pytest.mark.slow
def test_a_class_of_torch_optim_in_a_hybrid_equals_ddp_and_resumes(place, image_folder):
    net = ["model=alexnet_small", "model.dropout=0", "scheduler=constant"]
    # Otherwise rounding decides how far a tiny gradient moves a weight.
    net += ["optimizer.args.eps=0.01"]
    ddp = train("nadam", place, image_folder, *net, "run.name=ddp", ranks=2)
    hybrid = ["run.name=hybrid", "parallel=hybrid", "parallel.split=[classifier.0,classifier.3]"]
    for steps in (2, 4):
        more = [*net, *hybrid, f"trainer.max_steps={steps}"]
        other = train("nadam", place, image_folder, *more, ranks=2)
    for stem in ("model", "optimizer"):
        a, b = (
            load_file(d / f"checkpoints/step-00000004/{stem}.safetensors") for d in (ddp, other)
        )
        assert a.keys() == b.keys()
        for key in a:
            assert torch.allclose(a[key], b[key], rtol=1e-3, atol=2e-4), key


@pytest.mark.slow
def test_an_optimizer_resumes_with_its_state(place, image_folder):
    constant = "scheduler=constant"
    train("signum", place, image_folder, "run.name=whole", "trainer.max_steps=6", constant)
    for steps in (3, 6):
        more = ("run.name=parts", f"trainer.max_steps={steps}", constant)
        train("signum", place, image_folder, *more)
    for stem in ("model", "optimizer"):
        file = f"checkpoints/step-00000006/{stem}.safetensors"
        a, b = ((place / "runs" / name / file).read_bytes() for name in ("whole", "parts"))
        assert a == b, stem
    assert b'"int:num_steps/' in a[:20_000]


@pytest.mark.slow
def test_a_data_source_trains_and_evaluates_on_two_ranks(place, image_folder):
    train("stripes", place, image_folder, ranks=2)
    done = run("evaluate", "run.name=stripes", "plugins=[my_data]", cwd=place)
    assert done.returncode == 0, done.stdout
    result = json.loads((place / "runs/stripes/evaluation.json").read_text())
    assert result["val/num_images"] == 200
    assert set(result["per_class"]) == {"horizontal", "vertical"}


@pytest.mark.slow
def test_an_augmentation_is_a_function_of_seed_epoch_and_image(place, image_folder):
    net = ["model=alexnet_small", "scheduler=constant", "run.name=one"]
    one = train("darken", place, image_folder, *net)
    for steps in (2, 4):
        more = [*net, "run.name=parts", f"trainer.max_steps={steps}"]
        parts = train("darken", place, image_folder, *more)
    darker = train("darken", place, image_folder, *net, "run.name=darker", "augment.args.least=0.1")
    a, b, c = (
        (d / "checkpoints/step-00000004/model.safetensors").read_bytes()
        for d in (one, parts, darker)
    )
    assert a == b
    assert a != c


@pytest.mark.slow
def test_a_metric_is_a_mean_over_all_images_of_all_ranks(place, image_folder):
    one = train("metric", place, image_folder, "model=alexnet_small", "trainer.max_steps=2")
    name = "run.name=metric"
    two = run("evaluate", name, "plugins=[my_metrics]", cwd=place, ranks=2)
    assert two.returncode == 0, two.stdout
    again = json.loads((one / "evaluation.json").read_text())["val/confidence"]
    assert again == pytest.approx(last_row(one, "val/confidence")["val/confidence"], rel=1e-6)
    assert 0.2 <= again <= 1


@pytest.mark.slow
def test_a_callback_is_called_on_rank_0(place, image_folder):
    run_dir = train("journal", place, image_folder, "model=alexnet_small", ranks=2)
    lines = (run_dir / "journal.txt").read_text().splitlines()
    assert [line.split(" loss")[0] for line in lines[:4]] == [f"step {k}" for k in (1, 2, 3, 4)]
    assert re.fullmatch(r"evaluation 4 top1 [\d.]+", lines[4])
    assert lines[5:] == ["checkpoint 4 step-00000004", "end"]


def refused(place: Path, *overrides: str) -> str:
    done = run("train", *overrides, cwd=place)
    assert done.returncode == 64, done.stdout
    assert done.stdout.count("\n") == 1, done.stdout
    return done.stdout


def test_a_yaml_file_cannot_name_plugins(place):
    (place / "conf" / "experiment").mkdir(parents=True)
    (place / "conf" / "experiment" / "evil.yaml").write_text(
        "# @package _global_\nplugins: [evil]\nrun: {root: evil}\n"
    )
    (place / "evil.py").write_text("open('imported', 'w').close()\n")
    said = refused(place, f"--config-dir={place}/conf", "experiment=evil")
    assert "plugins=[evil] comes from a YAML file" in said
    said = refused(place, f"--config-dir={place}/conf", "experiment=evil", "plugins=[${run.root}]")
    assert "must name modules, not ${...}" in said
    assert not (place / "imported").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["plugins=[no_such]"], "plugins=[no_such] cannot be imported (ModuleNotFoundError: No module named 'no_such')"),
        (["plugins=[broken]"], "ValueError: twice two is five at "),
        (["plugins=[my_nets.py]"], "write plugins=[my_nets]"),
        (["plugins=[my_nets]", "model=plugin", "model.name=tidy"], "nearest: tiny"),
        (["model=plugin", "model.name=tiny"], "registered: none); give the module that registers it"),
        (["plugins=[my_augments]", "augment=plugin", "augment.name=darken", "augment.args.leest=1"], "augment.name (darken): got an unexpected keyword argument 'leest'; correct the args"),
        (["optimizer=torch", "optimizer.name=LBFGS"], "several times a step"),
        (["optimizer=torch", "optimizer.name=SparseAdam"], "sparse gradients"),
        (["optimizer=torch", "optimizer.name=Nadam"], "no class of torch.optim; there are: ASGD, "),
        (["optimizer=torch", "optimizer.name=SGD", "optimizer.args.lr=1"], "write optimizer.lr=1"),
        (["optimizer=torch", "optimizer.name=SGD", "optimizer.args.beta=1"], "unexpected keyword argument 'beta'"),
        (["optimizer=torch", "optimizer.name=Adafactor", "parallel=hybrid"], "use parallel=ddp"),
        (["replay=runs/demo/replay.json"], "python -m alexnet_ddp.replay run.name=NAME file="),
    ],
)  # fmt: skip
def test_one_line_for_a_wrong_plugin_or_optimizer(place, image_folder, overrides, line):
    (place / "broken.py").write_text("raise ValueError('twice two is five')\n")
    assert line in refused(place, "data=folder", f"data.root={image_folder}", *QUICK, *overrides)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"), [("test_resnet", []), ("test_vit", ["model.args.img_size=64"])]
)
def test_a_network_of_timm_with_its_own_inputs(place, image_folder, name, options):
    timm = pytest.importorskip("timm")
    data = ["data=folder", f"data.root={image_folder}", *QUICK, *options]
    done = run("train", *data, "run.name=timm", "model=timm", f"model.name={name}", cwd=place)
    assert done.returncode == 0, done.stdout
    loaded = alexnet_ddp.load_run(place / "runs/timm")
    theirs, ours = timm.get_pretrained_cfg(name), loaded.config.data
    assert ours.normalisation == (theirs.mean, theirs.std)
    assert theirs.mean != IMAGENET_MEAN  # else this test would show nothing
    assert ours.eval_interpolation.value == theirs.interpolation
    assert ours.eval_resize == int(64 / theirs.crop_pct)
    evaluated = run("evaluate", "run.name=timm", cwd=place)
    assert evaluated.returncode == 0, evaluated.stdout
    recorded = json.loads((place / "runs/timm/evaluation.json").read_text())

    # The same network and transform by hand give the same number of correct images.
    index = alexnet_ddp.open_dataset("data=folder", f"data.root={image_folder}").val
    with torch.inference_mode():
        inputs = [loaded.transform(Image.open(index.name(i))) for i in range(len(index))]
        found = loaded.model(torch.stack(inputs)).argmax(1)
    assert int((found == torch.from_numpy(index.labels)).sum()) == recorded["val/correct1"]
    x = inputs[0]
    pixels = T.Compose(
        [
            T.Resize(ours.eval_resize, T.InterpolationMode(theirs.interpolation)),
            T.CenterCrop(64),
            T.ToTensor(),
            T.Normalize(theirs.mean, theirs.std),
        ]
    )(Image.open(index.name(0)).convert("RGB"))
    assert torch.allclose(x, pixels, atol=1e-5)


def test_options_of_the_user_come_before_those_of_timm():
    cfg = cli.compose(["model=timm", "model.name=test_resnet", "data.mean=[0,0,0]", "data.eval_resize=80"])  # fmt: skip
    assert cfg.data.mean == [0, 0, 0]
    assert cfg.data.eval_resize == 80


def test_two_plugins_of_one_name_are_refused():
    registry = plugins.Registry("model", "model.name")
    registry.add("a", len)
    registry.add("a", len)  # a module that is imported twice
    with pytest.raises(ConfigError, match="both register 'a'; rename one of them"):
        registry.add("a", max)


def test_only_elementwise_optimizers_suit_a_hybrid():
    plugins.register_optimizer("by element", torch.optim.SGD, elementwise=True)
    plugins.register_optimizer("by tensor", torch.optim.Adagrad)
    for name in ("SGD", "NAdam"):
        assert needs_full_tensors(TorchOptimizerConfig(name=name)) is None
    assert "other elements" in needs_full_tensors(TorchOptimizerConfig(name="Adafactor"))
    assert needs_full_tensors(PluginOptimizerConfig(name="by element", lr=1)) is None
    line = needs_full_tensors(PluginOptimizerConfig(name="by tensor", lr=1))
    assert "was not registered with elementwise=True" in line


class Odd(torch.optim.SGD):
    """Keeps a state that cannot be saved."""

    value: object = [1]

    def step(self, closure=None):
        for weight in self.param_groups[0]["params"]:
            self.state[weight]["odd"] = self.value


def test_a_state_that_cannot_be_saved_is_refused():
    model = torch.nn.Linear(2, 2)
    optimizer = Odd(model.parameters(), 0.1)
    optimizer.step()
    with pytest.raises(ConfigError, match="Odd keeps odd of type list, which cannot be saved"):
        state_by_name(optimizer, model)
    optimizer.state.clear()
    optimizer.state["global"]["count"] = 1
    with pytest.raises(ConfigError, match="keeps state that belongs to no parameter"):
        state_by_name(optimizer, model)


@pytest.mark.parametrize("bad", [0.0, 1.0])
def test_an_optimizer_without_found_inf_is_not_called_for_a_bad_step(bad):
    model = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(TorchOptimizerConfig(name="RMSprop", lr=0.1), model)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.ones(1, 2)).sum().backward()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    apply_step(optimizer, scaler, torch.tensor(bad))
    is_same = all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
    assert is_same == bool(bad)


CLASSES = sorted(
    name
    for name, owner in vars(torch.optim).items()
    if isinstance(owner, type) and issubclass(owner, torch.optim.Optimizer)
    and name not in ("Optimizer", "LBFGS", "SparseAdam", "Muon")
)  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
def test_the_state_of_any_torch_optimizer_continues_exactly(name):
    def build() -> tuple:
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4, 2)
        )
        return model, build_optimizer(TorchOptimizerConfig(name=name, lr=0.01), model)

    def learn(model, optimizer, steps) -> None:
        for k in steps:
            optimizer.zero_grad()
            model(torch.full((2, 3, 3, 3), k + 1.0)).square().sum().backward()
            optimizer.step()

    model, optimizer = build()
    learn(model, optimizer, range(2))
    state = {key: t.clone() for key, t in state_by_name(optimizer, model).items()}
    other, fresh = build()
    other.load_state_dict(model.state_dict())
    load_state_by_name(fresh, other, state)
    learn(model, optimizer, range(2, 5))
    learn(other, fresh, range(2, 5))
    for p, q in zip(model.parameters(), other.parameters()):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", ["top1", "loss", "num_images"])
def test_a_metric_cannot_replace_a_built_in_one(name):
    with pytest.raises(ConfigError, match=rf"trainer.metrics \({name}\): val/{name} is reported"):
        UserMetrics([name], torch.device("cpu"))


def test_elementwise_is_that_of_the_last_registration():
    alexnet_ddp.register_optimizer("again", torch.optim.SGD, elementwise=True)
    assert plugins.is_elementwise("again")
    alexnet_ddp.register_optimizer("again", torch.optim.SGD)
    assert not plugins.is_elementwise("again")


def test_plugins_may_be_deleted_on_the_command_line():
    assert cli.compose(["~plugins"]).plugins == []
