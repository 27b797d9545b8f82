"""Who am I, who are the others, and how we agree: in real processes, and for a world of one."""

import os
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from alexnet_ddp.config import ConfigError, Device
from alexnet_ddp.runtime.distributed import (
    World,
    any_rank,
    average,
    broadcast,
    broadcast_tensors,
    choose_device,
    first_on_node,
    from_main,
    raise_together,
    session,
    sum_over_ranks,
)
from alexnet_ddp.runtime.errors import DataError, Diverged, PeerFailed, RunError
from tests.ranks import run_ranks

RANKS = 3


def caught(call) -> tuple[str, int, str, bool] | None:
    try:
        call()
    except RunError as error:
        return type(error).__name__, error.exit_code, str(error), error.only_here
    return None


def everything() -> dict:
    """What one rank sees of each collective."""
    found: dict = {}
    with session(Device.cpu) as world:
        r = world.rank
        found["world"] = (
            r,
            world.local_rank,
            world.world_size,
            world.local_world_size,
            world.is_main,
        )
        found["sum"] = sum_over_ranks(torch.tensor([r, 10 * r])).tolist()
        found["any"] = [any_rank(r == 2, world), any_rank(False, world)]
        found["broadcast"] = broadcast({"from": r})

        mine = (
            {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7, dtype=torch.int64)}
            if r == 0
            else {}
        )
        received = broadcast_tensors(mine, world)
        found["tensors"] = {n: (t.tolist(), str(t.dtype)) for n, t in received.items()}
        found["no tensors"] = broadcast_tensors({}, world)

        buffers = [torch.full((2, 2), float(r)), torch.tensor([3.0 * r, 1.0])]
        average(buffers, world)
        found["average"] = [b.tolist() for b in buffers]

        found["no error"] = caught(lambda: raise_together(None, world))
        own = {1: DataError("bad image on 1"), 2: Diverged("loss on 2")}.get(r)
        found["error"] = caught(lambda: raise_together(own, world))
        found["from main"] = from_main(lambda: {"pid": os.getpid()}, world)["pid"] == broadcast(
            os.getpid()
        )

        def fail() -> None:
            raise ConfigError("rank 0 says no")

        found["main fails"] = caught(lambda: from_main(fail, world))

        def build() -> tuple[float, float]:
            began = time.monotonic()
            time.sleep(0.05)
            return began, time.monotonic()

        found["one node"] = first_on_node(build, world)
        # Two nodes: ranks 0 and 1 here, rank 2 there.
        there = replace(world, local_rank=(0, 1, 0)[r], local_world_size=(2, 2, 1)[r])
        found["two nodes"] = first_on_node(build, there)
        found["node fails"] = caught(lambda: first_on_node(fail if r == 1 else build, world))
        found["still in step"] = sum_over_ranks(torch.ones(1)).item()
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    return run_ranks(everything, RANKS)


def on_all(ranks: list[dict], what: str) -> list:
    return [rank[what] for rank in ranks]


def test_each_rank_has_its_ranks_and_sizes(ranks):
    assert on_all(ranks, "world") == [(0, 0, 3, 3, True), (1, 1, 3, 3, False), (2, 2, 3, 3, False)]


def test_sums_and_flags_are_equal_on_all_ranks(ranks):
    assert on_all(ranks, "sum") == [[3, 30]] * RANKS
    assert on_all(ranks, "any") == [[True, False]] * RANKS


def test_rank_0s_values_and_tensors_reach_all_with_their_types(ranks):
    assert on_all(ranks, "broadcast") == [{"from": 0}] * RANKS
    tensors = {"a": ([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], "torch.float32"), "b": (7, "torch.int64")}
    assert on_all(ranks, "tensors") == [tensors] * RANKS
    assert on_all(ranks, "no tensors") == [{}] * RANKS


def test_average_is_the_mean_over_the_ranks_in_place(ranks):
    assert on_all(ranks, "average") == [[[[1.0, 1.0], [1.0, 1.0]], [3.0, 1.0]]] * RANKS


def test_no_error_on_any_rank_raises_nothing(ranks):
    assert on_all(ranks, "no error") == [None] * RANKS


def test_the_lowest_failing_rank_raises_its_own_error_and_the_others_its_code_and_reason(ranks):
    assert on_all(ranks, "error") == [
        ("PeerFailed", DataError.exit_code, "bad image on 1", False),
        ("DataError", DataError.exit_code, "bad image on 1", True),
        ("PeerFailed", DataError.exit_code, "bad image on 1", False),
    ]


