"""torchrun, quiet about an end that the run has explained in one line itself. TORCHRUN_LOG=1 brings its words back."""

import logging
import os
import sys

from port import check_port  # beside this file
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from alexnet_ddp.resilience.signals import end_with_parent

EXPLAINED = (1, *range(64, 94))  # the trace of a bug, and alexnet_ddp/errors.py

end_with_parent()
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
