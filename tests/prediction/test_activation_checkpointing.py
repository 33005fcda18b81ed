"""Activation checkpointing of a model that is not known: where, and what it saves."""

import pytest
import torch
from test_trace import order
from torch import Tensor, nn

from autobatch.compat.torchvision import import_torchvision
from autobatch.prediction.activation_checkpointing import (
    checkpoint_activations,
    reason_against,
    repeated_blocks,
)
from autobatch.prediction.trace import fit_traces
from autobatch.prediction.tracing_process import trace_in_process

WIDTH, DEPTH = 64, 8


class Block(nn.Module):
    """Counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.back = nn.Linear(WIDTH, 8 * WIDTH), nn.Linear(8 * WIDTH, WIDTH)
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return x + torch.Tensor(self.back(self.wide(x).sigmoid()))


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out


@pytest.mark.parametrize(
    ("name", "count", "kinds"),
    [
        ("vit_b_16", 12, {"EncoderBlock"}),
        ("resnet18", 8, {"BasicBlock"}),
        ("convnext_tiny", 18, {"CNBlock"}),
        ("densenet121", 7, {"_DenseBlock", "_Transition"}),
        ("vgg11", 0, set()),
    ],
)
def test_blocks_are_found_where_a_model_repeats_itself(
    name: str, count: int, kinds: set[str]
) -> None:
    with torch.device("meta"):
        model = getattr(import_torchvision().models, name)()
    blocks = list(repeated_blocks(model))
    assert (len(blocks), {type(block).__name__ for block in blocks}) == (count, kinds)
    assert bool(reason_against(model)) == (not blocks)


def test_a_checkpointed_model_has_the_same_gradients() -> None:
    torch.manual_seed(0)
    plain, checkpointed = Deep(), Deep()
    checkpointed.load_state_dict(plain.state_dict())
    checkpointed.blocks.append(checkpointed.blocks[0])  # The same once more is one block.
    plain.blocks.append(plain.blocks[0])
    checkpoint_activations(checkpointed)
    x = torch.randn(5, WIDTH)
    for model in (plain, checkpointed):
        model(x).sum().backward()
    for one, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert [block.runs for block in plain.blocks] == [2, *[1] * (DEPTH - 1), 2]
    assert [block.runs for block in checkpointed.blocks] == [4, *[2] * (DEPTH - 1), 4]


def test_a_checkpointed_step_keeps_the_inputs_of_its_blocks_and_one_block() -> None:
    net, sample = Deep(), (torch.zeros(4, WIDTH), torch.zeros(4, dtype=torch.long))
    answer = trace_in_process(
        [order(net, sample), order(net, sample, change="activation checkpointing")]
    )
    plain, saved = (fit_traces(*traces) for traces in answer.traces)
    assert plain is not None
    assert saved is not None
    batch = 2**16
    row_bytes = 4 * WIDTH * batch
    # A block keeps its input and two wide ones, whose gradient joins them in the backward pass.
    more = plain.allocated_bytes(batch) - saved.allocated_bytes(batch)
    assert more == pytest.approx((DEPTH - 1) * 8 * row_bytes, rel=0.15)


def test_a_model_of_transformers_is_asked_to_do_it() -> None:
    import_torchvision()
    from transformers import GPT2Config, GPT2LMHeadModel

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=9))

    model = Wrapped()
    assert reason_against(model) == ""
    checkpoint_activations(model)
    assert reason_against(model) == "the model does it already"
    assert not any("forward" in vars(module) for module in model.modules()), "not wrapped as well"
