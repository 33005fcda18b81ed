"""Check the arguments of public functions before any work starts.

Only the functions that need torch import it, so that ``autobatch --help`` does not.
"""

import math
import operator
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

_WRAPPERS: Final = {
    "DataParallel": "it splits batches by itself",
    "DistributedDataParallel": "its ranks would have to agree on every size",
    "FullyShardedDataParallel": "an out-of-memory error leaves its parameters unsharded",
    "FSDPModule": "an out-of-memory error leaves its parameters unsharded",
    "ScriptModule": "TorchScript hides its buffers, so they cannot be restored",
}


def check_size(name: str, size: object) -> int:
    """Return a count of at least 1 as an ``int``.

    Args:
        name: The name of the argument, for the error.
        size: The count.

    Raises:
        TypeError: If ``size`` is not an integer, or a ``bool``.
        ValueError: If ``size`` is below 1.

    Example:
        >>> check_size("desired", numpy.int64(256))
        256
    """
    if isinstance(size, bool):
        raise TypeError(f"{name} must be an integer of at least 1, got {size!r}")
    try:
        count = operator.index(size)  # type: ignore[arg-type]  # It raises TypeError for other types.
    except TypeError:
        raise TypeError(f"{name} must be an integer of at least 1, got {size!r}") from None
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")
    return count


def check_positive(name: str, value: object) -> float | None:
    """Return a number above 0 as a ``float``; None stays None.

    Args:
        name: The name of the argument, for the error.
        value: The number, or None.

    Raises:
        TypeError: If ``value`` is no number.
        ValueError: If ``value`` is not above 0.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number above 0 or None, got {value!r}")
    if math.isnan(value) or value <= 0:
        raise ValueError(f"{name} must be above 0, got {value}")
    return float(value)


def check_model(model: object) -> "nn.Module":
    """Return the model, or raise if its gradient cannot be accumulated exactly.

    Raises:
        TypeError: If the model is no module, or a wrapper that splits batches itself.
        ValueError: If no parameter requires a gradient, or if the parameters are on several devices
            or on the meta device.
    """
    from torch import nn

    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        for kind in type(module).__mro__:
            if kind.__name__ in _WRAPPERS:
                raise TypeError(
                    f"{kind.__name__} is not supported yet: {_WRAPPERS[kind.__name__]}; "
                    "pass the module inside it"
                )
    _check_parameters(model)
    return model


def _check_parameters(model: "nn.Module") -> None:
    from torch.nn.parameter import is_lazy

    parameters = list(model.parameters())
    if any(is_lazy(tensor) for tensor in (*parameters, *model.buffers())):
        raise ValueError("the model has lazy parameters without shapes; run one forward first")
    if not parameters:
        raise ValueError(f"{type(model).__name__} has no parameters: there is nothing to train")
    if not any(parameter.requires_grad for parameter in parameters):
        raise ValueError(
            f"all {len(parameters)} parameters of {type(model).__name__} are frozen "
            "(requires_grad=False): there is nothing to train"
        )
    devices = {str(tensor.device) for tensor in (*parameters, *model.buffers())}
    if len(devices) > 1:
        raise ValueError(f"the model must be on one device, got {', '.join(sorted(devices))}")
    if devices == {"meta"}:
        raise ValueError("the model is on the meta device and has no values; initialise it first")
    if any(getattr(parameter, "_post_accumulate_grad_hooks", None) for parameter in parameters):
        raise ValueError(
            "the model has post-accumulate-gradient hooks, which would run once per micro-batch "
            "instead of once per step; remove them"
        )


def check_optimizer(optimizer: object, model: "nn.Module") -> "Optimizer":
    """Return the optimizer, or raise if it cannot train the model by gradient accumulation.

    Raises:
        TypeError: If it is no torch optimizer, or if it evaluates the loss several times per step.
        ValueError: If it holds none of the model's parameters.
    """
    import torch

    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            "optimizer must be a torch.optim.Optimizer (find_and_train and find_batch_size take a "
            f"factory (params) -> Optimizer as well), got {type(optimizer).__name__}"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError("LBFGS is not supported: it evaluates the loss several times a step")
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for parameter in _parameters(optimizer)):
        raise ValueError(
            f"{type(optimizer).__name__} holds none of the model's parameters; it was made for "
            "another model, or before the model was replaced"
        )
    return optimizer


def check_one_process() -> None:
    """Raise in distributed training, which is not supported yet.

    Raises:
        ValueError: If the world size is above 1.
    """
    import torch

    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        world = distributed.get_world_size()
        if world > 1:
            raise ValueError(f"a world of {world} ranks is not supported yet, only one process")


def _parameters(optimizer: "Optimizer") -> "list[Tensor]":
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
