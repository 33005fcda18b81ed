"""Activation checkpointing of any model: repeated blocks run again in the backward pass."""

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final

from torch import nn
from torch.utils.checkpoint import checkpoint

# Methods of transformers' models; the second one is the older name, gone in version 6.
_ENABLE: Final = ("activation_checkpointing_enable", "gradient_checkpointing_enable")


def reason_against(model: nn.Module) -> str:
    """Return why activation checkpointing cannot be added to the model, or ``""`` if it can.

    Example:
        >>> reason_against(nn.Linear(2, 2))
        'the model has no Sequential or ModuleList of repeated blocks'
    """
    own = _own_ways(model)
    if any(getattr(part, "gradient_checkpointing", False) for m in own for part in m.modules()):
        return "the model does it already"
    if own or any(True for _ in repeated_blocks(model)):
        return ""
    return "the model has no Sequential or ModuleList of repeated blocks"


def checkpoint_activations(model: nn.Module) -> None:
    """Change the model to keep only each block's inputs, and to run each block again in backward.

    A model with its own activation checkpointing, such as those of transformers, enables it. In any
    other model the blocks are those of ``repeated_blocks``.

    Args:
        model: The model; its blocks' ``forward`` is replaced.
    """
    own = _own_ways(model)
    for module in own:
        enable = _enable_of(module)
        assert enable is not None, "the module has its own activation checkpointing"
        enable({"use_reentrant": False})
    for block in [] if own else {id(found): found for found in repeated_blocks(model)}.values():
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def repeated_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost blocks: two or more of a class in one ``Sequential`` or ``ModuleList``.

    A block has child modules, and is no plain ``Sequential``, ``ModuleList`` or ``ModuleDict``.
    Inside those the search for blocks goes on.
    """
    children = list(model.children())
    kinds: Counter[type[nn.Module]] = Counter()
    if isinstance(model, nn.Sequential | nn.ModuleList):
        kinds.update(type(child) for child in children if _is_block(child))
    for child in children:
        if kinds[type(child)] > 1:
            yield child
        else:
            yield from repeated_blocks(child)


def _is_block(module: nn.Module) -> bool:
    plain = type(module) in (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return not plain and any(True for _ in module.children())


def _enable_of(module: nn.Module) -> Callable[[dict[str, bool]], object] | None:
    found = (getattr(module, name, None) for name in _ENABLE)
    return next((enable for enable in found if callable(enable)), None)


def _own_ways(model: nn.Module) -> list[nn.Module]:
    """Return the outermost parts that have their own activation checkpointing."""
    if _enable_of(model) is not None:
        return [model] if getattr(model, "supports_gradient_checkpointing", True) else []
    return [part for child in model.children() for part in _own_ways(child)]
