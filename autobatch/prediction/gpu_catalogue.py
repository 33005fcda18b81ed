"""A catalogue of GPUs: what of their memory PyTorch sees, what it cannot use, and what they can do.

Sizes are of one card without MIG, with ECC where its maker ships it switched on, and on Linux:
Windows and WSL show nearly all that is listed. Drivers differ by up to one percent; the catalogue
holds the smallest capacity found. Where a source gives MB or MiB, it means 2**20 bytes.

What ``nvidia-smi`` lists is from https://github.com/modal-labs/modal-client/pull/2797 and from
``nvidia-smi`` in public logs; compute capabilities are from https://developer.nvidia.com/cuda-gpus.
"""

import difflib
import re
from dataclasses import dataclass, replace
from typing import Final

from autobatch.devices.base import standard_headroom
from autobatch.units import format_bytes, parse_bytes

_MIB: Final = 2**20

# The context grows with the multiprocessors, each of which it gives a stack and buffers. These
# bounds hold every published size: T4 0.11 to 0.14 GiB, L4 0.25, RTX 3090 0.31 to 0.41, RTX 4090
# 0.43, L40S 0.4 to 0.5, RTX 5090 0.6, H200 0.66.
_CONTEXT_PER_MULTIPROCESSOR: Final = (2.5 * _MIB, 5.2 * _MIB)
_CONTEXT_AT_LEAST: Final = 256 * _MIB  # What the upper bound may not go below: the L4's.

# What the driver holds back of the listed memory, at most, on every card where both are known.
_HELD_BACK_BYTES: Final = 544 * _MIB
_HELD_BACK_FRACTION: Final = 0.016

# Words of a name that tell no two cards apart.
_FILLERS: Final = re.compile("nvidia|geforce|tesla|rtx|generation|gpu")

_VARIANTS: Final = {"ti", "super"}  # Another card than the one without the word.
_NEARLY_SIZE: Final = re.compile(r"\s*-?\d+(?:\.\d+)?\s*[kmgt](?:i?b)?\s*", re.IGNORECASE)
_SIZE: Final = re.compile(r"\s*\d+(?:\.\d+)?\s*[kmgt]i?b\s*", re.IGNORECASE)

# Where a capacity was read, as it stands there: in logs that many public repositories hold. Both
# programs print cudaDeviceProp.totalGlobalMem in MiB.
_TORCH: Final = "torch.cuda.get_device_properties: major={}, minor={}, total_memory={}MB"
_LLAMA: Final = "llama.cpp (ggml_cuda_init): compute capability {}.{}, VMM: yes, VRAM: {} MiB"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One kind of GPU. All sizes are bytes.

    Attributes:
        name: As people say it.
        listed_bytes: The total that ``nvidia-smi`` lists.
        capacity_bytes: ``total_memory`` as PyTorch sees it.
        compute_capability: Major and minor number.
        context_bytes: The least and the most that a process holds outside the allocator as soon
            as it uses the GPU. Kernels that libraries load on demand come on top.
        source: Where the capacity was published: an address, or the line of a public log.
        derived: Whether the capacity was not published but follows ``visible_bytes``.
        also: Further words of the names that torch and shops give it.
    """

    name: str
    listed_bytes: int
    capacity_bytes: int
    compute_capability: tuple[int, int]
    context_bytes: tuple[int, int]
    source: str
    derived: bool = False
    also: str = ""

    @property
    def workspace_bytes(self) -> int:
        """The workspace that each thread which multiplies takes for cuBLAS.

        As ``parseChosenWorkspaceSize`` of ``aten/src/ATen/cuda/CublasHandlePool.cpp`` has it in
        2026; older versions take 32 MiB on Hopper only. ``CUBLAS_WORKSPACE_CONFIG`` overrules it.
        """
        large = self.compute_capability[0] in (9, 10, 12)
        return 32 * _MIB if large else 2 * 4096 * 1024 + 8 * 16 * 1024

    @property
    def bf16(self) -> bool:
        """Whether it multiplies in bfloat16 itself: since Ampere."""
        return self.compute_capability >= (8, 0)

    @property
    def flash(self) -> bool:
        """Whether PyTorch's flash attention runs on it: since Ampere."""
        return self.compute_capability >= (8, 0)


def visible_bytes(listed_bytes: int) -> int:
    """Return the capacity to expect where only the listed total is known.

    What the driver holds back is taken at its largest, 544 MiB or 1.6 %: no card in the catalogue
    shows less than this.
    """
    return listed_bytes - max(_HELD_BACK_BYTES, round(_HELD_BACK_FRACTION * listed_bytes))


