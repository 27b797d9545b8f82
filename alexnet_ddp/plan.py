"""Predict bytes, step time and efficiency of each strategy on a cluster, and recommend one.

    python -m alexnet_ddp.plan nodes=2 gpus_per_node=8 device=A100 \
        links.between_gbit_per_s=100 [plot=PNG] [json=JSON]
"""

if __name__ == "__main__":  # torch, below, is imported after the configuration is valid
    from alexnet_ddp.runtime import startup

    startup.begin("plan")

    from alexnet_ddp import cli

    cli.run("plan", "alexnet_ddp.plan:main")

from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from alexnet_ddp.config import ConfigError, Device, Precision
from alexnet_ddp.config.plan import PlanConfig
from alexnet_ddp.cost_model import machine
from alexnet_ddp.cost_model.choose import CLEARLY, GUESSED_GBIT, USABLE, best, choose, strategies
from alexnet_ddp.cost_model.machine import Cluster, measure_device
from alexnet_ddp.cost_model.network import Network, read_network
from alexnet_ddp.cost_model.step import Step, Strategy, predict
from alexnet_ddp.cost_model.sweep import Sweep, draw, matplotlib_pyplot, sweep
from alexnet_ddp.model import build_model, without_weights
from alexnet_ddp.runtime.distributed import choose_device
from alexnet_ddp.runtime.files import require_folder_of, write_json
from alexnet_ddp.runtime.printing import say
from alexnet_ddp.runtime.terminal import Console, Table

_MAX_HYBRIDS = 8  # rows of the table, the fastest ones; the JSON file contains all of them


def main(cfg: PlanConfig, overrides: list[str]) -> None:
    """Print a table and a recommendation; write the files of plot and json.

    Raises ConfigError before anything is computed if an option is wrong or matplotlib is missing.
    """
    _check_file("plot", cfg.plot, ".png")
    _check_file("json", cfg.json, ".json")
    if cfg.plot:
        matplotlib_pyplot()
    # Only a measurement runs the network; otherwise its shapes are enough.
    with torch.device("cpu" if cfg.device == "measure" else "meta"):
        model = build_model(
            without_weights(cfg.model), cfg.data.num_classes, cfg.data.image_size, seed=0
        )
    network = read_network(model, cfg.data.image_size)
    if not network.split and cfg.wire_dtype is not Precision.fp32:
        raise ConfigError(
            f"wire_dtype ({cfg.wire_dtype.value}) would be ignored: only hybrids use it, and this "
            "network has no large linear layers to split; leave it out"
        )
    device = find_device(cfg, model, network)
    cluster = build_cluster(cfg, device)
    tried = strategies(network, cluster, cfg.wire_bytes)
    steps = [predict(network, device, cluster, strategy, cfg.images) for strategy in tried]
    found = best(steps, device)
    one = single_rank(network, device, cluster, cfg.images)
    swept = sweep(network, device, cluster, cfg.images)
    rows = [row(step, one, cfg) for step in steps]
    conclusion = [*conclude(steps, found, network, device), *crossing(network, swept, cfg.images)]
    if cfg.plot:
        draw(swept, cfg.images, cluster.world_size, Path(cfg.plot))
    if cfg.json:
        write_json(
            Path(cfg.json), record(cfg, network, device, cluster, rows) | {"conclusion": conclusion}
        )
    Console().print(table(rows, cfg, found))
    say(f"{device.name}: {device.flops_per_s / 1e12:,.3g} TFLOP/s ({device.origin})")
    for line in conclusion:
        say(line)


def _check_file(option: str, name: str | None, suffix: str) -> None:
    if name is None:
        return
    if Path(name).suffix != suffix:
        raise ConfigError(
            f"{option} ({name}) must end in {suffix}; {option}={Path(name).with_suffix(suffix)}"
        )
    require_folder_of(option, name)


