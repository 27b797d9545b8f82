"""Faults from the inside, for processes that have this folder on their PYTHONPATH. The product knows nothing of it.

KILL_AT_OPEN=NAME    whoever opens a file whose path ends so is killed
HOLD_GIL=FILE        rank 1 runs a catastrophic regular expression, once FILE is there, in a thread
"""

import os
import signal
import sys

name = os.environ.get("KILL_AT_OPEN")
if name and os.environ.get("RANK"):

    def die(event: str, arguments: tuple) -> None:
        if event == "open" and str(arguments[0]).endswith(name):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)

go = os.environ.get("HOLD_GIL")
if go and os.environ.get("RANK") == "1" and "alexnet_ddp.train" in " ".join(sys.orig_argv):
    import re
    import threading
    import time

    def hold() -> None:
        while not os.path.exists(go):
            time.sleep(0.05)
        os.unlink(go)  # once: not again after a restart
        re.match(r"(a+)+$", "a" * 60 + "b")

    threading.Thread(target=hold, daemon=True).start()
