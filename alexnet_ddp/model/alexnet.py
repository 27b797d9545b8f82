"""The AlexNet family, layer by layer, with its papers; torchvision's own AlexNet is used as is."""

import torch
import torchvision
from torch import Tensor, nn

from alexnet_ddp.config import (
    AlexNet2012Config,
    AlexNetBNConfig,
    AlexNetConfig,
    AlexNetSmallConfig,
)
from alexnet_ddp.model.builders import builds


class AlexNet(nn.Module):
    """features -> adaptive average pool -> classifier, as in torchvision's AlexNet.

    pool: height = width of the pooled features.
    """

    def __init__(self, features: nn.Sequential, pool: int, classifier: nn.Sequential) -> None:
        super().__init__()
        self.features, self.classifier = features, classifier
        self.avgpool = nn.AdaptiveAvgPool2d((pool, pool))

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images, float [n, 3, size, size], to logits [n, num_classes]."""
        return self.classifier(torch.flatten(self.avgpool(self.features(images)), 1))


def _conv(
    channels_in: int, channels_out: int, kernel: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    padding = 2 if kernel == 11 else kernel // 2
    return [
        nn.Conv2d(channels_in, channels_out, kernel, stride, padding, groups=groups),
        nn.ReLU(inplace=True),
    ]


def _pool() -> nn.Module:
    return nn.MaxPool2d(kernel_size=3, stride=2)


def _classifier(
    features: int, hidden: list[int], num_classes: int, dropout: float
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in zip([features, *hidden], hidden):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(inplace=True), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(hidden[-1], num_classes))


def alexnet_2012(num_classes: int, dropout: float) -> AlexNet:
    """AlexNet of Krizhevsky, Sutskever, Hinton 2012, with the paper's initialisation.

    It has two groups, local response normalisation and overlapping pools. 60,965,224 parameters for
    1,000 classes; images of 224 or 227 pixels give 6 x 6 features.
    """

    def norm() -> nn.Module:
        # torch divides alpha by size.
        return nn.LocalResponseNorm(size=5, alpha=1e-4 * 5, beta=0.75, k=2.0)

    features = nn.Sequential(
        *[*_conv(3, 96, 11, stride=4), norm(), _pool()],
        *[*_conv(96, 256, 5, groups=2), norm(), _pool()],
        *_conv(256, 384, 3),
        *_conv(384, 384, 3, groups=2),
        *[*_conv(384, 256, 3, groups=2), _pool()],
    )
    model = AlexNet(features, 6, _classifier(256 * 6 * 6, [4096, 4096], num_classes, dropout))
    _init_2012(model)
    return model


def _init_2012(model: AlexNet) -> None:
    """Section 5: weights N(0, 0.01); biases 1 in conv2, conv4, conv5 and fc6, fc7, otherwise 0."""
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    ones = {1, 3, 4, 5, 6}
    for k, layer in enumerate(layers):
        nn.init.normal_(layer.weight, std=0.01)
        assert layer.bias is not None
        nn.init.constant_(layer.bias, 1.0 if k in ones else 0.0)


def alexnet_bn(num_classes: int, dropout: float, norm_after_pool5: bool = False) -> AlexNet:
    """AlexNet-BN of You, Gitman, Ginsburg 2017.

    The widths and groups are those of 2012; BatchNorm without affine parameters precedes conv2 to
    conv5. norm_after_pool5: also before fc6, as in Jia 2018.
    """

    def norm(channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels, affine=False)

    features = nn.Sequential(
        *[*_conv(3, 96, 11, stride=4), _pool(), norm(96)],
        *[*_conv(96, 256, 5, groups=2), _pool(), norm(256)],
        *[*_conv(256, 384, 3), norm(384)],
        *[*_conv(384, 384, 3, groups=2), norm(384)],
        *[*_conv(384, 256, 3, groups=2), _pool()],
        *([norm(256)] if norm_after_pool5 else []),
    )
    model = AlexNet(features, 6, _classifier(256 * 6 * 6, [4096, 4096], num_classes, dropout))
    _init_he(model)
    return model


def alexnet_small(num_classes: int, dropout: float) -> AlexNet:
    """A small AlexNet for images of about 64 pixels; 6.1 M parameters for 10 classes.

    Convolutions 64-192-384-256 with pools after the first, second and fourth; fc 4096; fc classes.
    The first two convolutions have stride 2, so that 64 pixels give 2 x 2 features.
    """
    features = nn.Sequential(
        *[*_conv(3, 64, 5, stride=2), nn.MaxPool2d(2)],
        *[*_conv(64, 192, 5, stride=2), nn.MaxPool2d(2)],
        *_conv(192, 384, 3),
        *[*_conv(384, 256, 3), nn.MaxPool2d(2)],
    )
    model = AlexNet(features, 2, _classifier(256 * 2 * 2, [4096], num_classes, dropout))
    _init_he(model)
    return model


def _init_he(model: AlexNet) -> None:
    """He 2015: weights with variance 2 / fan_in, biases 0.

    torch's default variance is a sixth of that, which delays the start of learning.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    last = model.classifier[-1]
    assert isinstance(last, nn.Linear)
    nn.init.normal_(last.weight, std=0.001)  # the loss starts at ln(num_classes)


@builds(AlexNetConfig)
def _build(cfg: AlexNetConfig, num_classes: int, image_size: int) -> nn.Module:
    return torchvision.models.alexnet(num_classes=num_classes, dropout=cfg.dropout)


@builds(AlexNet2012Config)
def _build_2012(cfg: AlexNet2012Config, num_classes: int, image_size: int) -> nn.Module:
    return alexnet_2012(num_classes, cfg.dropout)


@builds(AlexNetBNConfig)
def _build_bn(cfg: AlexNetBNConfig, num_classes: int, image_size: int) -> nn.Module:
    return alexnet_bn(num_classes, cfg.dropout, cfg.norm_after_pool5)


@builds(AlexNetSmallConfig)
def _build_small(cfg: AlexNetSmallConfig, num_classes: int, image_size: int) -> nn.Module:
    return alexnet_small(num_classes, cfg.dropout)
