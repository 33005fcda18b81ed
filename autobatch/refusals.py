"""What cannot be trained exactly yet, refused at once with the reason."""

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

_WRAPPERS: Final = {
    "DataParallel": "it splits batches by itself",
    "DistributedDataParallel": "its ranks would have to agree on every size",
    "FullyShardedDataParallel": "memory running out leaves its parameters unsharded",
    "FSDPModule": "memory running out leaves its parameters unsharded",
    "ScriptModule": "TorchScript hides its buffers, so they could not be put back",
}


def check_model(model: object) -> nn.Module:
    """Return the model, or refuse it.

    Raises:
        TypeError: If it is no module, or one that owns the batch itself.
        ValueError: If nothing in it can be trained, or its parameters are not in one real place.
    """
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


def _check_parameters(model: nn.Module) -> None:
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
            "the model has post-accumulate-gradient hooks, which would run once a micro-batch "
            "instead of once a step; remove them"
        )


def check_optimizer(optimizer: object, model: nn.Module) -> Optimizer:
    """Return the optimizer, or refuse it.

    Raises:
        TypeError: If it is none, or takes more than one gradient a step.
        ValueError: If it holds none of the model's parameters.
    """
    if not isinstance(optimizer, Optimizer):
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
    """Refuse distributed training, where sizes would have to be agreed on.

    Raises:
        ValueError: If the world has more than one rank.
    """
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        world = distributed.get_world_size()
        if world > 1:
            raise ValueError(f"a world of {world} ranks is not supported yet, only one process")


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
