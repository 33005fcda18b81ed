"""Steps of many kinds, predicted without a GPU: what is traced, what is refused, and how."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import spectral_norm

import autobatch
from autobatch import AutobatchError, peak, predict
from autobatch.cli import main
from autobatch.prediction import traced_step as module
from autobatch.prediction.gpu_catalogue import find_gpu
from autobatch.prediction.result import Prediction

KIB = 2**10
DATA = torch.zeros(4, 64), torch.zeros(4, dtype=torch.long)


def slope(found: Prediction) -> float:
    """Bytes an example, once the batch is large."""
    return (found.peak_bytes(40_960) - found.peak_bytes(20_480)) / 20_480


def test_a_gradient_of_a_gradient_is_traced() -> None:
    """Gradient penalties: the first gradient, of 1 KiB an example, has a graph of its own."""
    net = nn.Linear(256, 256, bias=False)

    def penalty(batch: int) -> None:
        x = torch.ones(batch, 256, device=net.weight.device, requires_grad=True)
        (gradient,) = torch.autograd.grad(net(x).tanh().sum(), x, create_graph=True)
        gradient.square().sum().backward()

    def plain(batch: int) -> None:
        x = torch.ones(batch, 256, device=net.weight.device, requires_grad=True)
        net(x).tanh().square().sum().backward()

    twice, once = peak(penalty, gpu="T4"), peak(plain, gpu="T4")
    assert not any("as on the CPU" in note for note in twice.notes)
    assert slope(once) >= 3 * KIB  # The input, what tanh and the square have kept.
    assert slope(twice) >= slope(once) + 2 * KIB


def test_a_gradient_alone_is_the_same_step_at_all_batches() -> None:
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 1))

    def step(batch: int) -> None:
        device = next(net.parameters()).device
        x = torch.ones(batch, 64, device=device, requires_grad=True)
        torch.autograd.grad(net(x).sum(), x)

    assert not any("different ways" in note for note in peak(step, gpu="T4").notes)


class Moving(torch.autograd.Function):
    """Its backward pass moves a tensor to where it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        assert gradient.is_cuda
        moved = x.to(gradient.device)
        assert moved.untyped_storage()._cdata == x.untyped_storage()._cdata, "it was copied"
        product: Tensor = gradient * moved
        return product


def test_code_in_a_backward_pass_sees_the_device() -> None:
    net = nn.Linear(64, 64)

    def step(batch: int) -> None:
        made: Any = Moving.apply
        made(net(torch.ones(batch, 64, device=net.weight.device))).sum().backward()

    assert peak(step, gpu="T4").tolerable


