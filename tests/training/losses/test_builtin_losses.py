"""Torch's own losses give the undivided loss and gradient from any split."""

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor, nn

from autobatch.data.tree import BatchTree
from autobatch.training.losses.callable import CallableLoss
from autobatch.training.losses.loss import Loss
from autobatch.training.losses.resolve import resolve_loss

drawn = settings(deadline=None, max_examples=10, derandomize=True)
TorchLoss = Callable[[Tensor, Tensor], Tensor]
Problem = Callable[[int, Generator], tuple[Tensor, Tensor]]


def normal(*shape: int, generator: Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def classes(*shape: int) -> Problem:
    """Logits ``(size, 5, *shape)`` and class indices ``(size, *shape)``."""

    def problem(size: int, generator: Generator) -> tuple[Tensor, Tensor]:
        return (
            normal(size, 5, *shape, generator=generator),
            torch.randint(0, 5, (size, *shape), generator=generator),
        )

    return problem


def probabilities(*shape: int) -> Problem:
    """Logits and class probabilities, both ``(size, 5, *shape)``."""

    def problem(size: int, generator: Generator) -> tuple[Tensor, Tensor]:
        target = normal(size, 5, *shape, generator=generator).softmax(1)
        return normal(size, 5, *shape, generator=generator), target

    return problem


def reals(*shape: int) -> Problem:
    def problem(size: int, generator: Generator) -> tuple[Tensor, Tensor]:
        return (
            3 * normal(size, *shape, generator=generator),
            normal(size, *shape, generator=generator),
        )

    return problem


def units(*shape: int) -> Problem:
    """Outputs and targets between 0 and 1."""

    def problem(size: int, generator: Generator) -> tuple[Tensor, Tensor]:
        output, target = reals(*shape)(size, generator)
        return output.sigmoid(), target.sigmoid()

    return problem


def logs(size: int, generator: Generator) -> tuple[Tensor, Tensor]:
    output, target = probabilities(2)(size, generator)
    return output.log_softmax(1), target.log()


def log_and_probabilities(size: int, generator: Generator) -> tuple[Tensor, Tensor]:
    output, target = probabilities(2)(size, generator)
    return output.log_softmax(1), target


@dataclass(frozen=True)
class Case:
    """A loss, and a problem for it.

    Attributes:
        ignored: The class index that the loss ignores, or None.
    """

    loss: TorchLoss
    problem: Problem
    ignored: int | None = None

    def draw(self, seed: int, sizes: Sequence[int], hidden: int = 0) -> tuple[Tensor, Tensor]:
        """Outputs and targets; a third is ignored, and the whole part ``hidden``."""
        generator = Generator().manual_seed(seed)
        output, target = self.problem(sum(sizes), generator)
        if self.ignored is not None:
            target[torch.rand(target.shape, generator=generator) < 1 / 3] = self.ignored
            target.split(list(sizes))[hidden].fill_(self.ignored)
            self.show(target, -1 if hidden < len(sizes) - 1 else 0)
        return output.requires_grad_(), target

    def show(self, target: Tensor, index: int) -> None:
        """Make one element of the targets valid."""
        assert self.ignored is not None
        target.view(-1)[index] = (self.ignored + 1) % 5


W = torch.tensor([0.5, 2.0, 0.25, 1.0, 3.0], dtype=torch.float64)  # Class weights.
V = torch.tensor([0.5, 2.0, 0.25], dtype=torch.float64)  # Element weights.
CASES = {
    "cross-entropy": Case(nn.CrossEntropyLoss(), classes()),
    "cross-entropy, ignored": Case(nn.CrossEntropyLoss(), classes(3), -100),
    "cross-entropy, ignore_index": Case(nn.CrossEntropyLoss(ignore_index=2), classes(2, 3), 2),
    "cross-entropy, weighted": Case(nn.CrossEntropyLoss(W), classes(3), -100),
    "cross-entropy, smoothed": Case(nn.CrossEntropyLoss(label_smoothing=0.2), classes(3), -100),
    "cross-entropy, weighted, smoothed": Case(
        nn.CrossEntropyLoss(W, ignore_index=0, label_smoothing=0.2), classes(2), 0
    ),
    "cross-entropy, summed": Case(nn.CrossEntropyLoss(W, reduction="sum"), classes(3), -100),
    "cross-entropy, functional": Case(F.cross_entropy, classes(3), -100),
    "cross-entropy, partial": Case(
        functools.partial(F.cross_entropy, weight=W, ignore_index=4), classes(3), 4
    ),
    "cross-entropy of probabilities": Case(nn.CrossEntropyLoss(), probabilities()),
    "cross-entropy of probabilities, spatial": Case(nn.CrossEntropyLoss(), probabilities(2, 3)),
    "cross-entropy of probabilities, weighted": Case(
        nn.CrossEntropyLoss(W, label_smoothing=0.2), probabilities(3)
    ),
    "cross-entropy, inferred": Case(F.cross_entropy, classes(3), -100),
    "nll": Case(nn.NLLLoss(), classes(3), -100),
    "nll, weighted": Case(nn.NLLLoss(W, ignore_index=1), classes(2, 2), 1),
    "nll, functional": Case(functools.partial(F.nll_loss, weight=W), classes(), -100),
    "bce": Case(nn.BCELoss(), units(3)),
    "bce, weighted": Case(nn.BCELoss(V), units(3)),
    "bce, weighted, one row": Case(nn.BCELoss(V[None]), units(3)),
    "bce, functional": Case(functools.partial(F.binary_cross_entropy, weight=V), units(2, 3)),
    "bce with logits": Case(nn.BCEWithLogitsLoss(), units(3)),
    "bce with logits, weighted": Case(nn.BCEWithLogitsLoss(V, pos_weight=2 * V), units(3)),
    "bce with logits, maps": Case(nn.BCEWithLogitsLoss(pos_weight=V[:, None]), units(3, 2)),
    "bce with logits, one dimension": Case(nn.BCEWithLogitsLoss(pos_weight=V[:1]), units()),
    "bce with logits, functional": Case(F.binary_cross_entropy_with_logits, units(3)),
    "mse": Case(nn.MSELoss(), reals(2, 3)),
    "mse, one dimension": Case(nn.MSELoss(), reals()),
    "mse, summed": Case(nn.MSELoss(reduction="sum"), reals(3)),
    "mse, functional": Case(F.mse_loss, reals(3)),
    "l1": Case(nn.L1Loss(), reals(3)),
    "l1, functional": Case(functools.partial(F.l1_loss, reduction="sum"), reals(3)),
    "smooth l1": Case(nn.SmoothL1Loss(beta=0.5), reals(3)),
    "smooth l1, functional": Case(functools.partial(F.smooth_l1_loss, beta=0.0), reals(3)),
    "huber": Case(nn.HuberLoss(delta=0.7), reals(3)),
    "huber, functional": Case(functools.partial(F.huber_loss, delta=2.0), reals(3)),
    "kl": Case(nn.KLDivLoss(), log_and_probabilities),
    "kl, batchmean": Case(nn.KLDivLoss(reduction="batchmean"), log_and_probabilities),
    "kl, log_target": Case(nn.KLDivLoss(reduction="batchmean", log_target=True), logs),
    "kl, functional": Case(functools.partial(F.kl_div, log_target=True), logs),
    "kl, summed": Case(nn.KLDivLoss(reduction="sum"), log_and_probabilities),
}
by_case = pytest.mark.parametrize("name", CASES)


def in_parts(loss: Loss, output: Tensor, target: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Value and gradient as training accumulates them, with one denominator."""
    denominator = loss.denominator(target, len(target))
    value = torch.zeros((), dtype=torch.float64)
    for part, its in zip(output.split(list(sizes)), target.split(list(sizes)), strict=True):
        summed, terms = loss.summed(part, its, len(its))
        assert terms is None
        value = value + summed / denominator
    return [value.detach(), *torch.autograd.grad(value, output)]


def undivided(loss: TorchLoss, output: Tensor, target: Tensor) -> list[Tensor]:
    """Value and gradient by torch."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="reduction: 'mean' divides")  # Of KLDivLoss.
        value = loss(output, target)
    return [value.detach(), *torch.autograd.grad(value, output)]


def mean_of_means(
    loss: TorchLoss, output: Tensor, target: Tensor, weights: dict[int, float]
) -> list[Tensor]:
    """Value and gradient by the usual mistake: a weighted mean of the parts' means."""
    value = torch.zeros((), dtype=torch.float64)
    gradients = []
    parts = zip(output.split(list(weights)), target.split(list(weights)), strict=True)
    for weight, (part, its) in zip(weights.values(), parts, strict=True):
        own_value, own_gradient = undivided(loss, part.detach().requires_grad_(), its)
        value += weight * own_value
        gradients.append(weight * own_gradient)
    return [value, torch.cat(gradients)]


def assert_equal(one: list[Tensor], other: list[Tensor]) -> None:
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@by_case
@drawn
@given(
    seed=st.integers(0, 2**16),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    hidden=st.integers(0, 4),
)
def test_any_split_gives_the_undivided_loss_and_gradient(
    name: str, seed: int, sizes: list[int], hidden: int
) -> None:
    case = CASES[name]
    output, target = case.draw(seed, sizes, hidden % len(sizes))
    loss = resolve_loss(None if "inferred" in name else case.loss)
    assert not loss.checked
    assert_equal(in_parts(loss, output, target, sizes), undivided(case.loss, output, target))


@by_case
def test_the_mean_of_means_is_another_loss_and_gradient(name: str) -> None:
    case, sizes = CASES[name], (4, 2, 1)
    output, target = case.draw(3, sizes, hidden=-1)
    weights = dict.fromkeys(sizes, 1 / 3)
    if case.ignored is not None:
        case.show(target, -1)  # The mean of a part without a valid target is nan.
        weights = {size: size / 7 for size in sizes}  # Weights by examples are wrong as well.
    expected = undivided(case.loss, output, target)
    for wrong, right in zip(
        mean_of_means(case.loss, output, target, weights), expected, strict=True
    ):
        with pytest.raises(AssertionError, match="not close"):
            torch.testing.assert_close(wrong, right, rtol=1e-3, atol=1e-6)


@given(seed=st.integers(0, 2**16), sizes=st.lists(st.integers(1, 4), min_size=2, max_size=5))
@drawn
def test_the_inferred_loss_of_floating_targets_is_the_mean_squared_error(
    seed: int, sizes: list[int]
) -> None:
    output, target = CASES["mse"].draw(seed, sizes)
    assert_equal(
        in_parts(resolve_loss(None), output, target, sizes), undivided(F.mse_loss, output, target)
    )


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.ignored is not None])
def test_a_part_without_valid_targets_adds_nothing(name: str) -> None:
    case = CASES[name]
    output, target = case.draw(0, [4])
    assert case.ignored is not None
    target.fill_(case.ignored)
    loss = resolve_loss(case.loss)
    if "summed" not in name:
        assert loss.denominator(target, 4) == 0
    summed, _ = loss.summed(output, target, 4)
    summed.backward()
    assert summed.item() == 0
    assert output.grad is not None
    assert not output.grad.any()  # True for nan.


