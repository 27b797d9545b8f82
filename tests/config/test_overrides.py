"""What a user types is what an option gets, and every mistake is one line that names the right spelling."""

import ast
import contextlib
import json
import os
import random
import re
import sys
from itertools import cycle
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError

from alexnet_ddp import cli
from alexnet_ddp.cli import compose, config_of_run
from alexnet_ddp.config import Config, ConfigError
from alexnet_ddp.config import compose as with_hydra
from alexnet_ddp.config.overrides import quoted, to_hydra
from alexnet_ddp.config.schema import ROOTS, Option, groups, options, sections
from alexnet_ddp.runtime.redaction import redact

PACKAGE = Path(cli.__file__).parent
SMALL = ("data=synthetic", "model=alexnet_small")


@pytest.fixture
def end(capsys, monkeypatch):
    """end(root, arguments) -> the exit code of the command, its line on stderr, and what it was called with."""

    def run(root: str, *arguments: str) -> tuple[int, str, list]:
        monkeypatch.setattr(sys, "argv", [root, *arguments])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        monkeypatch.setattr(cli.logging.getLogger("alexnet_ddp"), "handlers", [])
        called: list = []
        with pytest.raises(SystemExit) as e:
            cli.run(root, lambda *what: called.extend(what))
        return e.value.code, capsys.readouterr().err, called

    return run


def line_of(end, root: str, *arguments: str) -> str:
    code, err, called = end(root, *arguments)
    assert (code, called, err.count("\n")) == (64, [], 1), err
    return err.removeprefix("alexnet_ddp: ").rstrip("\n")


# --- text as it was typed ---------------------------------------------------------------------------------------

NUMBER_LIKE = [
    "1.10",
    "12e4567",
    "34e9999",
    "1e5",
    "true",
    "False",
    "null",
    "007",
    "2026_11_28",
    "0x10",
    "-1",
    "inf",
]
AS_TYPED = [
    *(
        "müller/bilder",
        "図/写真",
        "a~b",
        "photos (2)",
        "lr=0.1/x",
        "a,b",
        "a#b",
        "it's",
        'say "x"',
        "a b",
        "[1,2]",
        "{a}",
    ),
    *(
        "$HOME/x",
        "c:d",
        "100%",
        "wow!",
        "a\\b",
        "a\\",
        "\\'",
        "a${b",
        "${",
        "x${}",
        "$",
        "a;b|c&d",
        "a*?.jpg",
        "'",
        "'a'b'",
    ),
    *("range(1,3)", "choice(a,b)", "+x", "a=b=c", "@x", "=", " x", "x "),
]


@pytest.mark.sampled
@pytest.mark.parametrize("name", NUMBER_LIKE)
def test_a_run_has_the_name_that_was_typed(name):
    assert compose([f"run.name={name}"]).run.name == name


@pytest.mark.parametrize("name", ["1.10", "null"])
def test_a_run_has_the_name_that_was_typed_behind_two_plus_signs(name):
    assert compose([f"++run.name={name}"]).run.name == name


TYPED = [*NUMBER_LIKE, *AS_TYPED]


@pytest.mark.sampled
@pytest.mark.parametrize("texts", [TYPED[k : k + 3] for k in range(0, len(TYPED), 3)])
def test_a_path_is_the_text_that_was_typed(texts):
    options = ("data.root", "run.root", "data.path_column")
    typed = [f"{option}={text}" for option, text in zip(options, texts)]
    cfg = compose(["data=csv", "data.root=x", "run.name=x", *typed])
    assert [cfg.data.root, cfg.run.root, cfg.data.path_column][: len(texts)] == texts


@pytest.mark.parametrize("root", ROOTS)
def test_every_text_option_of_every_command_gets_the_text_that_was_typed(root):
    for path, option in options(ROOTS[root]).items():
        if option.is_text or option.item is str:
            for text in ("1.10", "007", "true", "a b=(2)'", "é,$"):
                value = f"[{text.replace(',', ';')},1.10]" if option.item is str else text
                read = (
                    OverridesParser.create()
                    .parse_override(to_hydra(f"{path}={value}", ROOTS[root]))
                    .value()
                )
                expected = [text.replace(",", ";"), "1.10"] if option.item is str else text
                assert read == expected, path


