"""The models that people ask about: how each is made, and what one of its batches is."""

import functools
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from autobatch.compat.torchvision import import_torchvision
from benchmarks.findings import SEED

_SAMPLE: Final = 16  # Different examples; a batch repeats them.
_CLASSES: Final = 1000
# What fills memory soonest comes first: on a CPU that is what is waited for. Filling a GiB twice
# takes a core from 2 s (EfficientNet) to 10 s (ViT), at 64 pixels much as at 224.
_VISION: Final = (
    *("efficientnet_b0", "mobilenet_v3_large", "convnext_tiny", "resnet50", "swin_t"),
    *("resnet101", "resnet152", "resnet18", "vit_b_16"),
)
_GPT_2: Final = "gpt2"
NAMES: Final = (*_VISION, _GPT_2)
Batch = tuple[Tensor, Tensor] | dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model to be held.

    Attributes:
        make: Returns it, where torch makes tensors, with the same values each time.
        sample: Makes a few examples on the host.
        example: The shape of one, for people.
        loss: None is the model's own.
    """

    make: Callable[[], nn.Module]
    sample: Callable[[], Batch]
    example: str
    loss: nn.Module | None

    def data(self, examples: int) -> "Repeated":
        """Return so many examples."""
        return Repeated(self.sample(), examples)


class Repeated(Dataset[object]):
    """A few examples, over and over."""

    def __init__(self, sample: Batch, examples: int) -> None:
        self._sample = sample
        self._examples = examples

    def __len__(self) -> int:
        return self._examples

    def __getitem__(self, row: int) -> object:
        if row >= self._examples:
            raise IndexError(row)
        if isinstance(self._sample, dict):
            return {name: values[row % len(values)] for name, values in self._sample.items()}
        return tuple(values[row % len(values)] for values in self._sample)


def subjects(*, on_a_gpu: bool) -> tuple[dict[str, Subject], dict[str, str]]:
    """Return the models by name; and of those that cannot be made, the package that is missing.

    Images are of 224 pixels and texts of 1024 tokens on a GPU, of 64 and 128 on the CPU, where a
    step takes as long for each byte that it fills, but has to be waited for.
    """
    pixels, tokens = (224, 1024) if on_a_gpu else (64, 128)
    made = {name: vision(name, pixels) for name in _VISION}
    if importlib.util.find_spec("transformers") is None:
        return made, {_GPT_2: "transformers"}
    return made | {_GPT_2: language({"n_positions": tokens}, tokens)}, {}


def vision(name: str, pixels: int, classes: int = _CLASSES) -> Subject:
    """Return a classifier of torchvision that has learnt nothing."""
    size = {"image_size": pixels} if name.startswith("vit") else {}
    make = functools.partial(_vision, name, {"num_classes": classes, **size})
    sample = functools.partial(_images, pixels, classes)
    return Subject(
        make=make,
        sample=sample,
        example=f"3 x {pixels} x {pixels}",
        loss=nn.CrossEntropyLoss(),
    )


def language(config: Mapping[str, int], tokens: int) -> Subject:
    """Return a GPT-2 of transformers, from its configuration alone; it has a loss of its own."""
    sample = functools.partial(_tokens, tokens, config.get("vocab_size", 50257))
    make = functools.partial(_gpt2, dict(config))
    return Subject(make=make, sample=sample, example=f"{tokens} tokens", loss=None)


def _vision(name: str, options: Mapping[str, Any]) -> nn.Module:
    torch.manual_seed(SEED)
    model: nn.Module = import_torchvision().models.get_model(name, weights=None, **options)
    return model


def _gpt2(config: dict[str, int]) -> nn.Module:
    import_torchvision()  # transformers imports it, and does not get by without its operators.
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(SEED)
    special: dict[str, Any] = {
        "bos_token_id": 0,
        "eos_token_id": 0,
        "use_cache": False,
        "loss_type": "ForCausalLM",
    }
    model = GPT2LMHeadModel(GPT2Config.from_dict(config | special))
    model.loss_type = "ForCausalLM"  # As it falls back to by itself, with a warning.
    return model


def _images(pixels: int, classes: int) -> Batch:
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randn(_SAMPLE, 3, pixels, pixels, generator=generator)
    return images, torch.randint(0, classes, (_SAMPLE,), generator=generator)


def _tokens(tokens: int, vocabulary: int) -> Batch:
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(0, vocabulary, (_SAMPLE, tokens), generator=generator)
    return {"input_ids": ids, "labels": ids}
