"""Networks of tests that train as a user does: a step needs a fifth of the CPU time of alexnet_small's."""

import time

from torch import Tensor, nn

from alexnet_ddp import register_model

QUICK = ["plugins=[tests.network]", "model=plugin", "model.name=quick"]
WAITING = ["plugins=[tests.network]", "model=plugin", "model.name=waiting"]
STEP_S = 0.04


@register_model("quick")
class Quick(nn.Module):
    """0.6 million parameters, for images of 32 to 96 pixels."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 7, stride=4),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(3),
            nn.Flatten(),
        )
        self.classifier = nn.Sequential(
            nn.Linear(576, 1024), nn.ReLU(), nn.Dropout(0.2), nn.Linear(1024, num_classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))


@register_model("waiting")
class Waiting(Quick):
    """A step waits, because a drill needs time to hit a run."""

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            time.sleep(STEP_S)
        return super().forward(images)