def test_null_is_a_text_for_a_name_and_no_value_for_an_option_that_may_have_none():
    cfg = compose(
        [
            "run.name=null",
            "model.weights=null",
            "checkpoint.copy_to=NULL",
            "data=folder",
            "data.root=null",
        ]
    )
    assert (cfg.run.name, cfg.model.weights, cfg.checkpoint.copy_to, cfg.data.root) == (
        "null",
        None,
        None,
        "null",
    )
    assert compose(["model.weights='null'"]).model.weights == "null"


def test_quotes_around_a_whole_value_are_hydras_and_are_taken_off():
    for typed, read in {
        "'1.10'": "1.10",
        '"a b"': "a b",
        r"'it\'s'": "it's",
        r"'a\\'": "a\\",
        "'a\\b'": "a\\b",
    }.items():
        assert compose(["data=folder", f"data.root={typed}"]).data.root == read


def test_a_list_of_texts_keeps_each_as_it_was_typed():
    def split(value):
        return compose(["parallel=hybrid", f"parallel.split={value}"]).parallel.split

    assert split("[1.10, classifier.4,null,1e5]") == ["1.10", "classifier.4", "null", "1e5"]
    assert split("['a,b',\"c d\"]") == ["a,b", "c d"]
    assert (split("null"), split("[]")) == (None, [])


def test_interpolations_of_keys_and_of_the_environment_stay(monkeypatch):
    monkeypatch.setenv("NAME_OF_A_RUN", "1.10")
    assert compose(["run.name=${oc.env:NAME_OF_A_RUN}"]).run.name == "1.10"
    assert compose(["run.name=s${seed}-${oc.env:NOT_SET_HERE,x}", "seed=3"]).run.name == "s3-x"
    assert compose(["trainer.epochs=${seed}", "seed=3"]).trainer.epochs == 3
    assert compose([r"run.name=a\${seed}"]).run.name == "a${seed}"


def test_any_text_survives_hydras_grammar_and_omegaconfs():
    rng, parser = random.Random(20261128), OverridesParser.create()
    for _ in range(3000):
        alphabet = rng.choice(["'\"\\${}", "ab01.eE_- ~()[]{},:=#'\"\\$%!@?*|/+&;<>`^éü漢😀\t"])
        text = "".join(rng.choice(alphabet) for _ in range(rng.randint(0, 12)))
        with contextlib.suppress(GrammarParseError):
            if "${" in text and OmegaConf.create([text]):
                continue  # an interpolation, which keeps its meaning
        node = OmegaConf.create({"x": parser.parse_override(f"data.root={quoted(text)}").value()})
        assert OmegaConf.to_container(node, resolve=True) == {"x": text}


@pytest.mark.sampled
@pytest.mark.parametrize(
    "text", ["1.10", "12e4567", "a b=(2)", "it's", "a\\", "é,$", "'x'y'", "2026_11_28"]
)
def test_a_recorded_run_is_composed_again_with_the_same_texts(tmp_path, text):
    overrides = ["data=folder", f"data.root={text}", f"run.name={text}", "+experiment=demo"]
    run_dir = tmp_path / text
    run_dir.mkdir()
    (run_dir / "run.json").write_text(json.dumps(redact({"overrides": overrides})))
    cfg = config_of_run(run_dir, [])
    assert (cfg.run.name, cfg.data.root) == (text, text)


def record_run(run_dir: Path, *overrides: str) -> Path:
    run_dir.mkdir()
    (run_dir / "run.json").write_text(json.dumps({"overrides": list(overrides)}))
    return run_dir


def test_an_override_counts_more_than_the_record(tmp_path):
    run_dir = record_run(tmp_path / "r", "data=folder", "data.root=x")
    assert config_of_run(run_dir, ["++data.root=007"]).data.root == "007"


def test_a_record_does_not_send_a_variable_of_this_machine_to_a_server(tmp_path, monkeypatch):
    monkeypatch.setenv("KEPT", "secret")
    run_dir = record_run(tmp_path / "r", "data=shards", "data.root=ftp://host/${oc.env:KEPT}")
    with pytest.raises(ConfigError, match=r"data.root of r is a URL with \$\{...\}") as error:
        config_of_run(run_dir, [])
    assert "secret" not in str(error.value)
    assert config_of_run(run_dir, ["data.root=ftp://host/x"]).data.root == "ftp://host/x"
    assert config_of_run(run_dir, [], opens_data=False).run.name == "r"


