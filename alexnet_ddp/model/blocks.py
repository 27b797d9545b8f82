"""The blocks of a network from its input to its head, and a learning rate for each."""

from collections.abc import Iterator

from torch import nn

from alexnet_ddp.model.head import head_parameters

_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def backbone_blocks(model: nn.Module) -> list[list[str]]:
    """The names of the parameters of each block, from the input to the head, without the head.

    A block is a child of the network, but some modules are replaced by their children: each
    nn.Sequential, nn.ModuleList and nn.ModuleDict, and each module that contains a list of several
    modules of one class. Modules that only have vectors, such as norms, belong to the block before
    them. Parameters of the network itself, such as a class token, belong to the first block.

    AlexNet, VGG: each convolution and each linear layer, with its norm. ResNet: the first
    convolution, then each residual block. EfficientNet: each MBConv block, and the convolutions
    before and after them. ViT: the patch embedding with token and positions, then each encoder
    layer, the last one with the final norm.
    """
    head = set(head_parameters(model))
    blocks: list[list[str]] = []
    first: list[str] = []
    dims = {name: parameter.dim() for name, parameter in model.named_parameters()}
    for names, is_own in _units(model, ""):
        names = [name for name in names if name in dims and name not in head]
        if is_own:
            first += names
        elif blocks and all(dims[name] <= 1 for name in names):
            blocks[-1] += names
        elif names:
            blocks.append(names)
    if not blocks:
        return [first] if first else []
    return [first + blocks[0], *blocks[1:]]


def lr_factors(model: nn.Module, backbone: float, layer_decay: float) -> dict[str, float]:
    """The factor of the learning rate of each parameter, by name.

    The head has 1, the block before it backbone * layer_decay, the one before that backbone *
    layer_decay**2, and so on.
    """
    factors = dict.fromkeys(head_parameters(model), 1.0)
    for depth, names in enumerate(reversed(backbone_blocks(model)), start=1):
        factors |= dict.fromkeys(names, backbone * layer_decay**depth)
    return factors


def _units(module: nn.Module, prefix: str) -> Iterator[tuple[list[str], bool]]:
    """The parameters of each child of `module`, in order of registration.

    The second value is True for parameters that belong to `module` itself.
    """
    yield [prefix + name for name, _ in module.named_parameters(recurse=False)], True
    for name, child in module.named_children():
        if _is_opened(child):
            yield from _units(child, f"{prefix}{name}.")
        else:
            yield [f"{prefix}{name}.{key}" for key, _ in child.named_parameters()], False


def _is_opened(module: nn.Module) -> bool:
    """True if the children of `module` are blocks, and not `module` itself."""
    if type(module) in _LISTS or _repeats(module):
        return True
    return any(_repeats(child) for child in module.children())


def _repeats(module: nn.Module) -> bool:
    """True for a list of several modules, all of one class."""
    kinds = [type(child) for child in module.children()]
    return isinstance(module, _LISTS) and len(kinds) > 1 and len(set(kinds)) == 1
