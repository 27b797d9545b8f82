"""Compute a bad step again, in one process: did the images cause it, or the machine?

    python -m alexnet_ddp.replay runs/X/replay.json
    python -m alexnet_ddp.replay run.name=X [file=runs/X/replay.json]

The steps from the newest checkpoint before that step, or from the start, are computed again with
the slices that the ranks had. Nothing is written.
"""

if __name__ == "__main__":  # torch, below, is imported after the configuration is valid
    import sys

    from alexnet_ddp.runtime import startup

    startup.begin("replay")

    from alexnet_ddp import cli

    sys.argv[1:] = cli.with_record_options(sys.argv[1:])
    cli.run("replay", "alexnet_ddp.replay:main", cli.without_data_options)

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alexnet_ddp import cli
from alexnet_ddp.config import ConfigError, DDPConfig, Hook, OnNan, ReplayConfig
from alexnet_ddp.config.option import key_of
from alexnet_ddp.data.features import FeatureLoader
from alexnet_ddp.data.loader import Batch, Loader
from alexnet_ddp.data.sampler import GlobalBatchSampler, MicroBatch
from alexnet_ddp.model import set_dropout_keys
from alexnet_ddp.runtime import distributed
from alexnet_ddp.runtime.printing import say
from alexnet_ddp.training.parts import TrainingParts
from alexnet_ddp.training.precision import autocast
from alexnet_ddp.training.setup import RunSetup
from alexnet_ddp.training.step import TrainStep
from alexnet_ddp.training.vote import StepVote

_SHOWN = 5  # images


def main(options: ReplayConfig, overrides: list[str]) -> None:
    """Replay the step that options.file records, by default the run's own replay.json.

    Raises ConfigError if there is no such record or run, or if there are several processes.
    """
    record = read_record(Path(options.file or options.run_dir / "replay.json"))
    overrides = [one for one in overrides if key_of(one) != "file"]
    cfg = cli.config_of_run(options.run_dir, overrides)
    parallel = cfg.parallel
    cfg = replace(
        cfg, parallel=DDPConfig(), trainer=replace(cfg.trainer, on_nan=OnNan.skip)
    )  # a world of one
    exact = not isinstance(parallel, DDPConfig) or parallel.hook not in (
        Hook.powersgd,
        Hook.post_local_sgd,
    )
    with distributed.session(cfg.device, cfg.trainer.tf32) as world:
        if world.world_size > 1:
            raise ConfigError(
                f"replay takes one process, not {world.world_size}; start it without torchrun"
            )
        setup = RunSetup(cfg, world, up_to=record["step"] - 1)
        parts = TrainingParts(setup)
        loader, name = parts.train_loader, setup.data.train.name
        again = Replay(parts, setup.sampler, loader, setup.lr, name, exact)
        for line in again.lines(record, setup.state.step):
            say(line)
        parts.close()


def read_record(path: Path) -> dict[str, Any]:
    """The record in the file `path`. Raises ConfigError if it cannot be read."""
    try:
        record = json.loads(path.read_bytes())
        if record["step"] >= 1 and record["world_size"] >= 1:
            return record | {"loss": float(record["loss"]), "indices": list(record["indices"])}
        raise ValueError("step and world_size must be at least 1")
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = "give the replay.json of a run's directory"
        raise ConfigError(
            f"file={path} cannot be read ({type(error).__name__}: {error}); {remedy}"
        ) from error


@dataclass
class Replay:
    """A run in the state of an earlier step, in one process.

    name(i): the name of image i. exact: the run computed its updates in the same way.
    """

    parts: TrainingParts
    sampler: GlobalBatchSampler
    loader: Loader | FeatureLoader
    lr: Callable[[int], float]
    name: Callable[[int], str]
    exact: bool = True

    def lines(self, record: dict[str, Any], start: int) -> Iterator[str]:
        """Compute the steps from `start` to the recorded one; yield what was found in it."""
        step = record["step"] - 1
        works = self._works(range(start, step + 1), record["world_size"])
        batches = self.loader.batches(works)
        yield f"replay of step {step + 1} ({record['reason']}), from the state after step {start}"
        for k in range(start, step):
            self._train_step(batches, k, self.lr(k), len(self.sampler.batch(k)), StepVote())
            if self.parts.unfreeze_due(k + 1):
                self.parts.unfreeze()
        indices = self.sampler.batch(step).tolist()
        agree = indices == record["indices"]
        yield f"images: {len(indices)}, {'the recorded ones' if agree else 'NOT the recorded ones'}"
        losses, weight = self._losses(batches, step, len(indices))
        loss = sum(losses.values()) / weight if weight else math.nan
        yield f"loss {loss:.6g}, recorded {record['loss']:.6g}"
        norm, tensors = self._gradient()
        yield f"gradient norm {norm:.6g}" + (
            f", not finite in {', '.join(tensors[:_SHOWN])}" if tensors else ""
        )
        bad = [i for i, value in losses.items() if not math.isfinite(value)]
        worst = bad or sorted(losses, key=losses.__getitem__, reverse=True)
        what = "not finite" if bad else "largest losses"
        yield f"{what}: " + ", ".join(f"{self.name(i)} ({losses[i]:.4g})" for i in worst[:_SHOWN])
        if not self.exact:
            yield "parallel.hook is not replayed: the run had slightly different weights"
        elif (
            agree
            and math.isfinite(loss)
            and math.isfinite(norm)
            and "not finite" in record["reason"]
        ):
            yield (
                "all is finite here: not these images and weights, "
                "but the machine that ran the step is to blame"
            )

    def _works(self, steps: range, world_size: int) -> Iterator[MicroBatch]:
        """The forward passes of all ranks, one after the other.

        BatchNorm then normalises the same images together as in the run.
        """
        micro = self._train_step.cfg.micro_batch_size
        for step in steps:
            for rank in range(world_size):
                for work in self.sampler.micro_batches(
                    range(step, step + 1), rank, world_size, micro
                ):
                    yield replace(work, is_last=work.is_last and rank == world_size - 1)

    def _losses(
        self, batches: Iterator[Batch], step: int, num_images: int
    ) -> tuple[dict[int, float], float]:
        """Losses by image, and the sum of their weights; the mean gradient is left in .grad."""
        train_step, model = self._train_step, self._model
        losses: dict[int, float] = {}
        weights: list[Tensor] = []
        train_step.optimizer.zero_grad(set_to_none=True)
        for batch in batches:
            if len(batch.labels):
                set_dropout_keys(model, train_step.seed, step, batch.indices)
                with autocast(train_step.cfg.precision, train_step.world):
                    logits = model(batch.inputs()).float()
                found = train_step.loss(logits, batch, "none")
                if train_step.loss.is_weighted:
                    weights.append(train_step.loss.weight(batch))
                (train_step.objective(found.sum(), batch) / num_images).backward()
                losses |= dict(zip(batch.indices.tolist(), found.tolist()))
            if batch.micro_batch.is_last:
                break
        weight = torch.stack(weights).sum().item() if weights else len(losses)
        if weights:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, num_images / weight)
        return losses, weight

    def _gradient(self) -> tuple[float, list[str]]:
        """The norm of the gradient, and the parameters of which it is not finite."""
        gradients = {
            name: p.grad for name, p in self._model.named_parameters() if p.grad is not None
        }
        bad = [name for name, grad in gradients.items() if not torch.isfinite(grad).all()]
        return float(nn.utils.get_total_norm(list(gradients.values()))), bad

    @property
    def _train_step(self) -> TrainStep:
        return self.parts.train_step

    @property
    def _model(self) -> nn.Module:
        return self._train_step.parallel_model.model
