"""A backward pass that begins with a gradient of one's own.

``Tensor.backward(gradient=...)`` compares shapes symbolically, as dynamic ones need it, and looks
for tensors of other classes: 8 of the 75 microseconds that a micro-batch of a small net takes.
Where neither matters, torch's own next function is called at once. It is private, and torch 2.11 to
2.13 have it; without it, or where somebody has put a function of their own in the place of one of
the two above it, the public way is gone.
"""

from typing import Final

import torch
from torch import Tensor

_PUBLIC: Final = (Tensor.backward, torch.autograd.backward)
_ENGINE: Final = getattr(torch.autograd.graph, "_engine_run_backward", None)


def backward(loss: Tensor, gradient: Tensor) -> None:
    """Add the gradients of ``loss`` to every ``.grad`` of its graph, which is let go.

    Args:
        loss: A scalar with a graph.
        gradient: What the pass begins with: a scalar of the same dtype, where the loss is.
    """
    untouched = (Tensor.backward, torch.autograd.backward) == _PUBLIC
    if _ENGINE is None or type(loss) is not Tensor or not untouched or loss.ndim:
        loss.backward(gradient=gradient)
    else:
        _ENGINE(
            (loss,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True
        )
