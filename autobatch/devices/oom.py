"""Whether an error means that a batch was too large for the device's memory."""

import re
from collections.abc import Iterator, Mapping
from typing import Final

import torch

from autobatch.results.verdict import Verdict

MEMORY_VERDICTS: Final = (Verdict.OUT_OF_MEMORY, Verdict.TOO_LARGE)
"""The verdicts after which a smaller size may run."""

_GITHUB: Final = "https://github.com/"
_TORCH: Final = _GITHUB + "pytorch/pytorch/issues/"
_TORCH_SOURCE: Final = _GITHUB + "pytorch/pytorch/blob/main/"
_CUDA_ERRORS: Final = "https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html"

_DEVICES: Final = r"\b(?:CUDA|HIP|XPU|MPS|MTIA|NPU|MLU|MUSA|HPU|C10|Triton)"
_LIBRARIES: Final = r"\b(?:CU|HIP)(?:BLAS(?:LT)?|DNN|SOLVER|SPARSE|FFT|RAND)"
_CLAUSE_ENDS: Final = r"(?=[ \t]*(?:$|[\r\n]|[^\w\s-]|at\b))"  # Not "out of memory slots".

TABLE: Final[Mapping[Verdict, Mapping[str, str]]] = {
    # Verdict, the gravest first, then pattern (upper and lower case are equal) and source.
    # "device-side assert" alone is too wide: the hint under every CUDA error has these words.
    Verdict.FATAL: {
        r"illegal memory access|misaligned address": _TORCH + "190139",
        r"device-side assert triggered|device-side assertion failures were found": _TORCH_SOURCE
        + "c10/cuda/CUDADeviceAssertionHost.cpp",
        r"unspecified launch failure|illegal instruction was encountered|invalid program counter"
        r"|hardware stack error|launch timed out and was terminated|cudaErrorContextIsDestroyed"
        r"|operation not supported on global/shared address space": _CUDA_ERRORS,
        r"uncorrectable (?:ECC|NVLink) error": _GITHUB + "vllm-project/vllm/issues/5222",
        r"\bUR_RESULT_ERROR_DEVICE_LOST\b": _TORCH + "190972",
    },
    # An index or a kernel has a limit, however much memory is left.
    Verdict.TOO_LARGE: {
        r"\bcanUse32BitIndexMath\b|fit into 32-bit index math": _TORCH + "80020",
        r"(?:>=?|(?:more|larger|greater) than|exceeds?) (?:INT_MAX|2(?:\*\*|\^)31|2147483647)\b"
        r"|(?:INT_MAX|numeric_limits<\w+>::max\(\)) to be true, but got false": _TORCH + "51871",
        r"argument \w+ must be (?:positive|non-negative) and less than 2147483647 ": _TORCH_SOURCE
        + "aten/src/ATen/cuda/CUDABlas.cpp",
        r"too large to be indexed with int32": _GITHUB + "Dao-AILab/flash-attention/issues/407",
        r"quantile\(\) input tensor is too large": _TORCH + "64947",
        # A limit of the batch, 1024 or 65535. Not ..._ARCH_MISMATCH and the like.
        r"\bCUDNN_STATUS_NOT_SUPPORTED\b": _TORCH + "1059",
        # More blocks along an axis of the grid than 65535.
        r"\b(?:CUDA|HIP)\b.{0,20}: invalid configuration argument": _TORCH + "142228",
        r"Triton Error \[\w+\]: invalid argument": _GITHUB + "triton-lang/triton/issues/3299",
        # One buffer has a limit of its own on MPS and on XPU.
        r"\bInvalid buffer size: \d": _GITHUB + "kijai/ComfyUI-SUPIR/issues/151",
        r"can NOT allocate memory block with size larger than": _GITHUB
        + "intel/intel-extension-for-pytorch/issues/629",
    },
    Verdict.OUT_OF_MEMORY: {
        rf"{_DEVICES}(?: backend)? out of memory{_CLAUSE_ENDS}": _GITHUB
        + "huggingface/accelerate/pull/4227",
        # Runtime, driver, Triton, NCCL: "CUDA error: ...", "Cuda failure 2 '...'".
        rf"{_DEVICES}\w*(?: driver| runtime)? (?:error|failure)\b.{{0,80}}?"
        rf"\bout of memory{_CLAUSE_ENDS}": _GITHUB + "deepmodeling/deepmd-kit/pull/3857",
        r"\bcudaErrorMemoryAllocation\b|\bCUDA_ERROR_OUT_OF_MEMORY\b"
        r"|\bhipErrorOutOfMemory\b": _CUDA_ERRORS,
        rf"{_LIBRARIES}_(?:\w+_)?ALLOC(?:ATION)?_FAILED\b": _GITHUB
        + "deepmodeling/deepmd-kit/pull/5443",
        r"\bmiopenStatusAllocFailed\b|\brocblas_status_memory_error\b"
        r"|Memory not available to allocate buffer": _GITHUB + "ROCm/MIOpen/issues/47",
        r"\b(?:UR|ZE)_RESULT_ERROR_OUT_OF_(?:DEVICE|HOST)_MEMORY\b": _TORCH + "177714",
        r"\bkIOGPUCommandBufferCallbackErrorOutOfMemory\b": _GITHUB
        + "ggml-org/llama.cpp/pull/22673",
        # On MIG and Jetson NVML fails while torch writes the text of its own error.
        r"NVML_SUCCESS == r\b.{0,9}INTERNAL ASSERT": _TORCH + "112377",
        r"Failed to CUDA (?:host )?[cm]?alloc\b": _GITHUB + "NVIDIA/nccl/issues/962",
        r"DefaultCPUAllocator: (?:can't allocate|not enough) memory": _TORCH + "73841",
        r"\bstd::bad_alloc\b": _GITHUB + "ZPdesu/Barbershop/issues/48",
    },
    # Memory often, but also a wrong index, a missing library, a fault of the card.
    Verdict.SUSPECT: {
        rf"{_LIBRARIES}_STATUS_NOT_INITIALIZED": _GITHUB
        + "EleutherAI/lm-evaluation-harness/issues/1689",
        rf"{_LIBRARIES}_STATUS_EXECUTION_FAILED": _TORCH + "17774",
        rf"{_LIBRARIES}_STATUS_INTERNAL_ERROR": _TORCH + "81620",
        r"\bmiopenStatus(?:Internal|Unknown)Error\b": _TORCH + "60477",
        r"unable to find an engine": _TORCH + "108645",
        rf"{_DEVICES}\b.{{0,20}}: device not ready|!handles_\.at\(i\)": _GITHUB
        + "mberr/torch-max-mem/issues/45",
        r"INTERNAL ASSERT.{0,250}CachingAllocator": _TORCH + "119452",
        r"\bUR_RESULT_ERROR_OUT_OF_RESOURCES\b": _TORCH + "190972",
        r"\bout of resource: ": _GITHUB + "meta-pytorch/torchtune/issues/2572",
        # No batch reaches these sizes: they are garbage, perhaps made by a large batch.
        r"Storage size calculation overflowed|numel: integer multiplication overflow": _TORCH
        + "91552",
    },
}
_GRAVEST_FIRST: Final = (*TABLE, Verdict.OTHER)

