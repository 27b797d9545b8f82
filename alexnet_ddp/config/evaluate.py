"""Options of `alexnet-ddp evaluate`."""

from dataclasses import dataclass

from alexnet_ddp.config.option import option
from alexnet_ddp.config.run import Config
from alexnet_ddp.runtime.errors import ConfigError


@dataclass(kw_only=True)
class EvaluateConfig(Config):
    """A run or a file of weights, and what is computed besides its accuracy."""

    calibrate: bool = option(
        False,
        "Fit a temperature to the validation images and write it to calibration.json in the run's "
        "directory. predict then divides the logits by it.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.calibrate and self.model.weights is not None:
            rule = "is stored with a run, and model.weights is a file"
            raise ConfigError(f"calibrate=true {rule}; give run.name in place of model.weights")