def test_a_damaged_record_is_not_called_missing(tmp_path):
    run_dir = record_run(tmp_path / "r")
    damages = {"{": "JSONDecodeError", '{"overrides": "a=1"}': "TypeError", "[" * 5000: "Recursion"}
    for content, reason in damages.items():
        (run_dir / "run.json").write_text(content)
        with pytest.raises(ConfigError, match=rf"run.json cannot be read \({reason}"):
            config_of_run(run_dir, [])


def test_a_settings_text_of_spark_is_as_it_was_typed():
    overrides = ["source=x", "root=y", "engine=spark", "engine.master=local[2,4]"]
    cfg = with_hydra.compose("prepare", [*overrides, "+engine.conf.spark.app.name=1.10"])
    assert (cfg.engine.master, cfg.engine.conf) == ("local[2,4]", {"spark.app.name": "1.10"})


@pytest.mark.parametrize(
    "argument", ["--optimizer.lr=0.25", "--seed=3", "--data.root=/a b", "--scheduler=poly"]
)
def test_an_override_may_be_written_with_two_dashes_as_wandbs_sweeps_do(end, argument):
    code, err, (_, overrides) = end("train", argument)
    assert (code, err, overrides) == (0, "", [argument[2:]])


@pytest.mark.parametrize("dashes", ["", "--"])
@pytest.mark.parametrize("given", ["{'lr': 0.1}", "{'lr': 0.1, 'momentum': 0.8}"])
def test_nested_parameters_of_wandbs_sweeps_are_answered_with_dotted_names(end, given, dashes):
    """The sweep agent writes them as a dictionary of Python."""
    code, err, _ = end("train", f"{dashes}optimizer={given}")
    assert code == 64
    assert err.strip() == (
        f"alexnet_ddp: optimizer ({given}) is a dictionary of Python; give each option, such as "
        "optimizer.lr=0.1; in sweep.yaml, name the parameter optimizer.lr"
    )


def test_a_choice_of_a_group_is_a_text_too(tmp_path, end):
    (tmp_path / "experiment").mkdir()
    for name in ("2026_11_28", "1.10", "größe (2)"):
        (tmp_path / f"experiment/{name}.yaml").write_text("# @package _global_\nseed: 7\n")
        code, err, (cfg, _) = end("train", "--config-dir", str(tmp_path), f"experiment={name}")
        assert (code, err, cfg.seed) == (0, "", 7)


# --- YAML files -------------------------------------------------------------------------------------------------


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("where", "value"),
    [
        *(("experiment", value) for value in ("1.10", "2026_11_28", "true", "1e5", "007")),
        ("data", "1.10"),
        ("base", "2026_11_28"),
    ],
)
def test_a_number_for_a_text_in_a_yaml_file_is_refused(tmp_path, end, value, where):
    experiment = tmp_path / "experiment"
    experiment.mkdir()
    named = f"# @package _global_\nrun:\n  name: {value}\n"
    (experiment / "base.yaml").write_text(
        named if where == "base" else "# @package _global_\nseed: 1\n"
    )
    defaults = "defaults: [base, {override /data: mine}]\n"
    (experiment / "mine.yaml").write_text(
        named if where == "experiment" else f"# @package _global_\n{defaults}"
    )
    (tmp_path / "data").mkdir()
    root = value if where == "data" else "x"
    (tmp_path / "data/mine.yaml").write_text(
        f"defaults: [{{schema: folder}}, _self_]\nroot: {root}\n"
    )
    said = line_of(end, "train", "--config-dir", str(tmp_path), "experiment=mine")
    option = "data.root" if where == "data" else "run.name"
    file = {"experiment": "experiment/mine", "data": "data/mine", "base": "experiment/base"}[where]
    assert said.startswith(f"{option} is a text, but {file}.yaml gives the number or boolean ")
    assert "with quotes" in said


