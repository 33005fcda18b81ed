"""What torch can do with a model or an optimizer is trained exactly in pieces, or refused."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from reference import Pair, assert_exact, assert_same_parameters, small_model, twin, undivided_steps
from states import fingerprint
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from autobatch import Accumulator, InexactStepError, StepResult, find_and_train

Make = Callable[[], nn.Module]
Optimize = Callable[[nn.Module], torch.optim.Optimizer]


def pairs(count: int = 4, examples: int = 10, inputs: int = 5) -> list[Pair]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count * examples, inputs, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (count * examples,), generator=generator)
    return list(zip(x.split(examples), y.split(examples), strict=True))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def first_weight(model: nn.Module) -> nn.Parameter:
    return model.get_parameter("0.weight")


def assert_cut_is_exact(
    model: nn.Module,
    batches: Sequence[Pair] | None = None,
    *,
    optimize: Optimize = sgd,
    micro_batch: int = 4,
) -> nn.Module:
    """In pieces and undivided, the same losses and parameters; returns the one in pieces."""
    batches = pairs() if batches is None else batches
    ours, whole = twin(model), twin(model)
    accumulator = Accumulator(ours, optimize(ours), nn.CrossEntropyLoss(), micro_batch=micro_batch)
    steps = [accumulator.step(batch) for batch in batches]
    losses = undivided_steps(whole, optimize(whole), F.cross_entropy, batches)
    assert all(len(step.micro_batch_sizes) > 1 for step in steps)
    assert_exact([step.loss for step in steps], losses)
    assert_same_parameters(ours, whole)
    assert any((a != b).any() for a, b in zip(ours.parameters(), model.parameters(), strict=True))
    return ours


# Compiled models.


@dataclass
class Backend:
    """Compiles nothing, and counts what it is given to compile."""

    graphs: int = 0

    def __call__(
        self,
        graph: torch.fx.GraphModule,
        inputs: Sequence[Tensor],  # noqa: ARG002  # The protocol's.
    ) -> Callable[..., object]:
        self.graphs += 1
        return graph.forward

    def compiled(self, model: nn.Module) -> nn.Module:
        torch._dynamo.reset()
        module = torch.compile(model, backend=self, dynamic=False)
        assert isinstance(module, nn.Module)
        return module


def normalised() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()


@pytest.mark.parametrize("make", [small_model, normalised])
def test_a_compiled_model_is_compiled_for_two_shapes_and_no_more(make: Make) -> None:
    ours, eager, backend = make(), make(), Backend()
    compiled = backend.compiled(ours)
    for model in (compiled, eager):
        accumulator = Accumulator(model, sgd(model), nn.CrossEntropyLoss(), micro_batch=4)
        sizes = [accumulator.step(batch).micro_batch_sizes for batch in pairs(count=12)]
        assert set(sizes) == {(4, 3, 3)}
    assert backend.graphs == 2
    assert_same_parameters(ours, eager)


@pytest.mark.parametrize("first", [4, 10])
def test_batch_norm_compiled_before_it_was_cut_is_pooled_all_the_same(first: int) -> None:
    ours, eager = normalised(), normalised()
    for model in (Backend().compiled(ours), eager):
        accumulator = Accumulator(model, sgd(model), nn.CrossEntropyLoss(), micro_batch=4)
        for examples in (first, 8, 8, 4, 8):
            accumulator.step((pairs()[0][0][:examples], pairs()[0][1][:examples]))
    assert_same_parameters(ours, eager)


class Halved(nn.BatchNorm1d):
    """With a forward pass of its own, as libraries of models have them."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / 2


class Ghost(nn.BatchNorm1d):
    """Two calls that look like one."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.cat([super(Ghost, self).forward(half) for half in input.chunk(2)])


def compiled_down(model: nn.Module) -> nn.Module:
    """As for kernels, without a compiler: functions that change nothing in place."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", dynamic=False)
    assert isinstance(compiled, nn.Module)
    return compiled


