"""Each text as it was really seen, and as many that only look like one."""

import re
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autobatch.devices.oom import TABLE, verdict_of
from autobatch.results.verdict import Verdict

FATAL, TOO_LARGE = Verdict.FATAL, Verdict.TOO_LARGE
OUT_OF_MEMORY, SUSPECT, OTHER = Verdict.OUT_OF_MEMORY, Verdict.SUSPECT, Verdict.OTHER

Text = tuple[type[Exception], str]
Case = tuple[type[Exception], str, Verdict]


class PrivateError(RuntimeError):
    """A class of the user's."""


class Unhashable(Exception):  # noqa: N818 - a stand-in for NVMLError, which is so too
    def __eq__(self, other: object) -> bool:
        return self is other


class Unprintable:
    """A tensor on a dead device: showing it raises."""

    def __repr__(self) -> str:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


# A RuntimeError since torch 2.8; the cases hold where it is missing too.
ACCELERATOR: type[Exception] = getattr(torch, "AcceleratorError", RuntimeError)
OOM = torch.OutOfMemoryError
RUNTIME = RuntimeError

# What torch writes under every CUDA error: it speaks of assertions whatever has happened.
HINT = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the "
    "stacktrace below might be incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1"
    "\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)
SEARCH = "\nSearch for `cudaErrorMemoryAllocation' in https://docs.nvidia.com for more information."
UNTRACKED = "\nDevice-side assertion tracking was not enabled by user."
ALLOCATOR = '"/pytorch/c10/cuda/CUDACachingAllocator.cpp":1154, please report a bug to PyTorch. '
NCCL = (
    "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:275, unhandled cuda error (run "
    "with NCCL_DEBUG=INFO for details), NCCL version 2.20.5\nncclUnhandledCudaError: Call to CUDA "
    "function failed.\nLast error:\n"
)
CUDNN_HINT = " This error may appear if you passed in a non-contiguous input."
BUT_FALSE = (
    " to be true, but got false.  (Could this error message be improved?  If so, please report an "
    "enhancement request to PyTorch.)"
)
FREE = (
    "GPU 0 has a total capacity of 23.65 GiB of which 12.38 MiB is free. Including non-PyTorch "
    "memory, this process has 23.63 GiB memory in use. Of the allocated memory 22.10 GiB is "
    "allocated by PyTorch, and 1.02 GiB is reserved by PyTorch but unallocated."
)
CPU_ALLOCATOR = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: "