def find_device(cfg: PlanConfig, model: nn.Module, network: Network) -> machine.Device:
    """A GPU of the table, this machine's device (measured), or the user's. Raises ConfigError."""
    if cfg.device == "measure":
        shape, here = (cfg.images, cfg.data.image_size), choose_device(Device.auto, 0)
        if here.type == "cpu" and cfg.precision is not Precision.fp32:
            raise ConfigError(
                f"precision={cfg.precision.value} needs a GPU, but device=measure found none; "
                "use precision=fp32"
            )
        device = measure_device(model, network, shape, cfg.precision, here, cfg.gpus_per_node)
    elif cfg.device == "custom":
        device = machine.Device("custom", 0.0, float("inf"), machine.CUSTOM_BYTES_PER_S)
    else:
        device = machine.gpu_device(cfg.device, cfg.precision)
    if cfg.tflops:
        device = replace(device, flops_per_s=cfg.tflops * 1e12, origin="given: tflops")
    if cfg.images_per_s:
        flops = cfg.images_per_s * network.train_flops
        device = replace(device, flops_per_s=flops, origin=f"given: {cfg.images_per_s:,g} images/s")
    return replace(device, memory_bytes=cfg.memory_gb * 1e9) if cfg.memory_gb else device


def build_cluster(cfg: PlanConfig, device: machine.Device) -> Cluster:
    """The cluster with the user's links; links that are not given have default values."""
    links, is_cpu = cfg.links, device.host_s_per_byte > 0
    between_gbit = links.between_gbit_per_s or GUESSED_GBIT["cpu" if is_cpu else "cuda"]
    if is_cpu:
        inside, between = machine.gloo_links(between_gbit)
        if links.inside_gb_per_s:
            inside = replace(inside, bytes_per_s=links.inside_gb_per_s * 1e9)
    else:
        known = machine.find_gpu(device.name)
        inside_gb = links.inside_gb_per_s or (
            known.link_gb_per_s if known else machine.PCIE_GB_PER_S
        )
        inside, between = machine.nccl_links(inside_gb, between_gbit)
    if links.inside_latency_us:
        inside = replace(inside, latency_s=links.inside_latency_us / 1e6)
    if links.between_latency_us:
        between = replace(between, latency_s=links.between_latency_us / 1e6)
    return Cluster(cfg.nodes, cfg.gpus_per_node, inside, between, trees=not is_cpu)


def single_rank(network: Network, device: machine.Device, cluster: Cluster, images: int) -> Step:
    """The step of a single rank, which has an efficiency of 1."""
    return predict(network, device, replace(cluster, nodes=1, gpus_per_node=1), Strategy(), images)


def row(step: Step, one: Step, cfg: PlanConfig) -> dict[str, float | str]:
    """The values of one strategy for the table and the JSON file. The keys contain the units."""
    images_per_s = cfg.all_images / step.seconds
    epoch_s = cfg.data.num_train / images_per_s
    return {
        "strategy": step.strategy.name,
        "overrides": step.strategy.overrides,
        "sent_mb": step.bytes_sent / 1e6,
        "compute_ms": step.compute_s * 1e3,
        "exposed_ms": step.exposed_s * 1e3,
        "update_ms": step.update_s * 1e3,
        "step_ms": step.seconds * 1e3,
        "images_per_s": images_per_s,
        "efficiency": images_per_s / (step.world_size * one.images_per_s),
        "epoch_s": epoch_s,
        "run_s": epoch_s * cfg.epochs,
        "memory_gb": step.memory_bytes / 1e9,
    }


def table(rows: list[dict], cfg: PlanConfig, found: Step | None) -> Table:
    """The table of strategies; the recommended one (`found`) is highlighted."""
    hybrids = sorted(rows[2:], key=lambda r: r["step_ms"])[:_MAX_HYBRIDS]
    shown = [r for r in rows if r in rows[:2] or r in hybrids]
    batch = f"{cfg.images} images each ({cfg.all_images:,}), {cfg.data.image_size} px"
    title = f"{cfg.nodes} x {cfg.gpus_per_node} ranks, {batch}"
    shown_table = Table(title=title, is_compact=True)
    shown_table.add_column("\nstrategy", no_wrap=True)
    units = (
        "MB\nsent",
        "exposed\nms",
        "step\nms",
        "\nimages/s",
        "\neff.",
        "\nepoch",
        f"{cfg.epochs}\nepochs",
        "\nGB",
    )
    for unit in units:
        shown_table.add_column(unit, justify="right", no_wrap=True)
    for r in shown:
        is_best = found is not None and r["strategy"] == found.strategy.name
        cells = (
            short(r["sent_mb"]),
            short(r["exposed_ms"]),
            short(r["step_ms"]),
            f"{r['images_per_s']:,.0f}",
            f"{r['efficiency']:.0%}",
            duration(r["epoch_s"]),
            duration(r["run_s"]),
            f"{r['memory_gb']:.1f}",
        )
        shown_table.add_row(r["strategy"], *cells, style="bold green" if is_best else None)
    return shown_table


