"""The reference of all options, from the schema: --help, and docs/configuration.md.

    python -m alexnet_ddp.config.reference > docs/configuration.md

Values of conf/COMMAND.yaml and conf/GROUP/CHOICE.yaml are shown as defaults in place of the
schema's. --help reads these files without composing them.
"""

import sys
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, fields, replace
from enum import Enum
from functools import cache
from inspect import cleandoc
from typing import Any

from alexnet_ddp.config import advice
from alexnet_ddp.config.option import MISSING, Spec, spec_of
from alexnet_ddp.config.schema import CONF_DIR, ROOTS, group_names, groups, options_of, sections
from alexnet_ddp.runtime.errors import ConfigError
from alexnet_ddp.runtime.printing import say

_WIDTH = 100
_TRAINS_EXIT_CODES = """\
Exit codes: 0 complete, 64 configuration, 65 data, 66 no usable checkpoint, 70 diverged, 74 disk or
memory, 75 stopped and saved, 76 a rank was lost (start the same command again for 75 and 76),
79 stopped and saved because wandb asked for it, 93 three restarts by launch/ without progress."""
USAGE = {
    "train": f"""\
Train an image classifier with DistributedDataParallel.

  python -m alexnet_ddp.train                                      the built-in data, one process
  torchrun --nproc_per_node=8 -m alexnet_ddp.train experiment=alexnet data.root=/data/imagenet
  python -m alexnet_ddp.train data=folder data.root=DIR model=torchvision model.name=resnet18

The same run.name resumes the run, on any number of processes; a complete run exits with 0 at once.
Without experiment= the recipe is the default one for the data (conf/experiment/default/), and the
first line of the run prints it.
{_TRAINS_EXIT_CODES}""",
    "evaluate": """\
Evaluate exactly: every validation image once, on any number of processes.

  python -m alexnet_ddp.evaluate run.name=X [data.root=DIR ...]        the best checkpoint of a run
  python -m alexnet_ddp.evaluate model=alexnet model.weights=FILE data=imagenet data.root=DIR
  torchrun --nproc_per_node=2 -m alexnet_ddp.evaluate run.name=X
  python -m alexnet_ddp.evaluate run.name=X calibrate=true
  python -m alexnet_ddp.evaluate run.name=X metrics=true predictions=FILE.csv
  python -m alexnet_ddp.evaluate run.name=X images=DIR crops=10
  python -m alexnet_ddp.evaluate model=M model.weights=IMAGENET1K_V1 images=DIR output=RESULTS

Prints top-1, top-5 and a table of the classes; with run.name, also writes evaluation.json into the
run's directory. metrics=true adds precision, recall, F1, AUROC and the confusions of classes, and
needs pip install 'alexnet-ddp[metrics]'. data.root must contain the training images too: they
determine the classes. With run.name every option has the run's value, unless the command line
gives another. calibrate=true fits a temperature to the validation images; predict then uses it.
images=DIR evaluates on CLASS/* in DIR instead, also if only some classes are there, and writes
evaluation_images.json. With model.weights it needs no data=..., and classes=FILE if the weights
contain no class names. output=RESULTS is the folder for the files in place of the run's directory.
With model.weights these files are written only if output is given.""",
    "predict": """\
Classify images with a trained network: prints the most probable classes of each image.

  python -m alexnet_ddp.predict run.name=X images=cat.jpg
  python -m alexnet_ddp.predict run.name=X images=photos output=predictions.jsonl
  python -m alexnet_ddp.predict run.name=X 'images=photos/*.jpg' top_k=3
  python -m alexnet_ddp.predict run.name=X images=photos output=p.csv min_confidence=0.9
  python -m alexnet_ddp.predict run.name=X images=photos embeddings=photos.npy
  python -m alexnet_ddp.predict export=DIR images=photos
  python -m alexnet_ddp.predict model=M model.weights=FILE classes=FILE.txt images=photos

A folder is listed as in training: linked folders are followed; hidden entries and other file types
are counted in a warning. A file that is named, or matched by a glob, may have any suffix.""",
    "export": """\
Write the model of a run as files for other programs, and evaluate the exported file.

  python -m alexnet_ddp.export run.name=X format=onnx output=DIR
  python -m alexnet_ddp.export run.name=X format=onnx output=DIR preprocessing=true
  python -m alexnet_ddp.export run.name=X format=safetensors output=DIR [data.root=DIR ...]
  python -m alexnet_ddp.export run.name=X format=huggingface output=DIR push=ORG/NAME

The weights are those that evaluate uses. DIR receives the model, classes.json, preprocessing.json,
metrics.json, model.json and README.md. At the end the exported file is evaluated on all validation
images and compared with the run's model. If they differ, nothing is left and the exit code is 70.
format=onnx needs: pip install 'alexnet-ddp[export]'. Every option has the run's value, unless the
command line gives another. It takes one process.
push uploads the folder to the Hugging Face Hub (pip install 'alexnet-ddp[hub]'). If that fails, the
folder stays.
Exit codes: 0 done, 64 configuration, 65 data, 66 no usable checkpoint, 70 the file differs from the
run, 74 disk, memory or network.""",
    "report": """\
Write report.html into the directory of a run or a sweep: one page without external resources.

  alexnet-ddp report run.name=X
  alexnet-ddp report run.name=X compare=[Y,Z]
  alexnet-ddp report run.name=X data.root=DIR max_images=20000
  alexnet-ddp report run.name=SWEEP        the trials of a sweep: results by option, curves, table

It shows results with their intervals, curves, where the time goes, starts and stops, the worst
classes, the images with the largest losses, the filters of the first layer, the first batch, the
data, the options and their differences to the defaults, and a command that repeats the run. For the
images it runs the best weights over max_images validation images, in one process. What cannot be
computed is replaced by the reason: a run that trains, that was killed or that has no checkpoint has
a report too. Exit codes: 0 done, 64 configuration, 65 data (of data.root on the command line),
74 disk.""",
    "plan": """\
Predict the speed of a training on a cluster, for each kind of parallelism, and recommend one.

  python -m alexnet_ddp.plan nodes=2 gpus_per_node=8 device=A100 links.between_gbit_per_s=100
  python -m alexnet_ddp.plan nodes=4 gpus_per_node=1 images_per_s=3000 device=custom plot=plan.png
  python -m alexnet_ddp.plan nodes=2 gpus_per_node=1 device=measure data.image_size=64
  python -m alexnet_ddp.plan nodes=1024 device=V100 precision=fp16 global_batch_size=65536

Prints bytes, exposed communication, step time, images/s, scaling efficiency, epoch and run time,
and memory. Exit codes: 0 done, 64 configuration.""",
    "prepare": """\
Pack images into shuffled, verified shards, on which data=shards trains.

  python -m alexnet_ddp.prepare source=/data/imagenet root=/data/shards
  python -m alexnet_ddp.prepare source=photos root=shards engine.workers=8 shorter_side=null
  python -m alexnet_ddp.prepare source=photos root=raw encoding=raw size=256
  python -m alexnet_ddp.prepare source=... root=... engine=spark engine.master=spark://host:7077
  spark-submit --master yarn alexnet_ddp/prepare/__main__.py source=... root=... engine=spark
  python -m alexnet_ddp.prepare action=inspect root=shards      also: verify, stats, diff other=DIR
  python -m alexnet_ddp.prepare action=sheet root=shards output=sheet.png augment=alexnet_2012

The same command continues after a stop, and verifies when all shards are written.
Exit codes: 0 done, 64 configuration, 65 bad data, or verify or diff found a difference, 74 disk or
worker, 75 stopped: start the same command again.""",
    "doctor": """\
Check the machines for a run: prints what was found, what the run needs, and what to do.

  python -m alexnet_ddp.doctor                                   this machine, the built-in data
  torchrun --nproc_per_node=8 -m alexnet_ddp.doctor experiment=alexnet data.root=DIR
  COMMAND=doctor launch/local.sh experiment=alexnet data.root=DIR      also launch/node.sh, per node
  COMMAND=doctor sbatch --nodes=4 slurm/train.sbatch experiment=alexnet data.root=DIR

Give it the overrides of the run. It takes less than a minute and trains nothing. It leaves no files
but the built-in data and the caches that a training makes too.
FAIL: the run would not start, would hang, or would end early. warn: it would be slower, or its
state easier to lose. Exit codes: 0 nothing FAILs, 64 something does.""",
    "replay": """\
Compute a recorded step again, in one process: did the images or the machine cause the bad step?

  python -m alexnet_ddp.replay runs/X/replay.json
  python -m alexnet_ddp.replay run.name=X [file=runs/X/replay.json] [data.root=DIR ...]

The steps from the newest checkpoint before the recorded step are computed again, with the images
that each rank had. Prints the loss, the gradient's norm, and which images or tensors are not
finite. Nothing is written. Every option has the run's value, unless the command line gives another.
Exit codes: 0 done, 64 configuration, 65 data, 66 no usable checkpoint.""",
    "lr_find": """\
Find a learning rate: train some steps with a rising rate, and see where the loss falls fastest.

  alexnet-ddp lr-find experiment=imagenet20 data.root=DIR
  torchrun --nproc_per_node=8 -m alexnet_ddp.lr_find experiment=alexnet data.root=DIR max_lr=1

Give it the overrides of the run. It prints a suggestion for optimizer.lr and draws the curve. It
reads and writes nothing of a run. Exit codes: 0 done, 64 configuration, 65 data.""",
    "sweep": """\
Train once for each of several values of options, and compare the trials.

  alexnet-ddp sweep optimizer.lr=0.01,0.03,0.1 data=folder data.root=DIR
  alexnet-ddp sweep 'model=choice(alexnet,alexnet_bn)' optimizer.lr=0.01,0.1 sweep.parallel=2
  alexnet-ddp sweep 'optimizer.lr=tag(log,interval(1e-3,1))' sweep.sampler=tpe sweep.pruner=asha
  alexnet-ddp sweep optimizer.lr=0.01,0.1 sweep.sbatch=--gpus-per-node=8     one Slurm job array

Give it the overrides of train, of which some have several values in Hydra's grammar. Each trial is
a run, in run.root/sweep.name. It ends with a table, sweep.csv and the command that trains the best
trial. The same command continues after a stop: trials that are over are not repeated.
Exit codes: 0 done, 64 configuration, 74 disk, 75 stopped and saved: start the same command again;
if no trial has a result, the code of the first trial.""",
    "runs": """\
List all runs below a folder: status, best top-1, step, images/s, hours, and the options in which
the runs differ.

  alexnet-ddp runs [FOLDER] [sort=top1]
  alexnet-ddp runs FOLDER output=FILE.csv

FOLDER is the option root, by default runs. The options that were given on a command line come
first. output=FILE.csv has a column for each option. Exit codes: 0 done, 64 configuration.""",
    "compare": """\
Compare two runs: their options, their curves side by side, and the first step in which they differ.

  alexnet-ddp compare A B
  alexnet-ddp compare A B max_rows=null

A and B are names of runs below root (runs), or their directories. Losses and learning rates differ
if they differ by more than tolerance, relative to the larger one. The first step is the first one
with a row in metrics.jsonl: start the runs with trainer.log_every_steps=1 to find it exactly.
Exit codes: 0 done, 64 configuration.""",
}
_HOW = """\
Usage: GROUP=CHOICE and OPTION=VALUE. --help NAME explains one group or option; --cfg job prints the
composed configuration; --config-dir DIR adds a folder of YAML files; --version."""