def test_a_recipe_without_its_first_line_is_answered_with_that_line(tmp_path, end):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text("trainer: {epochs: 3}\n")
    said = line_of(end, "train", "--config-dir", str(tmp_path), "experiment=mine")
    assert "must begin with the line # @package _global_" in said


def test_a_part_to_print_that_is_an_option_is_answered_with_the_part(end):
    said = line_of(end, "train", "--cfg", "job", "--package", "trainer.epochs")
    assert said == "--package trainer.epochs must name a part, such as trainer"


def test_a_quoted_text_in_a_yaml_file_is_taken(tmp_path, end):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text("# @package _global_\nrun: {name: '1.10'}\n")
    assert end("train", "--config-dir", str(tmp_path), "experiment=mine")[2][0].run.name == "1.10"


# --- values that nothing can take ------------------------------------------------------------------------------

TOO_MUCH = {
    f"run.name={'n' * 300}": "run.name (",
    f"run.name={'é' * 101}": "run.name (",
    f"run.name={'n' * 300}x seed=1": "run.name (",
    "run.name=a\nb": r"run.name (a\nb) contains a control character, such as a newline; leave it out",
    "run.name=a\0b": r"run.name (a\x00b) contains a control character",
    "run.name=\udcfc": "run.name (\\udcfc) contains bytes that are not UTF-8",
    "run.name= x": "run.name (' x') must not begin or end with a space",
    "run.name=.": "run.name ('.') must name one directory",
    f"run.root={'d' * 256}": "run.root (",
    f"run.root={'d/' * 2048}": "run.root (",
    f"model.weights=/{'d' * 256}/x": "model.weights (",
    "run.root=": "run.root ('') is empty; give a text",
    "run.root=~/runs": "run.root (~/runs) begins with ~, which only a shell expands; write $HOME/runs",
    "logger.wandb_project=a\u2028b": "logger.wandb_project (",
    "seed=1e20": "seed (1e20) must be an integer",
    "seed=-1": "seed (-1) must be in [0, 4294967295]",
    "seed=4294967296": "seed (4294967296) must be in [0, 4294967295]",
    f"trainer.epochs={10**30}": "trainer.epochs (",
    f"seed={'9' * 5000}": "seed (",
    f"trainer.log_every_steps={10**400}": "trainer.log_every_steps (an integer of 1329 bits) must be an integer of",
    "seed=1\n2": r"seed (1\n2) must be an integer",
    "optimizer.weight_decay=inf": "optimizer.weight_decay (inf) must be a finite number",
    "scheduler.warmup_epochs=inf": "scheduler.warmup_epochs (inf) must be a finite number",
    "trainer.spike_factor=inf": "trainer.spike_factor (inf) must be a finite number",
}


def test_what_has_a_meaning_for_hydra_is_refused_in_our_words(end):
    assert line_of(end, "train", "experiment=null") == (
        "experiment=null is refused; leave experiment out for its default"
    )
    assert line_of(end, "train", "run.name=???").startswith(
        "run.name (???) is OmegaConf's mark of a value"
    )
    assert "data=... chooses the files" in line_of(
        end, "train", "experiment=default/folder", "data=folder", "data.root=x"
    )
    assert (
        line_of(end, "plan", "nodes=1,2")
        == "nodes=1,2: nodes takes one value; start one command per value"
    )
    assert (
        line_of(end, "plan", "-m", "nodes=1")
        == "-m (a sweep) is not supported; start one command per value"
    )
    assert line_of(end, "train", "~/data").startswith("'~/data' is not OPTION=VALUE")


@pytest.mark.sampled
@pytest.mark.parametrize("argument", TOO_MUCH, ids=range(len(TOO_MUCH)))
def test_a_value_that_nothing_can_take_is_one_short_line(end, argument):
    said = line_of(end, "train", argument)
    assert said.startswith(TOO_MUCH[argument])
    assert len(said) < 250
    assert said.isprintable()


