"""The modules and parameters of a training step, looked up once a step."""

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class ParameterCache:
    """Modules and parameters of the model and the loss, as of the last ``refresh``.

    Args:
        model: The model.
        others: Further root modules: the loss, if it is a module.
        more_parameters: Returns parameters that may belong to no module: the optimizer's.

    Attributes:
        batch_norms: The model's BatchNorm layers.
        modules: Every module of the model and of ``others``, once.
        parameters: Every tensor whose ``.grad`` the step owns, once.
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
        """Look everything up again; layers and parameter groups may have been added or replaced."""
        model_modules = list(self._model.modules())
        self.batch_norms = [module for module in model_modules if isinstance(module, _BatchNorm)]
        others = [module for other in self._others for module in other.modules()]
        self.modules = list(dict.fromkeys([*model_modules, *others]))
        own = [p for m in self.modules for p in m._parameters.values() if p is not None]
        by_id = {id(parameter): parameter for parameter in (*own, *self._more_parameters())}
        self.parameters: list[Tensor] = list(by_id.values())
