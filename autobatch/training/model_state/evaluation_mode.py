"""Run a model in evaluation mode, and restore its state afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from autobatch.devices.cpu import eagerly
from autobatch.state.rng import generators_in
from autobatch.training.model_state.mutations import refuse_parameter_changes
from autobatch.training.model_state.window_snapshot import window_snapshot


@contextmanager
def undisturbed(model: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Set evaluation mode and disable gradients inside; restore modes, buffers and RNG at the end.

    Args:
        model: In any mode.
        training: True sets training mode for every module except normalization and dropout. A model
            needs this if it computes its loss in training mode only, as torchvision's detectors do.

    Raises:
        InexactStepError: If the model's forward pass changed parameters.
    """
    # The snapshot also holds the modes: they are plain attributes.
    snapshot = window_snapshot(list(model.modules()), generators_in(model))
    try:
        model.eval()
        for module in model.modules() if training else ():
            module.training = not isinstance(module, _NormBase | _DropoutNd)
        # A model compiled for one example and for two would be compiled again for training.
        with torch.no_grad(), eagerly(), refuse_parameter_changes(model):
            yield
    finally:
        snapshot.restore()
