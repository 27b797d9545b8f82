"""Options of `python -m alexnet_ddp.plan`: a network, a cluster, and what is known of both."""

from dataclasses import dataclass, field

from alexnet_ddp.config.data import MAX_SIDE
from alexnet_ddp.config.option import Options, option
from alexnet_ddp.config.recipe import ModelConfig
from alexnet_ddp.config.run import Precision
from alexnet_ddp.runtime.errors import ConfigError


@dataclass(kw_only=True)
class PlanDataConfig(Options, section="data"):
    """The size of the data set; no file is read."""

    image_size: int = option(
        224, "Height and width of the network's input.", unit="pixels", minimum=1, maximum=MAX_SIDE
    )
    num_classes: int = option(1_000, "Number of classes.", minimum=1)
    num_train: int = option(1_281_167, "Images of an epoch; the default is ImageNet's.", minimum=1)


@dataclass(kw_only=True)
class LinksConfig(Options, section="links"):
    """Nominal rates in each direction; cost_model/machine.py has the shares that are reached."""

    inside_gb_per_s: float | None = option(
        None,
        "Bandwidth of a GPU to the others of its node.",
        unit="GB/s",
        null="the GPU's in the table",
        above=0,
    )
    inside_latency_us: float | None = option(
        None,
        "Latency within a node.",
        unit="microseconds",
        null="5 (NCCL) or 60 (gloo)",
        above=0,
    )
    between_gbit_per_s: float | None = option(
        None,
        "Bandwidth of a node to the others, shared by its GPUs.",
        unit="Gbit/s",
        null="25 for GPUs, 1 for CPUs",
        above=0,
    )
    between_latency_us: float | None = option(
        None,
        "Latency between nodes.",
        unit="microseconds",
        null="15 (NCCL) or 60 (gloo)",
        above=0,
    )


@dataclass(kw_only=True)
class PlanConfig(Options):
    """A network and a cluster."""

    model: ModelConfig
    data: PlanDataConfig = field(default_factory=PlanDataConfig)
    links: LinksConfig = field(default_factory=LinksConfig)
    nodes: int = option(1, "Number of nodes.", minimum=1)
    gpus_per_node: int = option(8, "Ranks of a node; on CPUs, processes.", minimum=1)
    images_per_gpu: int | None = option(
        None,
        "Images of a step on each rank.",
        unit="images",
        null="from global_batch_size, or else 128",
        minimum=1,
    )
    global_batch_size: int | None = option(
        None,
        "Images of a step over all ranks, in place of images_per_gpu.",
        unit="images",
        null="from images_per_gpu",
        minimum=1,
    )
    epochs: int = option(90, "Length of the run.", unit="epochs", minimum=1)
    device: str = option(
        "A100",
        "A GPU of the table (K20 P40 P100 V100 V100-PCIE T4 RTX4090 L4 A100 H100 H100-PCIE "
        "H100-NVL H200 H200-NVL); custom, with tflops or images_per_s; or measure: time a few "
        "steps on this machine.",
    )
    tflops: float | None = option(
        None,
        "Rate that training reaches on one GPU, not its peak.",
        unit="TFLOP/s",
        null="the table's",
        above=0,
    )
    images_per_s: float | None = option(
        None,
        "Rate of one GPU with this network at data.image_size.",
        unit="images/s",
        null="the table's",
        above=0,
    )
    memory_gb: float | None = option(
        None, "Memory of one GPU.", unit="10^9 bytes", null="the table's", above=0
    )
    precision: Precision = option(Precision.fp32, "Type of the forward and backward pass.")
    wire_dtype: Precision = option(
        Precision.fp32, "Type of the activations that a hybrid sends: fp32 or bf16."
    )
    plugins: list[str] = option(
        [], "Modules to import first, which register networks; from the command line only."
    )
    plot: str | None = option(None, "A .png file to draw.", null="none")
    json: str | None = option(None, "A .json file to write.", null="none")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wire_dtype is Precision.fp16:
            raise ConfigError("wire_dtype (fp16) must be fp32 or bf16, as parallel.wire_dtype is")
        if self.model.weights is not None:
            rule = "is not read by a plan: all weights cost the same; leave it out"
            raise ConfigError(f"model.weights ({self.model.weights}) {rule}")
        self._check_batch()
        self._check_rates()
        if self.gpus_per_node == 1 and (self.links.inside_gb_per_s or self.links.inside_latency_us):
            rule = "are not read if gpus_per_node is 1; leave them out"
            raise ConfigError(f"links.inside_gb_per_s and links.inside_latency_us {rule}")

    def _check_batch(self) -> None:
        each, total = self.images_per_gpu, self.global_batch_size
        if each is not None and total is not None:
            both = f"images_per_gpu ({each}) and global_batch_size ({total})"
            raise ConfigError(f"{both} are two ways to give the batch; give one of them")
        world = self.nodes * self.gpus_per_node
        if total is not None and total < world:
            rule = f"must be at least nodes * gpus_per_node ({world}); nearest: {world}"
            raise ConfigError(f"global_batch_size ({total}) {rule}")

    def _check_rates(self) -> None:
        rates = [name for name in ("tflops", "images_per_s") if getattr(self, name) is not None]
        if len(rates) == 2:
            both = f"tflops ({self.tflops}) and images_per_s ({self.images_per_s})"
            raise ConfigError(f"{both} are two ways to give the rate; give one of them")
        if self.device == "measure" and rates:
            raise ConfigError(f"{rates[0]} is what device=measure measures; leave it out")
        if self.device == "custom" and not rates:
            raise ConfigError("device=custom needs tflops=... or images_per_s=... of one GPU")
        if rates and self.precision is not Precision.fp32:
            rule = f"is included in {rates[0]} already; leave it out"
            raise ConfigError(f"precision ({self.precision.value}) {rule}")

    @property
    def images(self) -> int:
        """Images of a step on the rank that has most."""
        if self.global_batch_size is not None:
            return -(-self.global_batch_size // (self.nodes * self.gpus_per_node))
        return self.images_per_gpu or 128

    @property
    def wire_bytes(self) -> int:
        """Bytes of an activation while a hybrid sends it."""
        return 4 if self.wire_dtype is Precision.fp32 else 2

    @property
    def all_images(self) -> int:
        """Images of a step over all ranks."""
        return self.global_batch_size or self.images * self.nodes * self.gpus_per_node
