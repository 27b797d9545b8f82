"""Weights as other programs write them, and classifier rows that follow their classes."""

import argparse
import json
import logging
import re
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import vision_transformer

from alexnet_ddp.config import ConfigError, Head, TorchvisionConfig
from alexnet_ddp.model import build_model, load_weights, transforms_input
from alexnet_ddp.model.head import ClassChange, find_head, follow_classes
from alexnet_ddp.model.weights import load_checkpoint

CLASSES = ["a", "m", "q"]


class Small(nn.Module):
    """A network with a running mean, so that averages of parameters alone are not all of it."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, classes)


def small(seed: int = 0, classes: int = 3) -> Small:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Small(classes)


SOURCE = small(seed=1).state_dict()
OTHER = small(seed=2).state_dict()


def prefixed(prefix: str, state: dict[str, Tensor] = SOURCE) -> dict[str, Tensor]:
    return {prefix + name: t for name, t in state.items()}


def loaded(
    content: object, path: Path, legacy: bool = False, **options: object
) -> dict[str, Tensor]:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    model = small()
    load_weights(model, path, CLASSES, **options)
    return model.state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(t, b[name]) for name, t in a.items())


ARGS = argparse.Namespace(lr=0.1, output=Path("out"), best=np.float64(3), mean=np.zeros(3))
FORMS = {
    "module": prefixed("module."),
    "compiled ddp": prefixed("_orig_mod.module."),
    "ddp of compiled": prefixed("module._orig_mod."),
    "a wrapped part": {n.replace("conv.", "conv.module."): t for n, t in SOURCE.items()},
    "pytorch/examples": {
        "epoch": 1,
        "arch": "x",
        "state_dict": prefixed("module."),
        "best_acc1": torch.tensor(1.0),
    },
    "torchvision": {
        "model": SOURCE,
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}},
        "args": ARGS,
    },
    "timm": {"state_dict": SOURCE, "args": ARGS, "metric": np.float32(1)},
    "tutorial": {"model_state_dict": SOURCE, "loss": 0.5},
    "lightning": {
        "state_dict": {**prefixed("model."), "criterion.weight": torch.ones(2)},
        "hyper_parameters": {},
    },
    "lightning net": {"state_dict": prefixed("net._orig_mod.")},
    "composer": {
        "state": {"model": prefixed("module."), "optimizers": {}},
        "rng": [{"python": (3, (1, 2), None)}],
    },
    "transformers": prefixed("resnet.model."),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_weights_load_as_other_programs_nest_and_name_them(tmp_path, form, legacy, caplog):
    caplog.set_level(logging.INFO)
    assert same(SOURCE, loaded(FORMS[form], tmp_path / "w.pth.tar", legacy))
    (line,) = [
        m for m in caplog.messages if "takes " in m or "names such as " in m
    ]  # it says what it took
    nested = [
        key for key in ("state_dict", "model_state_dict", "state.model") if f"takes {key}" in line
    ]
    assert nested or "state_dict" not in FORMS[form]


@pytest.mark.parametrize(
    ("content", "taken", "left"),
    [
        (
            {"model": OTHER, "model_ema": {"n_averaged": torch.tensor(3), **prefixed("module.")}},
            "model_ema",
            "model",
        ),
        ({"state_dict": OTHER, "state_dict_ema": SOURCE}, "state_dict_ema", "state_dict"),
        (
            {"state_dict": {**prefixed("model.", OTHER), **prefixed("ema_model.module.")}},
            "state_dict",
            "model",
        ),
    ],
)
def test_averaged_weights_are_preferred_and_logged(tmp_path, caplog, content, taken, left):
    caplog.set_level(logging.INFO)
    assert same(SOURCE, loaded(content, tmp_path / "w.pth"))
    assert re.search(rf"takes {taken}; .*averaged weights, not \S*{left}", caplog.messages[0])


def test_averages_without_running_statistics_are_not_taken(tmp_path):
    parameters = {n: t for n, t in OTHER.items() if not n.startswith("bn.r")}
    assert same(SOURCE, loaded({"model": SOURCE, "model_ema": parameters}, tmp_path / "w.pth"))


def test_several_networks_that_fit_alike_are_refused_by_name(tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"holds several networks that fit: student, teacher; save the one that you",
    ):
        loaded({"student": SOURCE, "teacher": prefixed("module.", OTHER)}, tmp_path / "w.pth")


def test_files_from_before_torch_counted_batches_load(tmp_path):
    old = {n: t for n, t in SOURCE.items() if not n.endswith("num_batches_tracked")}
    assert same(old, loaded(old, tmp_path / "w.pth"))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_whole_module_is_refused_and_named(tmp_path, legacy):
    with pytest.raises(ConfigError) as e:
        loaded(torchvision.models.squeezenet1_1(num_classes=2), tmp_path / "w.pth", legacy)
    rule = "it holds more than tensors and plain data (torchvision.models.squeezenet.SqueezeNet), a whole module"
    assert f"is refused: {rule}; nothing in it was run; save model.state_dict()" in str(e.value)


class Planted:
    """Calls what a file must not be able to call, under names that are let through as data."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple:
        return Path.touch, (Path(self.mark),)