def test_the_byte_156_is_not_minus_100() -> None:
    target = torch.tensor([156, 0], dtype=torch.uint8)
    output = torch.zeros(2, 200, dtype=torch.float64, requires_grad=True)
    assert resolve_loss(F.cross_entropy).denominator(target, 2) == 2
    assert_equal(
        in_parts(resolve_loss(None), output, target, [1, 1]),
        undivided(F.cross_entropy, output, target),
    )


WEIGHTED: list[Callable[..., Tensor]] = [
    functional
    for functional in (F.mse_loss, F.l1_loss, F.huber_loss)
    if "weight" in inspect.signature(functional).parameters  # Versions of torch differ here.
]


@pytest.mark.parametrize("functional", WEIGHTED)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_weight_for_each_element_serves_every_example(
    functional: Callable[..., Tensor], reduction: str
) -> None:
    output, target = CASES["l1"].draw(0, [7])
    loss = functools.partial(functional, weight=V[None], reduction=reduction)
    # Torch itself needs the weights repeated for the whole batch.
    repeated = functools.partial(functional, weight=V.expand(7, 3), reduction=reduction)
    assert_equal(
        in_parts(resolve_loss(loss), output, target, [4, 2, 1]), undivided(repeated, output, target)
    )


@pytest.mark.parametrize(
    ("loss", "problem"),
    [
        *((functools.partial(f, weight=torch.ones(4, 3)), reals(3)) for f in WEIGHTED),
        (nn.BCELoss(torch.ones(4, 1)), units(3)),
        (nn.BCELoss(torch.ones(4)), units()),
        (nn.BCEWithLogitsLoss(torch.ones(4, 3)), units(3)),
        (nn.BCEWithLogitsLoss(pos_weight=torch.ones(4, 3)), units(3)),
    ],
)
def test_a_weight_for_each_example_is_refused(loss: TorchLoss, problem: Problem) -> None:
    output, target = problem(4, Generator())
    with pytest.raises(TypeError, match=r"weight of shape \[4.* cannot be cut .*\(sum, terms\)"):
        resolve_loss(loss).denominator(target, 4)
    with pytest.raises(TypeError, match=r"weight of shape \[4.* cannot be cut .*\(sum, terms\)"):
        resolve_loss(loss).summed(output, target, 4)


