"""BatchNorm layers in a window that is cut: each call is heard of, and none goes unnoticed.

A layer has a forward pass of its own there, with momentum 1: it leaves in the layer's buffers the
mean and the unbiased variance of what it saw. A hook would take six times as long.
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
from autobatch.training.batchnorm.statistics import Statistics, mean_and_variance

_TORCHS_OWN: Final = _BatchNorm.forward
_UNSEEN: Final = (
    "a BatchNorm layer moved its running statistics unseen (its class's forward called by hand, "
    "compiled before the batch was cut, or with new buffers for each call), so they cannot be "
    'pooled; call it as a module, or pass batch_norm="frozen"'
)

Forward = Callable[..., Tensor]
Heard = Callable[[int, Tensor], None]


class ForwardTracker:
    """Hears of every call that moves the layers' statistics, and knows whether it missed one.

    Torch counts no writing to running means and variances, but that to the number of batches. Its
    own forward pass is done here without that number, whose counting costs as much as all else that
    a window does for BatchNorm: there, a number that moves gives a call away. A subclass's forward
    pass counts itself, and how often is known.

    Args:
        taken: The layers, and their statistics before the window.
    """

    def __init__(self, taken: Statistics) -> None:
        self._taken = taken
        self._versions: list[int] = []  # Of the numbers, when the first one began.
        self._passed: dict[int, int] = {}  # By place: calls that counted themselves,
        self._earlier: Counter[int] = Counter()  # and those before this micro-batch.
        self._compiled = False

    @contextmanager
    def over_layers(self, heard: Heard) -> Iterator[None]:
        """Watch them inside.

        Args:
            heard: Is told of a call before it runs: the layer's place, and its input. Not kept, for
                who is told holds this: memory that waits for the garbage collector is not free.
        """
        layers = self._taken.layers
        kept = [(vars(layer), layer.momentum, vars(layer).get("forward")) for layer in layers]
        try:
            for place, (own, _, forward) in enumerate(kept):
                # A module's own way of setting looks at all it has first.
                if forward is None and type(layers[place]).forward is _TORCHS_OWN:
                    own["forward"] = self._watched(place, heard, _uncounted(layers[place]))
                else:
                    noted = self._watched(place, heard, self._counting(place))
                    own.update(forward=noted, momentum=1.0)
            yield
        finally:
            for own, momentum, forward in kept:
                own["momentum"] = momentum
                own.pop("forward", None) if forward is None else own.update(forward=forward)

    def begin(self) -> None:
        """Begin a micro-batch; what ran before the first one has been put back.

        Its calls are counted from 0: what is compiled would be again for each number that it meets.
        """
        if not self._versions:
            self._versions = self._taken.versions()
            self._passed = {}
        elif self._passed:
            self._earlier.update(self._passed)
            self._passed = {}

    def refuse_unseen(self) -> bool:
        """Return whether layers have counted calls, all of which were heard of.

        Raises:
            InexactStepError: If a layer has new statistics, or ran more often than was heard of.
        """
        self.begin()
        taken = self._taken
        if self._compiled:  # There a call may be written several times.
            counted = taken.counted()
        else:
            counted = list(map(operator.sub, taken.versions(), self._versions))
        unseen = any(n > self._earlier[place] for place, n in enumerate(counted) if n)
        if unseen or not taken.are_bound():
            raise InexactStepError(_UNSEEN)
        return bool(self._earlier)

    def _watched(self, place: int, heard: Heard, noted: Forward) -> Forward:
        """Return the layer's forward pass; ``noted`` is the one that is heard of."""
        layer = self._taken.layers[place]
        run, buffers = layer.forward, layer._buffers
        mean, _ = mean_and_variance(self._taken.buffers[place])

        def forward(*inputs: Tensor, **named: Tensor) -> Tensor:
            if not (layer.training and layer.track_running_stats):
                with self._as_before(place):
                    return run(*inputs, **named)
            # Others than its own may be lent to it for this call, as by functional_call.
            if buffers["running_mean"] is not mean:
                return run(*inputs, **named)
            heard(place, inputs[0] if inputs else named["input"])
            return noted(*inputs, **named)

        return forward

    def _counting(self, place: int) -> Forward:
        """Return a layer's own forward pass, which counts itself."""
        run = self._taken.layers[place].forward

        def forward(*inputs: Tensor, **named: Tensor) -> Tensor:
            self._passed[place] = self._passed.get(place, 0) + 1
            if torch.compiler.is_compiling():
                self._compiled = True
            return run(*inputs, **named)

        return forward

    @contextmanager
    def _as_before(self, place: int) -> Iterator[None]:
        """Give a layer the values from before the window, for a call that moves nothing."""
        taken = self._taken
        own, parts = taken.buffers[place], taken.values.split(taken.channels)
        mean, variance = mean_and_variance(own)
        buffers = taken.layers[place]._buffers
        buffers["running_mean"] = parts[place].to(mean.dtype)
        buffers["running_var"] = parts[place + len(taken.layers)].to(variance.dtype)
        try:
            yield
        finally:
            buffers.update(own)


def _uncounted(layer: _BatchNorm) -> Callable[[Tensor], Tensor]:
    """Return torch's own forward pass in training, with momentum 1 and without counting.

    What ``F.batch_norm`` sees to is seen to here, which costs less: a channel must have more than
    one value, and a tensor of another class knows its own way.
    """
    buffers, parameters = layer._buffers, layer._parameters  # A module asks all it has first.
    held = "weight" in parameters and "bias" in parameters  # Or they are computed.
    eps = layer.eps

    def forward(input: Tensor) -> Tensor:  # Torch's name.
        layer._check_input_dim(input)
        mean, variance = buffers["running_mean"], buffers["running_var"]
        if held:
            weight, bias = parameters["weight"], parameters["bias"]
        else:
            weight, bias = layer.weight, layer.bias
        if type(input) is not Tensor or input.numel() <= input.shape[1] or eps <= 0:
            return F.batch_norm(input, mean, variance, weight, bias, True, 1.0, eps)
        on = torch.backends.cudnn.enabled
        return torch.batch_norm(input, weight, bias, mean, variance, True, 1.0, eps, on)

    return forward
