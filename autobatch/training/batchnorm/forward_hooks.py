"""Track every call of a BatchNorm layer in a logical batch that is cut, and notice missed calls.

During such a batch each layer runs a forward pass of its own with momentum 1: its buffers then hold
the mean and the unbiased variance of its input. A module hook would take six times as long.
"""

import operator
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from autobatch.errors import InexactStepError
from autobatch.training.batchnorm.statistics import RunningStatistics, mean_and_variance

_TORCH_FORWARD: Final = _BatchNorm.forward
_UNTRACKED: Final = (
    "a BatchNorm layer updated its running statistics in a call that was not tracked (its class's "
    "forward called by hand, compiled before the batch was cut, or with new buffers for each "
    'call), so they cannot be pooled; call it as a module, or pass batch_norm="frozen"'
)

ForwardMethod = Callable[..., Tensor]
OnCall = Callable[[int, Tensor], None]


class BatchNormTracker:
    """Tracks every call that updates the layers' statistics, and detects calls that it missed.

    Torch counts writes (``_version``) to the number of batches, but not to running means and
    variances. The replacement for torch's own forward pass skips that number, because counting
    costs as much as everything else that a window does for BatchNorm: if the number changes anyway,
    a call was missed. A subclass's own forward pass still counts, so its calls are compared with
    the number.

    Args:
        statistics: The layers, with a copy of their statistics from before the logical batch.
    """

    def __init__(self, statistics: RunningStatistics) -> None:
        self._statistics = statistics
        self._versions: list[int] = []  # Versions of num_batches_tracked at the first micro-batch.
        self._calls: dict[int, int] = {}  # Calls that count, in this micro-batch, by layer index.
        self._earlier_calls: Counter[int] = Counter()  # The same of earlier micro-batches.
        self._compiled = False

    @contextmanager
    def tracking(self, on_call: OnCall) -> Iterator[None]:
        """Replace the layers' forward passes inside the block.

        Args:
            on_call: Called before each tracked call, with the layer's index and its input. It is
                not stored: its owner holds this tracker, and a reference cycle would keep memory
                until the garbage collector runs.
        """
        layers = self._statistics.layers
        saved = [(vars(layer), layer.momentum, vars(layer).get("forward")) for layer in layers]
        try:
            for index, (attributes, _, forward) in enumerate(saved):
                # Writing to the dictionary is faster than setattr, which searches the module first.
                if forward is None and type(layers[index]).forward is _TORCH_FORWARD:
                    uncounted = _uncounted_forward(layers[index])
                    attributes["forward"] = self._tracked(index, on_call, uncounted)
                else:
                    tracked = self._tracked(index, on_call, self._counting_forward(index))
                    attributes.update(forward=tracked, momentum=1.0)
            yield
        finally:
            for attributes, momentum, forward in saved:
                attributes["momentum"] = momentum
                if forward is None:
                    attributes.pop("forward", None)
                else:
                    attributes.update(forward=forward)

    def begin(self) -> None:
        """Begin a micro-batch; what ran before the first one was restored.

        The calls of each micro-batch are counted from 0: a compiled forward pass would be compiled
        again for every number that it has not seen.
        """
        if not self._versions:
            self._versions = self._statistics.versions()
            self._calls = {}
        elif self._calls:
            self._earlier_calls.update(self._calls)
            self._calls = {}

    def check(self) -> bool:
        """Return whether layers have counted calls, all of which were tracked.

        Raises:
            InexactStepError: If a layer has new buffers, or ran more often than was tracked.
        """
        self.begin()
        statistics = self._statistics
        if self._compiled:  # A compiled call may write to the number of batches several times.
            counted = statistics.counted()
        else:
            counted = list(map(operator.sub, statistics.versions(), self._versions))
        missed = any(n > self._earlier_calls[index] for index, n in enumerate(counted) if n)
        if missed or not statistics.are_bound():
            raise InexactStepError(_UNTRACKED)
        return bool(self._earlier_calls)

    def _tracked(
        self, index: int, on_call: OnCall, training_forward: ForwardMethod
    ) -> ForwardMethod:
        """Return a forward pass which calls ``on_call``, then ``training_forward``."""
        layer = self._statistics.layers[index]
        original_forward, buffers = layer.forward, layer._buffers
        mean, _ = mean_and_variance(self._statistics.buffers[index])

        def forward(*inputs: Tensor, **named: Tensor) -> Tensor:
            if not (layer.training and layer.track_running_stats):
                with self._original_statistics(index):
                    return original_forward(*inputs, **named)
            # functional_call may give the layer other buffers for this call.
            if buffers["running_mean"] is not mean:
                return original_forward(*inputs, **named)
            on_call(index, inputs[0] if inputs else named["input"])
            return training_forward(*inputs, **named)

        return forward

    def _counting_forward(self, index: int) -> ForwardMethod:
        """Return a layer's own forward pass, with its calls counted."""
        original_forward = self._statistics.layers[index].forward

        def forward(*inputs: Tensor, **named: Tensor) -> Tensor:
            self._calls[index] = self._calls.get(index, 0) + 1
            if torch.compiler.is_compiling():
                self._compiled = True
            return original_forward(*inputs, **named)

        return forward

    @contextmanager
    def _original_statistics(self, index: int) -> Iterator[None]:
        """Give a layer the values from before the logical batch, for a call in evaluation mode."""
        statistics = self._statistics
        own, values = statistics.buffers[index], statistics.values.split(statistics.channels)
        mean, variance = mean_and_variance(own)
        buffers = statistics.layers[index]._buffers
        buffers["running_mean"] = values[index].to(mean.dtype)
        buffers["running_var"] = values[index + len(statistics.layers)].to(variance.dtype)
        try:
            yield
        finally:
            buffers.update(own)


def _uncounted_forward(layer: _BatchNorm) -> Callable[[Tensor], Tensor]:
    """Return torch's own forward pass in training, with momentum 1 and without counting batches.

    It calls ``torch.batch_norm`` directly where the checks of ``F.batch_norm`` are known to pass,
    and ``F.batch_norm`` otherwise: for tensor subclasses, and for one value a channel.
    """
    buffers, parameters = layer._buffers, layer._parameters  # Faster than getattr.
    plain = "weight" in parameters and "bias" in parameters  # False for parametrized layers.
    eps = layer.eps

    def forward(input: Tensor) -> Tensor:  # Torch's name.
        layer._check_input_dim(input)
        mean, variance = buffers["running_mean"], buffers["running_var"]
        if plain:
            weight, bias = parameters["weight"], parameters["bias"]
        else:
            weight, bias = layer.weight, layer.bias
        if type(input) is not Tensor or input.numel() <= input.shape[1] or eps <= 0:
            return F.batch_norm(input, mean, variance, weight, bias, True, 1.0, eps)
        cudnn = torch.backends.cudnn.enabled
        return torch.batch_norm(input, weight, bias, mean, variance, True, 1.0, eps, cudnn)

    return forward
