"""The modules and parameters that a training step works on, looked up once a step."""

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class ParameterCache:
    """Modules and parameters of the model and the loss, as of the last ``refresh``.

    Args:
        model: The root of most modules.
        others: More roots: the loss, where it is a module.
        more_parameters: Returns parameters that may belong to none of these modules: the
            optimizer's.

    Attributes:
        batch_norms: The model's BatchNorm layers.
        modules: Every module of the model and of the others, once.
        parameters: Every tensor whose ``.grad`` a step owns, once.
    """

    def __init__(
        self,
        model: nn.Module,
        others: Sequence[nn.Module],
        more_parameters: Callable[[], Iterable[Tensor]],
    ) -> None:
        self._model = model
        self._others = others
        self._more_parameters = more_parameters
        self.refresh()

    def refresh(self) -> None:
        """Look again: layers, parameters and parameter groups may have been added."""
        of_model = list(self._model.modules())
        self.batch_norms = [module for module in of_model if isinstance(module, _BatchNorm)]
        others = [module for other in self._others for module in other.modules()]
        self.modules = list(dict.fromkeys([*of_model, *others]))
        own = [p for m in self.modules for p in m._parameters.values() if p is not None]
        found = {id(parameter): parameter for parameter in (*own, *self._more_parameters())}
        self.parameters: list[Tensor] = list(found.values())
