"""The interfaces through which the trainer uses a parallel model and its communication hook."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from alexnet_ddp.parallel.group import ShardedTensor


class CommHook(Protocol):
    """A DDP communication hook that has state or lets the replicas diverge for a while."""

    @property
    def gradients_differ(self) -> bool:
        """True if the ranks may have different gradients in the coming step."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Collective. The tensors that a checkpoint must contain, the same on all ranks."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what state_dict() returned. An empty dict resets the hook."""
        ...

    def set_step(self, step: int) -> None:
        """Continue at step `step` (0-based). All replicas must be equal."""
        ...

    def sync_replicas(
        self,
        step: int,
        required: bool,
        tensors: Callable[[], list[Tensor]],
        progress: Callable[[], None],
    ) -> bool:
        """Collective. After `step` steps: average `tensors` over the ranks, if due or required.

        tensors: returns the parameters and moments to average, in place. progress: called before
        each message. Returns True if the replicas are equal afterwards.
        """
        ...


class ParallelModel(Protocol):
    """A model that is trained by all ranks together. build_parallel() returns one."""

    hook: CommHook | None

    @property
    def model(self) -> nn.Module:
        """The network. Sharded layers contain this rank's shards only."""
        ...

    @property
    def is_split(self) -> bool:
        """True if layers are sharded. A forward pass then waits for other ranks."""
        ...

    @property
    def num_parameters(self) -> int:
        """The number of parameters of the full network."""
        ...

    def __call__(self, images: Tensor, max_images: int) -> Tensor:
        """Collective if layers are sharded. images [n, 3, size, size] -> logits [n, classes].

        max_images: the largest n of all ranks in this pass; all ranks pass the same number.
        """
        ...

    def on_wait(
        self,
        waiting: Callable[[], AbstractContextManager],
        exchange: Callable[[], AbstractContextManager],
    ) -> None:
        """Set two contexts.

        waiting: for the exchange of a forward pass in which fast ranks wait for slow ones.
        exchange: for all exchanges in which this rank computes nothing, except that of DDP's own
        backward pass and finish_backward().
        """
        ...

    def zero_loss(self, image: Tensor, max_images: int = 1) -> Tensor:
        """The loss of a rank that has no images in a pass: its gradient is zero.

        Batch statistics and modules' modes do not change. image: zeros, float [1, 3, size, size].
        """
        ...

    def warm_up_buckets(self, image: Tensor) -> nn.Parameter:
        """Collective. Run one backward pass without effect, before the first step of a process.

        Returns the parameter whose gradient came last.
        """
        ...

    def no_sync(self) -> AbstractContextManager[None]:
        """The context for all micro-batches of a step except the last: gradients stay local."""
        ...

    def finish_backward(self) -> None:
        """Collective. Wait until all gradients of a step's last backward pass are reduced."""
        ...

    def sync_found_inf(
        self, scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer
    ) -> None:
        """Collective. Call after unscale_(): all ranks skip the step if one found an infinity."""
        ...

    def global_norms(self, norms: Tensor, parameters: list[nn.Parameter]) -> Tensor:
        """Collective. Norms of local tensors, [..., n] -> norms of the full tensors, [..., n].

        The last dimension belongs to the n parameters (or to their gradients).
        """
        ...

    def sharded(self, tensors: dict[str, Tensor]) -> dict[str, Tensor | ShardedTensor]:
        """Mark the tensors that are shards. Keys: "name" or "moment/name" of a parameter."""
        ...

    def local(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Full tensors -> what this rank holds of them. The inverse of sharded(); same keys."""
        ...

    def full_model(self) -> nn.Module:
        """Collective. The network with full layers, for an evaluation. The rest is shared."""
        ...