def test_all_ranks_get_what_rank_0_builds_or_raises(ranks):
    assert on_all(ranks, "from main") == [True] * RANKS
    assert on_all(ranks, "main fails") == [
        ("ConfigError", 64, "rank 0 says no", True),
        ("PeerFailed", 64, "rank 0 says no", False),
        ("PeerFailed", 64, "rank 0 says no", False),
    ]


def test_the_first_of_a_node_builds_before_its_others(ranks):
    (_, first_ended), *others = on_all(ranks, "one node")
    assert all(began >= first_ended for began, _ in others)


def test_the_first_of_every_node_builds_before_any_other_rank(ranks):
    (_, ended_0), (began_1, _), (_, ended_2) = on_all(ranks, "two nodes")
    assert began_1 >= max(ended_0, ended_2)


def test_an_error_of_a_later_rank_is_raised_on_all_ranks(ranks):
    assert [e[:3] for e in on_all(ranks, "node fails")] == [
        ("PeerFailed", 64, "rank 0 says no"),
        ("ConfigError", 64, "rank 0 says no"),
        ("PeerFailed", 64, "rank 0 says no"),
    ]
    assert on_all(ranks, "still in step") == [RANKS] * RANKS


# --- a world of one ---------------------------------------------------------------------------------------------


@pytest.fixture
def no_torchrun(monkeypatch):
    for name in (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    ):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_without_torchrun_a_process_is_a_world_of_one_in_which_every_collective_works(no_torchrun):
    with session(Device.cpu) as world:
        assert world == World(0, 0, 1, 1, torch.device("cpu"))
        assert world.num_cores == torch.get_num_threads() == len(os.sched_getaffinity(0))
        assert sum_over_ranks(torch.tensor(4)).item() == 4
        assert any_rank(True, world)
        assert broadcast("x") == "x"
        assert broadcast_tensors({"a": torch.ones(2)}, world)["a"].tolist() == [1, 1]
        assert from_main(lambda: 5, world) == first_on_node(lambda: 5, world) == 5
        tensor = torch.tensor([2.0])
        average([tensor], world)
        average([], world)
        assert tensor.item() == 2
        with pytest.raises(DataError, match=r"^mine$"):
            raise_together(DataError("mine"), world)
    assert not dist.is_initialized()


def test_a_broken_environment_is_named(no_torchrun, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    line = r"^WORLD_SIZE \('two'\) in the environment must be a number; start with torchrun$"
    with pytest.raises(ConfigError, match=line), session(Device.cpu):
        pass


def test_the_cores_of_a_node_are_shared_by_its_ranks():
    cores = len(os.sched_getaffinity(0))
    assert World(0, 0, 2, 2, torch.device("cpu")).num_cores == max(1, cores // 2)
    assert World(0, 0, 999, 999, torch.device("cpu")).num_cores == 1


def test_a_peers_failure_carries_its_code():
    assert PeerFailed(70, "why").exit_code == 70


# --- choice of device, with CUDA patched ------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch):
    """gpus(n): a machine with n GPUs."""

    def have(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return have


def test_auto_is_this_ranks_gpu_or_the_cpu_without_gpus(gpus):
    gpus(4)
    assert choose_device(Device.auto, 2) == torch.device("cuda", 2)
    assert choose_device(Device.cuda, 0) == torch.device("cuda", 0)
    gpus(0)
    assert choose_device(Device.auto, 2) == torch.device("cpu")


def test_cpu_is_the_cpu_also_on_a_machine_with_gpus(gpus):
    gpus(4)
    assert choose_device(Device.cpu, 0) == torch.device("cpu")


def test_cuda_without_a_gpu_is_refused(gpus):
    gpus(0)
    with pytest.raises(
        ConfigError, match=r"^device=cuda needs a GPU for local rank 0, found 0; use device=cpu$"
    ):
        choose_device(Device.cuda, 0)


@pytest.mark.parametrize("device", [Device.auto, Device.cuda])
def test_more_processes_than_gpus_are_refused(gpus, device):
    gpus(2)
    remedy = "start at most 2 processes on this node"
    with pytest.raises(
        ConfigError, match=rf"^device={device} needs a GPU for local rank 2, found 2; {remedy}$"
    ):
        choose_device(device, 2)
