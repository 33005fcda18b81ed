"""A catalogue of GPUs: their memory, the part that the CUDA context takes, and their abilities.

Sizes are those of one card without MIG on Linux, with ECC if the maker ships the card with ECC on.
On Windows and WSL PyTorch sees nearly all listed memory. Capacities differ by up to one percent
between drivers; the catalogue holds the smallest one found. MB and MiB in a source mean 2**20
bytes.

The listed totals of ``nvidia-smi`` are from https://github.com/modal-labs/modal-client/pull/2797
and from ``nvidia-smi`` in public logs; compute capabilities are from
https://developer.nvidia.com/cuda-gpus.
"""

import difflib
import re
from dataclasses import dataclass, replace
from typing import Final

from autobatch.devices.budget import standard_headroom
from autobatch.units import format_bytes, parse_bytes

_MIB: Final = 2**20

# The context has a stack and buffers for each multiprocessor, so it grows with their number. These
# bounds include every published size: T4 0.11 to 0.14 GiB, L4 0.25, RTX 3090 0.31 to 0.41, RTX 4090
# 0.43, L40S 0.4 to 0.5, RTX 5090 0.6, H200 0.66.
_CONTEXT_PER_MULTIPROCESSOR: Final = (2.5 * _MIB, 5.2 * _MIB)
_CONTEXT_AT_LEAST: Final = 256 * _MIB  # The lowest upper bound, from the L4.

# The largest part of the listed memory that the driver keeps, over all cards with known sizes.
_HELD_BACK_BYTES: Final = 544 * _MIB
_HELD_BACK_FRACTION: Final = 0.016

# Words in names that distinguish no two cards.
_FILLERS: Final = re.compile("nvidia|geforce|tesla|rtx|generation|gpu")

_VARIANTS: Final = {"ti", "super"}  # A card with one of these words is another card.
_NEARLY_SIZE: Final = re.compile(r"\s*-?\d+(?:\.\d+)?\s*[kmgt](?:i?b)?\s*", re.IGNORECASE)
_SIZE: Final = re.compile(r"\s*\d+(?:\.\d+)?\s*[kmgt]i?b\s*", re.IGNORECASE)

# The lines of logs, in many public repositories, from which capacities were read. Both programs
# print cudaDeviceProp.totalGlobalMem in MiB.
_TORCH: Final = "torch.cuda.get_device_properties: major={}, minor={}, total_memory={}MB"
_LLAMA: Final = "llama.cpp (ggml_cuda_init): compute capability {}.{}, VMM: yes, VRAM: {} MiB"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One kind of GPU. All sizes are bytes.

    Attributes:
        name: The usual name.
        listed_bytes: The total that ``nvidia-smi`` lists.
        capacity_bytes: The total that PyTorch sees: ``total_memory`` of the device's properties.
        compute_capability: The major and the minor number.
        context_bytes: The smallest and the largest size of the CUDA context, which a process has
            outside the allocator. Kernels that libraries load on demand take more.
        source: The source of the capacity: an address, or a line of public logs.
        derived: Whether no source publishes the capacity, and ``visible_bytes`` estimates it.
        also: Further words in the names that torch and shops use.

    Example:
        >>> replace(find_gpu("RTX 4090"), name="half", capacity_bytes=12 * 2**30)
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
        """The bytes of the cuBLAS workspace of each thread that multiplies matrices.

        The size follows ``parseChosenWorkspaceSize`` of ``aten/src/ATen/cuda/CublasHandlePool.cpp``
        in 2026. Older versions take 32 MiB on Hopper only. ``CUBLAS_WORKSPACE_CONFIG`` sets another
        size.
        """
        large = self.compute_capability[0] in (9, 10, 12)
        return 32 * _MIB if large else 2 * 4096 * 1024 + 8 * 16 * 1024

    @property
    def bf16(self) -> bool:
        """Whether the GPU multiplies in bfloat16 itself: since Ampere."""
        return self.compute_capability >= (8, 0)

    @property
    def flash(self) -> bool:
        """Whether PyTorch's flash attention runs on the GPU: since Ampere."""
        return self.compute_capability >= (8, 0)


def visible_bytes(listed_bytes: int) -> int:
    """Return the expected capacity of a card of which only the listed total is known.

    The driver is assumed to keep 544 MiB or 1.6 %, whichever is more. No card in the catalogue has
    less than that.
    """
    return listed_bytes - max(_HELD_BACK_BYTES, round(_HELD_BACK_FRACTION * listed_bytes))


def find_gpu(name: str) -> Gpu:
    """Return the card of the catalogue with this name, in any spelling.

    Case, punctuation, maker and the order of words do not matter: ``"4090"``,
    ``"nvidia-geforce-rtx-4090"`` and the result of ``torch.cuda.get_device_name`` are the same
    card. A part of a name suffices if only one card has it. A whole name comes before longer ones
    (``"A10"`` is not the A10G), and a name without ``Ti`` is no Ti. A size such as ``"24GiB"``
    gives ``custom_gpu(name)``.

    Example:
        >>> find_gpu("rtx4090").capacity_bytes

    Raises:
        ValueError: If no card has that name, or several do.
    """
    if not isinstance(name, str):
        raise TypeError(f'a GPU is a name such as "RTX 4090" or a Gpu, got {name!r}')
    if _SIZE.fullmatch(name):
        return custom_gpu(name)
    if _NEARLY_SIZE.fullmatch(name):
        raise ValueError(f"a card's memory is written with its unit, such as 24GiB, got {name!r}")
    wanted = _words(name)
    meant = [gpu for gpu in CATALOGUE if _VARIANTS & _words(gpu.name) <= wanted]
    found = [gpu for gpu in meant if wanted and wanted <= _words(f"{gpu.name} {gpu.also}")]
    whole = [gpu for gpu in found if _words(gpu.name) <= wanted]
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
    """Return the allocator's limit in a search, with the largest context seen on such a card."""
    return gpu.capacity_bytes - gpu.context_bytes[1] - standard_headroom(gpu.capacity_bytes)


def possible_bytes(gpu: Gpu) -> int:
    """Return the most bytes that the allocator can get: smallest context, no headroom."""
    return gpu.capacity_bytes - gpu.context_bytes[0]


def custom_gpu(memory: int | str, *, like: str = "RTX 4090") -> Gpu:
    """Return a GPU with a memory of any size, which equals the card ``like`` in all else.

    Args:
        memory: The bytes that PyTorch sees, or text such as ``"24GiB"``.
        like: A name for ``find_gpu``.

    Example:
        >>> predict(model, data, gpu=custom_gpu("20GiB", like="A100 40GB"))

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
    """Return the words and numbers of a name: ``"A100-80GB"`` and ``"a 100 80"`` give the same."""
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
    """Return a row of the catalogue; a capacity or context without a source is estimated."""
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
"""The cards that ``find_gpu`` finds, oldest first."""
