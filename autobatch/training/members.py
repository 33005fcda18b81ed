"""What a model and its optimizer are made of, looked up once a step."""

from collections.abc import Sequence

from torch import Tensor, nn
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
        modules: dict[int, nn.Module] = {}
        parameters: dict[int, Tensor] = {}
        _find([self._model], modules, parameters)
        self.of_model = list(modules.values())
        _find(self._others, modules, parameters)
        self.modules = list(modules.values())
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                parameters[id(parameter)] = parameter
        self.parameters = list(parameters.values())


def _find(
    roots: Sequence[nn.Module], modules: dict[int, nn.Module], parameters: dict[int, Tensor]
) -> None:
    """Add what hangs on these roots, each by its id and once."""
    unseen = []
    for root in roots:
        if id(root) not in modules:
            modules[id(root)] = root
            unseen.append(root)
    while unseen:
        own = vars(unseen.pop())  # Behind a window all this is cold: each is looked at once.
        for parameter in own["_parameters"].values():
            if parameter is not None:
                parameters[id(parameter)] = parameter
        for child in own["_modules"].values():
            if child is not None and id(child) not in modules:
                modules[id(child)] = child
                unseen.append(child)
