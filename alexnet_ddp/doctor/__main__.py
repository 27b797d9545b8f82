from alexnet_ddp.runtime import startup

startup.begin("doctor")  # before the other imports

from alexnet_ddp import cli  # noqa: E402

cli.run("doctor", "alexnet_ddp.doctor.command:main")