@dataclass(frozen=True)
class Entry:
    """One option. kind, default: for people. choices: those that have it, if not all have it."""

    path: str
    kind: str
    default: str
    spec: Spec
    choices: tuple[str, ...] = ()

    @property
    def type_and_default(self) -> str:
        """Such as "number, greater than 0, default 0.1"."""
        default = "required" if self.default == "required" else f"default {self.default}"
        return ", ".join(text for text in (self.kind, default) if text)


@dataclass(frozen=True)
class Section:
    """A group, a part of the configuration such as `trainer`, or (name "") the other options.

    choices: of a group, with a sentence about each; the chosen one is `default`.
    """

    name: str
    about: str
    entries: list[Entry]
    choices: dict[str, str]
    default: str = ""


@cache
def describe(command: str) -> list[Section]:
    """The sections of a command, in the order of its configuration."""
    root, values = ROOTS[command], _values(command)
    own = [one.name for one in fields(root) if "spec" in one.metadata]
    found = [Section("", "", [_entry(root, name, name, values) for name in own], {})]
    for name in (one.name for one in fields(root)):
        if name in groups(root):
            found.append(_group(name, groups(root)[name], str(_choices(command)[name])))
        elif name in sections(root):
            owner, given = sections(root)[name], values.get(name) or {}
            paths = [(one.name, f"{name}.{one.name}") for one in fields(owner)]
            entries = [_entry(owner, key, path, given) for key, path in paths]
            found.append(Section(name, _about(owner), entries, {}))
    if "experiment" in group_names(root):
        recipes = {path.stem: "" for path in sorted((CONF_DIR / "experiment").glob("*.yaml"))}
        about = "Published and measured recipes; each file states its command and its result."
        default = str(_choices(command)["experiment"])
        found.append(Section("experiment", about, [], recipes, default))
    return [section for section in found if section.entries or section.choices]


