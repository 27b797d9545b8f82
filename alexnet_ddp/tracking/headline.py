"""The first line of a run: what is trained on what, and how the global batch is cut."""

from alexnet_ddp.config import Config, OptimizerConfig, Scaling
from alexnet_ddp.config.plugins import PluginOptimizerConfig, TorchOptimizerConfig
from alexnet_ddp.runtime.distributed import World


def headline(
    cfg: Config,
    world: World,
    parameters: int,
    counts: tuple[int, int, int],
    warmup_steps: int,
    progress: str,
) -> str:
    """parameters: their number. counts: training images, validation images, classes. progress: where the run stands."""
    trainer, (num_train, num_val, num_classes) = cfg.trainer, counts
    part = -(-trainer.global_batch_size // world.world_size)  # the largest slice of a rank
    micro = min(part, trainer.micro_batch_size or part)
    first, size = cfg.data.start_image_size, cfg.data.image_size
    decay = trainer.ema_decay
    weights = "" if decay is None else f"; evaluates averaged weights (trainer.ema_decay={decay})"
    growth = "" if first is None else f" growing from {first} to {size} pixels"
    return (
        f"{cfg.run.name}: {parameters:,} parameters, {num_train:,} + {num_val:,} images of {num_classes} classes"
        f"{growth}; global batch {trainer.global_batch_size} = {world.world_size} {world.device.type} rank(s) x "
        f"{-(-part // micro)} x {micro}; {recipe(cfg, warmup_steps)}{weights}; {progress}; {cfg.run_dir}"
    )


def recipe(cfg: Config, warmup_steps: int) -> str:
    """The length, the optimizer and the learning rate over time: they differ between the data choices."""
    optimizer, schedule = (
        type(part).__name__.removesuffix("Config") for part in (cfg.optimizer, cfg.scheduler)
    )
    if isinstance(cfg.optimizer, TorchOptimizerConfig | PluginOptimizerConfig):
        optimizer = cfg.optimizer.name
    rate = learning_rate(cfg.optimizer, cfg.trainer.global_batch_size)
    warmup = f" after {warmup_steps} steps of warm-up" if warmup_steps else ""
    return f"{cfg.trainer.epochs} epochs of {optimizer}, {rate}, {schedule}{warmup}"


def learning_rate(cfg: OptimizerConfig, global_batch_size: int) -> str:
    """The rate of the run, and how it was scaled if it was."""
    lr, base = f"lr {cfg.lr_at(global_batch_size):g}", cfg.base_batch_size
    match cfg.scaling:
        case Scaling.linear:
            return f"{lr} = {cfg.lr:g} x {global_batch_size} / {base}"
        case Scaling.sqrt:
            return f"{lr} = {cfg.lr:g} x sqrt({global_batch_size} / {base})"
    return lr
