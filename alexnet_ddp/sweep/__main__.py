from alexnet_ddp.runtime import startup

startup.begin("sweep")  # before the other imports

from alexnet_ddp import cli  # noqa: E402
from alexnet_ddp.config.space import first_point  # noqa: E402

cli.run("sweep", "alexnet_ddp.sweep.command:main", first_point)
