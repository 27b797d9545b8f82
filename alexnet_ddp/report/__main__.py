from alexnet_ddp.runtime import startup

startup.begin("report")  # before the other imports

from alexnet_ddp import cli  # noqa: E402

cli.run("report", "alexnet_ddp.report.command:main", cli.without_data_options)