class Recurrent(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.inner, self.last = kind(8, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        states: Tensor = self.inner(x.view(len(x), 8, 8))[0]
        scores: Tensor = self.last(states[:, -1])
        return scores


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_recurrent_layers_are_traced_as_cells_and_that_is_noted(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A GRU's largest batch is not asked for here, and would be traced for half a minute.
    monkeypatch.setattr(module, "_TIME_LIMIT_SECONDS", 0.001)
    found = predict(Recurrent(kind), DATA, gpu="T4")
    assert any("traced as single cells" in note for note in found.notes)
    assert slope(found) >= 8 * 16 * 4 * 4, "states and gates of eight steps"


class Attending(nn.Module):
    def __init__(self, *, plainly: bool) -> None:
        super().__init__()
        self.first, self.last, self.plainly = nn.Linear(1, 48), nn.Linear(16, 3), plainly

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.first(x[:, None, :, None]).chunk(3, -1)
        if self.plainly:
            with sdpa_kernel(SDPBackend.MATH):
                seen = F.scaled_dot_product_attention(q, k, v)
        else:
            seen = F.scaled_dot_product_attention(q, k, v)
        scores: Tensor = self.last(seen[:, 0].mean(1))
        return scores


def test_attention_takes_the_kernel_that_it_may() -> None:
    free, plain = (predict(Attending(plainly=p), DATA, gpu="RTX 4090") for p in (False, True))
    assert slope(plain) >= slope(free) + 64 * 64 * 4, "every weight of the attention is kept"


class Sam(torch.optim.Optimizer):
    """Keeps a number outside of its groups, as many an optimizer does."""

    def __init__(self, parameters: Any, reach: float = 0.05) -> None:
        super().__init__(parameters, {})
        self.reach = reach

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ARG002
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad * self.reach)


def test_an_optimizer_takes_what_it_holds_along() -> None:
    found = predict(nn.Linear(64, 3), DATA, gpu="T4", optimizer=Sam)
    assert found.breakdown.gradient_bytes == 1024 + 512  # 64 x 3 numbers and 3, in blocks.


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import torch
from torch import nn
from autobatch import predict
import test_traced_kinds as kinds

class Sam(kinds.Sam):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad * self.reach)

found = predict(nn.Linear(64, 3), kinds.DATA, gpu="T4", optimizer=Sam)
print(found.breakdown.gradient_bytes)
"""


def test_the_steps_of_an_optimizer_of_a_script_are_seen(tmp_path: Path) -> None:
    """Its class is sent by value, and would be with hooks of its own."""
    file = tmp_path / "script.py"
    file.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    root = str(Path(autobatch.__file__).parent.parent)
    said = subprocess.run(
        [sys.executable, file], env={**os.environ, "PYTHONPATH": root},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert said.split() == ["1536"]


class Careful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        if torch.isnan(x).any() or torch.isinf(x).sum() > 0:
            raise ValueError("there is a nan in the data")
        assert torch.isfinite(x).all()
        scores: Tensor = self.inner(x)
        return scores


def test_who_asks_for_nan_is_told_that_there_is_none() -> None:
    found = predict(Careful(), DATA, gpu="T4")
    assert any("all is a number at test_traced_kinds.py" in note for note in found.notes)


def masked(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs[targets != 0], targets[targets != 0])


def test_a_shape_that_depends_on_values_is_told_with_its_line() -> None:
    with pytest.raises(AutobatchError, match=r"depends on values, at test_traced_kinds.py:\d+"):
        predict(nn.Linear(64, 3), DATA, gpu="T4", loss=masked)


class Doubling(nn.Module):
    """Makes tensors of whatever dtype is the default."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 512)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.inner(x)
        return scores + torch.zeros(scores.shape, device=scores.device)


def test_the_default_dtype_is_that_of_here() -> None:
    default = torch.get_default_dtype()
    found = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            found.append(predict(Doubling(), (torch.zeros(4, 64), DATA[1]), gpu="T4"))
        finally:
            torch.set_default_dtype(default)
    assert not any("as on the CPU" in note for each in found for note in each.notes)
    assert slope(found[1]) == pytest.approx(2 * slope(found[0]), rel=0.05)


def test_a_module_with_parametrizations_is_sent() -> None:
    model = nn.Sequential(spectral_norm(nn.Linear(64, 8)), nn.Linear(8, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert predict(model, DATA, gpu="T4").tolerable
    assert type(model[0]).__name__ == "ParametrizedLinear"
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


class Looping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.inner(row) for row in x])


def test_a_loop_over_the_batch_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TIME_LIMIT_SECONDS", 0.001)
    found = predict(Looping(), DATA, gpu="T4")
    assert found.tolerable == 66, "33 was a proof, and one more was traced"
    assert f"larger batches than {found.tolerable} may fit: tracing them takes too long" in (
        found.notes
    )
    assert [what_if.change for what_if in found.what_ifs] == ["expandable segments"]


def test_a_step_that_makes_its_tensors_elsewhere_is_told_where_to() -> None:
    net = nn.Linear(64, 3)
    with pytest.raises(Exception, match="same device") as caught:
        peak(lambda batch: net(torch.zeros(batch, 64)).sum().backward(), gpu="T4")
    assert any("next(model.parameters()).device" in note for note in caught.value.__notes__)


def test_a_compiled_model_is_told_not_to_be_traced_as_such() -> None:
    compiled: Any = torch.compile(nn.Linear(64, 8), backend="eager")
    model = nn.Sequential(compiled, nn.Linear(8, 3))
    assert any("torch.compile" in note for note in predict(model, DATA, gpu="T4").notes)


class Pair(nn.Module):
    """Returns more than one tensor, as googlenet does in training."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3 * 8 * 8, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores: Tensor = self.inner(x.flatten(1))
        return scores, scores


def test_the_command_tells_no_traceback_of_another_process(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["predict", "test_traced_kinds:Pair", "--gpu", "T4", "--pixels", "8"]) != 0
    said = capsys.readouterr().err
    assert "one tensor of outputs" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("name", ["24G", "-3GiB", "80 g"])
def test_a_size_that_is_none_is_no_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"with its unit, such as 24GiB, got '{name}'"):
        find_gpu(name)


def test_what_is_no_name_at_all_is_refused() -> None:
    with pytest.raises(TypeError, match="got None"):
        find_gpu(None)  # type: ignore[arg-type]


def test_a_change_that_allows_less_without_allocating_more_is_explained() -> None:
    """The README's own: blocks are torn by what is small and stays."""
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(246016, 10))
    data = torch.zeros(4, 3, 64, 64), torch.zeros(4, dtype=torch.long)
    found = predict(model, data, gpu="RTX 4090", precision="bf16")
    allowed = {what_if.change: what_if.tolerable for what_if in found.what_ifs}
    assert allowed["fused AdamW"] < 0.9 * found.tolerable < allowed["SGD with momentum"]
    told = [note.split(" allocates no more")[0] for note in found.notes if "no more" in note]
    assert told == ["fused AdamW"]