_ADDRESSABLE_BYTES: Final = 1 << 47  # A process cannot address more.
_ABSURD_FACTOR: Final = 100  # A request of so many devices' memory is an overflow, not a batch.
_SIZE: Final = r"(\d+(?:\.\d*)?) ?(bytes|[KMGTPE]i?B)"
_REQUEST: Final = rf"\btried to allocate (?:more than )?{_SIZE}"
_CAPACITY: Final = rf"\btotal capacity of {_SIZE}|\b{_SIZE} total capacity"


def verdict_of(error: BaseException) -> Verdict:
    """Return what ``error`` says about the size that raised it: the gravest of its causes.

    ``torch.OutOfMemoryError`` and ``MemoryError`` are recognised by type. Text is read only in a
    ``RuntimeError``, which torch's ``AcceleratorError`` is as well: an ``IndexError`` is the
    user's, whatever its text. ``KeyboardInterrupt`` and other exits are never a matter of memory.
    """
    if not isinstance(error, Exception):
        return Verdict.OTHER
    return _gravest(map(_verdict_of_one, _causes(error)))


def requested_bytes(error: BaseException) -> int:
    """Return the size of an allocation that failed; 0 where ``error`` does not say."""
    return int(max((_first_size(_REQUEST, _text_of(cause)) for cause in _causes(error)), default=0))


def _gravest(verdicts: Iterator[Verdict]) -> Verdict:
    return min(verdicts, key=_GRAVEST_FIRST.index, default=Verdict.OTHER)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes, each once: a chain of causes may be circular."""
    seen: set[int] = set()  # By identity: an exception need not be hashable; NVML's are not.
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__


def _verdict_of_one(error: BaseException) -> Verdict:
    verdict = (
        _verdict_of_text(_text_of(error)) if isinstance(error, RuntimeError) else Verdict.OTHER
    )
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        verdict = _gravest(iter((verdict, Verdict.OUT_OF_MEMORY)))
    if verdict is Verdict.OUT_OF_MEMORY and _asks_for_the_absurd(_text_of(error)):
        return Verdict.TOO_LARGE
    return verdict


def _verdict_of_text(text: str) -> Verdict:
    for verdict, rows in TABLE.items():
        if any(re.search(pattern, text, re.IGNORECASE) for pattern in rows):
            return verdict
    return Verdict.OTHER


def _text_of(error: BaseException) -> str:
    """All text among the arguments; of an error among them, its own.

    Never ``str(error)``, which shows every argument: a tensor may live on a dead device.
    """
    wrapped = (arg.args for arg in error.args if isinstance(arg, BaseException))
    return "\n".join(arg for args in (error.args, *wrapped) for arg in args if isinstance(arg, str))


def _asks_for_the_absurd(text: str) -> bool:
    """Whether the request is an overflow: "Tried to allocate 17179869183.95 GiB"."""
    request = _first_size(_REQUEST, text)
    capacity = _first_size(_CAPACITY, text) or _ADDRESSABLE_BYTES
    return request >= min(_ABSURD_FACTOR * capacity, _ADDRESSABLE_BYTES)


def _first_size(pattern: str, text: str) -> float:
    """Bytes where ``pattern`` first matches; 0 if it does not. Torch's GB are GiB."""
    match = re.search(pattern, text, re.IGNORECASE)
    if match is None:
        return 0.0
    number, unit = filter(None, match.groups())
    return float(number) * 1024.0 ** "BKMGTPE".index(unit[0].upper())
