"""Becomes the launch script of a trial: python -m alexnet_ddp.sweep.start_trial OPTIONS SCRIPT...

OPTIONS are the process id of the sweep, a lock file, and cores such as 0,1 ("" for all). If the
sweep ends, even if it is killed, the kernel stops the script, which saves the trial. The script
holds the lock until it ends; a continued sweep waits here for it.
"""

import os
import signal
import sys

from alexnet_ddp.runtime.files import lock_file
from alexnet_ddp.runtime.startup import end_with_parent


def main(sweep: str, lock: str, cores: str, *script: str) -> None:
    """Replace this process with `script`. Raises OSError if it cannot be started."""
    # Until the script's own handlers, a stop signal ends this process: nothing has begun.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    end_with_parent()
    if os.getppid() != int(sweep):
        return  # the sweep ended before that
    if cores:
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        lock_file(descriptor, wait=True)
    except OSError as error:  # a file system without locks; the run has its own lock and warning
        sys.stderr.write(f"warning: {lock} cannot be locked ({error.strerror})\n")
    os.set_inheritable(descriptor, True)
    os.execvp(script[0], script)


if __name__ == "__main__":
    main(*sys.argv[1:])