def with_layer(kind: type[nn.BatchNorm1d]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), kind(6), nn.Tanh(), nn.Linear(6, 3)).double()


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, Halved])
@pytest.mark.parametrize("first", [4, 10])
def test_batch_norm_in_a_graph_that_is_compiled_down_to_its_kernels_is_pooled(
    kind: type[nn.BatchNorm1d], first: int
) -> None:
    """There a call counts itself several times as writing."""
    ours, eager = with_layer(kind), with_layer(kind)
    compiled = compiled_down(ours)
    for model in (compiled, eager):
        accumulator = Accumulator(model, sgd(model), nn.CrossEntropyLoss(), micro_batch=4)
        for examples in (first, 8, 8, 4, 8):
            accumulator.step((pairs()[0][0][:examples], pairs()[0][1][:examples]))
    assert_same_parameters(ours, eager)
    assert_exact(list(ours.buffers()), list(eager.buffers()))


def test_hidden_calls_are_refused_when_they_are_compiled_too() -> None:
    model = with_layer(Ghost)
    accumulator = Accumulator(
        compiled_down(model), sgd(model), nn.CrossEntropyLoss(), micro_batch=4
    )
    before = fingerprint(model)
    with pytest.raises(InexactStepError, match="not tracked"):
        accumulator.step((pairs()[0][0][:8], pairs()[0][1][:8]))
    assert fingerprint(model) == before


def test_a_compiled_model_is_found_a_size_for_and_trained() -> None:
    ours, whole, backend = small_model(), small_model(), Backend()
    result = find_and_train(
        backend.compiled(ours),
        pairs(examples=64),
        desired=64,
        optimizer=sgd(ours),
        loss=nn.CrossEntropyLoss(),
        memory_limit="12KiB",
        progress=False,
    )
    assert result.plan.accumulation_steps > 1
    undivided_steps(whole, sgd(whole), F.cross_entropy, pairs(examples=64))
    assert_same_parameters(ours, whole)
    assert backend.graphs == 0, "metered, it runs eagerly: what is compiled cannot be metered"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit is on its way out.
