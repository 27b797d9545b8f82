"""Knobs of `python -m alexnet_ddp.plan`: a network, a cluster, and what is known of both."""

from dataclasses import dataclass, field

from alexnet_ddp.config.checks import positive, require, within
from alexnet_ddp.config.data import MAX_SIDE
from alexnet_ddp.config.recipe import ModelConfig
from alexnet_ddp.config.run import Precision


@dataclass(kw_only=True)
class PlanDataConfig:
    image_size: int = 224  # pixels
    num_classes: int = 1_000
    num_train: int = 1_281_167  # images of an epoch: ImageNet's

    def __post_init__(self) -> None:
        positive("data", self, "image_size", "num_classes", "num_train")
        within("data", self, 1, MAX_SIDE, "image_size")


@dataclass(kw_only=True)
class LinksConfig:
    """Nominal rates, in each direction; the shares that are reached are in costs/machine.py."""

    inside_gb_per_s: float | None = (
        None  # GB/s of a GPU to the others of its node; null: the GPU's in the table
    )
    inside_latency_us: float | None = None  # null: 5 (NCCL), 60 (gloo)
    between_gbit_per_s: float | None = (
        None  # Gbit/s of a node, shared by its GPUs; null: 25 on GPUs, 1 on CPUs
    )
    between_latency_us: float | None = None  # null: 15 (NCCL), 60 (gloo)

    def __post_init__(self) -> None:
        positive(
            "links",
            self,
            "inside_gb_per_s",
            "inside_latency_us",
            "between_gbit_per_s",
            "between_latency_us",
        )


@dataclass(kw_only=True)
class PlanConfig:
    model: ModelConfig
    data: PlanDataConfig = field(default_factory=PlanDataConfig)
    links: LinksConfig = field(default_factory=LinksConfig)
    nodes: int = 1
    gpus_per_node: int = 8  # ranks of a node: on CPUs, processes
    images_per_gpu: int | None = None  # of a step; null: from global_batch_size, or else 128
    global_batch_size: int | None = None
    epochs: int = 90
    device: str = "A100"  # a GPU of the table in costs/machine.py; measure: this machine's; custom: by the next two
    tflops: float | None = (
        None  # TFLOP/s that training reaches (not the peak), instead of the table's
    )
    images_per_s: float | None = (
        None  # of one GPU, at data.image_size with this network, instead of the table's
    )
    memory_gb: float | None = None  # 10^9 bytes, instead of the table's
    precision: Precision = Precision.fp32
    wire_dtype: Precision = Precision.fp32  # of the activations that hybrids exchange: fp32 or bf16
    plugins: list[str] = field(
        default_factory=list
    )  # modules to import first, which register networks
    plot: str | None = None  # a .png to draw
    json: str | None = None  # a .json to write

    def __post_init__(self) -> None:
        positive(
            "", self, "nodes", "gpus_per_node", "images_per_gpu", "global_batch_size", "epochs"
        )
        positive("", self, "tflops", "images_per_s", "memory_gb")
        rule = "is fp32 or bf16, as parallel.wire_dtype is"
        require(
            self.wire_dtype is not Precision.fp16, f"wire_dtype ({self.wire_dtype.value}) {rule}"
        )
        weights, rule = (
            self.model.weights,
            "is not read by a plan: all weights cost the same; leave it out",
        )
        require(weights is None, f"model.weights ({weights}) {rule}")
        each, whole, rule = (
            self.images_per_gpu,
            self.global_batch_size,
            "are two ways to say one thing; give one of them",
        )
        both = each is not None and whole is not None
        require(not both, f"images_per_gpu ({each}) and global_batch_size ({whole}) {rule}")
        rates = [name for name in ("tflops", "images_per_s") if getattr(self, name) is not None]
        require(
            len(rates) < 2, f"tflops ({self.tflops}) and images_per_s ({self.images_per_s}) {rule}"
        )
        rule = "is what device=measure finds out; leave it out"
        require(self.device != "measure" or not rates, f"{' '.join(rates)} {rule}")
        require(
            self.device != "custom" or rates,
            "device=custom needs tflops=... or images_per_s=... of one GPU",
        )
        given, rule = self.precision.value, "is in tflops or images_per_s already; leave it out"
        require(not rates or self.precision is Precision.fp32, f"precision ({given}) {rule}")
        inside = self.links.inside_gb_per_s or self.links.inside_latency_us
        rule = "are not read where gpus_per_node is 1; leave them out"
        require(
            self.gpus_per_node > 1 or inside is None,
            f"links.inside_gb_per_s and links.inside_latency_us {rule}",
        )
        world = self.nodes * self.gpus_per_node
        rule = f"must be at least nodes * gpus_per_node ({world}); nearest: {world}"
        require(whole is None or whole >= world, f"global_batch_size ({whole}) {rule}")

    @property
    def images(self) -> int:
        """Of a step, of the rank that has most."""
        if self.global_batch_size is not None:
            return -(-self.global_batch_size // (self.nodes * self.gpus_per_node))
        return self.images_per_gpu or 128

    @property
    def wire_bytes(self) -> int:
        """Of an activation between the ranks of a hybrid."""
        return 4 if self.wire_dtype is Precision.fp32 else 2

    @property
    def all_images(self) -> int:
        """Of a step."""
        return self.global_batch_size or self.images * self.nodes * self.gpus_per_node
