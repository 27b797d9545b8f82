"""The networks, their masks and their weights: names and shapes are torchvision's, randomness is nobody's but ours."""

import logging
import math
import os
import pickle
import re
from itertools import pairwise
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from alexnet_ddp.config import (
    AlexNet2012Config,
    AlexNetBNConfig,
    AlexNetConfig,
    AlexNetSmallConfig,
    ConfigError,
    ModelConfig,
    TorchvisionConfig,
)
from alexnet_ddp.model import (
    KeyedDropout,
    build_model,
    check_image_size,
    load_weights,
    set_dropout_keys,
)


def build(
    cfg: ModelConfig, num_classes: int = 10, image_size: int = 224, seed: int = 0
) -> nn.Module:
    return build_model(cfg, num_classes, image_size, seed)


@pytest.fixture(scope="module")
def small() -> nn.Module:
    """alexnet_small for 10 classes of 64 pixels. Tests leave its weights alone."""
    return build(AlexNetSmallConfig(), image_size=64)


@pytest.fixture(scope="module")
def model_2012() -> nn.Module:
    return build(AlexNet2012Config(), num_classes=1000)


@pytest.fixture(scope="module")
def model_bn() -> nn.Module:
    return build(AlexNetBNConfig(), num_classes=1000)


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def layers(model: nn.Module, *kinds: type) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, kinds)]


def images(n: int, size: int) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(5))


# --- the family -------------------------------------------------------------------------------------------------


def test_alexnet_has_the_names_shapes_and_parameter_count_of_torchvision():
    def shapes(model: nn.Module) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in model.state_dict().items()}

    model = build(AlexNetConfig(), num_classes=1000)
    with torch.device("meta"):
        theirs = torchvision.models.alexnet()
    assert shapes(model) == shapes(theirs)
    assert list(model.state_dict()) == list(theirs.state_dict())
    assert num_parameters(model) == 61_100_840


def test_alexnet_computes_what_torchvision_computes_from_the_same_weights():
    model = build(AlexNetConfig(), num_classes=4, image_size=64).eval()
    theirs = torchvision.models.alexnet(num_classes=4).eval()
    theirs.load_state_dict(model.state_dict())
    x = images(2, 64)
    with torch.inference_mode():
        assert torch.equal(model(x), theirs(x))
    assert len({m.layer for m in layers(model, KeyedDropout)}) == 2  # each use has its own masks


def test_alexnet_2012_and_alexnet_bn_have_the_parameter_count_of_the_papers(model_2012, model_bn):
    assert num_parameters(model_2012) == 60_965_224
    assert num_parameters(model_bn) == 60_965_224


def test_alexnet_2012_starts_with_the_papers_initial_values(model_2012):
    weighted = layers(model_2012, nn.Conv2d, nn.Linear)
    assert [m.groups for m in layers(model_2012, nn.Conv2d)] == [1, 2, 1, 2, 2]
    assert [m.weight.shape[0] for m in weighted] == [96, 256, 384, 384, 256, 4096, 4096, 1000]
    biases = [sorted(set(m.bias.tolist())) for m in weighted]
    assert biases == [[0], [1], [0], [1], [1], [1], [1], [0]]  # conv2, conv4, conv5, fc6, fc7
    for m in weighted:
        assert m.weight.std().item() == pytest.approx(0.01, rel=0.03)
        assert abs(m.weight.mean().item()) < 5e-4


def test_alexnet_2012_normalises_across_channels_with_k_2_n_5_alpha_1e_4_beta_3_quarters(
    model_2012,
):
    norms = layers(model_2012, nn.LocalResponseNorm)
    assert len(norms) == 2
    x = 40 * images(1, 3).repeat(1, 4, 1, 1)[:, :9]
    expected = torch.empty_like(x)
    for i in range(9):
        energy = (x[:, max(0, i - 2) : i + 3] ** 2).sum(1)
        expected[:, i] = x[:, i] / (2 + 1e-4 * energy) ** 0.75
    assert (expected - x / 2**0.75).abs().max() > 0.1  # the constants matter on this tensor
    for norm in norms:
        torch.testing.assert_close(norm(x), expected)