def find_gpu(name: str) -> Gpu:
    """Return the card of the catalogue that ``name`` means, loosely spelt.

    Case, punctuation, maker and order do not matter: ``"4090"``, ``"nvidia-geforce-rtx-4090"`` and
    what ``torch.cuda.get_device_name`` says are the same card. A part of a name will do if it
    belongs to one card only; a whole name wins over longer ones (``"A10"`` is not the A10G), and
    without the word a Ti is not meant. A size such as ``"24GiB"`` is ``custom_gpu``.

    Raises:
        ValueError: If no card has that name, or several do.
    """
    if not isinstance(name, str):
        raise TypeError(f'a GPU is a name such as "RTX 4090" or a Gpu, got {name!r}')
    if _SIZE.fullmatch(name):
        return custom_gpu(name)
    if _NEARLY_SIZE.fullmatch(name):
        raise ValueError(f"a card's memory is written with its unit, such as 24GiB, got {name!r}")
    asked = _words(name)
    meant = [gpu for gpu in CATALOGUE if _VARIANTS & _words(gpu.name) <= asked]
    found = [gpu for gpu in meant if asked and asked <= _words(f"{gpu.name} {gpu.also}")]
    whole = [gpu for gpu in found if _words(gpu.name) <= asked]
    if len(whole or found) == 1:
        return (whole or found)[0]
    if found:
        names = ", ".join(gpu.name for gpu in found)
        raise ValueError(f"{name!r} may be any of {names}; say which")
    raise ValueError(
        f"no GPU in the catalogue is called {name!r}; nearest: {', '.join(_nearest(name))}. "
        "For any other card give its memory instead, such as 24GiB"
    )


def safe_bytes(gpu: Gpu) -> int:
    """What a search would allow the allocator, with the largest context seen on such a card."""
    return gpu.capacity_bytes - gpu.context_bytes[1] - standard_headroom(gpu.capacity_bytes)


def possible_bytes(gpu: Gpu) -> int:
    """What the allocator may get at all: with the smallest context, and no headroom."""
    return gpu.capacity_bytes - gpu.context_bytes[0]


def custom_gpu(memory: int | str, *, like: str = "RTX 4090") -> Gpu:
    """Return a GPU of which PyTorch sees ``memory``, in all else as the card ``like``.

    Args:
        memory: Bytes, or text such as ``"24GiB"``.
        like: A name that ``find_gpu`` knows.

    Raises:
        ValueError: If the memory cannot be read or is not above zero, or ``like`` is not found.
    """
    capacity = parse_bytes(memory, name="memory")
    return replace(
        find_gpu(like),
        name=format_bytes(capacity),
        listed_bytes=capacity,
        capacity_bytes=capacity,
        source="given by the user",
        derived=False,
        also="",
    )


def _words(name: str) -> set[str]:
    """Letters and numbers apart, so that ``"A100-80GB"`` and ``"a 100 80"`` are the same."""
    bare = re.sub(r"(\d)\s?gi?b\b", r"\1", _FILLERS.sub(" ", name.lower()))
    return set(re.findall(r"[a-z]+|\d+", bare))


def _nearest(name: str) -> list[str]:
    by_spelling = {" ".join(re.findall(r"\w+", gpu.name.lower())): gpu.name for gpu in CATALOGUE}
    spelling = " ".join(re.findall(r"\w+", name.lower()))
    close = difflib.get_close_matches(spelling, by_spelling, n=3, cutoff=0)
    return [by_spelling[match] for match in close]


def _card(
    name: str,
    listed_mib: int,
    visible_mib: int | None,
    compute_capability: tuple[int, int],
    multiprocessors: int,
    source: str = "",
    *,
    also: str = "",
    context_gib: tuple[float, float] | None = None,
) -> Gpu:
    """One row of the catalogue; without a published capacity or context these are derived."""
    listed = listed_mib * _MIB
    least, most = (round(multiprocessors * each) for each in _CONTEXT_PER_MULTIPROCESSOR)
    context = (least, max(most, _CONTEXT_AT_LEAST))
    published = source.format(*compute_capability, visible_mib)
    if context_gib is not None:
        context = (round(context_gib[0] * 2**30), round(context_gib[1] * 2**30))
    return Gpu(
        name=name,
        listed_bytes=listed,
        capacity_bytes=visible_bytes(listed) if visible_mib is None else visible_mib * _MIB,
        compute_capability=compute_capability,
        context_bytes=context,
        source=published or "derived from what nvidia-smi lists",
        derived=visible_mib is None,
        also=also,
    )


