"""Every option is typed and checked; every mistake is one line and code 64; Hydra leaves no file."""

import multiprocessing
import os
import re
import runpy
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import yaml

import alexnet_ddp
from alexnet_ddp.cli import compose
from alexnet_ddp.config import Config, ConfigError, DDPConfig, Hook
from alexnet_ddp.config import compose as with_hydra
from alexnet_ddp.config.reference import help_lines, markdown
from alexnet_ddp.config.schema import CONF_DIR, ROOTS, options, sections
from alexnet_ddp.config.schema import GROUPS as SCHEMA_GROUPS
from alexnet_ddp.tracking.console import learning_rate
from tests.ranks import run_ranks  # noqa: F401 (its forkserver has torch loaded, so a process starts fast)

GROUPS = ("data", "augment", "model", "optimizer", "scheduler", "parallel", "experiment")
PREPARE_GROUPS = ("engine", "augment")
EXPERIMENTS = sorted(path.stem for path in (CONF_DIR / "experiment").glob("*.yaml"))


def choices(group: str) -> set[str]:
    return {path.stem for path in (CONF_DIR / group).glob("*.yaml")}


def header(path: Path) -> str:
    """The comment lines that a file begins with."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line)
    return "\n".join(lines)


# --- options ------------------------------------------------------------------------------------------------------

DATA_KEYS = (
    "data.args, data.cache_dir, data.cache_gb, data.class_order, data.eval_interpolation, "
    "data.eval_resize, data.fold, data.grow_epochs, data.image_size, data.images, data.label_column, data.limit_train, data.limit_val, data.max_bad_images, data.mean, "
    "data.name, data.num_classes, data.num_threads, data.num_train, data.num_val, data.on_bad_image, data.path_column, data.root, "
    "data.sampling, data.shuffle, data.start_image_size, data.std, data.val_fraction, data.window_shards"
)
THREE = "must be auto, or three numbers, of red, green and blue in [0, 1]; write data.mean=[r,g,b]"
NUMBERS = "or numbers of at least 0 and not all 0, one per class; write "
WRONG_VALUES = {
    "data.sampling=evenly": (
        f"data.sampling (evenly) must be balanced or sqrt, {NUMBERS}data.sampling=balanced"
    ),
    "data.sampling=[0,0.0]": (
        f"data.sampling ([0, 0.0]) must be balanced or sqrt, {NUMBERS}data.sampling=balanced"
    ),
    "data.sampling=[1,-1]": (
        f"data.sampling ([1, -1]) must be balanced or sqrt, {NUMBERS}data.sampling=balanced"
    ),
    "data.sampling=2": (
        f"data.sampling (2) must be balanced or sqrt, {NUMBERS}data.sampling=balanced"
    ),
    "data=folder data.root=x data.mean=auto": (
        "data.mean (auto) takes the statistics that prepare writes, and only data=shards has them; "
        "give data.mean=[r,g,b] and data.std=[r,g,b], or pack the images"
    ),
    "data.mean=0.5": f"data.mean (0.5) {THREE}",
    "data.mean=[a,0,0]": f"data.mean (['a', 0, 0]) {THREE}",
    "data.mean=[0,0]": (
        "data.mean ([0, 0]) must be three numbers, of red, green and blue in [0, 1]; "
        "write data.mean=[r,g,b]"
    ),
    "trainer.class_weights=sqrt": (
        f"trainer.class_weights (sqrt) must be balanced, {NUMBERS}trainer.class_weights=balanced"
    ),
    "trainer.class_weights=[1,0]": (
        "trainer.class_weights ([1.0, 0.0]) must be greater than 0; leave images of a class out "
        "with data.sampling"
    ),
    "trainer.eval_every_steps=5 trainer.eval_every_epochs=2": (
        "trainer.eval_every_epochs (2) would be ignored with trainer.eval_every_steps (5); "
        "give one of them"
    ),
    "trainer.class_weights=balanced data.sampling=sqrt": (
        "trainer.class_weights=balanced would correct twice what data.sampling corrects; "
        "leave one of them out"
    ),
    "run.name=": "run.name ('') is empty; give a text",
    "run.name=..": "run.name ('..') must name one directory below run.root (runs)",
    "run.name=a/b run.root=x": "run.name ('a/b') must name one directory below run.root (x)",
    "data.image_size=0": "data.image_size (0) must be in [1, 20000]",
    "data.image_size=64 data.eval_resize=63": "data.eval_resize (63) must be at least data.image_size (64)",
    "data.start_image_size=32": (
        "data.start_image_size (32) and data.grow_epochs (None) belong together: the first size, and the epoch in "
        "which it has grown; give both or none"
    ),
    "data.start_image_size=64 data.grow_epochs=2": (
        "data.start_image_size (64) must be less than data.image_size (64), to grow to it"
    ),
    "data.start_image_size=32 data.grow_epochs=8": (
        "data.grow_epochs (8) must be less than trainer.epochs (8), to end at data.image_size"
    ),
    "data=shards data.root=x data.window_shards=0": "data.window_shards (0) must be at least 1",
    "data=shards data.root=x data.cache_gb=0": "data.cache_gb (0.0) must be in (0, 1000000000]",
    "data.num_threads=0": "data.num_threads (0) must be at least 1",
    "data.limit_train=0": "data.limit_train (0) must be at least 1",
    "data.limit_val=-1": "data.limit_val (-1) must be at least 1",
    "data=shards data.root=x data.window_shards=8": (
        "data.window_shards (8) is only read by data.shuffle=window, this is full; leave it out"
    ),
    "data=synthetic data.num_train=0": "data.num_train (0) must be at least 1",
    "data=synthetic data.num_val=0": "data.num_val (0) must be at least 1",
    "data=synthetic data.num_classes=0": "data.num_classes (0) must be at least 1",
    "augment.min_scale=-1": "augment.min_scale (-1.0) must be in [0, 1]",
    "augment.max_scale=2": "augment.max_scale (2.0) must be in [0, 1]",
    "augment.min_scale=0.9 augment.max_scale=0.5": "augment.min_scale (0.9) must be at most augment.max_scale (0.5)",
    "augment.max_ratio=0.5": "augment.max_ratio (0.5) must be at least 1",
    "augment.flip=2": "augment.flip (2.0) must be in [0, 1]",
    "augment=alexnet_2012 augment.flip=-1": "augment.flip (-1.0) must be in [0, 1]",
    "augment=alexnet_2012 augment.colour_sigma=-1": "augment.colour_sigma (-1.0) must be in [0, 10]",
    "augment.erase=1.5": "augment.erase (1.5) must be in [0, 1]",
    "augment.brightness=-0.1": "augment.brightness (-0.1) must be in [0, 1]",
    "augment.contrast=2": "augment.contrast (2.0) must be in [0, 1]",
    "augment=alexnet_2012 augment.saturation=nan": "augment.saturation (nan) must be a finite number",
    "augment.hue=0.6": "augment.hue (0.6) must be in [0, 0.5]",
    "augment=alexnet_2012 augment.mixup_alpha=-1": "augment.mixup_alpha (-1.0) must be in [0, 100]",
    "augment.cutmix_alpha=inf": "augment.cutmix_alpha (inf) must be a finite number",
    "augment.num_ops=2": "augment.num_ops (2) is only read by augment.policy=randaugment, this is none; leave it out",
    "augment.policy=trivialaugment augment.magnitude=9": (
        "augment.magnitude (9) is only read by augment.policy=randaugment, this is trivialaugment; leave it out"
    ),
    "augment.policy=randaugment augment.num_ops=0": "augment.num_ops (0) must be at least 1",
    "augment.policy=randaugment augment.magnitude=31": "augment.magnitude (31) must be in [0, 30]",
    "model.dropout=1": "model.dropout (1.0) must be in [0, 1)",
    "model=torchvision model.name=resnet18 model.dropout=-0.1": "model.dropout (-0.1) must be in [0, 1)",
    "optimizer.lr=0": "optimizer.lr (0.0) must be greater than 0",
    "optimizer.lr=nan": "optimizer.lr (nan) must be a finite number",
    "optimizer.bias_lr_factor=0": "optimizer.bias_lr_factor (0.0) must be greater than 0",
    "optimizer.weight_decay=-1": "optimizer.weight_decay (-1.0) must be at least 0",
    "optimizer=adamw optimizer.beta1=1": "optimizer.beta1 (1.0) must be in [0, 1)",
    "optimizer=adamw optimizer.beta2=-1": "optimizer.beta2 (-1.0) must be in [0, 1)",
    "optimizer=adamw optimizer.eps=0": "optimizer.eps (0.0) must be greater than 0",
    "optimizer=sgd optimizer.momentum=2": "optimizer.momentum (2.0) must be in [0, 1]",
    "optimizer=sgd optimizer.momentum=0 optimizer.nesterov=true": (
        "optimizer.nesterov needs optimizer.momentum greater than 0"
    ),
    "scheduler.warmup_epochs=-1": "scheduler.warmup_epochs (-1.0) must be at least 0",
    "scheduler.warmup_steps=-1 scheduler.warmup_epochs=0": "scheduler.warmup_steps (-1) must be at least 0",
    "scheduler.warmup_steps=600": (
        "scheduler.warmup_epochs (2.0) and scheduler.warmup_steps (600) exclude each other; set one of them to 0"
    ),
    "optimizer.scaling=linear": (
        "optimizer.scaling (linear) and optimizer.base_batch_size (None) belong together: how the rate is scaled, and "
        "from which batch; give both or none"
    ),
    "optimizer.base_batch_size=256": (
        "optimizer.scaling (none) and optimizer.base_batch_size (256) belong together: how the rate is scaled, and "
        "from which batch; give both or none"
    ),
    "optimizer.scaling=sqrt optimizer.base_batch_size=0": (
        "optimizer.base_batch_size (0) must be at least 1"
    ),
    "optimizer=lars optimizer.momentum=0": "optimizer.momentum (0.0) must be in (0, 1)",
    "optimizer=lars optimizer.eta=0": "optimizer.eta (0.0) must be greater than 0",
    "optimizer=lars optimizer.variant=weights_only": (
        "optimizer.variant=weights_only leaves biases and norms out of the decay; "
        "set optimizer.decay_biases=false"
    ),
    "scheduler=cosine scheduler.min_lr_ratio=2": "scheduler.min_lr_ratio (2.0) must be in [0, 1]",
    "scheduler=step scheduler.milestones_epochs=[3,2]": "scheduler.milestones_epochs ([3.0, 2.0]) must rise",
    "scheduler=step scheduler.gamma=0": "scheduler.gamma (0.0) must be greater than 0",
    "scheduler=poly scheduler.power=0": "scheduler.power (0.0) must be greater than 0",
    "trainer.epochs=0": "trainer.epochs (0) must be at least 1",
    "trainer.max_steps=0": "trainer.max_steps (0) must be at least 1",
    "trainer.global_batch_size=0": "trainer.global_batch_size (0) must be at least 1",
    "trainer.micro_batch_size=0": "trainer.micro_batch_size (0) must be at least 1",
    "trainer.eval_batch_size=-1": "trainer.eval_batch_size (-1) must be at least 1",
    "trainer.label_smoothing=1": "trainer.label_smoothing (1.0) must be in [0, 1)",
    "trainer.clip_grad_norm=0": "trainer.clip_grad_norm (0.0) must be greater than 0",
    "trainer.ema_decay=1": "trainer.ema_decay (1.0) must be in (0, 1)",
    "trainer.ema_decay=0": "trainer.ema_decay (0.0) must be in (0, 1)",
    "trainer.log_every_steps=0": "trainer.log_every_steps (0) must be at least 1",
    "trainer.eval_every_epochs=0": "trainer.eval_every_epochs (0) must be at least 1",
    "checkpoint.save_every_steps=0": "checkpoint.save_every_steps (0) must be at least 1",
    "checkpoint.save_every_minutes=0": "checkpoint.save_every_minutes (0.0) must be greater than 0",
    "checkpoint.keep_last=0": "checkpoint.keep_last (0) must be at least 1",
    "data.max_bad_images=3": "data.max_bad_images (3) is only read by data.on_bad_image=skip; leave it out",
    "data.on_bad_image=skip data.max_bad_images=-1": "data.max_bad_images (-1) must be at least 0",
    "device=cpu trainer.precision=bf16": (
        "trainer.precision=bf16 needs a CUDA device, but device=cpu; use trainer.precision=fp32"
    ),
    "device=cpu trainer.precision=fp16": (
        "trainer.precision=fp16 needs a CUDA device, but device=cpu; use trainer.precision=fp32"
    ),
    "data=folder": "data.root is required and has no value; give it on the command line: data.root=...",
    "data=imagenet": "data.root is required and has no value; give it on the command line: data.root=...",
    "model=torchvision": "model.name is required and has no value; give it on the command line: model.name=...",
    "++data.x.y=1": f"data.x.y is not a key; known here: {DATA_KEYS}",
    "+data._target_=os.system": f"data._target_ is not a key; known here: {DATA_KEYS}",
}

WRONG_PREPARATIONS = {
    "root=null": "source is required; give the directory or URL of the images: source=...",  # a folder called null
    "": "root is required and has no value; give it on the command line: root=...",
    "root=x": "source is required; give the directory or URL of the images: source=...",
    "root=x action=diff": "other is required for action=diff; give other=DIR, to compare root with",
    "root=x source=y engine.workers=0": "engine.workers (0) must be at least 1",
    "root=x source=y engine=auto engine.workers=-1": "engine.workers (-1) must be at least 1",
    "root=x source=y shorter_side=3": "shorter_side (3) must be in [4, 20000]",
    "root=x source=y quality=0": "quality (0) must be in [1, 100]",
    "root=x source=y encoding=raw size=0": "size (0) must be in [4, 20000]",
    "root=x source=y mean_image=0": "mean_image (0) must be in [4, 20000]",
    "root=x source=y num_shards=0": "num_shards (0) must be in [1, 999999]",
    "root=x source=y shuffle_seed=-1": "shuffle_seed (-1) must be in [0, 9223372036854775807]",
    "root=x source=y max_quarantine=-1": "max_quarantine (-1) must be at least 0",
    "root=x action=sheet image_size=0": "image_size (0) must be in [1, 20000]",
    "root=x source=y size=64": "size (64) is only read by encoding=raw, this is jpeg; leave it out",
    "root=x source=y encoding=raw shorter_side=null": (
        "shorter_side (None) is only read by encoding=jpeg, this is raw; leave it out"
    ),
    "root=x source=y encoding=raw quality=80": (
        "quality (80) is only read by encoding=jpeg, this is raw; leave it out"
    ),
    "root=x source=y encoding=raw keep_original=false": (
        "keep_original (False) is only read by encoding=jpeg, this is raw; leave it out"
    ),
    "root=x source=y split=test": "split (test) must be one of train, val, all",
    "root=x source=y encoding=png": "encoding (png) must be one of jpeg, raw",
    "root=x action=look": "action (look) must be one of prepare, inspect, verify, stats, diff, sheet",
    "root=x source=y engine=ray": "engine=ray does not exist; choices: auto, local, spark",
    "root=x source=y engine.master=local": (
        "engine.master is only read by engine=spark and engine=auto, this is engine=local; "
        "leave it out, or change engine"
    ),
}

# Wrong types, and options that the chosen classes do not have.
REFUSED_BY_THE_SCHEMA = {
    "augment=none augment.mixup_alpha=0.2": (
        "augment.mixup_alpha is only read by augment=basic and augment=alexnet_2012 and augment=plugin, this is augment=none; "
        "leave it out, or change augment"
    ),
    "augment.policy=autoaugment": "augment.policy (autoaugment) must be one of none, randaugment, trivialaugment",
    "trainer.nope=1": (
        "trainer.nope is not a key; known here: trainer.callbacks, trainer.check_every_steps, trainer.class_weights, trainer.clip_grad_norm, trainer.compile, "
        "trainer.drop_last, trainer.ema_decay, trainer.epochs, trainer.eval_batch_size, trainer.eval_every_epochs, trainer.eval_every_steps, "
        "trainer.global_batch_size, trainer.hang_timeout_s, trainer.label_smoothing, trainer.log_every_steps, "
        "trainer.max_hours, trainer.max_steps, trainer.metrics, trainer.micro_batch_size, trainer.on_nan, trainer.patience, trainer.precision, trainer.profile_ranks, trainer.profile_steps, trainer.spike_factor, "
        "trainer.tf32"
    ),
    "model.name=resnet18": (  # an option of another choice would be ignored
        "model.name is only read by model=torchvision and model=timm and model=plugin, this is model=alexnet_small; "
        "leave it out, or change model"
    ),
    "scheduler=cosine scheduler.power=2": (
        "scheduler.power is only read by scheduler=poly, this is scheduler=cosine; leave it out, or change scheduler"
    ),
    "data.num_classes=3": (
        "data.num_classes is only read by data=synthetic, this is data=demo; leave it out, or change data"
    ),
    "optimizer=sgd optimizer.beta1=0.9": (
        "optimizer.beta1 is only read by optimizer=adamw and optimizer=adam, this is optimizer=sgd; "
        "leave it out, or change optimizer"
    ),
    "data._target_=os.system": f"data._target_ is not a key; known here: {DATA_KEYS}",
    "trainer.epochs=1.5": "trainer.epochs (1.5) must be an integer",
    "trainer.epochs=1e20": "trainer.epochs (1e20) must be an integer",
    "trainer.epochs=0x10": "trainer.epochs (0x10) must be an integer",
    "trainer.epochs=true": "trainer.epochs (true) must be an integer",
    "trainer.epochs==3": "trainer.epochs (=3) must be an integer",
    "trainer.epochs=null": "trainer.epochs (null) must be an integer",
    "trainer.max_steps=x": "trainer.max_steps (x) must be an integer, or null",
    "optimizer.lr=fast": "optimizer.lr (fast) must be a number",
    "optimizer.lr=true": "optimizer.lr (true) must be a number",
    "trainer.compile=maybe": "trainer.compile (maybe) must be true or false",
    "device=tpu": "device (tpu) must be one of auto, cpu, cuda",
    "trainer.precision=int8": "trainer.precision (int8) must be one of fp32, bf16, fp16",
    "logger.wandb=true": "logger.wandb (true) must be one of disabled, offline, online, or null",
    "data.on_bad_image=ignore": "data.on_bad_image (ignore) must be one of raise, skip",
    "scheduler=step scheduler.milestones_epochs=3,4": (
        "scheduler.milestones_epochs (3,4) must be a list; write scheduler.milestones_epochs=[3,4]"
    ),
    "scheduler=step scheduler.milestones_epochs=[3,x]": "scheduler.milestones_epochs (x) must be a list of numbers",
    "scheduler=step scheduler.milestones_epochs=[3": (
        "scheduler.milestones_epochs ([3) is not in Hydra's grammar for mappings and lists; "
        "write scheduler.milestones_epochs=[1,2]"
    ),
    "parallel=hybrid parallel.split=classifier.1": (
        "parallel.split (classifier.1) must be a list; write parallel.split=[classifier.1]"
    ),
    "trainer={epochs:many}": "trainer.epochs (many) must be an integer",
    "optimizer=nope": "optimizer=nope does not exist; choices: adam, adamw, lars, plugin, sgd, torch",
    "optimizer=null": "optimizer=null is refused; choices: sgd, adamw, adam, lars, torch, plugin",
    "run={name:1.10}": "run.name is a text, but run={name:1.10} gives the number 1.1; write run.name=...",
}


def line(command: str, *overrides: str) -> str:
    """The line that `command` prints for a wrong command line."""
    with pytest.raises(ConfigError) as e:
        with_hydra.compose(command, list(overrides))
    return str(e.value)


@pytest.mark.sampled
@pytest.mark.parametrize("overrides", WRONG_VALUES)
def test_a_wrong_value_is_refused_with_value_rule_and_remedy(overrides):
    with pytest.raises(ConfigError) as e:
        compose(overrides.split())
    assert str(e.value) == WRONG_VALUES[overrides]


HYDRAS_OWN = [
    *(
        "hydra.callbacks.x._target_=os.system",
        "+hydra.callbacks.x={_target_:os.system}",
        "~hydra.callbacks",
    ),
    *(
        "hydra/launcher=joblib",
        "++hydra.job_logging={version:1}",
        "hydra.run.dir=x",
        "hydra.searchpath=[file://x]",
    ),
    "experiment@hydra.callbacks=demo",
]


@pytest.mark.parametrize("override", HYDRAS_OWN)
def test_hydras_own_keys_are_refused_by_name_because_they_could_call_anything(override):
    with pytest.raises(ConfigError) as e:
        compose(["seed=1", override])
    key = override.lstrip("+~").split("=")[0]
    assert (
        str(e.value)
        == f"{key} is refused: Hydra only composes here, and calls nothing; leave it out"
    )


@pytest.mark.sampled
@pytest.mark.parametrize("overrides", WRONG_PREPARATIONS)
def test_a_wrong_preparation_is_refused_with_value_rule_and_remedy(overrides):
    assert line("prepare", *overrides.split()) == WRONG_PREPARATIONS[overrides]


@pytest.mark.sampled
@pytest.mark.parametrize("overrides", REFUSED_BY_THE_SCHEMA)
def test_what_the_schema_does_not_know_is_refused(overrides):
    assert line("train", *overrides.split()) == REFUSED_BY_THE_SCHEMA[overrides]


def test_randaugment_has_torchvisions_defaults_and_other_policies_have_none():
    chosen = [
        compose([f"augment.policy={name}"]).augment
        for name in ("randaugment", "trivialaugment", "none")
    ]
    assert [(cfg.num_ops, cfg.magnitude) for cfg in chosen] == [(2, 9), (None, None), (None, None)]


def test_without_overrides_the_demo_is_composed_into_plain_dataclasses():
    cfg = compose([])
    assert isinstance(cfg, Config)
    assert (cfg.run.name, cfg.run_dir) == ("demo", Path("runs/demo"))
    assert (type(cfg.data).__name__, type(cfg.model).__name__) == (
        "DemoConfig",
        "AlexNetSmallConfig",
    )
    assert isinstance(cfg.trainer.log_every_steps, int)


def test_of_two_values_for_one_key_the_last_counts():
    assert compose(["seed=1", "seed=2"]).seed == 2
    assert type(compose(["model=alexnet", "model=alexnet_bn"]).model).__name__ == "AlexNetBNConfig"


def test_eval_resize_follows_the_image_size_by_torchvisions_ratio():
    assert compose(["data=synthetic"]).data.eval_resize == 256
    assert compose(["data.image_size=112"]).data.eval_resize == 128
    assert compose(["data.image_size=112", "data.eval_resize=112"]).data.eval_resize == 112


@pytest.mark.sampled
@pytest.mark.parametrize("group", [g for g in GROUPS if g != "experiment"])
def test_every_choice_of_a_group_composes_and_is_the_only_thing_that_changes(group):
    required = {choice: ["data.root=x"] for choice in ("folder", "csv", "imagenet", "shards")}
    required |= {"torchvision": ["model.name=resnet18"]}
    kinds = set()
    for choice in choices(group):
        kinds.add(type(getattr(compose([f"{group}={choice}", *required.get(choice, [])]), group)))
    assert len(kinds) == len(choices(group))


# --- experiments and help ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_header_of_an_experiment_says_its_command_and_what_to_expect(name):
    text = header(CONF_DIR / "experiment" / f"{name}.yaml")
    assert re.search(rf"alexnet_ddp\.train experiment={name}\b", text)
    assert "Expected" in text


@pytest.mark.sampled
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_has_its_own_name_and_takes_the_place_of_the_default_recipe(name):
    root = [] if name in ("demo", "smoke") else ["data.root=somewhere"]
    cfg = compose([f"experiment={name}", *root])
    assert cfg.run.name == name
    assert cfg.scheduler.warmup_epochs is not None
    assert not getattr(cfg.optimizer, "nesterov", False)


def test_the_demo_experiment_is_the_default_with_a_report():
    assert compose(["experiment=demo"]) == compose(["logger.report=true"])


# --- the default recipe of each data choice ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "epochs", "lr", "min_scale"),
    [("folder", 30, 0.025, 0.35), ("shards", 30, 0.025, 0.35), ("imagenet", 90, 0.1, 0.08)],
)
def test_own_images_get_a_recipe_of_their_own_and_not_the_demos(data, epochs, lr, min_scale):
    cfg = compose([f"data={data}", "data.root=x"])
    assert (cfg.trainer.epochs, cfg.augment.min_scale) == (epochs, min_scale)
    assert cfg.optimizer.lr_at(cfg.trainer.global_batch_size) == pytest.approx(lr)
    assert cfg.scheduler.warmup_epochs is None


@pytest.mark.parametrize("data", ["folder", "shards", "imagenet"])
def test_the_values_of_the_default_recipe_belong_to_its_own_optimizer_and_augmentation(data):
    cfg = compose(
        [f"data={data}", "data.root=x", "optimizer=adamw", "scheduler=step", "augment=none"]
    )
    demo = compose(["optimizer=adamw", "scheduler=step", "augment=none"])
    assert (cfg.optimizer, cfg.scheduler, cfg.augment) == (
        demo.optimizer,
        demo.scheduler,
        demo.augment,
    )
    assert cfg.trainer.epochs == compose([f"data={data}", "data.root=x"]).trainer.epochs


def test_the_command_line_and_an_experiment_win_over_the_default_recipe():
    own = ["data=folder", "data.root=x"]
    cfg = compose([*own, "optimizer.lr=0.3", "trainer.epochs=3", "scheduler.warmup_epochs=1"])
    assert (cfg.optimizer.lr, cfg.trainer.epochs, cfg.scheduler.warmup_epochs) == (0.3, 3, 1)
    assert compose([*own, "scheduler.warmup_steps=7"]).scheduler.warmup_steps == 7
    experiment = compose(["experiment=alexnet", *own])
    published = compose(["experiment=alexnet", "data.root=x"])
    assert replace(experiment, data=published.data) == published


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ("", "demo"),
        ("model=torchvision model.name=resnet18", "demo-resnet18"),
        ("data=folder data.root=/a/photos/", "photos-alexnet_small"),
        ("data=imagenet data.root=/ model=alexnet_bn", "data-alexnet_bn"),
        ("data=shards data.root='s3://me:CANARY@host/my set?key=CANARY'", "my-set-alexnet_small"),
        ("data=shards data.root='s3://me:CANARY@host'", "host-alexnet_small"),
        ("data=synthetic", "synthetic-alexnet_small"),
        (f"data=folder data.root={'x' * 200} model=torchvision model.name=a/b", f"{'x' * 90}-a-b"),
        ("data=folder data.root=x run.name=mine", "mine"),
    ],
)
def test_a_run_without_a_name_is_named_after_its_data_and_its_network(overrides, name):
    assert compose(re.findall(r"(?:'[^']*'|\S)+", overrides)).run.name == name


@pytest.mark.parametrize(
    ("command", "groups"),
    [
        ("train", GROUPS),
        ("evaluate", GROUPS),
        ("doctor", GROUPS),
        ("prepare", PREPARE_GROUPS),
        ("plan", ("model",)),
    ],
)
def test_the_help_lists_exactly_the_choices_that_exist(command, groups):
    text = "\n".join(help_lines(command, []))
    for group in (*GROUPS, *PREPARE_GROUPS):
        listed = set(re.findall(rf"^  {group}=(\S+)", text, re.MULTILINE))
        # A choice may have no file of values, such as optimizer=torch.
        known = choices(group) | set(SCHEMA_GROUPS.get(group, ()))
        assert listed == (known if group in groups else set())


def test_every_file_of_a_group_belongs_to_a_choice():
    for group, known in SCHEMA_GROUPS.items():
        assert choices(group) <= set(known)


@pytest.mark.parametrize("command", ROOTS)
def test_the_help_explains_every_option_with_type_and_default(command):
    text = "\n".join(help_lines(command, []))
    for path in options(ROOTS[command]):
        entry = rf"^  {re.escape(path)}  \(.+(default .+|required)\)\n      [A-Za-z].{{3}}"
        assert re.search(entry, text, re.MULTILINE), path


def test_every_option_is_declared_with_a_description_that_is_a_sentence():
    owners = {*ROOTS.values(), *(one for group in SCHEMA_GROUPS.values() for one in group.values())}
    owners |= {part for root in ROOTS.values() for part in sections(root).values()}
    for owner in owners:
        for one in fields(owner):
            is_part = isinstance(one.type, type) and is_dataclass(one.type)
            assert is_part or one.metadata["spec"].description.endswith("."), (owner, one.name)


def test_help_for_one_group_or_option_prints_that_alone():
    group = "\n".join(help_lines("train", ["optimizer"]))
    assert "  optimizer.lr  (number, greater than 0, default 0.05 (sgd), 0.002 (adamw)" in group
    assert "trainer." not in group.replace("trainer.global_batch_size", "")
    option = list(help_lines("train", ["data.cache_gb"]))
    assert option[2].startswith("  data.cache_gb  (number, in (0, 1000000000], or null")
    assert "Unit: 10^9 bytes. null: no limit." in "\n".join(option)
    with pytest.raises(ConfigError, match=r"--help optimizr: .*nearest: optimizer$"):
        list(help_lines("train", ["optimizr"]))


def test_the_help_of_train_states_which_options_may_change_on_resume():
    def last(command, name):
        return " ".join(list(help_lines(command, [name]))[-2:]).split("  May change on resume")[1:]

    assert last("train", "checkpoint") == [": all."]
    assert last("train", "model") == [": model.weights, model.head."]
    fixed = "global_batch_size drop_last precision label_smoothing class_weights clip_grad_norm ema_decay"
    named = ", ".join(f"trainer.{name}" for name in fixed.split())
    assert [" ".join(text.split()) for text in last("train", "trainer")] == [f": all but {named}."]
    assert last("train", "trainer.epochs") == ["."]
    assert last("train", "trainer.precision") == last("train", "optimizer") == []
    assert last("train", "run") == []  # another name is another run
    assert last("evaluate", "trainer.epochs") == last("plan", "model") == []


def test_the_number_that_the_reference_gives_for_null_is_the_one_that_is_used():
    name = "local_sgd_start_step"
    given = DDPConfig(hook=Hook.post_local_sgd, local_sgd_start_step=0)
    assert DDPConfig(hook=Hook.post_local_sgd).value_of(name) == 100
    assert given.value_of(name) == 0
    assert "null: 100." in "\n".join(help_lines("train", [f"parallel.{name}"]))


def test_the_page_of_all_options_is_current():
    page = CONF_DIR.parent / "docs/configuration.md"
    remedy = "run python -m alexnet_ddp.config.reference > docs/configuration.md"
    assert page.read_text() == markdown(), remedy


def test_every_folder_of_conf_is_a_known_group():
    assert {path.name for path in CONF_DIR.iterdir() if path.is_dir()} == {*GROUPS, *PREPARE_GROUPS}


# --- real processes ---------------------------------------------------------------------------------------------


def as_main(arguments: list[str], cwd: str) -> None:
    """What `python -m alexnet_ddp.train ARGUMENTS` does, with its output in files."""
    os.chdir(cwd)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"../{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.pop("HYDRA_FULL_ERROR", None)
    sys.argv = ["train.py", *arguments]
    sys.modules.pop("alexnet_ddp.train", None)
    runpy.run_module("alexnet_ddp.train", run_name="__main__", alter_sys=True)


@pytest.fixture
def train(tmp_path):
    """train(arguments) -> exit code, stdout, stderr, and what lies in the directory afterwards."""
    cwd = tmp_path / "cwd"
    cwd.mkdir()

    def start(*arguments: str) -> tuple[int, str, str, list[str]]:
        context = multiprocessing.get_context("forkserver")
        process = context.Process(target=as_main, args=(list(arguments), str(cwd)))
        process.start()
        process.join(60)
        out, err = ((tmp_path / name).read_text() for name in ("stdout", "stderr"))
        return process.exitcode, out, err, sorted(os.listdir(cwd))

    return start


WRONG_NAME = "run.name ('0/x') must name one directory below run.root (runs)\n"
KEYS = "augment, checkpoint, data, device, experiment, finetune, logger, model, optimizer, parallel, plugins, resume, run, "
KEYS += "scheduler, seed, trainer"


WRONG_LINES = {
    "nope=1": f"nope is not a key; known here: {KEYS}",
    "paralel=ddp": "paralel is not a key; nearest: parallel",
    "parallel.hooks=fp16": "parallel.hooks is not a key; nearest: parallel.hook",
    "trainer.epochs=many": "trainer.epochs (many) must be an integer",
    "scheduler=nope": "scheduler=nope does not exist; choices: constant, cosine, poly, step",
    "+x=1": f"x is not a key; known here: {KEYS}",
    "data=folder": (
        "data.root is required and has no value; give it on the command line: data.root=..."
    ),
    "data._target_=os.system": f"data._target_ is not a key; known here: {DATA_KEYS}",
    "optimizer=null": "optimizer=null is refused; choices: sgd, adamw, adam, lars, torch, plugin",
    "optimizer.lr=0": "optimizer.lr (0.0) must be greater than 0",
    "run.name=${nope}": (
        "run.name (${nope}) refers to a key that does not exist; a literal ${ is written \\${"
    ),
}


@pytest.mark.parametrize("argument", WRONG_LINES)
def test_a_wrong_command_line_is_refused_in_one_line(argument):
    with pytest.raises(ConfigError) as error:
        compose([argument])
    assert str(error.value) == WRONG_LINES[argument]


@pytest.mark.parametrize("argument", ["paralel=ddp", "data=folder", "run.name=${nope}"])
def test_a_wrong_command_line_is_one_line_and_code_64_and_leaves_no_file(train, argument):
    assert train(argument) == (64, "", f"alexnet_ddp: {WRONG_LINES[argument]}\n", [])


def test_bf16_on_a_machine_without_a_gpu_is_one_line_and_code_64(train):
    size = (
        "data=synthetic",
        "data.image_size=32",
        "data.num_train=8",
        "data.num_val=8",
        "data.num_classes=4",
    )
    code, out, err, _ = train("trainer.precision=bf16", *size)
    line = "trainer.precision=bf16 needs a CUDA device, this run is on the CPU; use trainer.precision=fp32"
    assert (code, out, err) == (64, "", f"alexnet_ddp: {line}\n")


def test_cfg_job_prints_the_composed_run_and_leaves_no_file(train):
    code, out, err, left = train("--cfg", "job", "optimizer.lr=0.123", "model.dropout=0.25")
    printed = yaml.safe_load(out)
    assert (code, err, left) == (0, "", [])
    assert printed["optimizer"]["lr"] == 0.123
    assert (printed["model"]["dropout"], printed["run"]["name"]) == (0.25, "demo")
    assert "hydra" not in printed


def test_help_shows_commands_groups_and_options_and_leaves_no_file(train):
    code, out, err, left = train("data=folder", "--help")
    assert (code, err, left) == (0, "", [])
    for text in (
        "torchrun --nproc_per_node=8 -m alexnet_ddp.train",
        "  optimizer=lars ",
        "  trainer.global_batch_size  (integer, at least 1, default 64)\n      Images per optimizer",
    ):
        assert text in out
    assert train("--help=nope")[:3] == (
        64,
        "",
        f"alexnet_ddp: --help nope: nope is not a key; known here: {KEYS}\n",
    )


def test_cfg_prints_one_part_and_the_version_is_the_packages(train):
    code, out, err, _ = train("--cfg=job", "--package", "model", "model=alexnet")
    assert (code, yaml.safe_load(out)["dropout"], err) == (0, 0.5, "")
    assert train("--cfg", "hydra")[:3] == (
        64,
        "",
        "alexnet_ddp: --cfg hydra is not supported; write --cfg job\n",
    )
    assert train("--version")[:3] == (0, f"alexnet_ddp {alexnet_ddp.__version__}\n", "")


def test_an_override_may_refer_to_another_key(train):
    code, out, err, _ = train("--cfg", "job", "--resolve", "run.name=seed-${seed}", "seed=3")
    assert (code, err) == (0, "")
    assert yaml.safe_load(out)["run"]["name"] == "seed-3"
    assert train("run.name=${seed}/x")[:3] == (64, "", "alexnet_ddp: " + WRONG_NAME)


@pytest.mark.sampled
@pytest.mark.parametrize(
    "option",
    ["--experimental-rerun=x", "--exp=x", "--config-name=x", "--run", "--info", "--hydra-help"],
)
def test_an_option_that_does_more_than_show_is_refused(train, option):
    code, _, err, left = train(option, "seed=1")
    assert (code, left) == (64, [])
    assert err.startswith(
        f"alexnet_ddp: {option.split('=')[0]} is not supported; known: --help [NAME], --cfg job, "
    )
    assert err.count("\n") == 1


def test_a_folder_of_further_experiments_may_be_given_and_hold_values_only(train, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text(
        "# @package _global_\nseed: 7\noptimizer: {lr: -1}\n"
    )
    folder = ("--config-dir", str(tmp_path))
    line = "alexnet_ddp: optimizer.lr (-1.0) must be greater than 0\n"
    assert train(*folder, "experiment=mine")[:3] == (64, "", line)
    (tmp_path / "experiment/mine.yaml").write_text(
        "# @package _global_\nhydra: {callbacks: {x: {_target_: os.abort}}}\n"
    )
    rule = "are refused: nothing here is called by a YAML file; remove them"
    line = f"alexnet_ddp: hydra.callbacks (x) {rule}\n"
    assert train(*folder, "experiment=mine")[:3] == (64, "", line)
    line = "alexnet_ddp: --config-dir (nowhere) is not a folder; give one of YAML files\n"
    assert train("--config-dir=nowhere")[:3] == (64, "", line)


def test_a_sweep_is_refused_with_what_to_do_instead(train):
    remedy = "write alexnet-ddp sweep, as in alexnet-ddp sweep optimizer.lr=0.01,0.1"
    said = f"alexnet_ddp: --multirun (a sweep) is not supported; {remedy}\n"
    assert train("--multirun", "seed=1,2")[:3] == (64, "", said)


def test_python_m_exits_64_with_one_line_in_an_empty_directory(tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "HYDRA_FULL_ERROR": "0",
    }
    command = [sys.executable, "-m", "alexnet_ddp.train", "nope=1"]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 64
    assert result.stderr == "alexnet_ddp: nope is not a key; known here: " + KEYS + "\n"
    assert list(tmp_path.iterdir()) == []


def imported(code: str, *arguments: str, **environment: str) -> set[str]:
    """The top-level modules that a process has imported after `code`."""
    code += "; import sys; print(*{name.split('.')[0] for name in sys.modules})"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment}
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_the_configuration_imports_no_torch_and_only_composing_imports_hydra():
    code = "import alexnet_ddp.config.reference, alexnet_ddp.training.schedule, alexnet_ddp.cli"
    assert not imported(code) & {"torch", "torchvision", "hydra", "omegaconf"}
    code = "from alexnet_ddp.cli import compose; compose(['optimizer=lars'])"
    assert not imported(code) & {"torch", "torchvision"}


@pytest.mark.parametrize(
    ("arguments", "unneeded"),
    [
        (["trainer.epoch=3"], {"torch", "hydra", "omegaconf"}),
        (["run.name=x", "trainer.epoch=3"], {"torch", "hydra", "omegaconf"}),
        (["--help"], {"torch", "hydra"}),
        (["optimizer.lr=0"], {"torch"}),
    ],
)
@pytest.mark.parametrize(
    "command",
    ["train", *(pytest.param(name, marks=pytest.mark.slow) for name in ("evaluate", "doctor"))],
)
def test_a_command_imports_torch_after_its_configuration_is_valid(command, arguments, unneeded):
    module = f"alexnet_ddp.{command}" + (".__main__" if command == "doctor" else "")
    code = (
        "import contextlib, io, runpy\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        f"    runpy.run_module('{module}', run_name='__main__')\n"
        "pass"
    )
    assert not imported(code, *arguments) & unneeded


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("networks", "lr"),
    [
        (("model=alexnet", "model=alexnet_2012"), 0.01),
        (("model=torchvision model.name=alexnet", "model=torchvision model.name=vgg16"), 0.01),
        (("model=alexnet_bn", "model=torchvision model.name=vgg16_bn"), 0.1),
        (("model=alexnet_small", "model=torchvision model.name=resnet18"), 0.1),
    ],
)
def test_the_default_recipe_has_a_lower_rate_for_networks_without_batchnorm(networks, lr):
    for network in networks:
        cfg = compose(["data=imagenet", "data.root=x", *network.split()])
        assert (cfg.optimizer.lr, cfg.optimizer.base_batch_size) == (lr, 256)


def test_the_lower_rate_is_of_the_default_recipe_for_all_own_data_and_of_no_other_optimizer():
    own = ["data=folder", "data.root=x", "model=torchvision", "model.name=vgg16"]
    assert compose(own).optimizer.lr == 0.01
    lars = compose([*own, "optimizer=lars"]).optimizer.lr
    assert lars == compose(["optimizer=lars"]).optimizer.lr


# --- large batches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scaling", "expected"), [("linear", 0.08), ("sqrt", 0.04 / 2**0.5)])
def test_a_rate_that_was_found_at_another_batch_is_scaled_as_it_says_and_the_run_says_so(
    scaling, expected
):
    found = ["optimizer.lr=0.01", "optimizer.base_batch_size=256", f"optimizer.scaling={scaling}"]
    cfg = compose([*found, "trainer.global_batch_size=2048"])
    assert cfg.optimizer.lr_at(2048) == pytest.approx(expected)
    assert cfg.optimizer.lr_at(256) == pytest.approx(0.01)
    how = {"linear": "0.01 x 2048 / 256", "sqrt": "0.01 x sqrt(2048 / 256)"}[scaling]
    assert learning_rate(cfg.optimizer, 2048) == f"lr {expected:g} = {how}"


def test_a_rate_is_what_it_is_at_every_batch_unless_scaling_is_asked_for():
    cfg = compose(["optimizer.lr=0.01", "trainer.global_batch_size=8192"])
    assert cfg.optimizer.lr_at(8192) == 0.01
    assert learning_rate(cfg.optimizer, 8192) == "lr 0.01"


# --- images that grow -------------------------------------------------------------------------------------------


def test_training_images_grow_by_whole_tiles_until_they_have_their_size():
    grows = compose(["data.image_size=224", "data.start_image_size=128", "data.grow_epochs=6"]).data
    assert [grows.train_image_size(epoch) for epoch in range(9)] == [
        128,
        128,
        160,
        160,
        192,
        192,
        224,
        224,
        224,
    ]
    odd = compose(["data.image_size=65", "data.start_image_size=33", "data.grow_epochs=1"]).data
    assert [odd.train_image_size(epoch) for epoch in range(3)] == [33, 65, 65]
    assert compose([]).data.train_image_size(0) == 64
