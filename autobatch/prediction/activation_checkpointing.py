"""Where a model's activations can be checkpointed without knowing the model."""

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final

from torch import nn
from torch.utils.checkpoint import checkpoint

# Of a model of transformers: the second is the name before, and ends with version 6.
_ENABLE: Final = ("activation_checkpointing_enable", "gradient_checkpointing_enable")


def why_not(model: nn.Module) -> str:
    """Return why there is nothing to checkpoint, or ``""``."""
    own = _own_ways(model)
    if any(getattr(part, "gradient_checkpointing", False) for m in own for part in m.modules()):
        return "the model does it already"
    if own or any(True for _ in repeated_blocks(model)):
        return ""
    return "the model has no Sequential or ModuleList of repeated blocks"


def checkpoint_activations(model: nn.Module) -> None:
    """Keep the inputs of each block only, and run it again in the backward pass.

    A model that knows how, as those of transformers do, is asked to. Of any other, the blocks are
    those that ``repeated_blocks`` finds.
    """
    own = _own_ways(model)
    for module in own:
        enable = _enable_of(module)
        assert enable is not None, "it has its own way"
        enable({"use_reentrant": False})
    for block in [] if own else {id(found): found for found in repeated_blocks(model)}.values():
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def repeated_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost blocks: two or more of a class in one ``Sequential`` or ``ModuleList``.

    A block holds modules itself, and is no plain ``Sequential`` or ``ModuleList``: in those, blocks
    are looked for.
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
    """The outermost parts that can checkpoint by themselves."""
    if _enable_of(model) is not None:
        return [model] if getattr(model, "supports_gradient_checkpointing", True) else []
    return [part for child in model.children() for part in _own_ways(child)]
