"""The search space: Hydra's grammar, and what cannot be swept."""

import pytest

from alexnet_ddp.config import ConfigError
from alexnet_ddp.config.space import first_point, read_space

VALUES = {
    "optimizer.lr=0.1,1e-2,3": ("0.1", "0.01", "3"),
    "optimizer.lr=choice(0.1)": ("0.1",),
    "model=choice(alexnet,alexnet_bn)": ("alexnet", "alexnet_bn"),
    "trainer.epochs=range(1,8,3)": ("1", "4", "7"),
    "optimizer.lr=range(0.1,0.4,0.1)": ("0.1", "0.2", "0.3"),
    "seed=sort(3,1,2,reverse=true)": ("3", "2", "1"),
    "trainer.ema_decay=null,0.9": ("null", "0.9"),
    "optimizer.nesterov=true,false": ("true", "false"),
    "data.root=/a/b,'c d'": ("/a/b", "'c d'"),
    "model.name='1.10','2'": ("1.10", "2"),
    "data.mean=[0.5,0.5,0.5],auto": ("[0.5,0.5,0.5]", "auto"),
}


@pytest.mark.parametrize("override", VALUES)
def test_values_in_hydras_grammar(override):
    (found,) = read_space([override]).dimensions
    assert (found.key, found.values) == (override.partition("=")[0], VALUES[override])


def test_an_interval_knows_its_scale_and_its_type():
    given = [
        "trainer.label_smoothing=interval(0,0.2)",
        "optimizer.lr=tag(log, interval(1e-4,1))",
        "trainer.epochs=interval(2,9)",
        "++model.args.width=int(interval(8,64))",
    ]
    found = read_space(given).dimensions
    assert [(one.low, one.high, one.is_int, one.is_log) for one in found] == [
        (0, 0.2, False, False),
        (1e-4, 1, False, True),
        (2, 9, True, False),
        (8, 64, True, False),
    ]
    assert found[0].text_of(0.123456789) == "0.123457"
    assert found[0].text_of(0.19999999) == "0.2"
    assert found[2].text_of(8.7) == "9"
    assert found[3].key == "model.args.width"


def test_the_overrides_are_divided():
    text = "data.root=/data/a (1)"  # no value of Hydra's grammar
    given = ["data=folder", text, "seed=1,2", "sweep.name=x", "~trainer.metrics", "model=a,b"]
    space = read_space(given)
    assert space.fixed == ("data=folder", text, "~trainer.metrics")
    assert space.options == ("sweep.name=x",)
    assert space.num_points == 4
    overrides = [*space.fixed, "seed=2", "model=a"]
    assert space.overrides({"seed": "2", "model": "a"}) == overrides
    assert first_point(given) == ["sweep.name=x", *space.fixed, "seed=1", "model=a"]
    assert read_space(["seed=1,2", "optimizer.lr=interval(1,2)"]).num_points is None


WRONG = {
    "seed=1": "no option has several values; give them, for example optimizer.lr=0.01,0.03,0.1",
    "seed=1,2 sed=3": "sed is not a key; nearest: seed",
    "seed=1,2 seed=3": "seed is given twice; give it once, with all its values",
    "seed=1,2,1": "seed (1,2,1) has the value 1 twice; give it once",
    "seed=1,2 run.name=x": "run.name=x names the run of a trial, which the sweep does; give sweep.name",
    "run.root=a,b": "run.root=a,b is the folder of all trials; give one value",
    "logger.wandb_id=a,b": "logger.wandb_id=a,b would be that of all trials, each of which gets its",
    "device=cpu,cuda": "device=cpu,cuda is divided between the trials; give one value",
    "seed=1,2 sweep.parallel=1,2": "sweep.parallel=1,2: sweep.parallel takes one value",
    "seed=choice(1,2": "seed (choice(1,2) is not in Hydra's grammar: ",
    "seed=range(3,1)": "seed (range(3,1)) contains no number: the stop is not included; ",
    "seed=range(1,3,0)": "seed (range(1,3,0)) has the step 0; give another one",
    "seed=range(1,99999)": "seed (range(1,99999)) has more than 10,000 values; use int(interval(...))",
    "model=glob(*)": "model (glob(*)) is no list of values; name them, as in choice(a,b)",
    "seed=tag(x,choice(1,2))": "seed (tag(x,choice(1,2))) has a tag, which only an interval reads",
    "seed=tag(x,interval(1,2))": "seed (tag(x,interval(1,2))) has the tag x; the only known tag is log",
    "seed=interval(2,1)": "seed (interval(2,1)) must have finite bounds, of which the first one is lower",
    "seed=interval(1,2.5)": "seed (interval(1,2.5)) must have whole numbers as bounds, as seed is an in",
    "optimizer.lr=tag(log,interval(0,1))": "optimizer.lr (tag(log,interval(0,1))) is logarithmic, so",
    "model=interval(0,1)": "model (interval(0,1)): an interval has numbers, and model is none; write m",
    "model.name=interval(0,1)": "model.name (interval(0,1)): an interval has numbers, and model.name",
    "model.name=1.10,b": "model.name is a text, but one of its values is the number or boolean 1.1; put",
    "data.root=https://me:word@a/b,c": "data.root would hold a secret, which is not recorded; give one",
}  # fmt: skip


@pytest.mark.parametrize("given", WRONG)
def test_what_cannot_be_swept_is_refused_in_one_line(given):
    with pytest.raises(ConfigError) as error:
        read_space(given.split(" "))
    assert str(error.value).startswith(WRONG[given])
    assert "\n" not in str(error.value)
