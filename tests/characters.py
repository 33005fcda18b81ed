"""Real text for small language models: the characters of Python's own documentation."""

import random
from functools import cache
from pydoc_data.topics import topics

import torch
from torch import Tensor

PADDING = 0  # Its own token: the characters begin at 1.
_SHORTEST = 4


@cache
def paragraphs() -> tuple[str, ...]:
    """Return the documentation's paragraphs, in one order on every machine."""
    found = (
        " ".join(text.split())
        for _, topic in sorted(topics.items())
        for text in topic.split("\n\n")
    )
    return tuple(text for text in found if len(text) >= _SHORTEST)


@cache
def vocabulary() -> dict[str, int]:
    """Return the token of each character; 0 stands for padding."""
    seen = sorted(set("".join(paragraphs())))
    return {character: token for token, character in enumerate(seen, start=1)}


def character_batches(
    examples: int, batch_size: int, *, longest: int, seed: int
) -> list[dict[str, Tensor]]:
    """Return batches of ragged text, each padded to its own longest example.

    Args:
        examples: In all; the last batch may be short.
        batch_size: Examples in each batch.
        longest: Tokens in the longest example; the shortest has 4.
        seed: Chooses the paragraphs, and where each is cut off.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels`` ``(batch, time)``; labels are -100 on
        padding.
    """
    choice = random.Random(seed)
    texts = choice.sample(paragraphs(), examples)
    cuts = [text[: choice.randint(_SHORTEST, longest)] for text in texts]
    tokens = [[vocabulary()[character] for character in text] for text in cuts]
    return [_padded(tokens[at : at + batch_size]) for at in range(0, examples, batch_size)]


def _padded(rows: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [PADDING] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
    }
