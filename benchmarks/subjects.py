"""What is searched: black boxes whose memory is a number, and six real models under limits."""

import functools
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
from black_box import BlackBox
from reference import twin
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from autobatch.compat.torchvision import import_torchvision
from autobatch.units import format_bytes
from benchmarks.engine_peers import Pair
from benchmarks.findings import SEED

_GPT_2: Final = "GPT-2 of 2 layers, 128 wide, 32 tokens, AdamW"
_BOX_LIMITS: Final = (1, 3, 7, 37, 100, 129, 1000)
_BOX_CEILINGS: Final = (256, 4096)
_EXAMPLES: Final = 1000
_ON_A_GPU: Final = 8  # Limits and data grow so: cuBLAS alone takes 32 MiB of them there.
_MIB: Final = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One case for every searcher.

    Attributes:
        make: Returns the same model each time, on the device.
        optimizer: Makes a fresh one; its state is born in the search.
        data: On the host; its length is the ceiling.
        device: Where the model runs.
        limit_bytes: What tensors may take there; None where the model itself says what is too much.
        possible: The largest size, where it is known beforehand.
    """

    make: Callable[[], nn.Module]
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    data: Pair
    device: torch.device
    limit_bytes: int | None = None
    possible: int | None = None

    @property
    def ceiling(self) -> int:
        """The largest size of interest."""
        return len(self.data[0])


def black_boxes(device: torch.device) -> dict[str, Subject]:
    """The 14 cases, by name. Each model has a gradient that is to be kept."""
    pairs = [(limit, ceiling) for ceiling in _BOX_CEILINGS for limit in _BOX_LIMITS]
    return {
        f"K = {limit}, ceiling {ceiling}": Subject(
            make=functools.partial(_box, limit, device),
            optimizer=Adam,
            data=_images(ceiling, channels=1, pixels=5, classes=3),
            device=device,
            possible=min(limit, ceiling),
        )
        for limit, ceiling in pairs
    }


def real_models(device: torch.device) -> tuple[dict[str, Subject], dict[str, str]]:
    """Six models under three limits each, by name; and of what is missing, what it lacks."""
    scale = _ON_A_GPU if device.type == "cuda" else 1
    images = _images(_EXAMPLES * scale, channels=3, pixels=32, classes=10)
    momentum = functools.partial(SGD, lr=0.01, momentum=0.9)
    vision = import_torchvision().models
    subjects: dict[str, Subject] = {}

    def add(
        name: str,
        make: Callable[[], nn.Module],
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        limits_mib: Iterable[int],
        data: Pair = images,
    ) -> None:
        once = functools.cache(functools.partial(_seeded, make))
        for limit in limits_mib:
            limit_bytes = limit * _MIB * scale
            subjects[f"{name}: {format_bytes(limit_bytes)}"] = Subject(
                make=functools.partial(_copy_on, device, once),
                optimizer=optimizer,
                data=data,
                device=device,
                limit_bytes=limit_bytes,
            )

    ten = {"num_classes": 10}
    layers = {"num_layers": 4, "num_heads": 12, "hidden_dim": 768, "mlp_dim": 3072}  # B has 12.
    vit = functools.partial(vision.VisionTransformer, image_size=32, patch_size=16, **layers, **ten)
    convnext = functools.partial(vision.convnext_tiny, **ten)
    add("MLP 3072-64-64-10, Adam", _mlp, Adam, (8, 10, 12))
    add("resnet18, SGD", functools.partial(vision.resnet18, **ten), momentum, (150, 164, 184))
    add("resnet50, SGD", functools.partial(vision.resnet50, **ten), momentum, (312, 324, 336))
    add("ViT-B/16, 4 of 12 layers, SGD", vit, momentum, (360, 376, 392))
    add("ConvNeXt-Tiny, SGD", convnext, momentum, (376, 396, 420))
    add(_GPT_2, _Gpt2, AdamW, (32, 96, 192), _tokens(_EXAMPLES * scale))
    missing = dict.fromkeys([name for name in subjects if _GPT_2 in name], "transformers")
    if importlib.util.find_spec("transformers"):
        return subjects, {}
    return {name: made for name, made in subjects.items() if name not in missing}, missing


def _box(limit: int, device: torch.device) -> nn.Module:
    model = BlackBox(limit).to(device)
    model(torch.ones(1, 1, 5, 5, device=device)).sum().backward()
    return model


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(SEED)
    return make()


def _copy_on(device: torch.device, make: Callable[[], nn.Module]) -> nn.Module:
    return twin(make()).to(device)


def _mlp() -> nn.Module:
    inner = (nn.Linear(3072, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    return nn.Sequential(nn.Flatten(), *inner, nn.Linear(64, 10))


class _Gpt2(nn.Module):
    """Made from its configuration alone. Returns scores as the cross-entropy takes them."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        size = {"n_layer": 2, "n_head": 4, "n_embd": 128, "n_positions": 32, "vocab_size": 512}
        special = {"bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
        self.body = GPT2LMHeadModel(GPT2Config.from_dict(size | special))

    def forward(self, tokens: Tensor) -> Tensor:
        scores: Tensor = self.body(input_ids=tokens).logits.transpose(1, 2)
        return scores


def _tokens(examples: int) -> Pair:
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(0, 512, (examples, 33), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _images(examples: int, *, channels: int, pixels: int, classes: int) -> Pair:
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randn(examples, channels, pixels, pixels, generator=generator)
    return images, torch.randint(0, classes, (examples,), generator=generator)


def residents(model: nn.Module, optimizer: Optimizer) -> Iterator[Tensor]:
    """Yield the tensors that live on the device between steps."""
    yield from model.parameters()
    yield from model.buffers()
    for entry in optimizer.state.values():
        yield from (value for value in entry.values() if isinstance(value, Tensor))
