"""torchrun without its log of a failure that the run itself has explained in one line.

TORCHRUN_LOG=1 enables torchrun's log.
"""

# Handle stop signals during the other imports, which take seconds; later torchrun's handlers do.
if __name__ == "__main__":
    from alexnet_ddp.runtime import startup

    startup.make_streams_safe()
    startup.exit_on_stop(can_continue=True)
    startup.pause_garbage_collection()

import logging
import os
import signal
import sys

from port import check_port  # beside this file
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

# A bug (with a traceback), the codes of alexnet_ddp/runtime/errors.py, and a stop signal.
EXPLAINED = (1, *range(64, 94), 128 + signal.SIGINT, 128 + signal.SIGTERM)


def stop(number: int, frame: object) -> None:
    """Turn SIGINT into SIGTERM: a Python that has just started prints a traceback at SIGINT."""
    os.kill(os.getpid(), signal.SIGTERM)


startup.resume_garbage_collection()
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
    if failure.exitcode not in EXPLAINED:  # for example killed, or out of memory
        print(f"torchrun: rank {rank} ended with code {failure.exitcode}", file=sys.stderr)
    sys.exit(1)