def test_what_stands_for_data_runs_no_code_of_its_own(tmp_path):
    with pytest.raises(ConfigError, match="nothing in it was run"):
        loaded({"model": SOURCE, "args": Planted(tmp_path / "it ran")}, tmp_path / "w.pth")
    assert not (tmp_path / "it ran").exists()
    torch.save({"path": tmp_path / "made", "n": np.float64(2), **SOURCE}, tmp_path / "v.pth")
    from alexnet_ddp.model.weight_files import Ignored, read_weights_file

    content = read_weights_file(tmp_path / "v.pth").content
    assert (type(content["path"]), type(content["n"])) == (Ignored, Ignored)
    allowed = torch.serialization.get_safe_globals()
    assert not any(
        isinstance(one, tuple) and one[0] is Ignored for one in allowed
    )  # nothing stays allowed


def files_of_other_kinds(root: Path) -> dict[str, str]:
    """File name -> what the message has to call it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.Linear(2, 2)).save(str(root / "script.pt"))
    np.savez(root / "w.npz", w=np.zeros(2))
    (root / "saved_model").mkdir()
    for name, content in {
        "page.pth": b"<!DOCTYPE html>\n<html>",
        "pointer.pth": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
        "pointer.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
        "net.onnx": b"\x08\x07\x12\x07pytorch",
        "net.h5": b"\x89HDF\r\n\x1a\n",
        "net.keras.pth": b"\x89HDF\r\n\x1a\n",
        "graph.pb": b"\n\x05saved",
        "model.safetensors.index.json": b'{"metadata": {}}',
        "net.pth.gz": b"\x1f\x8b\x08\x00",
        "empty.pth": b"",
    }.items():
        (root / name).write_bytes(content)
    return {
        "script.pt": "is a TorchScript program",
        "w.npz": "is a NumPy archive",
        "saved_model": "is a directory",
        "page.pth": "is an HTML page",
        "pointer.pth": "is a Git LFS pointer",
        "net.onnx": "is an ONNX file",
        "pointer.safetensors": "is a Git LFS pointer",
        "net.h5": "is a Keras",
        "net.keras.pth": "is a Keras",
        "graph.pb": "is a TensorFlow graph",
        "model.safetensors.index.json": "is a JSON file",
        "net.pth.gz": "is a compressed file",
        "empty.pth": "it is empty",
    }


def test_a_file_of_another_kind_is_called_what_it_is(tmp_path):
    for name, kind in files_of_other_kinds(tmp_path).items():
        with pytest.raises(ConfigError) as e:
            load_weights(small(), tmp_path / name)
        assert kind in str(e.value)
        assert "; " in str(e.value)  # the remedy
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_is_read_by_its_content_for_any_suffix(tmp_path, suffix):
    safetensors.torch.save_file(SOURCE, tmp_path / f"a{suffix}")
    torch.save(SOURCE, tmp_path / f"b{suffix}")
    for name in "ab":
        model = small()
        load_weights(model, tmp_path / f"{name}{suffix}")
        assert same(SOURCE, model.state_dict())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["head.weight", "bn.running_var"])
def test_values_that_are_not_finite_are_refused_with_the_name_of_the_tensor(tmp_path, name, value):
    bad = {n: t.clone() for n, t in SOURCE.items()}
    bad[name].view(-1)[1] = value
    with pytest.raises(ConfigError) as e:
        loaded(bad, tmp_path / "w.pth")
    rule = f"1 of {bad[name].numel()} values of {name} are not finite"
    assert f"model.weights ({tmp_path}/w.pth) is refused: {rule}" in str(e.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused_and_narrow_ones_are_checked(tmp_path, dtype):
    narrow = {
        name: t.to(dtype) if t.is_floating_point() else t
        for name, t in small().state_dict().items()
    }
    safetensors.torch.save_file(narrow, tmp_path / "w.safetensors")
    if dtype.is_floating_point:
        load_weights(small(1), tmp_path / "w.safetensors")
        return
    with pytest.raises(
        ConfigError, match="holds int8 values, as quantised weights do; give floating-point weights"
    ):
        load_weights(small(1), tmp_path / "w.safetensors")


def test_every_damage_of_a_torch_file_is_one_line(tmp_path):
    torch.save(small().state_dict(), tmp_path / "good.pth")
    good, path, refused = (tmp_path / "good.pth").read_bytes(), tmp_path / "bad.pth", 0
    rng = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(good)
        for at in (
            len(data) - 1 - rng.integers(0, min(900, len(data)), 3)
        ):  # the directory of the zip is at its end
            data[at] = rng.integers(0, 256)
        path.write_bytes(data)
        with suppress(ConfigError):
            load_weights(small(1), path)
            refused -= 1
        refused += 1
    assert refused > 100


def test_another_network_with_other_classes_is_a_line_about_shapes(tmp_path):
    path = with_classes(["a", "b", "c"], tmp_path / "w.safetensors")
    other = nn.Sequential(nn.Flatten(), nn.Linear(7, 3))
    with pytest.raises(ConfigError, match="does not fit the model"):
        load_weights(other, path, ["a", "b", "d"])
    rows = {"1.weight": torch.ones(3, 5)}
    kept = follow_classes(
        rows, ClassChange(["a", "b", "c"], ["a", "b", "d"]), {"1.weight": torch.zeros(3, 7)}
    )
    assert torch.equal(kept["1.weight"], rows["1.weight"])


def test_a_buffer_that_is_infinite_by_construction_is_accepted(tmp_path):
    model = small()
    model.register_buffer("mask", torch.full((2,), -float("inf")))
    torch.save(model.state_dict(), tmp_path / "w.pth")
    load_weights(model, tmp_path / "w.pth")
    assert torch.isinf(model.mask).all()


# --- rows of the head ---------------------------------------------------------------------------------------------


def with_classes(classes: list[str], path: Path) -> Path:
    state = small(seed=1, classes=len(classes)).state_dict()
    safetensors.torch.save_file(state, path, {"format": "pt", "classes": json.dumps(classes)})
    return path


def test_rows_follow_class_names_into_another_order(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    model = small()
    load_weights(
        model, with_classes(["q", "a", "m"], tmp_path / "w.safetensors"), CLASSES, head=None
    )
    assert torch.equal(model.head.weight, SOURCE["head.weight"][[1, 2, 0]])
    assert torch.equal(model.head.bias, SOURCE["head.bias"][[1, 2, 0]])
    (line,) = caplog.messages
    assert line.endswith(
        "classes: the same 3 classes in another order: rows of the head follow their class names"
    )


def test_classes_that_the_file_does_not_have_start_fresh_and_the_others_keep_their_rows(
    tmp_path, caplog
):
    model = small()
    fresh = model.head.weight.clone()
    load_weights(model, with_classes(["m", "q", "z"], tmp_path / "w.safetensors"), CLASSES)
    assert torch.equal(model.head.weight[1:], SOURCE["head.weight"][:2])
    assert torch.equal(model.head.weight[0], fresh[0])
    assert (
        "2 kept (m, q), 1 dropped (z), 1 new (a): rows of the head follow their class names; model.head=new"
        in (caplog.messages[0])
    )
    with pytest.raises(
        ConfigError,
        match=r"has other classes than the data: 2 kept \(m, q\), 1 dropped \(z\), 1 new",
    ):
        load_weights(small(), tmp_path / "w.safetensors", CLASSES, head=None)


def test_another_number_of_classes_keeps_the_rows_of_known_names(tmp_path):
    model = small()
    load_weights(model, with_classes(["q", "x", "y", "a"], tmp_path / "w.safetensors"), CLASSES)
    rows = small(seed=1, classes=4).head.weight
    assert torch.equal(model.head.weight[[0, 2]], rows[[3, 0]])


@pytest.mark.parametrize(
    ("name", "is_scaled"),
    [("mnasnet0_5", True), ("resnet18", False), ("squeezenet1_1", False), ("mobilenet_v2", False)],
)
def test_a_new_head_is_no_larger_than_twice_nn_linears(name, is_scaled, tmp_path):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, num_classes=10)
    head = model.get_parameter(f"{find_head(model)}.weight")
    own = head.detach().clone()
    torch.save(torchvision.models.get_model(name, num_classes=7).state_dict(), tmp_path / "w.pth")
    load_weights(model, tmp_path / "w.pth")
    if is_scaled:
        usual = (3 * own[0].numel()) ** -0.5
        assert own.std() > 10 * usual
        torch.testing.assert_close(head, own * (usual / own.std()))
    else:
        assert torch.equal(head, own)


def test_model_head_new_replaces_the_head_and_serves_a_file_without_one(tmp_path):
    for drop in (False, True):
        content = {n: t for n, t in SOURCE.items() if not (drop and n.startswith("head"))}
        state = loaded(content, tmp_path / "w.pth", head=Head.new)
        assert torch.equal(state["head.weight"], small().head.weight)
        assert torch.equal(state["conv.weight"], SOURCE["conv.weight"])


def test_for_a_file_without_class_names_the_order_of_its_rows_is_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    loaded(SOURCE, tmp_path / "w.pth")
    assert caplog.messages == [
        f"model.weights ({tmp_path}/w.pth) names no classes: its rows are taken in the order of the data's: "
        "0 = a, 1 = m, 2 = q"
    ]


def test_moments_follow_their_classes_and_scalars_stay():
    change = ClassChange(["a", "m"], ["m", "z"])
    fresh = {"head.weight": torch.full((2, 3), 7.0)}
    rows = torch.arange(6.0).view(2, 3)
    moved = follow_classes(
        {
            "head.weight": rows,
            "exp_avg/head.weight": rows,
            "step/head.weight": torch.tensor(5.0),
            "x/conv": rows,
        },
        change,
        fresh,
    )
    assert moved["head.weight"].tolist() == [[3, 4, 5], [7, 7, 7]]
    assert moved["exp_avg/head.weight"].tolist() == [[3, 4, 5], [0, 0, 0]]
    assert moved["step/head.weight"] == 5
    assert torch.equal(moved["x/conv"], rows)


# --- torchvision's networks ---------------------------------------------------------------------------------------

SIZES = {"inception_v3": 299, "googlenet": 224}
ALL = torchvision.models.list_models(module=torchvision.models)


def meta(name: str, **options: object) -> nn.Module:
    if name.startswith("regnet"):  # computes its widths with tensors
        return torchvision.models.get_model(name, num_classes=7).eval().to("meta")
    if name in SIZES:
        options |= {"init_weights": False}
    with torch.device("meta"):
        return torchvision.models.get_model(name, num_classes=7, **options).eval()


def executed_last(model: nn.Module, size: int) -> str:
    """Name of the linear layer or convolution that a forward pass runs last."""
    ran: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    with torch.no_grad():
        out = model(torch.empty(1, 3, size, size, device="meta"))
    assert out.shape == (1, 7)
    return ran[-1]


@pytest.mark.slow
def test_the_head_of_every_torchvision_classifier_is_found(full):
    for name in ALL if full else ALL[::4]:
        if name == "regnet_y_128gf":  # 2.6 GB; the same layers as the others of its family
            continue
        model = meta(name)
        assert find_head(model) == executed_last(model, SIZES.get(name, 224)), name


HEADS = {
    "googlenet": "fc",
    "inception_v3": "fc",
    "squeezenet1_0": "classifier.1",
    "mnasnet0_5": "classifier.1",
    "vit_b_32": "heads.head",
    "swin_t": "head",
    "convnext_tiny": "classifier.2",
    "alexnet": "classifier.6",
    "densenet121": "classifier",
    "maxvit_t": "classifier.5",
    "resnet18": "fc",
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_of_all_families_are_found(name):
    assert find_head(meta(name)) == HEADS[name]


def test_tensors_of_every_family_load_by_name_alone():
    """MNASNet does not without its version, which neither safetensors nor a checkpoint has."""
    for name in ("mnasnet0_5", "mnasnet1_3", "shufflenet_v2_x0_5", "squeezenet1_1"):
        model = torchvision.models.get_model(name, num_classes=3)
        other = torchvision.models.get_model(name, num_classes=3)
        load_checkpoint(other, dict(model.state_dict()), "a checkpoint")
        assert same(other.state_dict(), model.state_dict())


@pytest.mark.slow
def test_densenet_in_the_names_of_old_torchvision_loads(tmp_path):
    cfg = TorchvisionConfig(name="densenet121")
    source = build_model(cfg, 3, 64, seed=1).state_dict()
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", n): t
        for n, t in source.items()
    }
    assert old.keys() != source.keys()
    torch.save(old, tmp_path / "w.pth")
    model = build_model(cfg, 3, 64, seed=0)
    load_weights(model, tmp_path / "w.pth", CLASSES)
    assert same(source, model.state_dict())


def googlenet(seed: int, **options: object) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # torchvision's own initialisation takes a minute
        return torchvision.models.googlenet(num_classes=3, init_weights=False, **options).eval()


def test_googlenet_with_auxiliary_classifiers_computes_what_torchvision_computes_with_its_weights(
    tmp_path, caplog
):
    caplog.set_level(logging.INFO)
    theirs, ours = googlenet(0, transform_input=True), googlenet(1, aux_logits=False)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    for wanted in (None, True, False):
        load_weights(ours, tmp_path / "w.pth", CLASSES, transform_input=wanted)
        assert transforms_input(ours) is (wanted is not False)
        theirs.transform_input = wanted is not False
        with torch.inference_mode():
            assert torch.equal(ours(x), theirs(x))
    rule = "without its auxiliary classifiers; inputs are transformed as for torchvision's own weights; model.transform"
    assert rule in caplog.messages[0]
    path = tmp_path / "ours.safetensors"
    for recorded in (
        "true",
        "false",
    ):  # our own files have no auxiliary classifiers, and record what they need
        safetensors.torch.save_file(ours.state_dict(), path, {"transform_input": recorded})
        load_weights(ours, path)
        assert transforms_input(ours) is (recorded == "true")


def test_transform_input_of_a_network_that_has_none_is_refused():
    with pytest.raises(
        ConfigError, match=r"^model\.transform_input \(true\) is not an option of resnet18; leave"
    ):
        build_model(TorchvisionConfig(name="resnet18", transform_input=True), 3, 64, seed=0)


@pytest.fixture
def small_vit(monkeypatch):
    """torchvision's vit_b_32 has one narrow layer."""
    build = vision_transformer._vision_transformer
    small = {"num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 16}
    monkeypatch.setattr(
        vision_transformer, "_vision_transformer", lambda **given: build(**(given | small))
    )


def test_a_vit_of_torchvision_takes_any_size_and_its_positions_are_interpolated(
    small_vit, tmp_path, caplog
):
    name, file = "encoder.pos_embedding", tmp_path / "w.pth"
    state = build_model(TorchvisionConfig(name="vit_b_32"), 3, 224, 1).state_dict()
    assert state[name].shape == (1, 50, 16)
    torch.save(state, file)
    cfg = TorchvisionConfig(name="vit_b_32", weights=str(file))
    assert same(state, build_model(cfg, 3, 224, 0).state_dict())
    with caplog.at_level(logging.INFO):
        found = build_model(cfg, 3, 64, 0, CLASSES).state_dict()
    expected = vision_transformer.interpolate_embeddings(64, 32, dict(state))
    assert found[name].shape == (1, 5, 16)
    assert same(expected, found)
    assert f"({file}): positions ({name}) of 7 x 7 patches are interpolated to 2 x 2" in caplog.text
    with pytest.raises(ConfigError, match="1x50x16 there, 1x5x16 here"):  # as of another run
        load_checkpoint(build_model(TorchvisionConfig(name="vit_b_32"), 3, 64, 0), state, "x")


def test_positions_that_are_no_square_are_refused(small_vit, tmp_path):
    state = build_model(TorchvisionConfig(name="vit_b_32"), 3, 64, 1).state_dict()
    state["encoder.pos_embedding"] = torch.zeros(1, 8, 16)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match="1x8x16 there, 1x5x16 here"):
        build_model(TorchvisionConfig(name="vit_b_32", weights=str(tmp_path / "w.pth")), 3, 64, 0)
