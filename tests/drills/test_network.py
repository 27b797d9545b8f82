"""D07, D08: two nodes, each in namespaces of its own, one launch/node.sh in each, and a link that goes away."""

import signal
import time
from collections.abc import Callable, Iterator

import pytest

from tests.cluster import Hosts, why_not
from tests.drills.harness import PROJECT, Job, assert_same_run

pytestmark = pytest.mark.drill

HANG_S = 8


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    reason = why_not()
    if reason:
        pytest.skip(
            reason
        )  # the real thing or nothing: links can only be cut in namespaces, which need root
    with Hosts(2) as hosts:
        yield hosts


@pytest.fixture
def two_nodes(hosts: Hosts, new_job: Callable[..., Job]) -> Callable[..., list[Job]]:
    """two_nodes("name", "1:2"): calm's training, one rank on each host; of each its node.sh.

    until(job): called before the second node starts.
    """

    def start(
        name: str,
        num_nodes: str,
        *overrides: str,
        last_call_s: int = 15,  # on a busy machine the second node starts seconds later
        until: Callable[[Job], object] = lambda job: None,
    ) -> list[Job]:
        env = {
            "NNODES": num_nodes,
            "RDZV_ENDPOINT": "n1:29500",
            "RDZV_ID": name,
            "LAST_CALL_S": str(last_call_s),
        }
        jobs = [
            new_job(
                name,
                f"trainer.hang_timeout_s={HANG_S}",
                *overrides,
                env=env | {"NODE_RANK": str(rank)},
            )
            for rank in (0, 1)
        ]
        for number, job in enumerate(jobs, 1):
            job.log = job.root / f"n{number}.log"
            if number == 2:
                until(jobs[0])
            job.start(launcher=hosts.command(f"n{number}", str(PROJECT / "launch/node.sh")))
        return jobs

    return start


def step_of_newest(job: Job) -> int:
    found = job.checkpoints()
    return int(found[-1].name.removeprefix("step-")) if found else 0


def test_d07_a_node_disappears_and_the_other_one_continues_alone(hosts, two_nodes, calm, measured):
    survivor, _ = two_nodes("lost", "1:2")
    survivor.until(lambda: step_of_newest(survivor) >= 10, what="the checkpoint of step 10")
    saved, began = step_of_newest(survivor), time.monotonic()
    hosts.link("n2", up=False)
    hosts.crash("n2")
    survivor.until(
        lambda: "exit code 76; starting again" in survivor.said(),
        90,
        "the end of the survivor's rank",
    )
    measured["stopped with 76 after, s"] = round(time.monotonic() - began, 1)
    reached = survivor.step()
    survivor.until(
        lambda: survivor.said().rpartition("starting again")[2].count("; step "),
        what="the next start",
    )
    measured["training alone after, s"] = round(time.monotonic() - began, 1)
    start = int(survivor.said().rpartition("; step ")[2].split()[0])
    measured["steps repeated"] = reached - start
    assert saved <= start <= reached
    assert survivor.wait() == 0, survivor.said()
    assert survivor.index_hashes() == calm.index_hashes()  # no image lost, none twice
    assert "world size 2 -> 1" in survivor.said()


@pytest.mark.parametrize("moment", ["start", "training"])
def test_d07_a_node_that_comes_later_takes_part(hosts, two_nodes, calm, moment):
    def wait(job: Job) -> None:
        if moment == "start":
            job.until(lambda: has_rank(job), what="a rank")
        else:
            job.until_step(4)

    first, second = two_nodes("later", "1:2", "trainer.epochs=100", last_call_s=1, until=wait)
    first.until(lambda: "= 2 cpu rank(s)" in first.said(), what="a start of both")
    first.until_step(first.step() + 3)
    first.hit(signal.SIGTERM, 0)  # its vote stops both
    assert (first.wait(), second.wait()) == (75, 75), first.said() + second.said()
    assert "starting again" not in first.said() + second.said()  # torchrun itself starts the ranks
    if moment == "training":
        assert "world size 1 -> 2" in first.said()
    hashes, known = first.index_hashes(), calm.index_hashes()
    assert sorted(hashes) == list(range(1, len(hashes) + 1))  # no step is lost, none is repeated
    same = {step: found for step, found in known.items() if step in hashes}
    assert {step: hashes[step] for step in same} == same


def has_rank(job: Job) -> bool:
    try:
        job.rank(0)
    except LookupError:
        return False
    return True


def test_d08_a_link_that_is_away_for_5_s_costs_5_s_and_no_restart(hosts, two_nodes, calm, measured):
    first, second = two_nodes("away", "2")
    first.until_step(12)
    began = time.monotonic()
    hosts.link("n2", up=False)
    time.sleep(0.5)
    stood_at = first.step()
    time.sleep(4.5)
    assert first.step() == stood_at
    hosts.link("n2", up=True)
    first.until_step(stood_at + 1)
    measured["stood still for, s"] = round(time.monotonic() - began, 1)
    assert (first.wait(), second.wait()) == (0, 0), first.said() + second.said()
    assert "starting again" not in first.said() + second.said()
    assert_same_run(first, calm)