@pytest.mark.parametrize(
    "hide", [torch.jit.script, lambda model: torch.jit.trace(model, pairs()[0][0])]
)
def test_torchscript_is_refused(hide: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(hide(small_model()))
    with pytest.raises(TypeError, match="ScriptModule is not supported yet: TorchScript hides"):
        Accumulator(model, sgd(model))


# What dynamo looks at in passing, and silences where warnings are no errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("make", [small_model, normalised])
def test_a_model_compiled_in_place_or_traced_to_a_graph_is_one_like_any_other(make: Make) -> None:
    eager, compiled, graph = make(), make(), torch.fx.symbolic_trace(make())
    torch._dynamo.reset()
    compiled.compile(backend=Backend(), dynamic=False)
    for model in (eager, compiled, graph):
        accumulator = Accumulator(model, sgd(model), nn.CrossEntropyLoss(), micro_batch=4)
        for batch in pairs():
            accumulator.step(batch)
    assert_same_parameters(eager, compiled)
    assert_exact(dict(eager.named_parameters()), dict(graph.named_parameters()))
    assert_exact(dict(eager.named_buffers()), dict(graph.named_buffers()))


# Activation checkpointing.


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool, used: bool, dropout: float, norm: bool) -> None:
        super().__init__()
        self.reentrant, self.used = reentrant, used
        torch.manual_seed(0)
        self.first = nn.Linear(5, 6)
        norms = [nn.BatchNorm1d(6)] if norm else []
        self.inner = nn.Sequential(nn.Linear(6, 6), *norms, nn.Dropout(dropout), nn.Tanh())
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if self.used:
            hidden = checkpoint(self.inner, hidden, use_reentrant=self.reentrant)
        else:
            hidden = self.inner(hidden)
        scores: Tensor = self.last(hidden)
        return scores


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations_change_nothing_in_pieces(reentrant: bool) -> None:
    model = Checkpointed(reentrant=reentrant, used=True, dropout=0, norm=False).double()
    assert_cut_is_exact(model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_dropout_and_batch_norm_are_those_without_checkpoints(reentrant: bool) -> None:
    states = []
    for used in (False, True):
        model = Checkpointed(reentrant=reentrant, used=used, dropout=0.5, norm=True).double()
        accumulator = Accumulator(model, sgd(model), nn.CrossEntropyLoss(), micro_batch=4)
        torch.manual_seed(3)
        for batch in pairs():
            accumulator.step(batch)
        states.append(model.state_dict())
    assert_exact(*states)


# Hooks.


def test_a_gradient_hook_of_a_parameter_runs_uncut_and_is_refused_in_pieces() -> None:
    ours, whole = small_model(), small_model()
    for model in (ours, whole):
        first_weight(model).register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
    accumulator = Accumulator(ours, sgd(ours), nn.CrossEntropyLoss(), micro_batch=10)
    accumulator.step(pairs()[0])
    undivided_steps(whole, sgd(whole), F.cross_entropy, pairs()[:1])
    assert_same_parameters(ours, whole)
    accumulator = Accumulator(ours, sgd(ours), nn.CrossEntropyLoss(), micro_batch=9)
    with pytest.raises(InexactStepError, match="gradient hook, which would run once a micro-batch"):
        accumulator.step(pairs()[0])
    assert_same_parameters(ours, whole)


def test_a_post_accumulate_hook_is_refused_at_once() -> None:
    model = small_model()
    first_weight(model).register_post_accumulate_grad_hook(lambda _: None)
    with pytest.raises(ValueError, match="post-accumulate"):
        Accumulator(model, sgd(model))


def tripled(_: nn.Module, gradients: object, __: object) -> tuple[Tensor]:
    assert isinstance(gradients, tuple)
    (gradient,) = gradients
    assert isinstance(gradient, Tensor)
    return (gradient * 3,)


@pytest.mark.usefixtures("unasked")
def test_module_hooks_run_once_a_micro_batch() -> None:
    ours, whole = small_model(), small_model()
    seen: list[tuple[str, int]] = []
    for model in (ours, whole):
        model[0].register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))
        model[2].register_full_backward_hook(tripled)
    ours[1].register_forward_hook(lambda _, __, output: seen.append(("forward", len(output))))
    ours[1].register_full_backward_hook(
        lambda _, gradients, __: seen.append(("backward", len(gradients[0])))  # type: ignore[index]
    )
    Accumulator(ours, sgd(ours), micro_batch=4).step(pairs()[0])
    undivided_steps(whole, sgd(whole), F.cross_entropy, pairs()[:1])
    assert_same_parameters(ours, whole)
    assert seen == [(phase, size) for size in (4, 3, 3) for phase in ("forward", "backward")]


# Which parameters train.


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into = nn.Linear(5, 5)
        self.out = nn.Linear(5, 5)
        self.out.weight = self.into.weight

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.out(torch.tanh(self.into(x)))
        return scores


def test_tied_weights_are_trained_once() -> None:
    ours = assert_cut_is_exact(Tied().double())
    assert isinstance(ours, Tied)
    assert ours.out.weight is ours.into.weight


def test_frozen_parameters_stay_until_they_are_thawed() -> None:
    ours, whole = small_model(), small_model()
    for model in (ours, whole):
        model[0].requires_grad_(requires_grad=False)
    accumulator = Accumulator(ours, sgd(ours), micro_batch=4)
    reference, before = sgd(whole), first_weight(ours).clone()
    for place, batch in enumerate(pairs()):
        if place == 2:
            assert torch.equal(first_weight(ours), before)
            for model in (ours, whole):
                model[0].requires_grad_(requires_grad=True)
        accumulator.step(batch)
        undivided_steps(whole, reference, F.cross_entropy, [batch])
    assert_same_parameters(ours, whole)
    assert not torch.equal(first_weight(ours), before)


