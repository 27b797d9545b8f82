"""`alexnet-ddp COMMAND ...` and `python -m alexnet_ddp COMMAND ...`: the same as `python -m
alexnet_ddp.COMMAND ...`.
"""

import runpy
import sys
from difflib import get_close_matches

COMMANDS = {
    "train": "train an image classifier, or continue a run",
    "evaluate": "evaluate a run, or a file of weights, on all validation images",
    "predict": "classify images with a trained run",
    "export": "write the model of a run for other programs, and check the written file",
    "report": "write a page with the curves, times, classes and images of a run",
    "prepare": "pack images into verified shards",
    "plan": "predict the time and memory of a training on a cluster",
    "doctor": "check the machines that a run would use",
    "runs": "list all runs of a folder, with their results and options",
    "compare": "show the options, curves and the first step in which two runs differ",
    "replay": "compute a bad step again, to find its cause",
    "lr-find": "find a learning rate for a training",
    "sweep": "train once for each of several values of options, and compare the trials",
    "launch": "copy the scripts that start runs on several machines",
}


def main() -> None:
    """Run the command that the first argument names.

    Exits with its code; 64 for an unknown command.
    """
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in COMMANDS:
        del sys.argv[1]
        runpy.run_module(
            f"alexnet_ddp.{command.replace('-', '_')}", run_name="__main__", alter_sys=True
        )
        return
    from alexnet_ddp import __version__
    from alexnet_ddp.runtime.printing import say
    from alexnet_ddp.runtime.startup import make_streams_safe

    make_streams_safe()
    if command == "--version":
        say(f"alexnet-ddp {__version__}")
    elif command in ("--help", "-h", "help"):
        for line in _help():
            say(line)
    else:
        say(f"alexnet_ddp: {_unknown(command)}", sys.stderr)
        sys.exit(64)


def _help() -> list[str]:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, what in COMMANDS.items()]
    usage = "Usage: alexnet-ddp COMMAND [OPTION=VALUE ...], or python -m alexnet_ddp COMMAND ..."
    more = (
        "alexnet-ddp COMMAND --help explains a command; alexnet-ddp --version prints the version."
    )
    return [usage, "", *lines, "", more]


def _unknown(command: str) -> str:
    near = get_close_matches(command, COMMANDS, 1)
    if near:
        hint = f"nearest: {near[0]}"
    elif "=" in command:
        hint = f"write alexnet-ddp train {command}"
    else:
        hint = f"there are: {', '.join(COMMANDS)}"
    return f"{command} is not a command; {hint}"


if __name__ == "__main__":
    main()
