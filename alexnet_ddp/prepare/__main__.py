from alexnet_ddp.runtime import startup

startup.begin("prepare")  # before the other imports

from alexnet_ddp import cli  # noqa: E402

cli.run("prepare", "alexnet_ddp.prepare.command:main")