class Routed(nn.Module):
    """Each example goes to one of two experts; a third is never used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(5, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = x.new_zeros(len(x), 3)
        for place, chosen in enumerate((x[:, 0] > 0, x[:, 0] <= 0)):
            if chosen.any():
                scores[chosen] = self.experts[place](x[chosen])
        return scores


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_parameters_without_a_part_in_some_micro_batches_or_all(micro_batch: int) -> None:
    model = Routed().double()
    ours = assert_cut_is_exact(model, micro_batch=micro_batch)
    assert isinstance(ours, Routed)
    assert_same_parameters(ours.experts[2], model.experts[2])


class Adapted(nn.Module):
    """A frozen layer with a low-rank adapter beside it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(5, 3).requires_grad_(requires_grad=False)
        self.down = nn.Linear(5, 2, bias=False)
        self.up = nn.Linear(2, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.base(x) + self.up(self.down(x))
        return scores


@pytest.mark.parametrize("holds_all", [False, True])
def test_only_adapters_train_whether_or_not_the_optimizer_holds_the_rest(holds_all: bool) -> None:
    def optimize(model: nn.Module) -> torch.optim.Optimizer:
        held = [p for p in model.parameters() if holds_all or p.requires_grad]
        return torch.optim.AdamW(held, lr=0.1)

    model = Adapted().double()
    ours = assert_cut_is_exact(model, optimize=optimize)
    assert isinstance(ours, Adapted)
    assert_same_parameters(ours.base, model.base)


def test_an_optimizer_of_some_parameters_leaves_the_others_alone() -> None:
    model = small_model()
    ours = assert_cut_is_exact(model, optimize=lambda m: sgd(m.get_submodule("2")))
    assert torch.equal(first_weight(ours), first_weight(model))
    assert all(parameter.grad is None for parameter in ours.parameters())


def test_groups_keep_their_own_settings_and_may_be_added_between_steps() -> None:
    ours, whole = small_model(), small_model()

    def optimize(model: nn.Sequential) -> torch.optim.Optimizer:
        groups = [
            {"params": [model[2].weight], "lr": 0.1, "weight_decay": 0.3},
            {"params": [model[2].bias], "lr": 0.02},
        ]
        return torch.optim.AdamW(groups, lr=0.01, weight_decay=0)

    optimizers = [optimize(ours), optimize(whole)]
    accumulator = Accumulator(ours, optimizers[0], micro_batch=4)
    for place, batch in enumerate(pairs()):
        if place == 2:
            for model, optimizer in zip((ours, whole), optimizers, strict=True):
                optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.05})
        accumulator.step(batch)
        undivided_steps(whole, optimizers[1], F.cross_entropy, [batch])
    assert_same_parameters(ours, whole)
    assert not torch.equal(first_weight(ours), first_weight(small_model()))


# Optimizers.

_LR = {"Adadelta": 1.0}
_ALL = [
    name
    for name in sorted(torch.optim.__all__)
    if isinstance(kind := getattr(torch.optim, name), type)
    and issubclass(kind, torch.optim.Optimizer)
    and name not in ("Optimizer", "LBFGS", "SparseAdam")
]


def _takes(name: str, option: str) -> bool:
    parameters = [nn.Parameter(torch.ones(2, 2))]
    try:
        getattr(torch.optim, name)(parameters, lr=0.1, **{option: True})
    except (TypeError, RuntimeError):
        return False
    return True


_CASES = [
    (name, option)
    for name in _ALL
    for option in ("default", "foreach", "fused", "maximize")
    if option == "default" or _takes(name, option)
]


