"""What a model and its optimizer are made of, looked up once a step."""

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer


class Members:
    """Modules and parameters of the model and the loss, as of the last ``refresh``.

    A step asks for them again and again, and ``nn.Module.parameters`` makes a name for each: on a
    small net that alone takes longer than a forward pass.

    Args:
        model: The root of most of them.
        others: More roots: the loss, where it is a module.
        optimizer: May hold parameters of others.

    Attributes:
        of_model: Every module of the model, once.
        modules: Those, and the others'.
        parameters: Every tensor whose ``.grad`` a step owns: the modules', and the optimizer's.
    """

    def __init__(self, model: nn.Module, others: Sequence[nn.Module], optimizer: Optimizer) -> None:
        self._model = model
        self._others = others
        self._optimizer = optimizer
        self.refresh()

    def refresh(self) -> None:
        """Look again: layers, parameters and groups may have been added."""
        self.of_model = _modules([self._model])
        known = set(map(id, self.of_model))
        others = [m for m in _modules(self._others) if id(m) not in known] if self._others else []
        self.modules = [*self.of_model, *others]
        held = {}
        for module in self.modules:
            for parameter in vars(module)["_parameters"].values():
                if parameter is not None:
                    held[id(parameter)] = parameter
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                held[id(parameter)] = parameter
        self.parameters = list(held.values())


def _modules(roots: Sequence[nn.Module]) -> list[nn.Module]:
    found = {id(root): root for root in roots}
    unseen = list(roots)
    while unseen:
        for child in vars(unseen.pop())["_modules"].values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                unseen.append(child)
    return list(found.values())
