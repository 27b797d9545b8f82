"""Loads weights into a network: from files of other programs, other runs and checkpoints."""

import logging
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import GoogLeNet, Inception3, VisionTransformer
from torchvision.models.vision_transformer import interpolate_embeddings

from alexnet_ddp.config import ConfigError, Head
from alexnet_ddp.model.head import ClassChange, follow_classes, initial_head
from alexnet_ddp.model.naming import find_network
from alexnet_ddp.model.weight_files import WeightsFile, read_weights_file

log = logging.getLogger(__name__)

_SHOWN = 3  # names in a message
# Prefixes of the auxiliary classifiers of Inception and GoogLeNet, which are only used in training.
_AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")


def load_weights(
    model: nn.Module,
    path: Path,
    classes: list[str] | None = None,
    head: Head | None = Head.auto,
    transform_input: bool | None = None,
    weights_classes: list[str] | None = None,
) -> None:
    """Load a weight file into `model`, by parameter name.

    classes: class folder names of the data, in the order of the labels. If the file contains its
    class names, the rows of the head are matched by name.
    head: which rows of the head may keep their initialisation; None: none, all must be in the file.
    transform_input: for GoogLeNet and Inception; None: see _set_input_transform.
    weights_classes: the classes of the file, if it does not contain them.
    Raises ConfigError if names or shapes differ, or if a value is not finite.
    """
    file = read_weights_file(path)
    complaint = f"model.weights ({path})"
    own = model.state_dict()
    found = find_network(file.content, own, complaint)
    weights, notes = found.tensors, []
    if found.place:
        notes.append(f"takes {found.place}")
    if found.example:
        notes.append(f"names such as {found.example} are read as this network's")
    notes += [found.remark] * bool(found.remark)
    if isinstance(model, GoogLeNet | Inception3):
        notes += _set_input_transform(model, weights, file, transform_input)
        weights = {
            name: t for name, t in weights.items() if not name.startswith(_AUXILIARY) or name in own
        }
    if notes:
        log.info("%s: %s", complaint, "; ".join(notes))
    weights = _fit_head(model, weights, file.classes or weights_classes, classes, head, complaint)
    remedy = "give the weights of this network, or the network of these weights"
    _refuse_nonfinite(weights, own, complaint)
    weights = _fit_positions(model, weights, complaint)
    fit(model, weights, f"{complaint} does not fit the model", remedy, found.versions)


