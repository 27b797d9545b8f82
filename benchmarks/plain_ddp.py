"""The peer of benchmarks/communication.py: AlexNet under DDP, as in PyTorch's tutorial.

https://docs.pytorch.org/tutorials/intermediate/ddp_tutorial.html, with torchvision's network and
SGD. Nothing is tuned: random tensors in memory, default buckets, optimizer and memory allocator.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torchvision
from torch import nn, optim
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel as DDP

Given = Callable[
    [int], tuple[torch.Tensor, torch.Tensor]
]  # step -> images [n, 3, size, size], labels [n]


def train(more: Callable[[], bool], batch: int, size: int, hook: str | None = None) -> None:
    """Take a step whenever more() returns True, until it returns False."""
    model = build()
    images, labels = torch.randn(batch, 3, size, size), torch.randint(1000, (batch,))
    steps(more, model, lambda step: (images, labels), hook)


def build(dropout: float = 0.5) -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.alexnet(dropout=dropout)


def steps(
    more: Callable[[], bool], model: nn.Module, given: Given, hook: str | None = None
) -> None:
    dist.init_process_group("gloo")
    # One bucket for PowerSGD: its callbacks start more all-reduces. With several buckets the ranks
    # start them in different orders, and gloo, which matches them by order, ends the process.
    ddp_model = DDP(model, bucket_cap_mb=1000) if hook == "PowerSGD" else DDP(model)
    if hook == "fp16":
        ddp_model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    if hook == "PowerSGD":  # rank 1, from the third step, the earliest possible
        state = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=1, start_powerSGD_iter=2
        )
        ddp_model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    loss_fn = nn.CrossEntropyLoss()
    optimizer = optim.SGD(ddp_model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    step = 0
    while more():
        images, labels = given(step)
        optimizer.zero_grad()
        outputs = ddp_model(images)
        loss_fn(outputs, labels).backward()
        optimizer.step()
        step += 1
    dist.destroy_process_group()
