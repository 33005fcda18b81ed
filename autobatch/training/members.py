"""What a model and its optimizer are made of, looked up once a step."""

import operator
from collections.abc import Sequence
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
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
        batch_norms: Those of BatchNorm among them.
        modules: All of the model's, and the others'.
        parameters: Every tensor whose ``.grad`` a step owns: the modules', and the optimizer's.
    """

    def __init__(self, model: nn.Module, others: Sequence[nn.Module], optimizer: Optimizer) -> None:
        self._model = model
        self._others = others
        self._optimizer = optimizer
        self._find()

    def refresh(self) -> None:
        """Look again: layers, parameters and groups may have been added.

        Most often none were, and that is found out without looking into each module: what lies
        there is cold behind a whole window.
        """
        held = self._held_now()
        if sum(map(len, held)) != len(self._found) or not all(
            map(operator.is_, chain.from_iterable(held), self._found)
        ):
            self._find()

    def _find(self) -> None:
        modules: dict[int, nn.Module] = {}
        parameters: dict[int, Tensor] = {}
        _walk([self._model], modules, parameters)
        self.of_model = list(modules.values())
        self.batch_norms = [m for m in self.of_model if isinstance(m, _BatchNorm)]
        _walk(self._others, modules, parameters)
        self.modules = list(modules.values())
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                parameters[id(parameter)] = parameter
        self.parameters = list(parameters.values())
        # Modules keep their own children and parameters in two dictionaries, always the same.
        self._dicts: list[dict[str, Any]] = []
        for module in self.modules:
            self._dicts += [vars(module)["_modules"], vars(module)["_parameters"]]
        self._found = list(chain.from_iterable(self._held_now()))

    def _held_now(self) -> list[Any]:
        """What hangs on each module, and on each of the optimizer's groups."""
        groups = [group["params"] for group in self._optimizer.param_groups]
        return [*map(dict.values, self._dicts), *groups]


def _walk(
    roots: Sequence[nn.Module], modules: dict[int, nn.Module], parameters: dict[int, Tensor]
) -> None:
    """Add what hangs on these roots, each by its id and once."""
    unseen = []
    for root in roots:
        if id(root) not in modules:
            modules[id(root)] = root
            unseen.append(root)
    while unseen:
        own = vars(unseen.pop())
        for parameter in own["_parameters"].values():
            if parameter is not None:
                parameters[id(parameter)] = parameter
        for child in own["_modules"].values():
            if child is not None and id(child) not in modules:
                modules[id(child)] = child
                unseen.append(child)