def help_lines(command: str, names: list[str]) -> Iterator[str]:
    """The lines of --help; of the groups, sections and options `names` only, if there are any.

    Raises ConfigError for a name that the command does not have.
    """
    chosen = describe(command)
    if names:
        chosen = [section for name in names for section in _named(name, command)]
    else:
        yield from USAGE[command].splitlines()
        yield ""
        yield from _HOW.splitlines()
    for section in chosen:
        yield ""
        yield from _section_lines(section)
        yield from _wrapped(_may_change(section, command), 2)


_WITH_TRAIN = (
    "evaluate",
    "doctor",
    "replay",
    "lr_find",
    "sweep",
    "export",
    "report",
)  # commands that also have its options


def markdown(
    commands: tuple[str, ...] = (
        *("train", "evaluate", "doctor", "replay", "lr_find", "sweep", "predict", "export"),
        *("report", "plan", "prepare", "runs", "compare"),
    ),
) -> str:
    """docs/configuration.md."""
    lines = [_INTRODUCTION, *_recipes()]
    for command in commands:
        known = describe("train") if command in _WITH_TRAIN else []
        seen = {entry.path for section in known for entry in section.entries}
        lines += [f"## Options of `{command.replace('_', '-')}`", ""]
        if known:
            lines += ["All options of `train`, and:", ""]
        for section in describe(command):
            entries = [entry for entry in section.entries if entry.path not in seen]
            if entries or (section.choices and not known):
                lines += _markdown_section(section, entries)
            if changes := _may_change(section, command):
                lines += [changes, ""]
    return "\n".join(lines).rstrip() + "\n"