@pytest.mark.slow
@pytest.mark.parametrize(
    "root", ["train", "predict", "plan", "prepare"]
)  # evaluate and doctor have train's options
def test_no_number_option_takes_more_than_64_bits_or_what_is_no_number(root, full):
    too_much = {int: cycle((str(10**30), "-1" + "0" * 30)), float: cycle(("nan", "-inf", "inf"))}
    for k, (path, option) in enumerate(options(ROOTS[root]).items()):
        kind = next((kind for kind in (int, float) if kind in option.kinds), None)
        if kind is None or (k % 4 and not full):
            continue
        choice = path.split(".")[0]
        chosen = [f"{choice}={option.choices[0]}"] if option.choices else []
        said = refusal(root, *chosen, f"{path}={next(too_much[kind])}")
        assert said.startswith(
            (f"{path} (", "data.root is req", "model.name is req", "root is req", "images is req")
        )


def refusal(root: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as e:
        with_hydra.compose(root, list(overrides))
    return str(e.value)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_every_seed_that_is_taken_is_one_that_torch_and_the_hashes_tell_apart(seed):
    from alexnet_ddp import rng

    assert compose([f"seed={seed}"]).seed == seed
    assert rng.fold(seed, 1) == rng.fold(seed + 2**32, 1)  # which is why a larger seed is refused


# --- the right spelling -----------------------------------------------------------------------------------------

SPELLINGS = {
    "logger=wandb": "logger=wandb is refused: logger is not a group; write logger.wandb=online (or offline, disabled)",
    "logger=tensorboard": "logger=tensorboard is refused: logger is not a group; write logger.tensorboard=true",
    "trainer=ddp": "trainer=ddp is refused: trainer is not a group; write parallel=ddp",
    "resume=true": "resume=true is refused: resume is not a group; its options: resume.allow_changes",
    "model=resnet18": (
        "model=resnet18 does not exist; choices: alexnet, alexnet_2012, alexnet_bn, alexnet_small, plugin, "
        "timm, torchvision; "
        "a network of torchvision: model=torchvision model.name=resnet18"
    ),
    "model=AlexNet": "model=AlexNet does not exist; nearest: model=alexnet",
    "model=sgd": "model=sgd does not exist; write optimizer=sgd",
    "data=imagnet": "data=imagnet does not exist; nearest: data=imagenet",
    "data=/data/imagenet": (
        "data=/data/imagenet does not exist; write data=folder data.root=/data/imagenet (or data=imagenet, data=shards)"
    ),
    "experiment=alexnt": "experiment=alexnt does not exist; nearest: experiment=alexnet",
    "lr=0.1": "lr is not a key; nearest: optimizer.lr",
    "optimzer.lr=0.1": "optimzer.lr is not a key; nearest: optimizer.lr",
    "optimizer.learning_rate=0.1": "optimizer.learning_rate is not a key; nearest: optimizer.lr",
    "wandb=online": "wandb is not a key; nearest: logger.wandb",
    "epochs=10": "epochs is not a key; nearest: trainer.epochs",
    "trainer.num-epochs=10": "trainer.num-epochs is not a key; nearest: trainer.epochs",
    "batch_size=64": "batch_size is not a key; nearest: trainer.global_batch_size",
    "trainer.batch_size=64": "trainer.batch_size is not a key; nearest: trainer.global_batch_size",
    "--epochs 10": "--epochs is not supported; write trainer.epochs=10",
    "--lr=0.1": "--lr is not supported; write optimizer.lr=0.1",
    "--optimizer.lr 0.1": "--optimizer.lr is not supported; write optimizer.lr=0.1",
    "--batch-size=64": "--batch-size is not supported; write trainer.global_batch_size=64",
    "-j 4": "-j is not supported; write OPTION=VALUE, without dashes; --help lists the options",
    "ddp": "'ddp' is not OPTION=VALUE; write parallel=ddp",
    "optimizer.lr = 0.1": "'optimizer.lr' is not OPTION=VALUE; write OPTION=VALUE, without spaces around =",
    "seed=1,2": "seed=1,2: seed takes one value; alexnet-ddp sweep trains one run per value",
    "seed=range(1,3)": "seed=range(1,3): seed takes one value; alexnet-ddp sweep trains one run per value",
    "model=alexnet,alexnet_bn": (
        "model=alexnet,alexnet_bn: model takes one value; alexnet-ddp sweep trains one run per value"
    ),
    "-m seed=1,2": (
        "-m (a sweep) is not supported; write alexnet-ddp sweep, as in alexnet-ddp sweep optimizer.lr=0.01,0.1"
    ),
    "trainer={bogus:2,epochs:3}": "trainer.bogus is not a key; known here: trainer.callbacks, ",
    "run.name=${oc.env:NOT_SET_HERE}": (
        "run.name (${oc.env:NOT_SET_HERE}) refers to an environment variable that is not set, or cannot be resolved"
    ),
}


@pytest.mark.parametrize("arguments", SPELLINGS)
def test_a_wrong_name_is_answered_with_the_right_spelling(end, arguments):
    said = line_of(end, "train", *arguments.split())
    wanted = SPELLINGS[arguments]
    assert said.startswith(wanted)
    assert said == wanted or wanted.endswith(", ")


OF_OTHER_COMMANDS = {
    "plan plan.nodes=2": "plan.nodes is not a key; nearest: nodes",
    "plan gpus=2": "gpus is not a key; nearest: gpus_per_node",
    "plan data=imagenet": "data=imagenet is refused: data is not a group; its options: data.image_size, ",
    "plan nodes=0": "nodes (0) must be at least 1",
    "predict predict.top_k=2": "predict.top_k is not a key; nearest: top_k",
    "predict images=x top_k=0": "top_k (0) must be at least 1",
    "predict run=mine images=x": "run=mine is refused: run is not a group; its options: run.name, run.root",
    "prepare root=x action=sheet image_size=0": "image_size (0) must be in [1, 20000]",
    "prepare root=x source=y prepare.quality=3": "prepare.quality is not a key; nearest: quality",
    "doctor join_timeout_s=0": "join_timeout_s (0.0) must be in (0, 1000000]",
    "evaluate lr=0.1": "lr is not a key; nearest: optimizer.lr",
}


@pytest.mark.parametrize("command", OF_OTHER_COMMANDS)
def test_every_command_names_its_own_options(end, command):
    assert line_of(end, *command.split()).startswith(OF_OTHER_COMMANDS[command])


@pytest.mark.parametrize(
    "advice",
    [
        "use key=[value1,value2]",
        "quote it: key='value1,value2'",
        "write key=value",
        "give data.token=... again",
    ],
)
def test_advice_is_no_secret(advice):
    assert redact(advice) == advice


# Which commands read the options that a module's messages name.
OWNERS = {
    "plan": ["plan", "train"],
    "costs": ["plan", "train"],
    "prepare": ["prepare"],
    "packing": ["prepare", "train"],
}
OWNERS |= {
    "predict": ["predict", "train", "evaluate"],
    "doctor": ["doctor"],
    "lr_find": ["lr_find"],
    "sweep": ["sweep", "plan"],
    "space": ["sweep"],
    "reference": [*ROOTS],
    "examination": ["doctor", "prepare"],
}


FILES = (".py", ".csv", ".json", ".npy", ".yaml", ".png", ".html", ".onnx", ".safetensors", ".pt2")


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_every_option_that_a_message_names_exists(path):
    parts = [*path.relative_to(PACKAGE).parts[:-1], path.stem]
    roots = next(
        (OWNERS[part] for part in reversed(parts) if part in OWNERS),
        ["train", "evaluate", "predict", "prepare", "plan"],
    )
    known = {option for root in roots for option in options(ROOTS[root])}
    heads = {
        *ROOTS,
        *(head for root in ROOTS.values() for head in (*sections(root), *groups(root))),
    }
    named = re.compile(
        rf"(?<![\w./'-])(?:{'|'.join(sorted(heads))})\.[a-z][a-z_0-9]+(?![\w.(/]|\.py)"
    )
    tree = ast.parse(path.read_text())
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and id(node) not in docs
    ]
    for text in texts:
        for option in named.findall(text) if isinstance(text, str) and " " in text else []:
            assert option in known or option.endswith(FILES), f"{option} in {text!r}"


def test_options_of_a_choice_know_their_choices():
    found = options(Config)
    assert found["model.name"] == Option((str, str, str), ("torchvision", "timm", "plugin"))
    assert found["data.root"].choices == ("demo", "folder", "csv", "imagenet", "shards", "plugin")
    assert found["optimizer.lr"].choices == ()
    assert os.sep not in "".join(found)
