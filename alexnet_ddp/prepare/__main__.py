from alexnet_ddp.runtime import startup

startup.begin("prepare")  # before the other imports, which take seconds

from alexnet_ddp import cli  # noqa: E402
from alexnet_ddp.prepare.command import main  # noqa: E402

cli.run("prepare", main)
