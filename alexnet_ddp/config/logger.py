"""Options of the outputs of a run: Weights & Biases, TensorBoard, console and report."""

from dataclasses import dataclass
from enum import StrEnum

from alexnet_ddp.config.option import Options, option
from alexnet_ddp.runtime.errors import ConfigError


class Wandb(StrEnum):
    disabled = "disabled"
    offline = "offline"
    online = "online"


class Artifacts(StrEnum):
    """Which checkpoints are uploaded to Weights & Biases."""

    none = "none"
    best = "best"
    all = "all"


@dataclass(kw_only=True)
class LoggerConfig(Options, section="logger", may_change=True):
    """Outputs besides metrics.jsonl and plain lines, which are always written."""

    wandb: Wandb | None = option(
        None,
        "Weights & Biases. The variable WANDB_MODE can only lower it: online, offline, disabled.",
        null="online if `wandb agent` started the run, else disabled",
    )
    wandb_project: str | None = option(
        None, "Project in Weights & Biases.", null="WANDB_PROJECT, or alexnet_ddp"
    )
    wandb_entity: str | None = option(
        None, "User or team that owns the project.", null="WANDB_ENTITY, or the default of the key"
    )
    wandb_group: str | None = option(
        None, "Group of runs that this run belongs to.", null="WANDB_RUN_GROUP, or none"
    )
    wandb_job_type: str | None = option(
        None, "Type of the run within its group.", null="WANDB_JOB_TYPE, or none"
    )
    wandb_tags: list[str] | None = option(
        None, "Tags of the run, such as [baseline,v2].", null="WANDB_TAGS, or none"
    )
    wandb_notes: str | None = option(None, "Description of the run.", null="WANDB_NOTES, or none")
    wandb_id: str | None = option(
        None,
        "Id of the run in Weights & Biases. All starts of a run have the same.",
        null="WANDB_RUN_ID, or the id of the run's earlier starts, or a new one",
    )
    wandb_artifacts: Artifacts = option(
        Artifacts.none,
        "Checkpoints to upload as artifacts. best: each one that is the best so far; all: each "
        "one.",
    )
    tensorboard: bool = option(True, "Write TensorBoard event files.")
    histograms_every_steps: int | None = option(
        None,
        "Interval of histograms of the trained parameters and their gradients in TensorBoard.",
        unit="steps",
        null="none",
        minimum=1,
    )
    progress: bool = option(True, "Show a progress bar if the output is a terminal.")
    report: bool = option(
        False,
        "Write report.html into the run's directory when the run is complete, as "
        "`alexnet-ddp report` does. A report that fails is one warning.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.histograms_every_steps is not None and not self.tensorboard:
            rule = "would be ignored with logger.tensorboard=false"
            value = f"logger.histograms_every_steps ({self.histograms_every_steps})"
            raise ConfigError(f"{value} {rule}; leave one of them out")
