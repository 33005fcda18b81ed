"""The check of an unknown loss: additive losses pass, others are refused, no trace remains."""

import random
import weakref
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor, nn

from autobatch.data.tree import BatchTree
from autobatch.errors import InexactStepError
from autobatch.state.rng import random_state
from autobatch.training.losses.resolve import resolve_loss
from autobatch.training.losses.split_check import check_splits

drawn = settings(deadline=None, max_examples=12, derandomize=True)
any_sizes = given(
    seed=st.integers(0, 2**16), sizes=st.lists(st.integers(1, 5), min_size=2, max_size=4)
)


def window(seed: int = 0, sizes: Sequence[int] = (4, 3)) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs ``(examples, 5, 4)`` and targets ``(examples, 4)``, in which 0 is padding.

    Each example has at least one token, and no two neighbours have as many, 0 stands for none.
    """
    generator = Generator().manual_seed(seed)
    examples = sum(sizes)
    outputs = torch.randn(examples, 5, 4, generator=generator, dtype=torch.float64)
    targets = torch.randint(1, 5, (examples, 4), generator=generator)
    counts = 1 + torch.arange(examples) * 4 // examples
    targets[torch.arange(4) >= counts[:, None]] = 0
    return list(outputs.split(list(sizes))), list(targets.split(list(sizes)))


def check(
    loss: Callable[..., object],
    outputs: Sequence[BatchTree] | None = None,
    targets: Sequence[BatchTree] | None = None,
) -> bool:
    default_outputs, default_targets = window()
    return check_splits(resolve_loss(loss), outputs or default_outputs, targets or default_targets)


def plain_mean(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.mean(1) - targets).pow(2).mean()


def token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, ignore_index=0, reduction="none")


def tokens(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return token_loss(outputs, targets).sum(), (targets != 0).sum()


def masked_mean(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, ignore_index=0)


def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG001
    rows = outputs.flatten(1)
    return F.cross_entropy(rows @ rows.T, torch.arange(len(rows)))


def batch_maximum(outputs: Tensor, targets: Tensor) -> Tensor:
    return token_loss(outputs, targets).max()


def plain_sum(outputs: Tensor, targets: Tensor) -> Tensor:
    return token_loss(outputs, targets).sum()


def spread(outputs: Tensor, targets: Tensor) -> Tensor:
    return token_loss(outputs, targets).mean() + outputs.std(0).mean()


def neighbours(outputs: Tensor, targets: Tensor) -> Tensor:
    return plain_mean(outputs, targets) + (outputs - outputs.roll(1, 0)).abs().mean()


def mean_and_one(outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    return plain_mean(outputs, targets), 1


def coupled_pair(outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    return contrastive(outputs, targets) * len(outputs), len(outputs)


def with_gradient_of(value: Tensor, other: Tensor) -> Tensor:
    """Return the value of one tensor with the gradients of both."""
    return value + (other - other.detach())


def hidden_spread(outputs: Tensor, targets: Tensor) -> Tensor:
    return with_gradient_of(plain_mean(outputs, targets), outputs.std())


def hidden_contrast(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    summed, terms = tokens(outputs, targets)
    return with_gradient_of(summed, terms * contrastive(outputs, targets)), terms


def over_itself(outputs: Tensor, targets: Tensor) -> Tensor:
    value = plain_mean(outputs, targets)
    return value / value.detach()


def noisy(outputs: Tensor, targets: Tensor) -> Tensor:
    return plain_mean(outputs + torch.rand(()), targets)


@pytest.mark.parametrize("loss", [plain_mean, tokens])
@drawn
@any_sizes
def test_an_additive_loss_passes(loss: Callable[..., object], seed: int, sizes: list[int]) -> None:
    assert check(loss, *window(seed, sizes))


@pytest.mark.parametrize(
    "loss", [masked_mean, contrastive, batch_maximum, spread, neighbours, mean_and_one, noisy]
)
@drawn
@any_sizes
def test_a_loss_that_is_not_additive_is_refused(
    loss: Callable[..., object], seed: int, sizes: list[int]
) -> None:
    outputs, targets = window(seed, [size + 1 for size in sizes])
    with pytest.raises(InexactStepError, match="splitting changes this loss"):
        check(loss, outputs, targets)


@pytest.mark.parametrize(
    ("loss", "way_out"),
    [
        (masked_mean, r"return \(sum, terms\) if it is a mean over something other than examples"),
        (contrastive, "compares examples with one another .* one micro-batch"),
        (plain_sum, r"looks like a sum over examples: return \(sum, number of examples\)"),
        (lambda o, t: (plain_sum(o, t), 1), r"looks like a sum .* return \(sum, number of exam"),
        (coupled_pair, "the sum and the terms that it returns must each add up"),
        (noisy, "called again on the same outputs it is .* random numbers in the model"),
    ],
)
def test_the_error_says_what_to_do(loss: Callable[..., object], way_out: str) -> None:
    with pytest.raises(InexactStepError, match=way_out):
        check(loss)


def hidden_by_hook(outputs: Tensor, targets: Tensor) -> Tensor:
    same = outputs * 1
    same.register_hook(lambda gradient: gradient / gradient.norm())
    return plain_mean(same, targets)


@pytest.mark.parametrize(
    "loss", [hidden_spread, hidden_contrast, hidden_by_hook, over_itself], ids=lambda f: f.__name__
)
@drawn
@any_sizes
def test_a_loss_whose_gradient_alone_is_not_additive_is_refused(
    loss: Callable[..., object], seed: int, sizes: list[int]
) -> None:
    outputs, targets = window(seed, [size + 1 for size in sizes])
    with pytest.raises(InexactStepError, match="splitting changes the gradient of this loss"):
        check(loss, outputs, targets)


def test_values_alone_do_not_show_a_hidden_gradient() -> None:
    outputs, targets = window()
    assert check(lambda o, t: hidden_spread(o.detach(), t))
    whole = torch.cat(outputs)
    values = [loss(whole, torch.cat(targets)) for loss in (hidden_spread, plain_mean)]
    torch.testing.assert_close(values[0], values[1], rtol=1e-12, atol=1e-12)


def test_the_error_names_the_gradient_the_split_and_the_way_out() -> None:
    outputs, targets = [torch.tensor([[1.0], [3.0]])], [torch.zeros(2, 1)]
    with pytest.raises(
        InexactStepError,
        match=r"over 2 examples its largest element is 2\.5, but from parts of 1 \+ 1 one is off "
        r"by 1\.75; .* one micro-batch",  # 1/2 + 4/2, and (1 + 1/2) / 2 from the first part.
    ):
        check(lambda o, _: with_gradient_of(o.mean(), o.sum().square() / 4), outputs, targets)


def straight_through(outputs: Tensor, targets: Tensor) -> Tensor:
    return plain_mean(outputs + (outputs.round() - outputs).detach(), targets)


def focal(outputs: Tensor, targets: Tensor) -> Tensor:
    each = token_loss(outputs, targets)
    return ((1 - each.neg().exp()).detach().square() * each).mean()


def in_place(outputs: Tensor, targets: Tensor) -> Tensor:
    outputs -= outputs.detach().round()
    return plain_mean(outputs.clamp_(-0.4, 0.4), targets)


def penalised(outputs: Tensor, targets: Tensor) -> Tensor:
    value = plain_mean(outputs, targets)
    (slope,) = torch.autograd.grad(value * len(outputs), outputs, create_graph=True)
    return value + slope.square().mean()


def clipped(outputs: Tensor, targets: Tensor) -> Tensor:
    same = outputs * 1
    same.register_hook(lambda gradient: gradient.clamp(-0.1, 0.1))
    return plain_mean(same, targets)


@pytest.mark.parametrize("loss", [straight_through, focal, in_place, penalised, clipped])
@drawn
@any_sizes
def test_a_loss_with_its_own_gradient_for_each_example_passes(
    loss: Callable[[Tensor, Tensor], Tensor], seed: int, sizes: list[int]
) -> None:
    outputs, targets = window(seed, sizes)
    assert check(loss, outputs, targets)
    with pytest.raises(InexactStepError, match="the gradient"):  # Control: this gradient matters.
        check(lambda o, t: with_gradient_of(loss(o, t), o.square().sum()), outputs, targets)


@pytest.mark.parametrize(
    "loss",
    [
        torch.no_grad()(hidden_spread),
        lambda o, t: hidden_spread(o, t).detach(),
        lambda o, t: hidden_spread(torch.from_numpy(o.numpy()), t),
    ],
    ids=["no_grad", "detach", "numpy"],
)
def test_a_loss_without_a_gradient_is_compared_by_value(loss: Callable[..., object]) -> None:
    assert check(loss)
    with pytest.raises(InexactStepError, match="splitting changes this loss"):
        check(lambda o, t: loss(o, t) + o.detach().std())


def test_integer_outputs_are_compared_by_value() -> None:
    outputs = [torch.arange(8).reshape(4, 2), torch.arange(6).reshape(3, 2)]
    targets = [torch.zeros(4), torch.zeros(3)]
    seen: list[torch.dtype] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(targets.dtype)
        return outputs.double().mean()

    assert check(loss, outputs, targets)
    assert seen == [torch.float64] * 6
    factor = torch.ones((), requires_grad=True)
    assert check(lambda o, _: factor * o.double().mean(), outputs, targets)
    assert factor.grad is None
    with pytest.raises(InexactStepError, match="splitting changes this loss"):
        check(lambda o, _: o.double().std(), outputs, targets)


def test_the_gradient_of_each_output_counts_and_an_output_may_have_none() -> None:
    outputs, targets = window()
    nests: list[BatchTree] = [
        {
            "mean": its,
            "unused": its[:, 0],
            "scale": torch.tensor(2.0),
            "row": torch.arange(len(its)),
        }
        for its in outputs
    ]
    assert check(lambda o, t: o["scale"] * plain_mean(o["mean"], t), nests, targets)
    with pytest.raises(InexactStepError, match="the gradient"):
        check(
            lambda o, t: with_gradient_of(plain_mean(o["mean"], t), o["unused"].std()),
            nests,
            targets,
        )
    with pytest.raises(InexactStepError, match="the gradient"):
        check(lambda o, t: hidden_spread(o["mean"], t), nests, targets)


def test_a_part_may_have_no_gradient() -> None:
    def loss(outputs: Tensor, targets: Tensor, scale: float = 0.0) -> tuple[Tensor, Tensor]:
        summed, terms = tokens(outputs, targets)
        hidden = with_gradient_of(summed, scale * contrastive(outputs, targets))
        return hidden if terms else torch.zeros(()), terms

    outputs, targets = window(sizes=[5, 3])
    targets[1].zero_()
    assert check(loss, outputs, targets)
    with pytest.raises(InexactStepError, match="the gradient"):
        check(partial(loss, scale=9.0), outputs, targets)


def confident(outputs: Tensor, targets: Tensor) -> Tensor:
    """All gradients are small differences of two large numbers, in float32."""
    sure = outputs[..., 0].float() + 14 * F.one_hot(targets[:, 0], 5)
    return -sure.softmax(1).gather(1, targets[:, :1]).log().mean()


@drawn
@any_sizes
def test_gradients_with_large_rounding_errors_pass(seed: int, sizes: list[int]) -> None:
    outputs, targets = window(seed, sizes)
    assert check(confident, outputs, targets)
    with pytest.raises(InexactStepError, match="the gradient"):
        check(lambda o, t: with_gradient_of(confident(o, t), o.square().sum()), outputs, targets)


def test_a_gradient_that_differs_a_little_from_call_to_call_passes() -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        extra = 1e-4 * torch.rand(()) * outputs.mean()  # As atomic additions do on a GPU.
        return with_gradient_of(plain_mean(outputs, targets), extra)

    assert check(loss)


def test_a_gradient_that_differs_much_from_call_to_call_gives_no_answer() -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return with_gradient_of(plain_mean(outputs, targets), torch.rand(()) * outputs.sum())

    assert not check(loss)


def test_a_gradient_that_is_not_finite_gives_no_answer() -> None:
    assert not check(lambda o, t: plain_mean(o, t) + (0 * o).sqrt().sum())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_out_of_memory_gives_no_answer_and_frees_the_tensors(
    error: type[Exception], backward: bool
) -> None:
    failed: list[weakref.ref[Tensor]] = []

    def fail(its: Tensor) -> Tensor:
        failed.append(weakref.ref(its))
        raise error("no memory")

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        same = outputs * 1
        if backward:
            same.register_hook(fail)
        else:
            fail(same)
        return plain_mean(same, targets)

    assert not check(loss)
    assert len(failed) == 1, "the check ran the loss again"
    assert failed[0]() is None


def test_the_error_names_both_values_and_the_split() -> None:
    outputs, targets = [torch.tensor([[1.0], [2.0]])], [torch.zeros(2, 1)]
    with pytest.raises(
        InexactStepError, match=r"over 2 examples it is 3, but 1\.5 from parts of 1 \+ 1;"
    ):
        check(lambda o, _: o.sum(), outputs, targets)


def test_an_even_split_alone_does_not_show_a_mean_with_one_term() -> None:
    outputs, targets = window(sizes=[3, 3])
    even = [mean_and_one(*pair)[0] for pair in zip(outputs, targets, strict=True)]
    whole = mean_and_one(torch.cat(outputs), torch.cat(targets))[0]
    torch.testing.assert_close(sum(even) / 2, whole, rtol=1e-12, atol=1e-12)
    with pytest.raises(InexactStepError, match=r"parts of 4 \+ 2"):
        check(mean_and_one, outputs, targets)


@pytest.mark.parametrize(
    ("examples", "splits"),
    [
        (2, {(1, 1)}),
        (3, {(1, 2), (2, 1)}),
        (4, {(2, 2), (3, 1)}),
        (5, {(2, 3), (3, 2)}),
        (12, {(6, 6), (8, 4)}),
    ],
)
def test_two_splits_are_tried_and_one_is_uneven(
    examples: int, splits: set[tuple[int, int]]
) -> None:
    seen: list[int] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(len(outputs))
        return plain_mean(outputs, targets)

    assert check(loss, *window(sizes=[examples]))
    assert seen[:2] == [examples, examples]
    assert set(zip(seen[2::2], seen[3::2], strict=True)) == splits


@pytest.mark.parametrize("loss", [plain_mean, plain_sum])
def test_one_example_gives_no_answer(loss: Callable[..., object]) -> None:
    assert not check(loss, *window(sizes=[1]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_gives_no_answer(value: float) -> None:
    outputs, targets = window()
    outputs[1][0] = value
    assert not check(lambda o, _: o.mean(), outputs, targets)


def test_terms_that_are_all_zero_give_no_answer() -> None:
    outputs, targets = window()
    assert not check(tokens, outputs, [torch.zeros_like(its) for its in targets])


def test_equal_losses_give_no_answer() -> None:
    outputs, targets = window()
    same = [torch.zeros_like(its) for its in outputs]  # An output layer that begins at zero.
    assert not check(tokens, same, targets)
    assert check(tokens, outputs, targets)


def test_the_gradient_may_refuse_a_loss_whose_values_are_equal() -> None:
    outputs, targets = window()
    same = [torch.zeros_like(its) for its in outputs]
    with pytest.raises(InexactStepError, match=r"the gradient of this .* return \(sum, terms\) if"):
        check(masked_mean, same, targets)


def test_a_part_without_terms_is_refused_where_it_makes_nan() -> None:
    outputs, targets = window(sizes=[4, 4])
    targets[1].zero_()
    with pytest.raises(InexactStepError, match=r"but nan from parts of 4 \+ 4"):
        check(masked_mean, outputs, targets)


def test_a_part_without_terms_is_allowed_with_sum_and_terms() -> None:
    outputs, targets = window(sizes=[5, 3])
    targets[1].zero_()
    assert check(tokens, outputs, targets)


def test_terms_that_vanish_in_the_parts_are_refused() -> None:
    with pytest.raises(InexactStepError, match=r"but nan from parts of 3 \+ 4; the sum and the"):
        check(lambda o, t: (plain_sum(o, t), max(0, len(o) - 4)))


def test_a_loss_of_torch_passes_too() -> None:
    assert check(partial(F.cross_entropy, ignore_index=0))
    assert check(partial(F.cross_entropy, ignore_index=0, label_smoothing=0.1))


def test_nested_outputs_and_absent_targets_are_split() -> None:
    outputs, _ = window()
    nests: list[BatchTree] = [{"mean": its, "size": "base"} for its in outputs]
    assert check(lambda o, _: o["mean"].pow(2).mean(), nests, [None, None])
    with pytest.raises(InexactStepError, match="splitting changes"):
        check(lambda o, _: o["mean"].std(), nests, [None, None])


@pytest.mark.parametrize(
    ("outputs", "reason"),
    [
        ([torch.ones(2, 5), torch.ones(2, 6)], "all but dimension 0 agrees"),
        ([(torch.ones(2, 5), torch.tensor(i)) for i in range(2)], "agree in their scalars"),
        ([torch.ones(8, 5), torch.ones(8, 5)], "agree in length along dimension 0"),
        ([torch.ones(8, 5)], "agree in length along dimension 0"),
    ],
)
def test_outputs_that_cannot_be_joined_are_refused(outputs: list[BatchTree], reason: str) -> None:
    with pytest.raises(InexactStepError, match=rf"cannot be joined: .*{reason}.*forward="):
        check(lambda o, _: o, outputs, [torch.ones(2)] * len(outputs))


def float32_only(outputs: Tensor, targets: Tensor) -> Tensor:
    weight = torch.ones(4, 2, dtype=torch.float32)
    return (F.linear(outputs.mean(1), weight.T) - targets.sum(1, keepdim=True)).pow(2).mean()


def bfloat16_only(outputs: Tensor, targets: Tensor) -> Tensor:
    assert outputs.dtype is torch.bfloat16
    return plain_mean(outputs, targets)


def float32_inside(outputs: Tensor, targets: Tensor) -> Tensor:
    return plain_mean(outputs.float(), targets).double() + plain_mean(outputs, targets)


@pytest.mark.parametrize(
    ("loss", "dtype"),
    [
        (float32_only, torch.float32),
        (float32_only, torch.bfloat16),
        (bfloat16_only, torch.bfloat16),
        (float32_inside, torch.float32),
    ],
)
@drawn
@any_sizes
def test_a_loss_that_fails_in_float64_is_compared_in_its_own_precision(
    loss: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, seed: int, sizes: list[int]
) -> None:
    outputs, targets = window(seed, sizes)
    outputs = [its.to(dtype) for its in outputs]
    check(loss, outputs, targets)
    with pytest.raises(InexactStepError, match="looks like a sum"):
        check(lambda o, t: loss(o, t) * len(o), outputs, targets)
    with pytest.raises(InexactStepError, match="the gradient"):
        check(lambda o, t: with_gradient_of(loss(o, t), o.square().sum()), outputs, targets)


def test_the_check_is_made_without_autocast() -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        assert not torch.is_autocast_enabled("cpu")
        return plain_mean(outputs, targets)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert check(loss)


def test_an_error_of_the_loss_passes_through() -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG001
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        check(loss)


def test_a_loss_that_warns_about_small_parts_is_refused_without_a_warning() -> None:
    with pytest.raises(InexactStepError, match=r"but nan from parts of 3 \+ 1"):
        check(lambda o, _: o.std(0)[0, 0] * 0 + 1, *window(sizes=[2, 2]))


@pytest.mark.parametrize(
    "draw",
    [lambda: torch.rand(()).item(), np.random.random, random.random],
    ids=["torch", "numpy", "python"],
)
def test_the_rng_is_as_before(draw: Callable[[], float]) -> None:
    restore = random_state()
    expected = [draw(), draw()]
    restore()
    with pytest.raises(InexactStepError, match="draw random numbers in"):
        check(lambda o, t: plain_mean(o, t) * draw())
    assert [draw(), draw()] == expected


class Stateful(nn.Module):
    """Keeps one running mean in place, another as a new tensor, and a count."""

    in_place: Tensor
    replaced: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("in_place", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))
        self.calls = 0

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        value = plain_mean(outputs, targets)
        self.in_place.lerp_(value.detach().float(), 0.5)
        self.replaced = 0.5 * self.replaced + value.detach()
        self.last = value.detach()
        self.calls += 1
        return value

    def loss(self, outputs: Tensor, targets: Tensor, scale: float = 1.0) -> Tensor:
        return scale * self.forward(outputs, targets)

    def tracked(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.forward(outputs, targets) / (1 + self.in_place)


@pytest.mark.parametrize(
    "bind",
    [lambda module: module, lambda module: module.loss, lambda m: partial(m.loss, scale=2.0)],
)
def test_the_state_of_a_loss_module_is_as_before(
    bind: Callable[[Stateful], Callable[..., object]],
) -> None:
    module = Stateful()
    buffers = module.in_place, module.replaced
    assert check(bind(module))
    assert module.in_place is buffers[0]
    assert module.replaced is buffers[1]
    assert not any(buffers)
    assert module.calls == 0
    assert not hasattr(module, "last")
    assert list(module.state_dict()) == ["in_place", "replaced"]


def test_a_loss_that_depends_on_its_own_state_is_refused() -> None:
    with pytest.raises(InexactStepError, match="keep no state in the loss"):
        check(Stateful().tracked)


def test_the_loss_changes_only_copies_of_its_arguments() -> None:
    outputs, targets = window(sizes=[6])
    before = outputs[0].clone()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        outputs /= 2
        return plain_mean(outputs, targets)

    assert check(loss, outputs, targets)
    assert torch.equal(outputs[0], before)


class Trainable(nn.Module):
    """Has a parameter, a running mean that it does not detach, and an attribute."""

    running: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))
        self.register_buffer("running", torch.zeros(()))
        self.alias = nn.Module()
        self.alias.register_buffer("same", self.running)

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        value = self.factor * plain_mean(outputs, targets)
        self.running.lerp_(value.float(), 0.5)
        assert self.running is self.alias.same
        self.last = value
        return value


def test_no_gradient_and_no_graph_remains() -> None:
    module = Trainable()
    outputs, targets = window()
    assert check(module, outputs, targets)
    assert module.factor.grad is None
    assert module.factor.requires_grad
    assert module.running is module.alias.same
    assert module.running._version == 0
    assert not module.running.requires_grad
    assert not hasattr(module, "last")
    assert not any(its.requires_grad or its.grad is not None for its in outputs)


def test_an_earlier_gradient_remains() -> None:
    module = Trainable()
    module.factor.grad = torch.full((), 7.0)
    assert check(module)
    assert module.factor.grad == 7
