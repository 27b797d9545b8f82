from alexnet_ddp.runtime import startup

startup.begin("predict")  # before the other imports

from alexnet_ddp import cli  # noqa: E402

cli.run("predict", "alexnet_ddp.predict.command:main")