def test_alexnet_2012_normalises_after_conv1_and_conv2_and_its_pools_overlap(model_2012):
    kinds = [type(m).__name__ for m in model_2012.features]
    assert kinds[:8] == ["Conv2d", "ReLU", "LocalResponseNorm", "MaxPool2d"] * 2
    assert {(p.kernel_size, p.stride) for p in layers(model_2012, nn.MaxPool2d)} == {(3, 2)}


def test_alexnet_bn_normalises_before_conv2_to_conv5_only_and_without_parameters(model_bn):
    norms = layers(model_bn, nn.BatchNorm2d)
    assert [n.num_features for n in norms] == [96, 256, 384, 384]
    assert all(not list(n.parameters()) for n in norms)
    before = [
        type(a).__name__
        for a, b in zip(model_bn.features, list(model_bn.features)[1:])
        if type(b) is nn.Conv2d
    ]
    assert before == ["BatchNorm2d"] * 4
    assert not layers(model_bn.classifier, nn.BatchNorm1d, nn.BatchNorm2d)


def test_alexnet_bn_may_normalise_after_pool5_too():
    features = build_model(AlexNetBNConfig(norm_after_pool5=True), 10, 224, seed=0).features
    assert [type(m).__name__ for m in features[-2:]] == ["MaxPool2d", "BatchNorm2d"]


def test_alexnet_small_has_the_widths_of_the_article(small):
    assert [m.out_channels for m in layers(small, nn.Conv2d)] == [64, 192, 384, 256]
    assert [m.out_features for m in layers(small, nn.Linear)] == [4096, 10]
    kinds = [type(m) for m in small.features if type(m) in (nn.Conv2d, nn.MaxPool2d)]
    conv, pool = nn.Conv2d, nn.MaxPool2d
    assert kinds == [conv, pool, conv, pool, conv, conv, pool]  # pools after 1, 2 and 4
    assert [m.p for m in layers(small, KeyedDropout)] == [0.5]


@pytest.mark.parametrize(("cfg", "size"), [(AlexNetSmallConfig(), 64), (AlexNetBNConfig(), 96)])
def test_the_loss_starts_near_the_logarithm_of_the_number_of_classes(cfg, size):
    model = build(cfg, num_classes=20, image_size=size)
    set_dropout_keys(model, 0, 0, torch.arange(24, dtype=torch.int32))
    smooth = F.interpolate(
        images(24, 5), size=size, mode="bilinear"
    )  # like a normalised photograph
    with torch.no_grad():
        loss = F.cross_entropy(model(smooth), torch.arange(24) % 20)
    assert loss.item() == pytest.approx(math.log(20), abs=0.15)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(small):
    again, other = (build(AlexNetSmallConfig(), image_size=64, seed=seed) for seed in (0, 1))
    own = small.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in again.state_dict().items())
    assert all(
        not torch.equal(t, own[n]) for n, t in other.state_dict().items() if n.endswith("weight")
    )


def test_building_a_model_does_not_change_the_global_generator():
    torch.manual_seed(123)
    before = torch.get_rng_state()
    build(TorchvisionConfig(name="squeezenet1_1"), seed=7)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("cfg", [AlexNetSmallConfig(), TorchvisionConfig(name="resnet18")])
