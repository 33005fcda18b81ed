"""What a model and its optimizer are made of, looked up once a step."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer


class Members:
    """Modules and parameters of the model and the loss, as of the last ``refresh``.

    A step asks for them again and again, and ``nn.Module.parameters`` makes a name for each: on a
    small net that alone takes longer than a forward pass.

    Args:
        roots: The model, and the loss where it is a module.
        optimizer: May hold parameters of others.

    Attributes:
        modules: Every module, once.
        parameters: Every tensor whose ``.grad`` a step owns: the modules', and the optimizer's.
    """

    def __init__(self, roots: Sequence[nn.Module], optimizer: Optimizer) -> None:
        self._roots = roots
        self._optimizer = optimizer
        self.refresh()

    def refresh(self) -> None:
        """Look again: layers, parameters and groups may have been added."""
        self.modules = _modules(self._roots)
        held: dict[int, Tensor] = {}
        for module in self.modules:
            for parameter in vars(module)["_parameters"].values():
                if parameter is not None:
                    held[id(parameter)] = parameter
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                held[id(parameter)] = parameter
        self.parameters = list(held.values())

    def batch_norms(self) -> list[_BatchNorm]:
        """Return the BatchNorm layers."""
        return [module for module in self.modules if isinstance(module, _BatchNorm)]


def _modules(roots: Sequence[nn.Module]) -> list[nn.Module]:
    found = {id(root): root for root in roots}
    unseen = list(roots)
    while unseen:
        for child in vars(unseen.pop())["_modules"].values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                unseen.append(child)
    return list(found.values())
