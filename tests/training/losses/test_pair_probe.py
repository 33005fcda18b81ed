"""Two examples run alone and together, and a check swallows no error that training needs."""

import pytest
import torch
from torch import Tensor, nn

from autobatch.errors import InexactStepError
from autobatch.training.losses.pair_probe import probe_pair, probe_pair_in_either_mode

PAIR = torch.tensor([[1.0], [2.0]])


class Recorded(nn.Module):
    """Records the mode of each call, and fails in the modes that it is given errors for."""

    def __init__(self, errors: dict[bool, Exception] | None = None) -> None:
        super().__init__()
        self.errors = errors or {}

    def forward(self, rows: Tensor) -> float:
        modes_seen.append(self.training)
        if self.training in self.errors:
            raise self.errors[self.training]
        return float(rows.sum())


modes_seen: list[bool] = []


@pytest.fixture(autouse=True)
def _forget_modes() -> None:
    modes_seen.clear()


@pytest.mark.parametrize("training", [False, True])
def test_each_example_runs_alone_and_both_run_twice(training: bool) -> None:
    model = Recorded().train(not training)
    assert probe_pair(model, model, PAIR, training=training) == (1, 2, 3, 3)
    assert modes_seen == [training] * 4
    assert model.training is not training


def test_a_model_that_fails_in_evaluation_mode_runs_in_training_mode() -> None:
    model = Recorded({False: KeyError("no losses")})
    assert probe_pair_in_either_mode(model, model, PAIR) == (1, 2, 3, 3)
    assert modes_seen == [False] + [True] * 4


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), InexactStepError("not exact")]
)
def test_memory_errors_and_inexact_steps_pass_at_once(error: Exception) -> None:
    model = Recorded({False: error})
    with pytest.raises(type(error)):
        probe_pair_in_either_mode(model, model, PAIR)
    assert modes_seen == [False]


def test_an_error_in_both_modes_has_a_note() -> None:
    model = Recorded({False: KeyError("first"), True: KeyError("second")})
    with pytest.raises(KeyError, match="second") as caught:
        probe_pair_in_either_mode(model, model, PAIR)
    assert caught.value.__notes__ == ["a check ran the model on two examples, alone and together"]