def test_the_class_weights_may_be_as_many_as_the_examples() -> None:
    assert resolve_loss(nn.CrossEntropyLoss(W)).denominator(torch.arange(5), 5) == W.sum()


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.KLDivLoss(reduction="sum"), nn.BCELoss(), None])
def test_shapes_that_torch_would_broadcast_are_refused(loss: nn.Module | None) -> None:
    with pytest.raises(ValueError, match=r"one shape, got \[4, 1\] and \[4\]"):
        resolve_loss(loss).summed(torch.rand(4, 1), torch.rand(4), 4)


@pytest.mark.parametrize("target", [torch.tensor(1.0), torch.tensor(1)])
def test_targets_without_examples_are_refused(target: Tensor) -> None:
    with pytest.raises(
        ValueError, match=r"along dimension 0, got shape \[\]; a list .* DataLoader"
    ):
        resolve_loss(None).denominator(target, 4)


@pytest.mark.parametrize("loss", [None, nn.CrossEntropyLoss()])
def test_a_number_as_target_is_explained_as_a_list_of_examples(loss: nn.Module | None) -> None:
    with pytest.raises(TypeError, match=r"got int; pass .*DataLoader\(data, batch_size"):
        resolve_loss(loss).denominator(1, 4)


def test_floating_class_indices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"class probabilities .* got shape \[4\]"):
        resolve_loss(F.cross_entropy).denominator(torch.ones(4), 4)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), F.mse_loss])