def short(value: float) -> str:
    """One decimal below 1,000, none above."""
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """A duration in its two largest units, such as 2h05m."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    if hours == 0:
        return f"{m}m{s:02d}s"
    return f"{hours}h{m:02d}m" if hours < 48 else f"{hours // 24}d{hours % 24:02d}h"


def conclude(
    steps: list[Step], found: Step | None, network: Network, device: machine.Device
) -> list[str]:
    """The recommendation and its reason, in one or two lines."""
    if found is None:
        need = min(steps, key=lambda s: s.memory_bytes).memory_bytes / 1e9
        limit = f"{USABLE:.0%} of {device.memory_bytes / 1e9:g} GB"
        return [
            f"Use a smaller batch: a GPU would need {need:.1f} GB of {limit}; lower images_per_gpu."
        ]
    plain, half, *hybrids = steps
    reason = ""
    if found is not plain:
        speedup = plain.seconds / found.seconds
        reason = f" ({speedup:.2f} times as fast as ddp, with the same result)"
    elif not network.split:
        reason = " (the last linear layers have too few parameters for parallel=hybrid to pay)"
    elif (near := best(hybrids, device)) is not None and near.seconds < found.seconds:
        gain = found.seconds / near.seconds - 1
        reason = f" ({near.strategy.name} would be only {gain:.1%} faster)"
    lines = [f"Use {found.strategy.name}: {found.strategy.overrides}{reason}"]
    if half.seconds * CLEARLY < found.seconds:
        speedup = found.seconds / half.seconds
        lines.append(
            f"{half.strategy.overrides} would be {speedup:.2f} times as fast, but rounds gradients."
        )
    return lines


def crossing(network: Network, swept: Sweep, images: int) -> list[str]:
    """Up to which size a hybrid over all ranks sends fewer bytes than DDP, and is faster."""
    if network.crossover is None:
        return []
    most = int(network.crossover)
    ranks = f" ({most // images:,} ranks)" if most >= images else ""
    first = (
        "Crossover: hybrid over all ranks sends fewer bytes than ddp "
        f"up to a global batch of {most:,} images{ranks}."
    )
    pairs = zip(swept.ranks[1:], swept.ddp[1:], swept.world_hybrid[1:])
    faster = [ranks for ranks, ddp, hybrid in pairs if hybrid.seconds < ddp.seconds]
    if not faster:
        return [first, "On these links it is never faster."]
    from_to = f"from {faster[0]} to {faster[-1]}" if len(faster) > 1 else f"on {faster[0]}"
    at = f"{from_to} ranks (a global batch of {faster[-1] * images:,})"
    return [first, f"On these links it is faster {at}; {len(swept.ranks)} sizes were tried."]


def record(
    cfg: PlanConfig, network: Network, device: machine.Device, cluster: Cluster, rows: list[dict]
) -> dict[str, object]:
    """The content of the JSON file: all inputs, and all rows."""
    chosen = choose(network, device, cluster, cfg.images, activation_bytes=cfg.wire_bytes)
    facts = {
        "parameters": network.parameters,
        "split_parameters": sum(layer.parameters for layer in network.split),
        "split": [layer.name for layer in network.split],
        "train_gflop_an_image": network.train_flops / 1e9,
        "crossover_global_batch": network.crossover,
    }
    finite = {
        key: None if value == float("inf") else value for key, value in asdict(device).items()
    }
    return {
        "network": facts,
        "device": finite,
        "cluster": asdict(cluster),
        "images_per_gpu": cfg.images,
        "torch": torch.__version__,
        "choice": {"strategy": chosen.strategy.name, "reason": chosen.reason},
        "rows": rows,
    }