OUT_OF_MEMORY_TEXTS: list[Text] = [
    (OOM, ""),  # By type: nothing need be said.
    (OOM, f"CUDA out of memory. Tried to allocate 20.00 MiB. {FREE}"),
    (OOM, "HIP out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 16 GiB"),
    (OOM, "XPU out of memory. Tried to allocate 1.71 GiB. GPU 0 has a total capacity of 15.11 GiB"),
    (OOM, "Allocation on device "),
    (MemoryError, ""),
    (MemoryError, "std::bad_alloc"),
    (MemoryError, "Unable to allocate 149. GiB for an array with shape (200000, 100000)"),
    (RUNTIME, "CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 10.76 GiB total capacity)"),
    (ACCELERATOR, "CUDA error: out of memory" + HINT),
    (ACCELERATOR, "CUDA error: out of memory" + SEARCH + HINT),
    (ACCELERATOR, "CUDA error: out of memory" + UNTRACKED),
    (ACCELERATOR, "HIP error: out of memory" + HINT),
    (RUNTIME, "CUDA driver error: out of memory"),
    (RUNTIME, "cuda runtime error (2) : out of memory at /pytorch/aten/src/THC/THCStorage.cu:58"),
    (
        RUNTIME,
        "Error: 'err == cudaSuccess' failed: alloc fail (cudaMalloc error out of memory [2])",
    ),
    (RUNTIME, "for_each: failed to synchronize: cudaErrorMemoryAllocation: out of memory"),
    (RUNTIME, "CUDA_ERROR_OUT_OF_MEMORY"),
    (RUNTIME, "hipErrorOutOfMemory"),
    (RUNTIME, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    (RUNTIME, "CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
    (RUNTIME, "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    (RUNTIME, "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    (RUNTIME, "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate`"),
    (RUNTIME, "cuFFT error: CUFFT_ALLOC_FAILED"),
    (RUNTIME, "GET was unable to find an engine to execute this: CUDNN_STATUS_ALLOC_FAILED"),
    (RUNTIME, "miopenStatusAllocFailed"),
    (RUNTIME, "MIOpen Error: handlehip.cpp:70: Memory not available to allocate buffer: 655360000"),
    (RUNTIME, "rocblas_status_memory_error"),
    (RUNTIME, f'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "{ALLOCATOR}'),
    (RUNTIME, "NVML_SUCCESS == r INTERNAL ASSERT FAILED"),
    (RUNTIME, "Triton Error [CUDA]: out of memory"),
    (RUNTIME, "Triton Error [HIP]:  Code: 2, out of memory"),
    (RUNTIME, "No valid triton configs. OutOfMemoryError: CUDA out of memory. Tried to allocate"),
    (RUNTIME, NCCL + "Cuda failure 2 'out of memory'"),
    (RUNTIME, NCCL + "Cuda failure 'out of memory'"),
    (RUNTIME, NCCL + "Failed to CUDA calloc async 1920 bytes"),
    (RUNTIME, "HIP out of memory. Tried to allocate 32.00 MiB (GPU 0; 7.98 GiB total capacity)"),
    (
        RUNTIME,
        "XPU out of memory, please use `empty_cache` to release all unoccupied cached memory.",
    ),
    (RUNTIME, "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
    (
        RUNTIME,
        "MPS backend out of memory (MPS allocated: 9.57 GiB, other allocations: 17.35 GiB, max "
        "allowed: 27.20 GiB). Tried to allocate 292.50 MiB on private pool.",
    ),
    (RUNTIME, "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"),
    (
        RUNTIME,
        CPU_ALLOCATOR + "can't allocate memory: you tried to allocate 116813856768 bytes. "
        "Error code 12 (Cannot allocate memory)",
    ),
    (RUNTIME, "data. DefaultCPUAllocator: not enough memory: you tried to allocate 1981808 bytes."),
    (RUNTIME, "std::bad_alloc"),
    (
        ACCELERATOR,
        "Caught AcceleratorError in pin memory thread for device 0.\nOriginal Traceback (most "
        "recent call last):\ntorch.AcceleratorError: CUDA error: out of memory" + HINT,
    ),
    (
        RUNTIME,
        "The following operation failed in the TorchScript interpreter.\nTraceback of TorchScript "
        "(most recent call last):\nRuntimeError: CUDA out of memory. Tried to allocate 2.00 MiB",
    ),
]

TOO_LARGE_TEXTS: list[Text] = [
    (OOM, "CUDA out of memory. Tried to allocate 16777216.00 TiB."),
    (OOM, "CUDA out of memory. Tried to allocate more than 1EB memory."),
    (OOM, f"CUDA out of memory. Tried to allocate 13535.27 GiB. {FREE}"),
    (RUNTIME, "CUDA out of memory. Tried to allocate 17179869183.95 GiB (GPU 0; 23.65 GiB total"),
    (
        RUNTIME,
        "CUDA out of memory. Tried to allocate 5000.00 GiB (GPU 0; 23.65 GiB total capacity)",
    ),
    (
        RUNTIME,
        CPU_ALLOCATOR + "can't allocate memory: you tried to allocate 36028797018963968 bytes",
    ),
    (RUNTIME, "Expected canUse32BitIndexMath(input) && canUse32BitIndexMath(output)" + BUT_FALSE),
    (RUNTIME, "input tensor must fit into 32-bit index math"),
    (RUNTIME, "output gradient tensor must fit into 32-bit index math"),
    (
        RUNTIME,
        "nonzero is not supported for tensors with more than INT_MAX elements,   See "
        "https://github.com/pytorch/pytorch/issues/51871",
    ),
    (RUNTIME, "The dimension being sorted can not have more than INT_MAX elements."),
    (RUNTIME, "MPSGaph does not support tensor dims larger than INT_MAX"),
    (RUNTIME, "dst/scr size > INT_MAX is not supported"),
    (
        RUNTIME,
        "Expected input_height * input_width <= std::numeric_limits<int32_t>::max()" + BUT_FALSE,
    ),
    (
        RUNTIME,
        "at::cuda::blas::gemm<float> argument m must be non-negative and less than 2147483647 but "
        "got 4294967296",
    ),
    (RUNTIME, "parameter tensor is too large to be indexed with int32"),
    (RUNTIME, "quantile() input tensor is too large"),
    (RUNTIME, "CUDNN_STATUS_NOT_SUPPORTED"),
    (RUNTIME, "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED." + CUDNN_HINT),
    (ACCELERATOR, "CUDA error: invalid configuration argument" + HINT),
    (RUNTIME, "CUDA kernel failed : invalid configuration argument"),
    (RUNTIME, "Triton Error [CUDA]: invalid argument"),
    (RUNTIME, "Invalid buffer size: 19.38 GiB"),
    (
        RUNTIME,
        "Current platform can NOT allocate memory block with size larger than 4GB! Tried to "
        "allocate 7.62 GiB (GPU  0; 15.11 GiB total capacity; 334.79 MiB already allocated)",
    ),
]

FATAL_TEXTS: list[Text] = [
    (ACCELERATOR, "CUDA error: an illegal memory access was encountered" + HINT),
    (RUNTIME, "Triton Error [CUDA]: an illegal memory access was encountered"),
    (RUNTIME, NCCL + "Cuda failure 700 'an illegal memory access was encountered'"),
    (ACCELERATOR, "CUDA error: device-side assert triggered" + HINT),
    (RUNTIME, "1 CUDA device-side assertion failures were found on GPU #0!"),
    (ACCELERATOR, "CUDA error: misaligned address" + HINT),
    (ACCELERATOR, "CUDA error: unspecified launch failure" + HINT),
    (ACCELERATOR, "HIP error: unspecified launch failure" + HINT),
    (ACCELERATOR, "CUDA error: an illegal instruction was encountered" + HINT),
    (ACCELERATOR, "CUDA error: invalid program counter" + HINT),
    (ACCELERATOR, "CUDA error: hardware stack error" + HINT),
    (ACCELERATOR, "CUDA error: operation not supported on global/shared address space" + HINT),
    (ACCELERATOR, "CUDA error: context is destroyed\nSearch for `cudaErrorContextIsDestroyed'"),
    (ACCELERATOR, "CUDA error: the launch timed out and was terminated" + HINT),
    (ACCELERATOR, "CUDA error: uncorrectable ECC error encountered" + HINT),
    (ACCELERATOR, "CUDA error: uncorrectable NVLink error detected during the execution" + HINT),
    (RUNTIME, "level_zero backend failed with error: 20 (UR_RESULT_ERROR_DEVICE_LOST)"),
    # The context is dead, whatever else the text says.
    (RUNTIME, "CUDA out of memory. CUDA error: an illegal memory access was encountered"),
    (RUNTIME, "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED: an illegal memory access"),
    (OOM, "CUDA error: device-side assert triggered"),
]

SUSPECT_TEXTS: list[Text] = [
    (RUNTIME, "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    (RUNTIME, "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
    (RUNTIME, "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle)`"),
    (RUNTIME, "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    (RUNTIME, "CUDA error: CUBLAS_STATUS_INTERNAL_ERROR when calling `cublasCreate(handle)`"),
    (RUNTIME, "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    (RUNTIME, "miopenStatusInternalError"),
    (RUNTIME, "miopenStatusUnknownError"),
    (RUNTIME, "GET was unable to find an engine to execute this computation"),
    (RUNTIME, "FIND was unable to find an engine to execute this computation"),
    (RUNTIME, "CUDA driver error: device not ready"),
    (ACCELERATOR, "CUDA error: device not ready" + HINT),
    (RUNTIME, f"!handles_.at(i) INTERNAL ASSERT FAILED at {ALLOCATOR}"),
    (RUNTIME, "!handles_.at(i) INTERNAL ASSERT FAILED"),
    (RUNTIME, f"!block->expandable_segment_ INTERNAL ASSERT FAILED at {ALLOCATOR}"),
    (RUNTIME, "level_zero backend failed with error: 40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)"),
    (
        RUNTIME,
        "No valid triton configs. OutOfMemoryError: out of resource: triton_red_fused_0 Required: "
        "163840 Hardware limit:101376 Reducing block sizes or `num_stages` may help.",
    ),
    (RUNTIME, "Storage size calculation overflowed with sizes=[1, 4605674770382112385, 4128, 128]"),
    (RUNTIME, "numel: integer multiplication overflow"),
]

INNOCENT: list[Text] = [
    # Another class is the user's error, whatever it says.
    (IndexError, "out of memory"),
    (IndexError, "index 5 is out of bounds for dimension 0 with size 5"),
    (KeyError, "CUDA out of memory"),
    (KeyError, "CUDA out of memory. Tried to allocate 20.00 MiB"),
    (ValueError, "CUDA out of memory. Tried to allocate 20.00 MiB"),
    (ValueError, "Scalar -2779057358 is out of range for type int32"),
    (TypeError, "CUDA error: out of memory"),
    (OSError, "[Errno 12] Cannot allocate memory"),
    (AssertionError, "CUDA error: an illegal memory access was encountered"),
    (Exception, "CUDA error: device-side assert triggered"),
    (OverflowError, "Python int too large to convert to C long"),
    (AttributeError, "module 'torch' has no attribute 'OutOfMemoryError'"),
    (ImportError, "libcudnn.so.9: CUDNN_STATUS_ALLOC_FAILED"),
    (StopIteration, "out of memory"),
    # Shapes, types, devices.
    (RUNTIME, ""),
    (RUNTIME, "mat1 and mat2 shapes cannot be multiplied (32x512 and 256x10)"),
    (RUNTIME, "The size of tensor a (32) must match the size of tensor b (31) at dimension 0"),
    (RUNTIME, "shape '[32, -1]' is invalid for input of size 1000"),
    (RUNTIME, "Sizes of tensors must match except in dimension 0. Expected size 3 but got size 4"),
    (RUNTIME, "expected scalar type Float but found Half"),
    (RUNTIME, "\"nll_loss_forward_reduce_cuda_kernel_2d_index\" not implemented for 'Int'"),
    (RUNTIME, "Expected all tensors to be on the same device, but found cuda:0 and cpu!"),
    (RUNTIME, "value cannot be converted to type int32_t without overflow"),
    (RUNTIME, "Overflow when unpacking long"),
    (RUNTIME, "integer out of range"),
    (RUNTIME, "Expected is_sm80 || is_sm90" + BUT_FALSE),
    (RUNTIME, "Expected weight.size(0) <= 2147483648" + BUT_FALSE),
    (RUNTIME, "Index tensor must have the same number of dimensions as self tensor"),
    (RUNTIME, "Expected tensor for argument #1 'indices' to have 32-bit index type"),
    (RUNTIME, "Kernel size can't be greater than actual input size"),
    (RUNTIME, "in `INT_MAX` when slicing forward and 'INT_MIN' when slicing backward."),
    (RUNTIME, "multinomial: number of categories cannot exceed 2^24"),
    (NotImplementedError, "Could not run 'aten::nonzero' with arguments from the 'CUDA' backend."),
    # Autograd, modules, precision.
    (RUNTIME, "element 0 of tensors does not require grad and does not have a grad_fn"),
    (RUNTIME, "Trying to backward through the graph a second time"),
    (
        RUNTIME,
        "one of the variables needed for gradient computation has been modified by an inplace",
    ),
    (RUNTIME, "Function 'MulBackward0' returned nan values in its 0th output."),
    (RUNTIME, "Error(s) in loading state_dict for Net: size mismatch for fc.weight"),
    (RecursionError, "maximum recursion depth exceeded while calling a Python object"),
    # Memory, innocently.
    (RUNTIME, "unsupported memory format option ChannelsLast"),
    (RUNTIME, "required rank 4 tensor to use channels_last format"),
    (RUNTIME, "CUDA tensor: out of memory_map bounds"),
    (RUNTIME, "CUDA error in my_kernel: index out of memory bounds"),
    (RUNTIME, "CUDA error: the episode ran out of memory slots"),
    (RUNTIME, "the replay buffer is out of memory"),
    (RUNTIME, "out of memory"),
    (RUNTIME, "the model was told to forget: CUDA out of memory-replay is not a thing"),
    (RUNTIME, "CUDA out of memory slots: only 16 graphs can be captured"),
    (RUNTIME, "CUDA out of memory_pool handles"),
    (RUNTIME, "cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned"),
    (RUNTIME, "Pin memory thread exited unexpectedly"),
    (RUNTIME, "Cannot get XPU pinned memory allocator without ATen_xpu library."),
    (RUNTIME, "unsupported operation: more than one element of the written-to tensor refers to a "),
    (RUNTIME, "some elements of the input tensor refer to a single memory location."),
    (RUNTIME, "Cannot swap t1 because it shares memory with another tensor"),
    (RUNTIME, "memory_limit must be at least 1 GiB, you tried to allocate a negative budget"),
    # The loader's own memory: no micro-batch changes it.
    (
        RUNTIME,
        "DataLoader worker (pid 4321) is killed by signal: Bus error. It is possible that "
        "dataloader's workers are out of shared memory. Please try to raise your shared memory.",
    ),
    (RUNTIME, "unable to mmap 4096 bytes from file </torch_1_2>: Cannot allocate memory (12)"),
    (RUNTIME, "unable to open shared memory object </torch_1> in read-write mode"),
    (RUNTIME, "DataLoader worker (pid(s) 12, 13) exited unexpectedly"),
    # The device, but neither its memory nor its life.
    (ACCELERATOR, "CUDA error: no kernel image is available for execution on the device" + HINT),
    (ACCELERATOR, "CUDA error: invalid device ordinal" + HINT),
    (ACCELERATOR, "CUDA error: invalid device function" + HINT),
    (ACCELERATOR, "CUDA error: operation not permitted when stream is capturing" + HINT),
    (ACCELERATOR, "CUDA error: initialization error" + UNTRACKED),
    (ACCELERATOR, "CUDA error: all CUDA-capable devices are busy or unavailable" + HINT),
    (ACCELERATOR, "CUDA error: invalid argument" + HINT),
    (RUNTIME, "Cannot re-initialize CUDA in forked subprocess."),
    (RUNTIME, "Found no NVIDIA driver on your system."),
    (RUNTIME, "The NVIDIA driver on your system is too old (found version 11040)."),
    (RUNTIME, "Attempting to deserialize object on a CUDA device but cuda.is_available() is False"),
    (RUNTIME, "CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx`"),
    (RUNTIME, "CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasSgemm`"),
    (RUNTIME, "cuDNN error: CUDNN_STATUS_BAD_PARAM"),
    (RUNTIME, "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED_ARCH_MISMATCH"),
    (RUNTIME, "cuDNN error: CUDNN_STATUS_VERSION_MISMATCH"),
    (RUNTIME, "my scheduler: CUSTOM_STATUS_NOT_INITIALIZED, CUSTOMER_ALLOC_FAILED"),
    (RUNTIME, 'engine_ INTERNAL ASSERT FAILED at "../torch/csrc/autograd/engine.cpp":1158'),
    (RUNTIME, "NCCL communicator was aborted on rank 0."),
    (RUNTIME, "NCCL error: Cuda failure 1 'invalid argument'"),
    (RUNTIME, "Triton Error [CUDA]: device kernel image is invalid"),
    (RUNTIME, "camera 2: device not ready"),
    (RUNTIME, "human resources: out of resources"),
    (RUNTIME, "quantile() q values must be in the range [0, 1]"),
    (RUNTIME, "Invalid buffer size: expected a multiple of 4"),
    (RUNTIME, "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."),
    (ACCELERATOR, "CUDA error: named symbol not found" + UNTRACKED),
    (RUNTIME, "Expected more than 1 value per channel when training, got input size [1, 64]"),
    # A user's own words.
    (RUNTIME, "this step tried to allocate 9 seats in a room of 8"),
    (RUNTIME, "tried to allocate 17179869184.00 GiB of disk"),
    (RUNTIME, "batch too large: at most 512 examples are allowed"),
    (RUNTIME, "sequence length 2048 is larger than the maximum of 1024"),
    (RUNTIME, "loss is nan at step 12"),
    (RUNTIME, "file too large"),
    (RUNTIME, "the allocation of marks to pupils failed"),
    (RUNTIME, "cublas is not initialized in this mock"),
    (RUNTIME, "this search engine is unable to find a restaurant"),
    (RUNTIME, "misuse of an assert on the device side was not triggered"),
    (RUNTIME, "expected at most INT_MAX as a mark of 'no limit'"),
    (RUNTIME, "32-bit indices are accepted here"),
    (RUNTIME, "the ECC of this code is correctable"),
    (RUNTIME, "DefaultCPUAllocator was replaced by the user"),
    (RUNTIME, "CUDA memory was not reset"),
    (RUNTIME, "no memory left for nostalgia: out of memories"),
    (RUNTIME, "bad_alloc is only a word"),
    (RUNTIME, "vertex too large to be indexed"),
    (RUNTIME, "the logging context is destroyed"),
    (RUNTIME, "CUDA error: operation not supported"),
    (RUNTIME, "the program counter of this toy machine is invalid"),
    (RUNTIME, "CUDA stream is not ready"),
    (RUNTIME, "grid must not have more than 65535 rows"),
    (RUNTIME, "the launch was refused: invalid configuration argument 'lr'"),
]

# The table of USERS 1.2, row by row, as its texts stand there; the verdicts are those that its
# lines 1.2.1 to 1.2.9 and 1.7.4 demand.
USERS_TABLE: list[Case] = [
    (OOM, "CUDA out of memory. Tried to allocate 20.00 MiB.", OUT_OF_MEMORY),
    (ACCELERATOR, "CUDA error: out of memory\n", OUT_OF_MEMORY),
    (RUNTIME, "CUDA driver error: out of memory", OUT_OF_MEMORY),
    (RUNTIME, "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate", OUT_OF_MEMORY),
    (RUNTIME, "CUBLAS_STATUS_NOT_INITIALIZED when calling cublasCreate", SUSPECT),
    (RUNTIME, "cuDNN error: CUDNN_STATUS_ALLOC_FAILED", OUT_OF_MEMORY),
    (RUNTIME, "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED." + CUDNN_HINT, TOO_LARGE),
    (RUNTIME, "GET was unable to find an engine to execute this computation", SUSPECT),
    (RUNTIME, "NVML_SUCCESS == r INTERNAL ASSERT FAILED", OUT_OF_MEMORY),
    (RUNTIME, "!handles_.at(i) INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp", SUSPECT),
    (RUNTIME, "Expected canUse32BitIndexMath(input) && canUse32BitIndexMath(output)", TOO_LARGE),
    (RUNTIME, "input tensor must fit into 32-bit index math", TOO_LARGE),
    (
        RUNTIME,
        "nonzero is not supported for tensors with more than INT_MAX elements",
        TOO_LARGE,
    ),
    (RUNTIME, "Triton Error [CUDA]: out of memory", OUT_OF_MEMORY),
    (RUNTIME, "NCCL error: Cuda failure 2 'out of memory'", OUT_OF_MEMORY),
    (RUNTIME, "HIP out of memory.", OUT_OF_MEMORY),
    (RUNTIME, "MPS backend out of memory", OUT_OF_MEMORY),
]

TEXTS: list[Case] = [
    *((kind, text, OUT_OF_MEMORY) for kind, text in OUT_OF_MEMORY_TEXTS),
    *((kind, text, TOO_LARGE) for kind, text in TOO_LARGE_TEXTS),
    *((kind, text, FATAL) for kind, text in FATAL_TEXTS),
    *((kind, text, SUSPECT) for kind, text in SUSPECT_TEXTS),
]
ALL: list[Case] = [*TEXTS, *((kind, text, OTHER) for kind, text in INNOCENT)]


def ids(case: object) -> str | None:
    return case.replace("\n", " ")[:60] if isinstance(case, str) else None


def chained(*errors: BaseException) -> BaseException:
    """Each raised from the next; the first is what the caller sees."""
    for error, cause in pairwise(errors):
        error.__cause__ = cause
    return errors[0]


def says_out_of_memory(error: Exception) -> Verdict:
    """The usual classifier, kept to show that these texts tell a good one from it."""
    return OUT_OF_MEMORY if "out of memory" in str(error).lower() else OTHER


@pytest.mark.parametrize(("kind", "text", "verdict"), TEXTS, ids=ids)
def test_a_text_seen_in_the_wild_is_recognised(
    kind: type[Exception], text: str, verdict: Verdict
) -> None:
    assert verdict_of(kind(text)) is verdict


@pytest.mark.parametrize(("kind", "text"), INNOCENT, ids=ids)
def test_a_text_that_only_looks_like_one_is_the_users(kind: type[Exception], text: str) -> None:
    assert verdict_of(kind(text)) is OTHER


def test_the_innocent_are_as_many_as_the_guilty() -> None:
    assert len(INNOCENT) >= len(TEXTS)
    assert len(set(INNOCENT)) == len(INNOCENT)
    assert len(set(TEXTS)) == len(TEXTS)


def test_every_pattern_has_a_text_and_a_source() -> None:
    for verdict, rows in TABLE.items():
        texts = [text for _, text, expected in TEXTS if expected is verdict]
        for pattern, source in rows.items():
            assert any(re.search(pattern, text, re.IGNORECASE) for text in texts), pattern
            assert source.startswith("https://"), pattern


def test_the_texts_can_tell_a_poor_classifier_from_a_good_one() -> None:
    missed = [text for kind, text, verdict in TEXTS if says_out_of_memory(kind(text)) != verdict]
    accused = [text for kind, text in INNOCENT if says_out_of_memory(kind(text)) is not OTHER]
    assert len(missed) > len(TEXTS) / 2
    assert len(accused) > 10


@pytest.mark.parametrize(("kind", "text", "verdict"), USERS_TABLE, ids=ids)
def test_every_row_of_the_users_table_gets_its_verdict(
    kind: type[Exception], text: str, verdict: Verdict
) -> None:
    """USERS 1.2, the table."""
    assert verdict_of(kind(text)) is verdict


@pytest.mark.parametrize(
    "told",
    [
        lambda kind, text: kind(text.upper()),
        lambda kind, text: kind(text.lower()),
        lambda kind, text: kind(text.swapcase()),
        lambda kind, text: kind(text, 2),
        lambda kind, text: kind(2, text),
        lambda kind, text: chained(ValueError("batch 3"), kind(text)),
        lambda kind, text: chained(kind(text), ValueError("batch 3")),
        lambda kind, text: chained(KeyError("a"), IndexError("b"), kind(text.upper(), 2)),
    ],
    ids=["upper", "lower", "swapped", "first of two", "second of two", "cause", "caused", "deep"],
)
def test_however_it_is_told_the_verdict_stays(
    told: Callable[[type[Exception], str], Exception],
) -> None:
    """USERS 1.2.10 and 7.2: every text and every decoy, in any case, chained, among arguments."""
    cases = [*USERS_TABLE, *ALL]
    wrong = [text for kind, text, verdict in cases if verdict_of(told(kind, text)) is not verdict]
    assert wrong == []


@pytest.mark.parametrize("kind", [Exception, ValueError, IndexError, KeyError, OSError, TypeError])
def test_no_text_makes_another_class_guilty(kind: type[Exception]) -> None:
    assert {verdict_of(kind(text)) for _, text, _ in TEXTS} == {OTHER}


@pytest.mark.parametrize(
    "kind", [NotImplementedError, torch.distributed.DistBackendError, PrivateError]
)
def test_a_subclass_of_runtime_error_is_read(kind: type[Exception]) -> None:
    assert verdict_of(kind("CUDA error: out of memory")) is OUT_OF_MEMORY


def test_a_known_type_needs_no_argument() -> None:
    assert verdict_of(torch.OutOfMemoryError()) is OUT_OF_MEMORY
    assert verdict_of(torch.cuda.OutOfMemoryError()) is OUT_OF_MEMORY
    assert verdict_of(MemoryError()) is OUT_OF_MEMORY
    assert verdict_of(RuntimeError()) is OTHER


def test_any_number_of_arguments_is_read() -> None:
    assert verdict_of(RuntimeError("CUDA out of memory.", 3)) is OUT_OF_MEMORY
    assert verdict_of(RuntimeError(3, "CUDA out of memory.")) is OUT_OF_MEMORY
    assert (
        verdict_of(RuntimeError(1, None, "the context", "Invalid buffer size: 9 GB")) is TOO_LARGE
    )
    assert verdict_of(RuntimeError(3)) is OTHER


def test_an_error_passed_on_as_an_argument_is_read() -> None:
    assert verdict_of(RuntimeError(RuntimeError("CUDA out of memory."))) is OUT_OF_MEMORY
    assert verdict_of(ValueError(RuntimeError("CUDA out of memory."))) is OTHER


def test_an_argument_that_cannot_be_shown_is_left_alone() -> None:
    assert verdict_of(RuntimeError("CUDA out of memory.", Unprintable())) is OUT_OF_MEMORY
    itself = RuntimeError()
    itself.args = (itself,)
    assert verdict_of(itself) is OTHER


def test_a_cause_speaks_through_any_class() -> None:
    assert verdict_of(chained(ValueError("batch 3"), OOM("CUDA"))) is OUT_OF_MEMORY
    assert verdict_of(chained(KeyError(1), ValueError(2), MemoryError())) is OUT_OF_MEMORY
    assert verdict_of(chained(RuntimeError("step 9 failed"), ValueError("shape"))) is OTHER


def raise_from(cause: RuntimeError) -> None:
    try:
        raise cause
    except RuntimeError as error:
        raise ValueError("batch 3") from error


def raise_during(cause: RuntimeError) -> None:
    try:
        raise cause
    except RuntimeError:
        raise ValueError("batch 3")  # noqa: B904 - without a cause is the case tested


def test_a_cause_is_followed_as_python_sets_it() -> None:
    with pytest.raises(ValueError, match="batch 3") as caught:
        raise_from(RuntimeError("CUDA error: out of memory"))
    assert verdict_of(caught.value) is OUT_OF_MEMORY


def test_what_was_merely_being_handled_is_not_a_cause() -> None:
    with pytest.raises(ValueError, match="batch 3") as caught:
        raise_during(RuntimeError("CUDA error: out of memory"))
    assert isinstance(caught.value.__context__, RuntimeError)
    assert verdict_of(caught.value) is OTHER


def test_an_order_to_stop_is_obeyed_whatever_caused_it() -> None:
    for order in (KeyboardInterrupt(), SystemExit(1), GeneratorExit()):
        assert verdict_of(chained(order, OOM("CUDA out of memory."))) is OTHER


def test_a_circle_of_causes_comes_to_an_end() -> None:
    first, second = ValueError("first"), ValueError("second")
    assert verdict_of(chained(first, second, first)) is OTHER
    assert verdict_of(chained(first, second, OOM(), first)) is OUT_OF_MEMORY


def test_an_error_that_cannot_be_hashed_is_no_obstacle() -> None:
    with pytest.raises(TypeError, match="unhashable"):
        hash(Unhashable())
    assert verdict_of(chained(Unhashable(), OOM())) is OUT_OF_MEMORY


@settings(deadline=None)
@given(cases=st.lists(st.sampled_from(ALL), min_size=1, max_size=9))
def test_the_gravest_along_the_causes_decides(cases: list[Case]) -> None:
    order = [FATAL, TOO_LARGE, OUT_OF_MEMORY, SUSPECT, OTHER]
    error = chained(*(kind(text) for kind, text, _ in cases))
    assert verdict_of(error) is min((verdict for _, _, verdict in cases), key=order.index)


@settings(deadline=None)
@given(text=st.text())
def test_any_text_gets_a_verdict(text: str) -> None:
    assert verdict_of(ValueError(text)) is OTHER
    assert verdict_of(RuntimeError(text)) in Verdict
    assert verdict_of(OOM(text)) is not OTHER


@settings(deadline=None)
@given(gib=st.floats(0.01, 2**40), total_gib=st.floats(1, 1024))
def test_a_hundred_devices_in_one_request_are_an_overflow(gib: float, total_gib: float) -> None:
    gib, total_gib = round(gib, 2), round(total_gib, 2)
    absurd = gib >= min(100 * total_gib, 2**17)  # 2**17 GiB: all that a process can address.
    expected = TOO_LARGE if absurd else OUT_OF_MEMORY
    told = f"CUDA out of memory. Tried to allocate {gib:.2f} GiB"
    assert verdict_of(OOM(f"{told}. GPU 0 has a total capacity of {total_gib:.2f} GiB")) is expected
    assert verdict_of(OOM(f"{told} (GPU 0; {total_gib:.2f} GiB total capacity)")) is expected


def test_errors_of_this_very_torch_are_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55, dtype=torch.uint8)  # More than a process can address.
    assert verdict_of(caught.value) is TOO_LARGE
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 62)
    assert verdict_of(caught.value) is SUSPECT
    with pytest.raises(MemoryError) as failed:
        np.empty(1 << 55, dtype=np.uint8)
    assert verdict_of(failed.value) is OUT_OF_MEMORY
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert verdict_of(caught.value) is OTHER