def test_a_loss_of_torch_takes_one_tensor_of_each(loss: TorchLoss) -> None:
    pair = (torch.ones(4, 2), torch.ones(4, 2))
    with pytest.raises(TypeError, match=r"one tensor of outputs, got \(float32\[4, 2\], float32"):
        resolve_loss(loss).summed(pair, pair[0], 4)
    with pytest.raises(TypeError, match=r"one tensor of targets, got \(float32\[4, 2\], float32"):
        resolve_loss(loss).denominator(pair, 4)


@pytest.mark.parametrize(
    ("targets", "described"),
    [
        (torch.ones(4, dtype=torch.bool), r"bool\[4\]"),
        (torch.ones(4, dtype=torch.complex64), r"complex64\[4\]"),
        ((torch.ones(4),), r"\(float32\[4\]\)"),
        (None, "NoneType"),
    ],
)
def test_no_loss_is_inferred_from_other_targets(targets: BatchTree, described: str) -> None:
    with pytest.raises(TypeError, match=rf"got {described}; pass loss="):
        resolve_loss(None).denominator(targets, 4)
    with pytest.raises(TypeError, match=rf"got {described}; pass loss="):
        resolve_loss(None).summed(torch.ones(4), targets, 4)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (nn.CrossEntropyLoss(reduction="none"), 'CrossEntropyLoss with reduction="none"'),
        (functools.partial(F.mse_loss, reduction="none"), 'MSELoss with reduction="none"'),
        (functools.partial(F.mse_loss, size_average=True), "size_average overrides"),
        (functools.partial(F.cross_entropy, reduce=False), "reduce overrides"),
        (functools.partial(F.nll_loss, torch.ones(5)), "got 1 positional"),
        (functools.partial(F.nll_loss, target=torch.ones(5)), "cannot be called: multiple values"),
        (
            functools.partial(F.l1_loss, beta=1.0),  # type: ignore[call-arg]  # On purpose.
            "partial of l1_loss .* argument 'beta'",
        ),
        (nn.CrossEntropyLoss, "got the class CrossEntropyLoss: call it"),
        ("mse", "a callable .* got 'mse'"),
    ],
)
def test_a_loss_that_can_never_be_exact_is_refused_at_once(
    loss: Callable[..., object], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        resolve_loss(loss)


@pytest.mark.parametrize(
    "loss", [nn.MSELoss(reduction="batchmean"), functools.partial(F.l1_loss, reduction="average")]
)
def test_a_reduction_that_torch_does_not_have_is_refused(loss: TorchLoss) -> None:
    with pytest.raises(ValueError, match=r"must be one of \('mean', 'sum'\), got '(batchm|aver)"):
        resolve_loss(loss)


@pytest.mark.parametrize(
    ("loss", "divides"),
    [
        (nn.MSELoss(), True),
        (nn.KLDivLoss(reduction="batchmean"), True),
        (nn.KLDivLoss(reduction="sum"), False),
        (functools.partial(F.cross_entropy, reduction="sum"), False),
        (None, True),
        (lambda outputs, targets: (outputs - targets).mean(), True),
    ],
)
def test_only_a_summed_loss_has_no_denominator(loss: TorchLoss | None, divides: bool) -> None:
    assert resolve_loss(loss).divides is divides


def test_a_deprecated_reduction_argument_still_counts() -> None:
    with pytest.warns(UserWarning, match="deprecated"):
        loss = nn.MSELoss(size_average=False)
    assert resolve_loss(loss).denominator(torch.ones(4), 4) == 1


def test_the_outer_partial_overrides_the_inner_one() -> None:
    inner = functools.partial(F.cross_entropy, ignore_index=3, reduction="sum")
    inner.note = "an attribute keeps functools from flattening"  # type: ignore[attr-defined]  # Any object may.
    outer = functools.partial(inner, reduction="mean", label_smoothing=0.1)
    assert outer.func is inner
    output, target = Case(outer, classes(3), 3).draw(0, [4, 3])
    loss = resolve_loss(outer)
    assert not loss.checked
    assert_equal(in_parts(loss, output, target, [4, 3]), undivided(outer, output, target))


class MyCrossEntropy(nn.CrossEntropyLoss):
    pass


class Bound:
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).abs().mean()


