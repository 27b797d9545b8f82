"""AdaLoRA's division of ranks among the layers, the same on all ranks and part of a checkpoint."""

from typing import Any

import torch
from torch import Tensor, nn

from alexnet_ddp.config import FinetuneConfig
from alexnet_ddp.model.adapters import ADAPTER, import_peft
from alexnet_ddp.runtime.distributed import World, from_main

# Shares of all epochs: the ranks are constant at first, and again in the end.
_FIRST, _LAST = 0.1, 0.4
_ALLOCATIONS = 100  # at most, in a run
_PENALTY = 0.5  # the weight of the penalty; peft's default


class RankAllocation:
    """Divides the total rank of the adapters of `model` (Zhang et al. 2023), by peft's allocator.

    An adapter is a sum of triplets: a singular value (lora_E), and a row of lora_A and a column of
    lora_B. Importances are computed from the gradients, which are those of the global batch on all
    ranks. Rank 0 decides which triplets remain and sends this to the other ranks; the singular
    values of the others are set to 0. The total rank falls from cfg.initial_rank to cfg.lora_rank
    for each layer, from 10 % to 60 % of the steps, at most 100 times. Then the triplets that
    remain are trained.

    num_steps: of all epochs.
    """

    def __init__(self, model: nn.Module, cfg: FinetuneConfig, num_steps: int, world: World) -> None:
        peft = import_peft(cfg.method)
        self._model, self._world = model, world
        self._config = peft.AdaLoraConfig(
            init_r=cfg.initial_rank,
            target_r=cfg.lora_rank,
            total_step=num_steps,
            tinit=round(_FIRST * num_steps),
            tfinal=round(_LAST * num_steps),
            deltaT=max(1, num_steps // _ALLOCATIONS),
        )
        from peft.tuners.adalora import RankAllocator

        self._allocator: Any = RankAllocator(model, self._config, ADAPTER)
        self._factors = (
            [p for name, p in model.named_parameters() if f".lora_A.{ADAPTER}" in name],
            [p for name, p in model.named_parameters() if f".lora_B.{ADAPTER}" in name],
        )
        self._remaining: dict[str, list[bool]] = {}  # name of lora_E -> its triplets
        self.load_state_dict({})

    def penalty(self) -> Tensor:
        """The penalty on factors that are not orthonormal, a scalar. Add it to the mean loss."""
        grams = [a @ a.T for a in self._factors[0]] + [b.T @ b for b in self._factors[1]]
        norms = [
            torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device))
            for gram in grams
        ]
        return _PENALTY * torch.stack(norms).mean()

    def update(self, step: int) -> None:
        """Collective if ranks are divided in this step. Call it after the optimizer's step `step`.

        The gradients must still be there, and finite. The steps are 0-based.
        """
        end = self._config.total_step - self._config.tfinal
        if step < end:
            self._allocator.update_ipt(self._model)
            budget, is_due = self._allocator.budget_schedule(step)
            if is_due:
                self._divide(budget)
        elif self._is_open():
            self._divide(self._allocator.target_bgt)
            self._allocator.reset_ipt()
        else:
            self._allocator.mask_using_rank_pattern(self._model, self._remaining)

    def state_dict(self) -> dict[str, Tensor]:
        """Return "remaining/NAME" (bool [rank]) and, until the last division, the importances."""
        rows = self._remaining.items()
        return {f"remaining/{name}": torch.tensor(row) for name, row in rows} | {
            f"{kind}/{name}": tensor
            for kind in ("exp_avg_ipt", "exp_avg_unc")
            for name, tensor in getattr(self._allocator, kind).items()
        }

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """The inverse of state_dict(). Without tensors, the ranks are those of a new run."""
        own = {n: p.detach() for n, p in self._model.named_parameters() if ".lora_" in n}
        self._allocator.reset_ipt()
        self._remaining = {n: [True] * len(p) for n, p in own.items() if ".lora_E." in n}
        if not state_dict:
            state_dict = {
                f"{kind}/{name}": torch.zeros_like(p)
                for kind in ("exp_avg_ipt", "exp_avg_unc")
                for name, p in own.items()
            }
        for entry, tensor in state_dict.items():
            kind, name = entry.split("/", 1)
            if kind == "remaining":
                self._remaining[name] = tensor.tolist()
            else:
                getattr(self._allocator, kind)[name] = tensor.to(own[name], copy=True)
                self._allocator.ipt[name] = torch.zeros_like(own[name])

    def _divide(self, total: int) -> None:
        """Collective. Choose the `total` triplets of all layers that remain."""
        self._remaining = from_main(
            lambda: self._allocator.mask_to_budget(self._model, total), self._world
        )
        self._allocator.mask_using_rank_pattern(self._model, self._remaining)

    def _is_open(self) -> bool:
        """True if the last division is still to be made, and there are importances for it."""
        return any(bool(tensor.any()) for tensor in self._allocator.exp_avg_unc.values())
