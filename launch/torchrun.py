"""torchrun, quiet about an end that the run has explained in one line itself. TORCHRUN_LOG=1 brings its words back."""

if (
    __name__ == "__main__"
):  # before the other imports, which take seconds; it ends with torchrun's own handlers
    from alexnet_ddp.runtime import startup

    startup.make_streams_safe()
    startup.exit_on_stop(can_continue=True)

import logging
import os
import signal
import sys

from port import check_port  # beside this file
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

# The trace of a bug, alexnet_ddp/runtime/errors.py, and a command that a stop signal ended.
EXPLAINED = (1, *range(64, 94), 128 + signal.SIGINT, 128 + signal.SIGTERM)


def stop(number: int, frame: object) -> None:
    """SIGINT would make a worker print a trace if its Python has just started; SIGTERM does not."""
    os.kill(os.getpid(), signal.SIGTERM)


startup.end_with_parent()
signal.signal(signal.SIGINT, stop)
check_port(sys.argv[1:])
if not os.environ.get("TORCHRUN_LOG"):
    logging.disable(logging.ERROR)
try:
    main()
except SignalException:
    sys.exit(1)
except ChildFailedError as error:
    rank, failure = error.get_first_failure()
    if failure.exitcode not in EXPLAINED:  # killed, out of memory: it had no time to speak
        print(f"torchrun: rank {rank} ended with code {failure.exitcode}", file=sys.stderr)
    sys.exit(1)
