"""torchrun that loses no stop signal, and does not log a failure that the run itself explains.

TORCHRUN_LOG=1 enables torchrun's log.
"""

# Handle stop signals during the other imports, which take seconds; later Agent does.
if __name__ == "__main__":
    from alexnet_ddp.runtime import startup

    startup.make_streams_safe()
    startup.exit_on_stop(can_continue=True)
    startup.pause_garbage_collection()

import logging
import os
import signal
import sys
from typing import Any

from port import check_port  # beside this file
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher import api as launcher
from torch.distributed.run import main

# A bug (with a traceback), the codes of alexnet_ddp/runtime/errors.py, and a stop signal.
EXPLAINED = (1, *range(64, 94), 128 + signal.SIGINT, 128 + signal.SIGTERM)


class Agent(LocalElasticAgent):
    """torchrun's agent of one node, with another way to handle a stop signal.

    torchrun raises an exception at whatever line the signal interrupts. While a rank starts, the
    agent does not know that rank yet and leaves it running; in a finalizer, Python discards the
    exception. Here the handler sets a flag, and the agent raises the exception between two steps
    of its own.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._is_stopped = False

    def _rendezvous(self, worker_group: Any) -> None:
        """Wait for the other nodes. A stop signal ends this process at once: no rank runs."""
        startup.exit_on_stop_again()
        self._raise_if_stopped()
        super()._rendezvous(worker_group)

    def _start_workers(self, worker_group: Any) -> Any:
        startup.handle_stop_signals(self._on_signal)
        return super()._start_workers(worker_group)

    def _monitor_workers(self, worker_group: Any) -> Any:
        self._raise_if_stopped()
        return super()._monitor_workers(worker_group)

    def _exit_barrier(self) -> None:
        """Wait for the other nodes. A stop signal ends the wait: this node's ranks have ended."""
        startup.handle_stop_signals(self._raise_stop)
        self._raise_if_stopped()
        super()._exit_barrier()

    def _raise_if_stopped(self) -> None:
        if self._is_stopped:
            self._raise_stop()

    def _raise_stop(self, *signal_and_frame: object) -> None:
        raise SignalException("stopped", sigval=signal.SIGTERM)

    def _on_signal(self, number: int, frame: object) -> None:
        """Request a stop. Pass a further signal on: the ranks decide whether they exit at once."""
        if not self._is_stopped:
            self._is_stopped = True
        elif self._pcontext:
            for rank in self._pcontext.subprocess_handlers.values():
                if rank.proc.poll() is None:
                    rank.close(signal.SIGTERM)


startup.resume_garbage_collection()
startup.end_with_parent()
check_port(sys.argv[1:])
if not os.environ.get("TORCHRUN_LOG"):
    logging.disable(logging.ERROR)
launcher.LocalElasticAgent = Agent
try:
    main()
except SignalException:
    sys.exit(1)
except ChildFailedError as error:
    rank, failure = error.get_first_failure()
    if failure.exitcode not in EXPLAINED:  # for example killed, or out of memory
        print(f"torchrun: rank {rank} ended with code {failure.exitcode}", file=sys.stderr)
    sys.exit(1)
