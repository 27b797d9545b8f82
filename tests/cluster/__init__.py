"""Several hosts on one machine, with links that can be cut and shaped, and a real Slurm on them where one is asked for.

    with Hosts(2, slurm=True) as hosts:
        hosts.run("ctl", "sbatch", "--wait", "job.sh")      # n1 and n2 compute, ctl is where one logs in
        hosts.link("n2", up=False)

Needs root, and Debian's packages iproute2, util-linux, slurmctld, slurmd, slurm-client, munge. All of it lives in
namespaces that end with this process, in whatever way it ends: hosts.sh.
"""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, Self

HERE = Path(__file__).parent
ON = str(HERE / "on.sh")
HOST_TOOLS = ("unshare", "nsenter", "taskset", "setpriv", "ip", "tc", "pgrep")
SLURM_TOOLS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue", "sinfo")
_ENV = {**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}


def why_not(slurm: bool = False) -> str | None:
    """Why there can be no hosts here, or None: the reason of a skipped test."""
    if os.geteuid() != 0:
        return "needs root, for namespaces"
    tools = HOST_TOOLS + (SLURM_TOOLS if slurm else ())
    missing = [tool for tool in tools if not shutil.which(tool, path=_ENV["PATH"])]
    if missing:
        return f"needs {', '.join(missing)}; apt-get install slurmctld slurmd slurm-client munge iproute2 util-linux"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, check=False
    )
    return f"no namespaces here: {tried.stderr.decode().strip()}" if tried.returncode else None


class Hosts:
    """A context: n1 .. nN and ctl, at 10.77.0.11 .. and 10.77.0.1 under these names."""

    def __init__(self, num_hosts: int, slurm: bool = False) -> None:
        flags = [
            "--net",
            "--uts",
            "--mount",
            "--pid",
            "--ipc",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ]
        self._command = [
            "unshare",
            *flags,
            str(HERE / "hosts.sh"),
            str(num_hosts),
            *(["slurm"] if slurm else []),
        ]

    def __enter__(self) -> Self:
        # In a session of its own: ctrl-C is for the test, which then leaves this context.
        pipes = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "start_new_session": True,
            "text": True,
        }
        self._process = subprocess.Popen(self._command, env=_ENV, **pipes)
        try:
            said = self._process.stdout.readline()
            assert said == "up\n", (
                f"the hosts did not come up (exit code {self._process.wait(10)}); why is above"
            )
            found = subprocess.run(
                ["pgrep", "-P", str(self._process.pid)], capture_output=True, check=True
            )
        except BaseException:
            self._end()
            raise
        self._pid = found.stdout.decode().strip()
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def command(self, host: str, *command: str) -> list[str]:
        """What runs `command` on `host`, in the folder that subprocess is told."""
        return ["nsenter", "--target", self._pid, "--all", "--wd=.", "--", ON, host, *command]

    def run(self, host: str, *command: str, **options: Any) -> str:
        """Its output. Raises CalledProcessError with what it said."""
        options = {
            "env": _ENV,
            "text": True,
            "stdout": subprocess.PIPE,
            "timeout": 60,
            "check": True,
        } | options
        return subprocess.run(
            self.command(host, *command), stdin=subprocess.DEVNULL, **options
        ).stdout.strip()

    def link(self, host: str, *, up: bool) -> None:
        """Cut a host off, or bring it back: what was on the way is lost."""
        self.run("ctl", "ip", "link", "set", host, "up" if up else "down")

    def rate(self, host: str, rate: str | None) -> None:
        """Both directions of a host's link, for example "100mbit"; None: as fast as it goes."""
        for where, device in ((host, "eth0"), ("ctl", host)):
            if rate is None:
                self.run(where, "tc", "qdisc", "del", "dev", device, "root")
            else:  # the burst must hold a whole packet of 64 KiB
                shape = f"root tbf rate {rate} burst 128kb latency 50ms".split()
                self.run(where, "tc", "qdisc", "replace", "dev", device, *shape)

    def crash(self, host: str) -> None:
        """The power is cut: all its processes end at once. It does not come back."""
        self.run("ctl", "bash", "-c", 'read -r pid _ <"/run/hosts/$0" && kill -KILL "$pid"', host)

    def _end(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()  # --kill-child: its child goes with it
            self._process.wait()
        self._process.stdout.close()


class Slurm(Hosts):
    """Two hosts with a Slurm of two nodes."""

    def __init__(self) -> None:
        super().__init__(2, slurm=True)

    def run(self, host: str, *command: str, **options: Any) -> str:
        env = {**options.pop("env", _ENV), "SLURM_CONF": "/run/slurm/slurm.conf"}
        return super().run(host, *command, env=env, **options)

    def reboot(self, host: str) -> None:
        """All that runs on it ends at once, and slurmd starts again."""
        self.run(host, "bash", "-c", "kill -KILL -1")  # all but its first process, and itself
        self.run(host, "slurmd", "-N", host)

    def sbatch(self, *arguments: str, env: dict[str, str], cwd: Path) -> str:
        """The job's id."""
        return self.run("ctl", "sbatch", "--parsable", *arguments, env=_ENV | env, cwd=cwd)

    def job(self, job_id: str) -> dict[str, str]:
        """What Slurm says of a job: JobState, Restarts, ExitCode, NodeList, ..."""
        said = self.run("ctl", "scontrol", "show", "job", "--oneliner", job_id)
        return dict(pair.split("=", 1) for pair in said.split() if "=" in pair)