def hooked() -> nn.Module:
    loss = nn.MSELoss()
    loss.register_forward_hook(lambda module, arguments, output: 2 * output)  # noqa: ARG005  # Torch's.
    return loss


def hooked_before() -> nn.Module:
    loss = nn.MSELoss()
    loss.register_forward_pre_hook(lambda module, arguments: arguments[::-1])  # noqa: ARG005  # Torch's.
    return loss


def patched() -> nn.Module:
    loss = nn.MSELoss()
    loss.forward = lambda outputs, targets: (outputs - targets).pow(4).mean()  # type: ignore[method-assign, assignment]  # On purpose.
    return loss


@pytest.mark.parametrize(
    "loss",
    [
        MyCrossEntropy(),
        MyCrossEntropy(reduction="none"),  # A subclass may still reduce.
        hooked(),
        hooked_before(),
        patched(),
        nn.PoissonNLLLoss(),
        functools.partial(F.gaussian_nll_loss, var=torch.ones(3)),
        Bound().loss,
        lambda outputs, targets: F.mse_loss(outputs, targets),
    ],
)
def test_a_loss_that_is_not_torchs_own_must_be_verified(loss: Callable[..., object]) -> None:
    assert resolve_loss(loss).checked


def test_buffers_and_settings_of_a_module_are_read_at_each_use() -> None:
    module = nn.CrossEntropyLoss(W.float())
    loss = resolve_loss(module)
    module.double()
    module.weight = 2 * W
    module.label_smoothing = 0.3
    module.ignore_index = 2
    output, target = CASES["cross-entropy, ignore_index"].draw(0, [4, 3])
    assert loss.denominator(target, 7) == 2 * W[target[target != 2]].sum()
    assert_equal(in_parts(loss, output, target, [4, 3]), undivided(module, output, target))


def test_weights_follow_the_outputs_to_their_device() -> None:
    output, target = torch.rand(4, 3, device="meta"), torch.rand(4, 3, device="meta")
    summed, _ = resolve_loss(nn.BCEWithLogitsLoss(torch.ones(3))).summed(output, target, 4)
    assert summed.device.type == "meta"


