"""A run that Slurm starts, by slurm/train.sbatch on the two nodes of tests/cluster."""

import time
from pathlib import Path

from tests.cluster import Slurm
from tests.drills.harness import PROJECT, Job

FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}


class Batch(Job):
    """A Job whose start() is an sbatch. As calm's it has two ranks, with half of the machine's cores each."""

    def __init__(
        self,
        slurm: Slurm,
        root: Path,
        name: str,
        *overrides: str,
        env: dict[str, str] | None = None,
    ):
        super().__init__(root, name, *overrides, "logger.wandb=offline", env=env)
        self.slurm = slurm
        self.env |= {"PROJECT_DIR": str(PROJECT), "WANDB_MODE": "offline"}
        self.env.pop("NPROC")
        self.id = ""

    def submit(
        self,
        *options: str,
        script: Path = PROJECT / "slurm/train.sbatch",
        arguments: list[str] | None = None,
    ) -> "Batch":
        """`options` are sbatch's; the script's arguments are the run's, which were given when the Batch was made."""
        run = arguments or [f"run.root={self.root}/runs", f"run.name={self.name}", *self.overrides]
        options = ("--nodes=2", "--cpus-per-task=1", f"--output={self.log}", *options)
        self.id = self.slurm.sbatch(*options, str(script), *run, env=self.env, cwd=self.root)
        return self

    def slurm_says(self) -> dict[str, str]:
        return self.slurm.job(self.id)

    def until_restart(self, number: int = 1, timeout_s: float = 120) -> float:
        """Until Slurm has taken the job back into its queue so many times."""
        return self.until(
            lambda: int(self.slurm_says()["Restarts"]) >= number, timeout_s, f"requeue {number}"
        )

    def requeued_with_more_time(self) -> None:
        """Call it when the run is saved, before Slurm starts it again: the next start must see the new limit."""

        def is_longer() -> bool:  # Slurm refuses a change while the job is ending
            more = ["update", f"JobId={self.id}", "TimeLimit=20"]
            self.slurm.run("ctl", "scontrol", *more, check=False)
            return self.slurm_says()["TimeLimit"] == "00:20:00"

        self.until(is_longer, what="the new time limit")
        self.slurm.rate("n1", None)
        self.until_restart()

    def until_saved(self, timeout_s: float = 120) -> float:
        """Seconds until the stopped run says that it is saved."""
        status = self.run_dir / "status.json"
        return self.until(
            lambda: status.exists() and self.status()["state"] == "preempted", timeout_s, "the save"
        )

    def slow_down(self) -> None:
        """The link of a node, and with it the exchange of gradients: a step takes more than 2 s."""
        self.slurm.rate("n1", "8mbit" if self.network else "150mbit")

    def outcome(self, timeout_s: float = 240) -> tuple[str, int]:
        """The final JobState, and how many times the job was requeued."""
        self.until(lambda: self.slurm_says()["JobState"] in FINAL, timeout_s, "the end of the job")
        said = self.slurm_says()
        return said["JobState"], int(said["Restarts"])

    def wandb_ids(self) -> set[str]:
        """Of all of wandb's runs that this run has made."""
        return {
            path.name.rsplit("-", 1)[1] for path in (self.run_dir / "wandb").glob("offline-run-*-*")
        }

    def end(self) -> None:
        for _ in range(3):  # a job may be on its way back into the queue
            if not self.id or self.slurm_says()["JobState"] in FINAL:
                break
            self.slurm.run("ctl", "scancel", "--signal=KILL", "--full", self.id, check=False)
            self.slurm.run("ctl", "scancel", self.id, check=False)
            time.sleep(0.2)
        super().end()
