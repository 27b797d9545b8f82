"""Copy the scripts that start runs with torchrun or Slurm out of the installed package.

    alexnet-ddp launch DIR

DIR/launch and DIR/slurm then contain the files of a checkout, except those that set one up. Set
PYTHON to the Python that has the package.
"""

import shutil
import sys
from pathlib import Path

from alexnet_ddp.runtime.errors import ConfigError
from alexnet_ddp.runtime.printing import say
from alexnet_ddp.runtime.startup import make_streams_safe

_PACKAGE = Path(__file__).resolve().parent
# They set up a checkout of the project, so they are not copied.
_OF_A_CHECKOUT = {"setup.sh", "demo.sh", "test.sh", "test_newest.sh"}
# In a wheel the folders are in the package, in a checkout next to it.
SOURCES = {
    name: next(d for d in (_PACKAGE / f"_{name}", _PACKAGE.parent / name) if d.is_dir())
    for name in ("launch", "slurm")
}


def copy_scripts(target: Path) -> list[Path]:
    """Copy the scripts of both folders into `target`; the files that were made.

    Raises ConfigError rather than overwrite one.
    """
    made = []
    pairs = [
        (file, target / name / file.relative_to(source))
        for name, source in SOURCES.items()
        for file in sorted(source.rglob("*"))
        if file.is_file() and "__pycache__" not in file.parts and file.name not in _OF_A_CHECKOUT
    ]
    for _, copy in pairs:
        if copy.exists():
            raise ConfigError(f"{copy} exists and is not overwritten; give another folder")
    try:
        for file, copy in pairs:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)  # with its permissions: scripts stay executable
            made.append(copy)
    except OSError as error:
        raise ConfigError(
            f"{target} cannot be written to ({error.strerror}); give another folder"
        ) from error
    return made


def main(arguments: list[str]) -> int:
    """Copy to the folder that the only argument names; the exit code."""
    make_streams_safe()
    if len(arguments) != 1 or arguments[0].startswith("-"):
        asked = arguments in (["--help"], ["-h"])
        usage = "alexnet-ddp launch DIR copies the scripts into DIR/launch and DIR/slurm"
        say(
            usage if asked else f"alexnet_ddp: give one folder: {usage}",
            None if asked else sys.stderr,
        )
        return 0 if asked else ConfigError.exit_code
    try:
        made = copy_scripts(Path(arguments[0]))
    except ConfigError as error:
        say(f"alexnet_ddp: {error}", sys.stderr)
        return error.exit_code
    say(f"copied {len(made)} files to {arguments[0]}/launch and {arguments[0]}/slurm")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