@pytest.mark.parametrize("loss", [F.mse_loss, lambda o, t: (o - t).pow(2).mean() * 100])
def test_a_sum_does_not_overflow_where_the_mean_does_not(loss: TorchLoss) -> None:
    output = torch.full((1000, 2), 10.0, dtype=torch.float16, requires_grad=True)
    summed, _ = resolve_loss(loss).summed(output, torch.full_like(output, 1.0), 1000)
    (summed / 1000).backward()
    assert summed.isfinite()
    assert output.grad is not None
    assert output.grad.dtype is torch.float16
    assert output.grad.all()


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5), seed=st.integers(0, 2**16))
@drawn
def test_any_mean_over_examples_is_split_exactly(sizes: list[int], seed: int) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().sum(1).sqrt().mean()

    output, target = CASES["mse, functional"].draw(seed, sizes)
    resolved = resolve_loss(loss)
    assert resolved.checked
    assert_equal(in_parts(resolved, output, target, sizes), undivided(loss, output, target))


@pytest.mark.parametrize("as_terms", [lambda count: count, lambda count: count.item()])
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5), seed=st.integers(0, 2**16))
@drawn
def test_any_sum_and_terms_are_split_exactly(
    as_terms: Callable[[Tensor], Tensor | float], sizes: list[int], seed: int
) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | float]:
        valid = (targets > 0).double()
        return (valid * (outputs - targets).pow(2)).sum(), as_terms(valid.sum())

    output, target = CASES["mse, functional"].draw(seed, sizes)
    assume((target > 0).any())
    resolved = resolve_loss(loss)
    assert resolved.denominator(target, sum(sizes)) == sum(sizes)
    pairs = [
        resolved.summed(part, its, len(its))
        for part, its in zip(output.split(sizes), target.split(sizes), strict=True)
    ]
    value = sum(summed for summed, _ in pairs) / sum(terms for _, terms in pairs if terms)
    whole_sum, whole_terms = loss(output, target)
    whole = whole_sum / whole_terms
    assert isinstance(value, Tensor)
    assert_equal(
        [value, *torch.autograd.grad(value, output)], [whole, *torch.autograd.grad(whole, output)]
    )


def test_terms_have_no_graph() -> None:
    output = torch.ones(4, requires_grad=True)
    _, terms = resolve_loss(lambda o, _: (o.sum(), o.sum())).summed(output, None, 4)
    assert isinstance(terms, Tensor)
    assert not terms.requires_grad


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (torch.ones(4, 3), ValueError, r"the loss must be scalar, got shape \[4, 3\]; return a"),
        (torch.ones(1), ValueError, r"the loss must be scalar, got shape \[1\]"),
        ((torch.ones(4), 4), ValueError, r"the sum must be scalar, got shape \[4\]"),
        ((torch.tensor(1.0), torch.ones(4, 1)), ValueError, r"terms .* got shape \[4, 1\]"),
        (1.5, TypeError, "the loss must be a tensor, got float; return a mean"),
        (None, TypeError, "the loss must be a tensor, got NoneType"),
        ((1.5, 4), TypeError, "the sum must be a tensor, got float"),
        ((torch.tensor(1.0), "4"), TypeError, "the terms must be a tensor, got str"),
        ((torch.tensor(1.0),), TypeError, r"a mean or \(sum, terms\), got \(float32"),
        ({"loss": torch.tensor(1.0)}, TypeError, "got {loss: float32"),
    ],
)
def test_a_result_that_is_neither_a_mean_nor_sum_and_terms_is_refused(
    result: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        resolve_loss(lambda *_: result).summed(torch.ones(4, 3), torch.ones(4, 3), 4)


def test_a_loss_may_not_switch_between_a_mean_and_sum_and_terms() -> None:
    results: list[object] = [torch.tensor(1.0), (torch.tensor(4.0), 4), torch.tensor(1.0)]
    loss = CallableLoss(lambda *_: results.pop())
    loss.summed(None, None, 4)
    with pytest.raises(TypeError, match=r"returned a mean before and \(sum, terms\) now"):
        loss.summed(None, None, 4)