def _named(name: str, command: str) -> Iterator[Section]:
    for section in describe(command):
        if name == section.name:
            yield section
            return
        entries = [entry for entry in section.entries if entry.path == name]
        if entries:
            yield Section(section.name, "", entries, {})
            return
    raise ConfigError(f"--help {name}: {advice.unknown(name, '', ROOTS[command])}")


def _may_change(section: Section, command: str) -> str:
    """Which options of train may change when a run resumes; "" if none, or another command."""
    free = dict.fromkeys(one.path for one in section.entries if one.spec.may_change)
    fixed = dict.fromkeys(one.path for one in section.entries if one.path not in free)
    if command != "train" or not free:
        return ""
    if len(section.entries) == 1:
        return "May change on resume."
    named = ", ".join(free)
    if len(fixed) < len(free):
        named = f"all but {', '.join(fixed)}" if fixed else "all"
    return f"May change on resume: {named}."


def _section_lines(section: Section) -> Iterator[str]:
    title = section.name or "general"
    yield f"{title}: {section.about}" if section.about else title
    for choice, about in section.choices.items():
        mark = "  (default)" if choice == section.default else ""
        yield f"  {section.name}={choice:<14} {about}{mark}".rstrip()
    if section.default and section.default not in section.choices:
        yield f"  default: {section.default}"
    for entry in section.entries:
        yield f"  {entry.path}  ({entry.type_and_default})"
        having = f"Only {' and '.join(f'{section.name}={one}' for one in entry.choices)}. "
        text = f"{having if entry.choices else ''}{_sentence(entry.spec)}"
        yield from _wrapped(text, 6)


