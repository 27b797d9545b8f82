from alexnet_ddp.runtime import startup

startup.begin("doctor")  # before the other imports, which take seconds

from alexnet_ddp import cli  # noqa: E402
from alexnet_ddp.config import DoctorConfig  # noqa: E402
from alexnet_ddp.config.door import use_schema  # noqa: E402
from alexnet_ddp.doctor.command import main  # noqa: E402

use_schema(DoctorConfig)
cli.run("doctor", main)