def test_a_forward_and_backward_pass_draws_nothing_from_the_global_generator(cfg):
    model = build(cfg, image_size=64)
    set_dropout_keys(model, 0, 3, torch.arange(4, dtype=torch.int32))
    before = torch.get_rng_state()
    F.cross_entropy(model(images(4, 64)), torch.arange(4)).backward()
    assert torch.equal(torch.get_rng_state(), before)


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cfg", "size"),
    [
        (AlexNetSmallConfig(), 16),
        (AlexNetConfig(), 32),
        (TorchvisionConfig(name="vit_b_32", dropout=0.1), 100),
    ],
)
def test_an_image_size_that_the_network_cannot_take_is_refused_with_the_reason(cfg, size):
    with pytest.raises(
        ConfigError, match=rf"^data\.image_size \({size}\) does not suit this network: \S.*[^.]$"
    ) as e:
        build(cfg, image_size=size)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("cfg", "start"),
    [
        (AlexNetConfig(), 32),
        pytest.param(AlexNet2012Config(), 32, marks=pytest.mark.slow),
        pytest.param(TorchvisionConfig(name="vit_b_32", dropout=0.1), 192, marks=pytest.mark.slow),
    ],
)
def test_a_size_to_grow_from_that_the_network_cannot_take_is_refused(cfg, start):
    rule = rf"^data\.start_image_size \({start}\) does not suit this network: \S.*[^.]$"
    with pytest.raises(ConfigError, match=rule):
        check_image_size(build(cfg), 10, start, "data.start_image_size")


@pytest.mark.parametrize(
    "cfg",
    [
        AlexNetConfig(),
        *(
            pytest.param(cfg, marks=pytest.mark.slow)
            for cfg in (AlexNet2012Config(), AlexNetBNConfig())
        ),
    ],
)
def test_the_family_may_grow_from_64_pixels(cfg):
    check_image_size(build(cfg), 10, 64, "data.start_image_size")


def test_an_unknown_torchvision_name_is_refused_with_its_neighbours():
    with pytest.raises(
        ConfigError, match=r"^model\.name \(resnet19\) is no classifier of torchvision; near: "
    ) as e:
        build(TorchvisionConfig(name="resnet19"))
    assert "resnet18" in str(e.value)
    assert "alexnet" not in str(e.value)
    with pytest.raises(
        ConfigError, match=r"^model\.name \(zzz\) is no classifier of torchvision; near: alexnet, "
    ):
        build(TorchvisionConfig(name="zzz"))


def test_a_detector_is_no_classifier():
    with pytest.raises(ConfigError, match="is no classifier of torchvision"):
        build(TorchvisionConfig(name="fasterrcnn_resnet50_fpn"))


def test_dropout_for_a_network_that_has_none_is_refused():
    with pytest.raises(
        ConfigError, match=r"^model\.dropout is not an option of resnet18; leave it null$"
    ):
        build(TorchvisionConfig(name="resnet18", dropout=0.3))


# --- keyed dropout ----------------------------------------------------------------------------------------------


def mask(
    indices: list[int] | range,
    seed: int = 0,
    step: int = 0,
    layer: int = 1,
    p: float = 0.5,
    units: int = 256,
) -> Tensor:
    """bool [n, units]: what is kept."""
    dropout = KeyedDropout(p, layer)
    set_dropout_keys(dropout, seed, step, torch.tensor(list(indices), dtype=torch.int32))
    return dropout(torch.ones(len(indices), units)) != 0


def agreement(a: Tensor, b: Tensor) -> float:
    return (a == b).double().mean().item()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_the_share_p_of_the_units(p):
    kept = mask(range(512), p=p).double()
    sigma = math.sqrt(p * (1 - p) / kept.numel())
    assert abs(kept.mean().item() - (1 - p)) < 5 * sigma
    by_unit, by_image = kept.mean(0), kept.mean(1)
    assert (by_unit - (1 - p)).abs().max() < 6 * math.sqrt(p * (1 - p) / 512)
    assert (by_image - (1 - p)).abs().max() < 6 * math.sqrt(p * (1 - p) / 256)


def test_a_mask_is_the_same_for_every_split_and_order_of_the_batch():
    whole = mask(range(100, 123))
    for cuts in ([0, 23], [0, 1, 23], [0, 7, 8, 20, 23], list(range(24))):
        parts = [mask(range(100 + a, 100 + b)) for a, b in pairwise(cuts)]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(mask(range(122, 99, -1)), whole.flip(0))