def _wrapped(text: str, indent: int) -> list[str]:
    margin = " " * indent
    return textwrap.wrap(text, _WIDTH, initial_indent=margin, subsequent_indent=margin)


def _markdown_section(section: Section, entries: list[Entry]) -> Iterator[str]:
    yield f"### {section.name or 'General'}"
    yield ""
    if section.about:
        yield from (section.about, "")
    if section.choices:
        for choice, about in section.choices.items():
            mark = " (default)" if choice == section.default else ""
            yield f"- `{section.name}={choice}`{f': {about}' if about else ''}{mark}"
        yield ""
    if entries:
        yield from ("| option | type | default | description |", "|---|---|---|---|")
    for entry in entries:
        only = " and ".join(f"`{section.name}={one}`" for one in entry.choices)
        text = f"{f'Only {only}. ' if only else ''}{_cell(_sentence(entry.spec))}"
        yield f"| `{entry.path}` | {_cell(entry.kind)} | {_cell(entry.default)} | {text} |"
    if entries:
        yield ""


def _group(name: str, choices: dict[str, type], default: str) -> Section:
    """Options with one definition are listed once, with the choices that have it."""
    given = {choice: _yaml(f"{name}/{choice}") for choice in choices}
    having: dict[int, list[tuple[str, Any]]] = {}
    for choice, owner in choices.items():
        for one in fields(owner):
            having.setdefault(id(one.metadata["spec"]), []).append((choice, one))
    entries = []
    for members in having.values():
        names = tuple(choice for choice, _ in members)
        key = members[0][1].name
        shown = [_entry(choices[choice], key, f"{name}.{key}", given[choice]) for choice in names]
        defaults = dict.fromkeys(entry.default for entry in shown)
        text = ", ".join(
            f"{entry.default} ({', '.join(c for c, e in zip(names, shown) if e == entry)})"
            for entry in dict.fromkeys(shown)
        )
        only = names if len(names) < len(choices) else ()
        first = shown[0]
        text = first.default if len(defaults) == 1 else text
        entries.append(Entry(first.path, first.kind, text, first.spec, only))
    base = _base(list(choices.values()))
    abouts = {choice: _about(owner) for choice, owner in choices.items()}
    return Section(name, _about(base), entries, abouts, default)


def _base(owners: list[type]) -> type:
    """The most specific class that all `owners` are derived from."""
    return next(one for one in owners[0].__mro__ if all(issubclass(o, one) for o in owners))


def _entry(owner: type, key: str, path: str, given: dict[str, Any]) -> Entry:
    """given: values from YAML files, which come before the schema's default."""
    one = next(one for one in fields(owner) if one.name == key)
    spec = spec_of(owner, key)
    option = options_of(owner)[key]
    kind = spec.kind or option.type_words
    if spec.rule:
        kind += f", {spec.rule}"
    if option.is_optional or (spec.kind and spec.null != ""):
        kind += ", or null"
    if not (option.is_optional or option.is_any):
        spec = replace(spec, null="")
    default = one.default if one.default_factory is NO_DEFAULT else one.default_factory()
    value = given.get(key, default)
    if value is NO_DEFAULT or value == MISSING:
        return Entry(path, kind, one.metadata["spec"].null or "required", spec)
    return Entry(path, kind, _shown(value), spec)


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _sentence(spec: Spec) -> str:
    """The description with the unit and the meaning of null."""
    unit = f" Unit: {spec.unit}." if spec.unit else ""
    null = f" null: {spec.null}." if spec.null != "" else ""
    return f"{spec.description}{unit}{null}"


