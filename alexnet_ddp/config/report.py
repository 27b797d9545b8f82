"""Options of `alexnet-ddp report`."""

from dataclasses import dataclass

from alexnet_ddp.config.option import option
from alexnet_ddp.config.run import Config
from alexnet_ddp.runtime.errors import ConfigError

_MAX_COMPARED = 5


@dataclass(kw_only=True)
class ReportConfig(Config):
    """A run, and the runs to compare it with."""

    compare: list[str] = option(
        [],
        "Up to five other runs whose curves and options are shown too: names below run.root, or "
        "directories.",
    )
    max_images: int = option(
        5000,
        "Validation images to look at with the best weights, a fixed choice. 0: the report has no "
        "images, no classes and no filters, and reads no data.",
        unit="images",
        minimum=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.compare) > _MAX_COMPARED:
            rule = f"names {len(self.compare)} runs; the page has colours for {_MAX_COMPARED}"
            raise ConfigError(f"compare {rule}: leave some out")
        if self.model.weights is not None:
            rule = "is refused: the report takes the weights of run.name"
            raise ConfigError(f"model.weights ({self.model.weights}) {rule}; leave it out")