def test_another_seed_step_image_or_layer_is_another_mask():
    one = mask(range(64))
    others = [
        mask(range(64), seed=1),
        mask(range(64), step=1),
        mask(range(1, 65)),
        mask(range(64), layer=2),
    ]
    assert torch.equal(mask(range(64)), one)
    for other in others:
        assert agreement(one, other) == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(one.numel()))


def test_dropout_scales_what_it_keeps_so_that_the_mean_stays():
    dropout = KeyedDropout(0.2, 1)
    set_dropout_keys(dropout, 0, 0, torch.arange(256, dtype=torch.int32))
    x = torch.ones(256, 16, 4, 4)
    y = dropout(x)
    assert set(y.unique().tolist()) == {0.0, 1.25}
    assert y.mean().item() == pytest.approx(1, abs=5 * 0.5 / math.sqrt(x.numel()))


def test_dropout_sends_gradients_only_through_what_it_keeps():
    dropout = KeyedDropout(0.5, 1)
    set_dropout_keys(dropout, 0, 0, torch.arange(4, dtype=torch.int32))
    x = torch.randn(4, 32, requires_grad=True)
    y = dropout(x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.where(y != 0, 2.0, 0.0))


def test_dropout_in_evaluation_and_with_p_0_is_the_identity():
    x = torch.randn(3, 5)
    assert KeyedDropout(0.5, 1).eval()(x) is x
    assert KeyedDropout(0.0, 1)(x) is x


def test_dropout_without_keys_names_the_missing_call():
    with pytest.raises(RuntimeError, match="set_dropout_keys"):
        KeyedDropout(0.5, 1)(torch.ones(1, 4))


def test_stochastic_depth_keeps_or_drops_whole_images_by_key():
    depth = KeyedDropout(0.5, 3, whole_image=True)
    set_dropout_keys(depth, 0, 0, torch.arange(400, dtype=torch.int32))
    y = depth(torch.ones(400, 2, 3, 3)).flatten(1)
    assert torch.equal(y, y[:, :1].expand_as(y))
    assert (y[:, 0] != 0).double().mean().item() == pytest.approx(0.5, abs=5 * 0.5 / 20)


def test_a_torchvision_network_gets_keyed_dropout_and_keyed_stochastic_depth():
    model = build(TorchvisionConfig(name="convnext_tiny"), image_size=64)
    names = {type(m).__name__ for m in model.modules()}
    assert not names & {"StochasticDepth", "Dropout"}
    keyed = layers(model, KeyedDropout)
    assert all(m.whole_image for m in keyed)
    assert len({m.layer for m in keyed}) == len(keyed) == 18
    assert keyed[0].p == 0
    assert keyed[-1].p == pytest.approx(0.1)


# --- weight files -----------------------------------------------------------------------------------------------


