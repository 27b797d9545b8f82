from alexnet_ddp.runtime import startup

startup.begin("export")  # before the other imports

from alexnet_ddp import cli  # noqa: E402

cli.run("export", "alexnet_ddp.export.command:main", cli.without_data_options)
