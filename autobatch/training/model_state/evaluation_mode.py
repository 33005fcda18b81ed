"""A model that is only tried, or evaluated: it is as it was afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from autobatch.devices.cpu import eagerly
from autobatch.state.rng import generators_in
from autobatch.training.model_state.mutations import parameters_at_rest
from autobatch.training.model_state.window_snapshot import window_snapshot


@contextmanager
def undisturbed(model: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Evaluation mode and no gradient until the end; then modes, buffers and RNG as before.

    Args:
        model: In any mode.
        training: For what only trains, such as a detector that returns its losses in training mode
            alone: all is in that mode, but for layers that normalise by the batch or drop out.

    Raises:
        InexactStepError: If parameters have moved inside.
    """
    start = window_snapshot(
        list(model.modules()), generators_in(model)
    )  # The mode is an attribute as others are.
    try:
        model.eval()
        for module in model.modules() if training else ():
            module.training = not isinstance(module, _NormBase | _DropoutNd)
        # Compiled for one example and for two, it would be compiled again for what it trains on.
        with torch.no_grad(), eagerly(), parameters_at_rest(model):
            yield
    finally:
        start.put_back()