def net(classes: int = 4, hidden: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(3, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def save(model: nn.Module, path: Path) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_come_back_as_they_were_saved(tmp_path, suffix):
    source, target = net(), net()
    load_weights(target, save(source, tmp_path / f"w{suffix}"))
    assert all(torch.equal(t, target.state_dict()[n]) for n, t in source.state_dict().items())


def test_a_model_can_be_built_from_a_weight_file(tmp_path, small):
    path = save(small, tmp_path / "w.safetensors")
    built = build(AlexNetSmallConfig(weights=str(path)), image_size=64, seed=9)
    assert all(torch.equal(t, small.state_dict()[n]) for n, t in built.state_dict().items())


def test_another_number_of_classes_reinitialises_the_head_with_a_warning(tmp_path, caplog):
    source, target = net(classes=4), net(classes=7)
    head = target[2].weight.clone()
    with caplog.at_level(logging.WARNING):
        load_weights(target, save(source, tmp_path / "w.safetensors"))
    line = "model.weights: 4 classes in the file, 7 in the data: the head (2.weight, 2.bias) starts from its initialisation"
    assert caplog.messages == [line]
    assert torch.equal(target[0].weight, source[0].weight)
    assert torch.equal(target[2].weight, head)


def test_another_number_of_classes_is_refused_if_the_head_is_needed(tmp_path):
    with pytest.raises(ConfigError, match="does not fit the model"):
        load_weights(net(classes=7), save(net(classes=4), tmp_path / "w.safetensors"), head=None)


def test_weights_of_another_network_are_refused_with_counts_and_the_first_names(tmp_path):
    path = save(net(hidden=5), tmp_path / "w.safetensors")
    with pytest.raises(ConfigError) as e:
        load_weights(net(hidden=6), path)
    rule = "of 4 tensors 3 of another shape (0.weight: 5x3 there, 6x3 here, 0.bias: 5 there, 6 here, 2.weight: "
    assert f"model.weights ({path}) does not fit the model: {rule}" in str(e.value)
    path = save(torchvision.models.resnet18(num_classes=4), tmp_path / "v.pth")
    with pytest.raises(ConfigError) as e:
        load_weights(net(), path)
    first = "4 missing (0.weight, 0.bias, 2.weight, ...); 122 unknown (conv1.weight, bn1.weight, bn1.bias, ...)"
    assert f"of 4 tensors {first}; give the weights of this network" in str(e.value)
    assert "\n" not in str(e.value)


class Bomb:
    """A pickle that would make a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("container", ["zip", "pickle", "zip in a dict", "renamed"])
def test_a_malicious_pickle_is_refused_and_nothing_in_it_runs(tmp_path, container):
    path, mark = tmp_path / "w.pt", tmp_path / "it ran"
    if container == "pickle":
        path.write_bytes(pickle.dumps(Bomb(mark), protocol=2))
    elif container == "renamed":
        path = path.with_suffix(".safetensors")
        path.write_bytes(pickle.dumps(Bomb(mark), protocol=2))
    else:
        torch.save(
            {**net().state_dict(), "x": Bomb(mark)} if "dict" in container else Bomb(mark), path
        )
    with pytest.raises(ConfigError) as e:
        load_weights(net(), path)
    assert not mark.exists()
    assert re.search(
        r"\) is refused: it holds more than tensors.*; nothing in it was run; save ", str(e.value)
    ), e
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("text", ["junk\n", "hi\n"])
def test_a_text_file_instead_of_weights_is_refused(tmp_path, text):
    (tmp_path / "w.pth").write_text(text)
    with pytest.raises(ConfigError, match=r"\) (is refused|cannot be read): "):
        load_weights(net(), tmp_path / "w.pth")


def test_the_malicious_pickle_of_these_tests_really_would_run(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "it ran")))
    assert (tmp_path / "it ran").exists()


def test_a_missing_weight_file_is_named(tmp_path):
    path = tmp_path / "none.pth"
    line = f"model.weights ({path}) is not a file; give a .safetensors or a torch file of tensors by name, or runs/NAME"
    with pytest.raises(ConfigError) as e:
        load_weights(net(), path)
    assert str(e.value) == line


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("damage", ["empty", "cut", "text"])
def test_a_damaged_weight_file_is_refused_in_one_line(tmp_path, suffix, damage):
    path = save(net(), tmp_path / f"w{suffix}")
    data = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "cut": data[: len(data) // 2], "text": b"<html>not found</html>\n"}[damage]
    )
    with pytest.raises(ConfigError) as e:
        load_weights(net(), path)
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("content", [[torch.zeros(2)], {0: torch.zeros(2)}, {"epoch": 3}])
def test_a_torch_file_of_anything_but_tensors_by_name_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=r"holds no tensors by name; save model\.state_dict\(\)$"):
        load_weights(net(), tmp_path / "w.pt")