def test_the_cases_are_all_optimizers_and_their_options() -> None:
    assert len(_ALL) >= 13
    assert ("AdamW", "fused") in _CASES
    assert ("SGD", "fused") in _CASES
    assert sum(option == "foreach" for _, option in _CASES) >= 12


@pytest.mark.parametrize(("name", "option"), _CASES)
def test_every_optimizer_takes_the_undivided_step(name: str, option: str) -> None:
    options = {} if option == "default" else {option: True}
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False)
    ).double()  # Muon takes matrices only.
    assert_cut_is_exact(
        model,
        optimize=lambda m: getattr(torch.optim, name)(
            m.parameters(), lr=_LR.get(name, 0.01), **options
        ),
    )


def test_a_capturable_optimizer_is_refused_by_torch_itself_on_the_cpu() -> None:
    model = small_model()
    optimizer = torch.optim.Adam(model.parameters(), capturable=True)
    before = twin(model)
    with pytest.raises(AssertionError, match="capturable"):
        Accumulator(model, optimizer, micro_batch=4).step(pairs()[0])
    assert_same_parameters(model, before)
    assert all(parameter.grad is None for parameter in model.parameters())


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 3, sparse=True)

    def forward(self, tokens: Tensor) -> Tensor:
        scores: Tensor = self.table(tokens).mean(1)
        return scores


# torch says so once a process, in Adagrad's own step.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.parametrize("kind", [torch.optim.SparseAdam, torch.optim.SGD, torch.optim.Adagrad])
def test_sparse_gradients_add_up(kind: type[torch.optim.Optimizer]) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [
        (
            torch.randint(0, 20, (10, 4), generator=generator),
            torch.randint(0, 3, (10,), generator=generator),
        )
        for _ in range(4)
    ]
    make: Callable[..., torch.optim.Optimizer] = kind
    assert_cut_is_exact(
        Bag().double(), batches, optimize=lambda m: make(list(m.parameters()), lr=0.1)
    )


# Parameters and averages that are made of others.


def test_weight_norm_is_exact() -> None:
    model = small_model()
    parametrizations.weight_norm(model[0])
    assert_cut_is_exact(model)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # The weight norm of old is deprecated.
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        torch.nn.utils.weight_norm,
    ],
    ids=["pruned", "weight norm of old"],
)
def test_weights_that_a_hook_makes_before_each_forward_are_exact(
    change: Callable[[nn.Module], object],
) -> None:
    model = small_model()
    change(model[0])
    ours, whole = model, small_model()
    change(whole[0])
    accumulator = Accumulator(ours, sgd(ours), micro_batch=4)
    for batch in pairs():
        accumulator.step(batch)
    undivided_steps(whole, sgd(whole), F.cross_entropy, pairs())
    assert_same_parameters(ours, whole)


def test_spectral_norm_changes_its_buffers_once_a_micro_batch_and_a_note_says_so() -> None:
    model = small_model()
    parametrizations.spectral_norm(model[0])
    accumulator = Accumulator(model, sgd(model), micro_batch=4)
    accumulator.step(pairs()[0])
    assert accumulator.moved_buffers == {
        "0.parametrizations.weight.0._u",
        "0.parametrizations.weight.0._v",
    }
    result = find_and_train(
        model,
        pairs(examples=64),
        desired=64,
        optimizer=sgd(model),
        memory_limit="12KiB",
        progress=False,
    )
    assert result.plan.accumulation_steps > 1
    assert any("parametrizations.weight.0._u" in note for note in result.notes)