def _about(owner: type) -> str:
    """The first sentence of a class's docstring."""
    return cleandoc(owner.__doc__ or "").split("\n\n")[0].replace("\n", " ")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


@cache
def _yaml(name: str) -> dict[str, Any]:
    """The values of conf/NAME.yaml as they are written; a choice may have no file."""
    from omegaconf import OmegaConf

    path = CONF_DIR / f"{name}.yaml"
    if not path.exists():
        return {}
    values: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    return values if isinstance(values, dict) else {}


def _values(command: str) -> dict[str, Any]:
    """The values of conf/COMMAND.yaml, and of the file of another command that it begins with."""
    return {key: value for name in _files(command) for key, value in _yaml(name).items()}


def _choices(command: str) -> dict[str, str]:
    """The default choices of the groups of a command."""
    defaults = [one for name in _files(command) for one in _yaml(name)["defaults"]]
    return {
        group: str(choice)
        for one in defaults
        if isinstance(one, dict)
        for group, choice in one.items()
    }


def _files(command: str) -> list[str]:
    """The command, after the one whose file its own file begins with."""
    first = _yaml(command)["defaults"][0]
    return [first, command] if first in ROOTS else [command]


_INTRODUCTION = """\
# Configuration

<!-- Generated by `python -m alexnet_ddp.config.reference`. Do not edit: a test compares them. -->

Every command takes `GROUP=CHOICE` and `OPTION=VALUE`:

    python -m alexnet_ddp.train data=folder data.root=photos optimizer=lars trainer.epochs=10

- Later values win: the schema's defaults (`alexnet_ddp/config/`), `conf/train.yaml`, the chosen
  `conf/GROUP/CHOICE.yaml`, the recipe (`conf/experiment/`), the command line.
- `null` is "no value" for an option that may have none. A list is `[a,b]`. Quotes around a whole
  value are removed. `${other.option}` and `${oc.env:NAME}` refer to another option and to an
  environment variable.
- A misspelt key, a value of the wrong type or outside its bounds, and an option that would be
  ignored are refused with one line and exit code 64, before torch is imported.
- A run that resumes must have the same values as before. Below each table are the options that may
  change: see [What may change](checkpoints-and-resume.md#what-may-change).
- `--help` prints this reference for one command, `--help NAME` for one group or option.
  `--cfg job` prints the composed configuration (a name of a run that is not given is derived
  later, hence `???`); `--resolve` fills in references, and
  `--package trainer` prints one part.
- `--config-dir DIR` adds a folder of further YAML files, such as `DIR/experiment/mine.yaml` for
  `experiment=mine`. They contain values only: nothing in them is called.
"""


def _recipes() -> Iterator[str]:
    """The values that differ between the default recipes of the data choices."""
    from alexnet_ddp.config.compose import compose, to_plain

    choices = ("demo", "folder", "shards", "imagenet")
    plain = [to_plain(compose("train", [f"data={one}", "data.root=x"])) for one in choices]
    flat = [dict(_flat(one, "")) for one in plain]
    yield "## Default recipes"
    yield ""
    yield "Without `experiment=`, these options depend on the data."
    yield ""
    yield f"| option | {' | '.join(f'`data={one}`' for one in choices)} |"
    yield f"|---{'|---' * len(choices)}|"
    for path in sorted({path for one in flat for path in one}):
        values = [one.get(path) for one in flat]
        if path.split(".")[0] not in ("data", "run") and len({str(one) for one in values}) > 1:
            yield f"| `{path}` | {' | '.join(_shown(one) for one in values)} |"
    low = compose("train", ["data=folder", "data.root=x", "model=alexnet"]).optimizer.lr
    yield ""
    yield f"For AlexNet and VGG without BatchNorm, `optimizer.lr` is {low:g} with data of your own."
    yield ""


def _flat(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


if __name__ == "__main__":
    for line in markdown().splitlines():
        say(line, sys.stdout)
