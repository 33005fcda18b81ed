"""A GPT-2 of transformers trains on ragged text as on undivided batches."""

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from characters import character_batches, vocabulary
from reference import Pair
from torch import Tensor, nn

from autobatch import TrainingResult, find_and_train
from autobatch.compat.torchvision import import_torchvision

Batch = dict[str, Tensor]

LONGEST = 48
DESIRED = 24
STEPS = 30
# AdamW enlarges a gradient of nothing but rounding (that of a key's bias) to the size of the
# others, unless its epsilon is larger than that gradient.
ADAMW = functools.partial(torch.optim.AdamW, lr=3e-3, eps=1e-6)


def gpt2() -> nn.Module:
    import_torchvision()  # transformers imports it, where it is installed.
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(vocabulary()) + 1,
        n_positions=LONGEST,
        n_embd=48,
        n_layer=2,
        n_head=4,
        bos_token_id=None,
        eos_token_id=None,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config)


def padded(batch: Batch) -> Batch:
    """Pad to the longest example of all; in a causal model, right padding changes nothing."""
    room = LONGEST - batch["labels"].shape[1]
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {name: F.pad(tensor, (0, room), value=fill[name]) for name, tensor in batch.items()}


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch).loss  # type: ignore[no-any-return]


def undivided(
    model: nn.Module,
    batches: list[Batch],
    loss_of: Callable[[nn.Module, Batch], Tensor] = own_loss,
    *,
    reverse: bool = False,
) -> list[float]:
    """A plain loop over whole logical batches, each in its order or in reverse."""
    model.train()
    optimizer = ADAMW(model.parameters())
    together = {name: torch.cat([padded(batch)[name] for batch in batches]) for name in batches[0]}
    losses = []
    for start in range(0, len(together["labels"]), DESIRED):
        optimizer.zero_grad()
        batch = {k: v[start : start + DESIRED] for k, v in together.items()}
        loss = loss_of(model, {k: v.flip(0) for k, v in batch.items()} if reverse else batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def accumulated(model: nn.Module, batches: list[Batch], **options: object) -> TrainingResult:
    return find_and_train(model, batches, DESIRED, optimizer=ADAMW, progress=False, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def text() -> list[Batch]:
    return character_batches(STEPS * DESIRED - 5, 10, longest=LONGEST, seed=0)


def test_the_losses_are_those_of_undivided_batches_at_every_step(text: list[Batch]) -> None:
    """With the model's own loss, in float32: each step multiplies the rounding of earlier sums.

    transformers rounds logits to float32 whatever the model; below the same goes on in float64. How
    far rounding alone leads differs between processors, so the same batches with their examples in
    reverse order say how fine this comparison can be.
    """
    model = gpt2()
    expected = undivided(copy.deepcopy(model), text)
    again = undivided(copy.deepcopy(model), text, reverse=True)
    rounding = max(abs(a - e) / e for a, e in zip(again, expected, strict=True))
    assert 0 < rounding < 5e-4, "a mean over examples is 1e-3 off and more: see below"
    result = accumulated(model, text, memory_limit="6MiB")
    assert result.steps == STEPS
    assert max(result.plan.micro_batch_sizes) < 10, "ragged pieces of 10 were not cut any further"
    assert result.losses == pytest.approx(expected, rel=max(1e-4, 2 * rounding))
    assert expected[-1] < 0.8 * expected[0], "nothing was learnt"


def test_a_mean_over_examples_would_be_another_training(text: list[Batch]) -> None:
    def per_example(model: nn.Module, batch: Batch) -> Pair:
        labels = batch.pop("labels")
        return model(**batch).logits[:, :-1].transpose(1, 2), labels[:, 1:]

    def mean_of_means(outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        each = F.cross_entropy(outputs, targets, reduction="none").sum(1)
        return (each / (targets != -100).sum(1)).sum(), len(targets)

    model = gpt2()
    expected = undivided(copy.deepcopy(model), text[:24])
    result = accumulated(model, text[:24], forward=per_example, loss=mean_of_means)
    assert result.losses != pytest.approx(expected, rel=1e-3)


def test_in_float64_they_are_the_same_to_ten_digits(text: list[Batch]) -> None:
    def shifted(model: nn.Module, batch: Batch) -> Pair:
        labels = batch["labels"]
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        return model(**inputs).logits[:, :-1].transpose(1, 2), labels[:, 1:]

    def loss_of(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(*shifted(model, batch))

    model = gpt2().double()
    expected = undivided(copy.deepcopy(model), text, loss_of)
    result = accumulated(
        model, text, forward=shifted, loss=nn.CrossEntropyLoss(), memory_limit="12MiB"
    )
    assert max(result.plan.micro_batch_sizes) < 10
    assert result.losses == pytest.approx(expected, rel=1e-10)