class Teacher(nn.Module):
    """A student, and the mean of its weights, which the forward pass updates, as in MoCo."""

    def __init__(self, *, gated: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student, self.teacher = nn.Linear(5, 3), nn.Linear(5, 3).requires_grad_(False)
        self.calls, self.gated = 0, gated
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            self.last = x.mean(0)
        if self.training or not self.gated:
            with torch.no_grad():
                pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
                for average, value in pairs:
                    average.lerp_(value, 0.1)
        difference: Tensor = self.student(x) - self.teacher(x)
        return difference


def test_a_note_names_what_a_forward_pass_changes_even_if_it_is_no_buffer() -> None:
    model = Teacher(gated=True).double()
    accumulator = Accumulator(model, sgd(model.student), micro_batch=4)
    accumulator.step(pairs()[0])
    assert accumulator.moved_buffers == {"teacher.weight", "teacher.bias", "calls", "last"}
    result = find_and_train(
        model, pairs(examples=64), desired=64, optimizer=sgd(model.student), device="cpu",
        memory_limit="4KiB", progress=False,
    )  # fmt: skip
    assert result.plan.accumulation_steps > 1
    assert any("teacher.weight" in note and "once a step" in note for note in result.notes)


def test_a_model_whose_parameters_move_in_evaluation_too_is_refused_in_pieces() -> None:
    model = Teacher(gated=False).double()
    with pytest.raises(
        InexactStepError, match=r"changes its parameters teacher.weight, teacher.bias"
    ):
        Accumulator(model, sgd(model.student), micro_batch=4).step(pairs()[0])
    assert Accumulator(model, sgd(model.student)).step(pairs()[0]).replays == 0


def test_an_embedding_with_max_norm_changes_nothing_else() -> None:
    model = nn.Sequential(nn.Embedding(7, 5, max_norm=0.5), nn.Flatten(), nn.Linear(15, 3))
    accumulator = Accumulator(model, sgd(model), micro_batch=4)
    accumulator.step((torch.randint(0, 7, (10, 3)), torch.randint(0, 3, (10,))))
    assert accumulator.moved_buffers == set()


def update(average: AveragedModel, model: nn.Module, _: StepResult) -> None:
    average.update_parameters(model)


def test_an_average_that_on_step_updates_is_that_of_the_undivided_steps() -> None:
    averages = []
    for limit in ("12KiB", None):
        model = small_model()
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        result = find_and_train(
            model,
            pairs(examples=64),
            desired=64,
            optimizer=sgd(model),
            memory_limit=limit,
            on_step=functools.partial(update, average, model),
            progress=False,
        )
        assert (result.plan.accumulation_steps > 1) == (limit is not None)
        averages.append(average)
    assert int(averages[0].n_averaged) == 4
    assert_same_parameters(*averages)


# Numbers, layouts and outputs.


class Waves(nn.Module):
    """Complex in its middle."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.waves = nn.Parameter(torch.randn(5, 3, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(torch.complex128) @ self.waves).abs()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_complex_parameters_are_trained(kind: Callable[..., torch.optim.Optimizer]) -> None:
    assert_cut_is_exact(Waves(), optimize=lambda m: kind(m.parameters(), lr=0.1))


@pytest.mark.usefixtures("unasked")
def test_channels_last_stays_channels_last() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).double()
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    formats = []
    model[0].register_forward_pre_hook(
        lambda _, inputs: formats.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    x = torch.randn(10, 4, 6, 6, dtype=torch.float64).to(memory_format=torch.channels_last)
    ours = assert_cut_is_exact(model, [(x, torch.arange(10) % 3)])
    assert formats == [True] * 4
    assert first_weight(ours).is_contiguous(memory_format=torch.channels_last)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(1).relu_()
        scores: Tensor = self.inner(x)
        return scores


@pytest.mark.parametrize("micro_batch", [4, 10])
def test_a_model_that_works_in_place_leaves_the_user_s_data_alone(micro_batch: int) -> None:
    ours, whole = InPlace().double(), InPlace().double()
    x, y = pairs()[0]
    kept = x.clone()
    Accumulator(ours, sgd(ours), micro_batch=micro_batch).step((x, y))
    assert torch.equal(x, kept)
    undivided_steps(whole, sgd(whole), F.cross_entropy, [(kept, y)])
    assert_same_parameters(ours, whole)


def test_a_loss_in_double_precision_of_a_single_precision_model() -> None:
    def loss(model: nn.Module, batch: object) -> tuple[Tensor, int]:
        assert isinstance(batch, tuple)
        x, y = batch
        return F.cross_entropy(model(x).double(), y, reduction="sum"), len(x)

    ours, whole = small_model().float(), small_model().float()
    x, y = pairs()[0][0].float(), pairs()[0][1]
    step = Accumulator(ours, sgd(ours), batch_loss=loss, micro_batch=4).step((x, y))
    (expected,) = undivided_steps(
        whole, sgd(whole), lambda out, y: F.cross_entropy(out.double(), y), [(x, y)]
    )
    torch.testing.assert_close(step.loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.state_dict(), whole.state_dict(), rtol=1e-5, atol=1e-7)


@dataclass
class Scores:
    """As transformers return them."""

    logits: Tensor
    hidden: tuple[Tensor, ...]


class Nested(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.inner = small_model()

    def forward(self, x: Tensor) -> object:
        logits = self.inner(x)
        return {
            "dict": {"logits": logits, "more": {"hidden": (x, [x])}},
            "tuple": (logits, (x, {"x": x})),
            "dataclass": Scores(logits, (x,)),
        }[self.kind]


READ: dict[str, Callable[[object], Tensor]] = {
    "dict": lambda out: out["logits"],  # type: ignore[index]
    "tuple": lambda out: out[0],  # type: ignore[index]
    "dataclass": lambda out: out.logits,  # type: ignore[attr-defined]
}


@pytest.mark.parametrize("kind", READ)
def test_nested_outputs_reach_the_user_s_loss_as_they_are(kind: str) -> None:
    def loss(outputs: object, targets: Tensor) -> tuple[Tensor, int]:
        logits = READ[kind](outputs)
        return F.cross_entropy(logits, targets, reduction="sum"), len(targets)

    def mean(outputs: object, targets: Tensor) -> Tensor:
        return F.cross_entropy(READ[kind](outputs), targets)

    whole = Nested(kind)
    reference = sgd(whole)
    losses = undivided_steps(whole, reference, mean, pairs())
    for given in (loss, mean):
        ours = Nested(kind)
        accumulator = Accumulator(ours, sgd(ours), given, micro_batch=4)
        assert_exact([accumulator.step(batch).loss for batch in pairs()], losses)
        assert_same_parameters(ours, whole)


class Recurrent(nn.Module):
    """Reads ``(time, batch, 5)``: what is cut along dimension 0 is time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reads = nn.GRU(5, 4)
        self.scores = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.scores(self.reads(x)[0][-1])
        return scores


def test_time_in_front_is_a_clear_error_and_a_forward_that_transposes_is_the_way_out() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 10, 5, generator=generator, dtype=torch.float64)
    y = torch.arange(10) % 3
    ours, whole = Recurrent().double(), Recurrent().double()
    with pytest.raises(ValueError, match="dimension 0"):
        Accumulator(ours, sgd(ours), micro_batch=4).step((x, y))
    assert_same_parameters(ours, whole)

    def forward(model: nn.Module, batch: object) -> tuple[Tensor, Tensor]:
        assert isinstance(batch, tuple)
        return model(batch[0].transpose(0, 1)), batch[1]

    accumulator = Accumulator(
        ours, sgd(ours), nn.CrossEntropyLoss(), micro_batch=4, forward=forward
    )
    accumulator.step((x.transpose(0, 1), y))
    undivided_steps(whole, sgd(whole), F.cross_entropy, [(x, y)])
    assert_same_parameters(ours, whole)


@pytest.mark.usefixtures("unasked")
def test_the_comparison_can_fail() -> None:
    coupled = nn.Sequential(small_model(), nn.Softmax(dim=0))  # Each example sees the others.
    with pytest.raises(AssertionError, match="not close"):
        assert_cut_is_exact(coupled)
