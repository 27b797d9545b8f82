"""Blocks of networks, and the learning rates by block."""

import pytest
import torch
import torchvision
from torch import nn

from alexnet_ddp.config import OptimizerConfig, SGDConfig
from alexnet_ddp.config.plugins import TorchOptimizerConfig
from alexnet_ddp.config.recipe import LARSConfig
from alexnet_ddp.model.blocks import backbone_blocks, lr_factors
from alexnet_ddp.training.optim import build_optimizer, set_lr

# The number of blocks, and a parameter of the first, of the second and of the last one.
EXPECTED = {
    "alexnet": (7, "features.0.bias", "features.3.weight", "classifier.4.weight"),
    "vgg11_bn": (10, "features.1.weight", "features.4.weight", "classifier.3.bias"),
    "resnet50": (17, "bn1.weight", "layer1.0.downsample.1.bias", "layer4.2.bn3.weight"),
    "efficientnet_b0": (18, "features.0.1.bias", "features.1.0.block.0.0.weight", "features.8.0.weight"),
    "vit_b_16": (13, "class_token", "encoder.layers.encoder_layer_0.ln_1.bias", "encoder.ln.weight"),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_the_blocks_of_a_network_are_those_that_the_documentation_lists(name):
    with torch.device("meta"):
        model = torchvision.models.get_model(name, num_classes=3)
    blocks = backbone_blocks(model)
    count, first, second, last = EXPECTED[name]
    assert len(blocks) == count
    assert (first in blocks[0], second in blocks[1], last in blocks[-1]) == (True, True, True)
    factors = lr_factors(model, 0.5, 0.5)
    names = [name for name, _ in model.named_parameters()]
    assert sorted(factors) == sorted(names)
    assert [factors[one] for one in names[-2:]] == [1, 1]  # the head
    assert (factors[last], factors[first]) == (0.25, 0.5 ** (count + 1))


def test_other_networks_have_each_parameter_in_one_block():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1, 3, 1, 1))
            self.norm = nn.BatchNorm2d(3)
            self.stages = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)])
            self.out = nn.Linear(4, 2)

    assert backbone_blocks(Own()) == [
        ["scale", "norm.weight", "norm.bias"],
        ["stages.0.weight", "stages.0.bias"],
        ["stages.1.weight", "stages.1.bias"],
    ]
    assert backbone_blocks(nn.Linear(4, 2)) == []


@pytest.mark.parametrize(
    "cfg",
    [
        SGDConfig(lr=1, bias_lr_factor=2),
        LARSConfig(lr=1, bias_lr_factor=2),
        TorchOptimizerConfig(name="RMSprop", lr=1, bias_lr_factor=2),
    ],
    ids=lambda cfg: type(cfg).__name__,
)
def test_each_parameter_has_the_rate_of_its_block(cfg: OptimizerConfig):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = build_optimizer(cfg, model, lr_factors=lr_factors(model, 0.5, 0.1))
    set_lr(optimizer, 0.4)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    expected = {"0": 0.5 * 0.1**2 * 0.4, "1": 0.5 * 0.1 * 0.4, "2": 0.4}
    for name, parameter in model.named_parameters():
        factor = 2 if name.endswith("bias") else 1
        assert rates[parameter] == pytest.approx(factor * expected[name[0]])


def test_an_update_of_sgd_is_proportional_to_the_factor():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = [p.detach().clone() for p in model.parameters()]
    factors = lr_factors(model, 0.5, 0.5)
    optimizer = build_optimizer(SGDConfig(lr=1, momentum=0), model, lr_factors=factors)
    set_lr(optimizer, 0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = [(old - p.detach()).mean().item() for old, p in zip(before, model.parameters())]
    assert moved == pytest.approx([0.025, 0.025, 0.1, 0.1], rel=1e-5)
