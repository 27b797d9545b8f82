"""Options of `alexnet-ddp evaluate`."""

from dataclasses import dataclass

from alexnet_ddp.config.option import check_suffix, option
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
    metrics: bool = option(
        False,
        "Also write precision, recall, F1, AUROC, average precision, Cohen's kappa, the "
        "calibration error and the confusions of classes to evaluation.json, and a table of the "
        "classes to evaluation_classes.csv. Needs: pip install 'alexnet-ddp[metrics]'.",
    )
    predictions: str | None = option(
        None,
        "A .csv or .parquet file with the label, the most probable classes and the loss of each "
        "validation image.",
        null="not written",
    )
    top_k: int = option(5, "Number of classes for each image in predictions.", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("calibrate", "metrics"):
            if getattr(self, name) and self.model.weights is not None:
                rule = "is stored with a run, and model.weights is a file"
                raise ConfigError(f"{name}=true {rule}; give run.name in place of model.weights")
        check_suffix("predictions", self.predictions, (".csv", ".parquet"))
        if self.predictions is None and self.top_k != self.default_of("top_k"):
            rule = "is the number of classes in the file of predictions, which is not written"
            raise ConfigError(f"top_k ({self.top_k}) {rule}; give predictions=FILE.csv too")