def fit(
    model: nn.Module,
    weights: dict[str, Tensor],
    complaint: str,
    remedy: str,
    versions: dict[str, Any] | None = None,
) -> None:
    """Load tensors by name.

    versions: the module versions recorded by torch.save; MNASNet needs them.
    Raises ConfigError if the tensors belong to another network; the message consists of
    `complaint`, the difference and `remedy`.
    """
    own = model.state_dict()
    wrong = [name for name, t in own.items() if name in weights and t.shape != weights[name].shape]
    fitting = OrderedDict((name, t) for name, t in weights.items() if name not in wrong)
    for name, t in own.items():  # files of torch before 0.4.1 lack these counters
        if name.endswith("num_batches_tracked"):
            fitting.setdefault(name, torch.zeros_like(t))
    # The versions are in an attribute that torch's annotations lack.
    fitting._metadata = versions or {"": own._metadata[""]}  # type: ignore[attr-defined]
    result = model.load_state_dict(fitting, strict=False)
    missing = [name for name in result.missing_keys if name not in wrong]
    shapes = [f"{n}: {_shape(weights[n])} there, {_shape(own[n])} here" for n in wrong]
    unknown = result.unexpected_keys
    parts = (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
    differences = [f"{len(names):,} {what} ({_first(names)})" for what, names in parts if names]
    if differences:
        shown = "; ".join(differences)
        raise ConfigError(f"{complaint}: of {len(own):,} tensors {shown}; {remedy}")


def load_checkpoint(model: nn.Module, weights: dict[str, Tensor], origin: str) -> None:
    """Load all tensors of a checkpoint. Raises ConfigError if they belong to another network."""
    complaint = f"{origin} holds another network than the configuration"
    fit(model, weights, complaint, "give the model that was trained, or another run.name")


def _first(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def _fit_head(
    model: nn.Module,
    weights: dict[str, Tensor],
    then: list[str] | None,
    now: list[str] | None,
    head: Head | None,
    complaint: str,
) -> dict[str, Tensor]:
    """Fit the rows of the head to the classes of the data.

    Rows are matched by name if the file has class names (`then`), otherwise by position.
    """
    fresh = initial_head(model)
    names = list(fresh)
    there = [name for name in names if name in weights]
    if head is Head.new:
        log.info("model.head=new: the head (%s) starts from its initialisation", ", ".join(names))
        return weights | fresh
    if not there:
        return weights  # fit() reports what is missing
    if then is not None and now is not None and len(weights[there[0]]) == len(then):
        return _by_name(weights, ClassChange(then, now), fresh, head, complaint)
    changed = [name for name in there if weights[name].shape != fresh[name].shape]
    if not changed:
        if now is not None:
            order = ", ".join(f"{k} = {name}" for k, name in enumerate(now[:_SHOWN]))
            more = ", ..." if len(now) > _SHOWN else ""
            log.info(
                "%s names no classes: its rows are taken in the order of the data's: %s%s",
                complaint,
                order,
                more,
            )
        return weights
    if head is None or weights[changed[0]].shape[1:] != fresh[changed[0]].shape[1:]:
        return weights  # fit() reports the difference
    counts = f"{len(weights[changed[0]])} classes in the file, {len(fresh[changed[0]])} in the data"
    log.warning(
        "model.weights: %s: the head (%s) starts from its initialisation",
        counts,
        ", ".join(changed),
    )
    return weights | fresh


def _by_name(
    weights: dict[str, Tensor],
    change: ClassChange,
    fresh: dict[str, Tensor],
    head: Head | None,
    complaint: str,
) -> dict[str, Tensor]:
    if change.then == change.now:
        return weights
    if head is None and not change.is_reorder:
        remedy = "give a data.root with the classes of the weights"
        raise ConfigError(f"{complaint} has other classes than the data: {change}; {remedy}")
    level = logging.INFO if change.is_reorder else logging.WARNING
    hint = "" if change.is_reorder else "; model.head=new replaces all rows"
    log.log(
        level,
        "%s: classes: %s: rows of the head follow their class names%s",
        complaint,
        change,
        hint,
    )
    return follow_classes(weights, change, fresh)


def _fit_positions(
    model: nn.Module, weights: dict[str, Tensor], complaint: str
) -> dict[str, Tensor]:
    """Interpolate the positions of a ViT of torchvision or timm to the network's number of patches.

    As the two libraries do. Positions are [1, tokens without a patch + patches, width], with as
    many patches in a row as in a column. Others are left to fit().
    """
    is_torchvision = isinstance(model, VisionTransformer)
    if not is_torchvision and not type(model).__module__.startswith("timm."):
        return weights
    name = "encoder.pos_embedding" if is_torchvision else "pos_embed"
    own, found = model.state_dict().get(name), weights.get(name)
    if own is None or found is None or found.dim() != 3 or found.shape[::2] != own.shape[::2]:
        return weights
    side = math.isqrt(own.shape[1])
    num_others = own.shape[1] - side**2  # the class token, for example
    old_side = math.isqrt(max(0, found.shape[1] - num_others))
    if old_side in (0, side) or old_side**2 + num_others != found.shape[1]:
        return weights
    positions = found.float()
    if is_torchvision:
        by_name = OrderedDict({name: positions})
        positions = interpolate_embeddings(side, 1, by_name)[name]
    else:
        from timm.layers import resample_abs_pos_embed  # an extra

        positions = resample_abs_pos_embed(positions, [side, side], None, num_others)
    old, new = f"{old_side} x {old_side}", f"{side} x {side}"
    log.info("%s: positions (%s) of %s patches are interpolated to %s", complaint, name, old, new)
    return weights | {name: positions}


def _refuse_nonfinite(weights: dict[str, Tensor], own: dict[str, Tensor], complaint: str) -> None:
    """Raises ConfigError for a tensor with non-finite values, or one that is not floating-point.

    A buffer that is non-finite in a new network may also be non-finite in the file.
    """
    for name, tensor in weights.items():
        if name not in own or not own[name].is_floating_point():
            continue
        if not tensor.is_floating_point():
            dtype = str(tensor.dtype).removeprefix("torch.")
            rule = f"{name} holds {dtype} values, as quantised weights do"
            raise ConfigError(f"{complaint} is refused: {rule}; give floating-point weights")
        if tensor.element_size() == 1:  # isfinite() does not support float8
            tensor = tensor.float()
        if torch.isfinite(tensor).all():
            continue
        if torch.isfinite(own[name]).all():
            num_bad = int((~torch.isfinite(tensor)).sum())
            rule = f"{num_bad:,} of {tensor.numel():,} values of {name} are not finite"
            raise ConfigError(
                f"{complaint} is refused: {rule}; give weights from before the training diverged"
            )


def _set_input_transform(
    model: GoogLeNet | Inception3,
    weights: dict[str, Tensor],
    file: WeightsFile,
    wanted: bool | None,
) -> list[str]:
    """Decide whether the network rescales its inputs; returns notes for the log.

    torchvision's own weights of these two networks need transform_input=True. Our files record the
    setting. In other files, auxiliary classifiers indicate torchvision's own weights.
    """
    has_auxiliary = any(name.startswith(_AUXILIARY) for name in weights)
    if wanted is not None:
        model.transform_input = wanted
    elif "transform_input" in file.facts:
        model.transform_input = file.facts["transform_input"] == "true"
    else:
        model.transform_input = has_auxiliary
    notes = ["without its auxiliary classifiers"] if has_auxiliary else []
    if has_auxiliary and wanted is None and model.transform_input:
        rule = "inputs are transformed as for torchvision's own weights"
        notes.append(f"{rule}; model.transform_input=false if these were trained without")
    return notes