CATALOGUE: Final[tuple[Gpu, ...]] = (
    # Pascal, Volta, Turing
    _card("P100", 16384, 16280, (6, 0), 56, _TORCH, also="PCIe 16GB"),
    _card("V100 16GB", 16384, 16130, (7, 0), 80, _TORCH, also="SXM2 PCIe"),
    _card("V100 32GB", 32768, 32494, (7, 0), 80, _LLAMA, also="SXM2 SXM3 PCIe"),
    _card("T4", 15360, 14912, (7, 5), 40, _LLAMA, also="16GB", context_gib=(0.11, 0.14)),
    _card("RTX 2080 Ti", 11264, 11019, (7, 5), 68, _TORCH, also="11GB"),
    # Ampere
    _card("RTX 3060", 12288, 11906, (8, 6), 28, _LLAMA, also="12GB"),
    _card("RTX 3060 Ti", 8192, None, (8, 6), 38, also="8GB"),
    _card("RTX 3070", 8192, 7819, (8, 6), 46, _LLAMA, also="8GB"),
    _card("RTX 3080", 10240, None, (8, 6), 68, also="10GB"),
    _card("RTX 3080 Ti", 12288, None, (8, 6), 80, also="12GB"),
    _card("RTX 3090", 24576, 24123, (8, 6), 82, _LLAMA, also="24GB", context_gib=(0.31, 0.41)),
    _card("RTX A5000", 24564, 24114, (8, 6), 64, _TORCH, also="24GB"),
    _card("RTX A6000", 49140, 48676, (8, 6), 84, _TORCH, also="48GB"),
    _card("A10", 23028, 22731, (8, 6), 72, _LLAMA, also="24GB"),
    _card("A10G", 23028, 22587, (8, 6), 80, _TORCH, also="24GB"),
    _card(
        "A30",
        24576,
        24062,
        (8, 0),
        56,
        "https://github.com/ProjectPhysX/FluidX3D/issues/8",
        also="24GB PCIe",
    ),
    _card("A40", 46068, 45416, (8, 6), 84, _TORCH, also="48GB PCIe"),
    _card("A100 40GB", 40960, 40326, (8, 0), 108, _TORCH, also="SXM4 PCIe"),
    _card("A100 80GB", 81920, 81151, (8, 0), 108, _LLAMA, also="SXM4 PCIe"),
    # Ada
    _card("RTX 4060", 8188, 7932, (8, 9), 24, "https://arxiv.org/abs/2510.21048", also="8GB"),
    _card("RTX 4060 Ti 8GB", 8188, None, (8, 9), 34),
    _card("RTX 4060 Ti 16GB", 16380, 15944, (8, 9), 34, _LLAMA),
    _card("RTX 4070", 12282, 11866, (8, 9), 46, _LLAMA, also="12GB"),
    _card("RTX 4080", 16376, 16049, (8, 9), 76, _TORCH, also="16GB"),
    _card("RTX 4080 Super", 16376, 15937, (8, 9), 80, _LLAMA, also="16GB"),
    _card("RTX 4090", 24564, 24210, (8, 9), 128, _LLAMA, also="24GB", context_gib=(0.43, 0.65)),
    _card(
        "L4",
        23034,
        22491,
        (8, 9),
        58,
        "https://github.com/bottlerocket-os/bottlerocket-kernel-kit/pull/139",
        also="24GB",
        context_gib=(0.25, 0.30),
    ),
    _card("L40S", 46068, 45467, (8, 9), 142, _LLAMA, also="48GB", context_gib=(0.4, 0.5)),
    _card("RTX 6000 Ada", 49140, 48622, (8, 9), 142, _TORCH, also="48GB"),
    # Hopper
    _card("H100 PCIe", 81559, 81008, (9, 0), 114, _TORCH, also="80GB"),
    _card("H100", 81559, 81081, (9, 0), 132, _LLAMA, also="80GB HBM3 SXM SXM5"),
    _card("H200", 143771, 143156, (9, 0), 132, _TORCH, also="141GB SXM", context_gib=(0.66, 0.67)),
    _card("GH200", 97871, None, (9, 0), 132, also="96GB 480GB"),
    # Blackwell
    _card("RTX 5060 Ti 8GB", 8151, None, (12, 0), 36),
    _card("RTX 5060 Ti 16GB", 16311, 15825, (12, 0), 36, _LLAMA),
    _card("RTX 5070", 12227, None, (12, 0), 48, also="12GB"),
    _card("RTX 5070 Ti", 16303, 15808, (12, 0), 70, _LLAMA, also="16GB"),
    _card("RTX 5080", 16303, 15880, (12, 0), 84, _LLAMA, also="16GB"),
    _card("RTX 5090", 32607, 32109, (12, 0), 170, _LLAMA, also="32GB", context_gib=(0.6, 0.86)),
    _card(
        "RTX PRO 6000",
        97887,
        97249,
        (12, 0),
        188,
        "out-of-memory errors in public logs: total capacity of 94.97 GiB",
        also="96GB Blackwell Server Workstation Edition",
    ),
    _card(
        "B200",
        183359,
        182631,
        (10, 0),
        148,
        "https://github.com/pytorch/ao/pull/4002",
        also="180GB 192GB SXM",
    ),
)
"""Each card that ``find_gpu`` knows, oldest first."""
