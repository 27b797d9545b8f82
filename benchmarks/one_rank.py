"""One rank of one variant of benchmarks/communication.py: a process that takes steps on request.

    python benchmarks/one_rank.py '{"kind": "plain", "batch": 32, "size": 64}'

RANK, MASTER_ADDR and so on must be set. Each line on stdin is a number of steps to take. Each line
on stdout is the result: seconds, and the bytes that this host's interface sent and received.
In between the process sleeps in read(), so that variants can take turns on one core. It ends at the
end of stdin.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

INTERFACE = os.environ["GLOO_SOCKET_IFNAME"]


class Requests:
    """Reads requests and writes results. Call more() before every step."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # libraries print to stderr, not into the results
        self._left, self._began = 0, None

    def more(self) -> bool:
        """Wait for the next request if all steps are done. Returns False at the end of stdin."""
        if self._left == 0:
            print(json.dumps(self._answer()), file=self._answers, flush=True)
            line = sys.stdin.readline()
            if not line:
                return False
            self._left, self._before, self._began = int(line), traffic(), time.perf_counter()
        self._left -= 1
        return True

    def _answer(self) -> dict[str, float]:
        if self._began is None:
            return {"ready": True}
        seconds = time.perf_counter() - self._began
        sent, received = (after - before for after, before in zip(traffic(), self._before))
        return {"seconds": seconds, "sent": sent, "received": received}


def traffic() -> tuple[int, int]:
    """Bytes that this host's interface has (sent, received).

    Read from /proc, because a /sys that was mounted in another namespace shows other interfaces.
    """
    with open("/proc/net/dev") as file:
        (counters,) = (
            line.split(":")[1].split() for line in file if line.split(":")[0].strip() == INTERFACE
        )
    return int(counters[8]), int(counters[0])


def ours(more: Callable[[], bool], request: dict) -> None:
    """Take steps with the trainer's own step, loader and vote."""
    from alexnet_ddp import cli
    from alexnet_ddp.runtime import distributed
    from alexnet_ddp.training.parts import TrainingParts
    from alexnet_ddp.training.setup import RunSetup
    from alexnet_ddp.training.vote import StepVote

    overrides = [
        "data=synthetic",
        "data.num_train=1000000",
        f"data.image_size={request['size']}",
        "augment=none",
    ]
    overrides += [
        "model=alexnet",
        "optimizer=sgd",
        "optimizer.lr=0.01",
        "optimizer.momentum=0.9",
        "scheduler=constant",
    ]
    overrides += [
        "optimizer.weight_decay=1e-4",
        "trainer.label_smoothing=0",
        "trainer.clip_grad_norm=null",
    ]
    overrides += [
        f"trainer.global_batch_size={request['batch'] * int(os.environ['WORLD_SIZE'])}",
        *request["overrides"],
    ]
    with tempfile.TemporaryDirectory() as root:
        cfg = cli.compose([*overrides, f"run.root={root}"])
        with distributed.session(cfg.device) as world:
            setup = RunSetup(cfg, world)
            training = TrainingParts(setup)
            batches = training.batches(setup.state.step)
            if request.get("record"):
                keep(training, Path(request["record"]), "start")
                batches = recorded(batches, Path(request["record"]), world.rank)
            state = setup.state
            while more():
                num_images = len(setup.sampler.batch(state.step))
                lr = setup.lr(state.step)
                training.train_step(batches, state.step, lr, num_images, StepVote())
                state.step += 1
            if request.get("record"):
                keep(training, Path(request["record"]), "ours")
            training.close()


def keep(training: object, folder: Path, name: str) -> None:
    """Collective. Rank 0 saves the full parameters to `folder`, by torchvision's names."""
    tensors = training.state_dict()["model"]
    full = {
        key: t if isinstance(t, torch.Tensor) else t.full_tensor() for key, t in tensors.items()
    }
    if os.environ["RANK"] == "0":
        torch.save(full, folder / f"{name}.pt")


def recorded(batches: Iterator, folder: Path, rank: int) -> Iterator:
    """Yield the same batches, and save the network's inputs to `folder` for plain DDP."""
    from alexnet_ddp.data.effects import apply_effects

    for step, batch in enumerate(batches):
        torch.save(
            (apply_effects(batch.images, batch.effects), batch.labels), folder / f"{step}-{rank}.pt"
        )
        yield batch


def replayed(more: Callable[[], bool], folder: Path) -> None:
    """Plain DDP on our recorded weights and images, without dropout: torch's masks differ."""
    import plain_ddp

    model, rank = plain_ddp.build(dropout=0.0), os.environ["RANK"]
    model.load_state_dict(torch.load(folder / "start.pt", weights_only=True))
    plain_ddp.steps(
        more, model, lambda step: torch.load(folder / f"{step}-{rank}.pt", weights_only=True)
    )
    if rank == "0":
        torch.save(model.state_dict(), folder / "plain.pt")


def compute(more: Callable[[], bool], batch: int, size: int) -> None:
    """Forward and backward passes without communication."""
    import plain_ddp

    model, loss_fn = plain_ddp.build(), torch.nn.CrossEntropyLoss()
    images, labels = torch.randn(batch, 3, size, size), torch.randint(1000, (batch,))
    while more():
        model.zero_grad()
        loss_fn(model(images), labels).backward()


def link(more: Callable[[], bool], megabytes: int) -> None:
    """Broadcasts only, to measure the rate that gloo reaches on the link."""
    dist.init_process_group("gloo")
    data = torch.zeros(megabytes * 1_000_000, dtype=torch.uint8)
    while more():
        dist.broadcast(data, src=0)
        dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    # One core per rank, even if the host has more.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    request, more = json.loads(sys.argv[1]), Requests().more
    match request["kind"]:
        case "plain":
            import plain_ddp

            plain_ddp.train(more, request["batch"], request["size"], request.get("hook"))
        case "replayed":
            replayed(more, Path(request["record"]))
        case "lightning":
            import lightning_ddp

            lightning_ddp.train(more, request["batch"], request["size"])
        case "ours":
            ours(more, request)
        case "compute":
            compute(more, request["batch"], request["size"])
        case "link":
            link(more, request["megabytes"])


if __name__ == "__main__":
    main()
