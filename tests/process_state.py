"""What an import or a first call may leave behind in a process, read as comparable values.

Only modules of the standard library are imported here: NumPy, torch and matplotlib are read where
the process has imported them already.
"""

import asyncio
import codecs
import copyreg
import decimal
import faulthandler
import gc
import locale
import logging
import os
import random
import signal
import sys
import threading
import tracemalloc
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final


def process_state() -> dict[str, object]:
    """Return every setting of the process by a readable name."""
    found: dict[str, object] = {}
    for prefix, read in _READERS.items():
        module = sys.modules.get(prefix)
        if prefix == "python" or module is not None:
            values = read(module) if module is not None else _python()
            found.update((f"{prefix}: {name}", value) for name, value in values.items())
    return found


def differences(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """Return the names of what changed, apart from modules that were imported in between."""
    return sorted(name for name, value in before.items() if after.get(name, value) != value)


def _python() -> dict[str, object]:
    return {
        "random": random.getstate(),
        "warnings.filters": list(warnings.filters),
        "warnings.showwarning": warnings.showwarning,
        "signal handlers": {n: signal.getsignal(n) for n in signal.valid_signals()},
        "signal wakeup": _wakeup_fd(),
        "signal mask": signal.pthread_sigmask(signal.SIG_BLOCK, []),
        "alarm": signal.getitimer(signal.ITIMER_REAL),
        "logging root": (logging.root.level, list(logging.root.handlers), logging.root.filters),
        "logging disabled": logging.root.manager.disable,
        "logging class": (logging.getLoggerClass(), logging.getLogRecordFactory()),
        "logging level names": logging.getLevelNamesMapping(),
        **_loggers(),
        "os.environ": dict(os.environ),
        "cwd": os.getcwd(),
        "umask": _umask(),
        "hooks": (sys.excepthook, sys.displayhook, sys.unraisablehook, sys.breakpointhook),
        "threading hooks": (threading.excepthook, threading.gettrace(), threading.getprofile()),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "children": _children(),
        "trace": (sys.gettrace(), sys.getprofile(), tracemalloc.is_tracing()),
        "streams": (sys.stdin, sys.stdout, sys.stderr),
        "sys.path": list(sys.path),
        "import hooks": (list(sys.meta_path), list(sys.path_hooks), __import__),
        "last error": [vars(sys).get(name) for name in ("last_exc", "last_value")],
        "limits": (sys.getrecursionlimit(), sys.getswitchinterval(), sys.dont_write_bytecode),
        "locale": {c: locale.setlocale(c) for c in (locale.LC_ALL, locale.LC_NUMERIC)},
        "decimal": repr(decimal.getcontext()),
        "gc": (gc.isenabled(), gc.get_threshold(), gc.get_debug(), gc.get_freeze_count()),
        "gc callbacks": list(gc.callbacks),
        "asyncio policy": vars(asyncio.events)["_event_loop_policy"],
        "faulthandler": faulthandler.is_enabled(),
        "codecs": codecs.lookup_error("strict"),
        "copyreg": {k: v for k, v in copyreg.dispatch_table.items() if k.__module__ == "builtins"},
        "open files": _open_files(),
    }


def _wakeup_fd() -> int:
    number = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(number)
    return number


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _loggers() -> dict[str, object]:
    """Each by its own name: those of modules that were imported since are not compared."""
    return {
        f"logger {name}": (logger.level, list(logger.handlers), logger.disabled, logger.propagate)
        for name, logger in logging.root.manager.loggerDict.items()
        if isinstance(logger, logging.Logger)
    }


def _children() -> int:
    process = sys.modules.get("multiprocessing.process")
    return 0 if process is None else len(process.active_children())


def _open_files() -> list[str]:
    """Apart from fonts: matplotlib keeps those open that it has drawn with."""
    links = (f"/dev/fd/{number}" for number in os.listdir("/dev/fd"))
    found = (os.readlink(link) for link in links if os.path.islink(link))  # The list's is closed.
    return sorted(path for path in found if not path.endswith(".ttf"))


def _numpy(numpy: ModuleType) -> dict[str, object]:
    name, key, position, waits, gauss = numpy.random.get_state()
    return {
        "random": (name, key.tobytes(), position, waits, gauss),
        "bit generator": id(numpy.random.get_bit_generator()),
        "errors": (numpy.geterr(), numpy.geterrcall(), numpy.getbufsize()),
        "printing": numpy.get_printoptions(),
    }


def _torch(torch: Any) -> dict[str, object]:
    backends = torch.backends
    nn_module = sys.modules["torch.nn.modules.module"]
    return {
        "random": torch.get_rng_state().tolist(),
        "seed": torch.initial_seed(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "anomaly": (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        "multithreading": torch._C._is_multithreading_enabled(),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        ),
        "autocast": [
            (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in ("cpu", "cuda")
        ],
        "autocast cache": (torch.is_autocast_cache_enabled(), torch.autocast_increment_nesting()),
        "autocast nesting": torch.autocast_decrement_nesting(),
        "matmul": torch.get_float32_matmul_precision(),
        "cudnn": [
            getattr(backends.cudnn, name)
            for name in ("enabled", "benchmark", "deterministic", "allow_tf32", "benchmark_limit")
        ],
        "cuda matmul": [
            getattr(backends.cuda.matmul, name)
            for name in (
                "allow_tf32",
                "allow_fp16_reduced_precision_reduction",
                "allow_bf16_reduced_precision_reduction",
            )
        ],
        "attention": [
            backends.cuda.flash_sdp_enabled(),
            backends.cuda.mem_efficient_sdp_enabled(),
            backends.cuda.math_sdp_enabled(),
            backends.cuda.cudnn_sdp_enabled(),
        ],
        "mkldnn": (backends.mkldnn.enabled, backends.mkldnn.deterministic),
        "quantized": backends.quantized.engine,
        # Where denormals are flushed, 1e-320 even equals 0.
        "denormal": bool(torch.tensor(1e-320, dtype=torch.float64, device="cpu") > 0),
        "warn always": torch.is_warn_always_enabled(),
        "printing": vars(torch._tensor_str.PRINT_OPTS).copy(),
        "cuda": torch.cuda.is_initialized(),
        "modes": (
            len(torch.utils._python_dispatch._get_current_dispatch_mode_stack()),
            torch._C._len_torch_function_stack(),
        ),
        "module hooks": {
            name: len(value)
            for name, value in vars(nn_module).items()
            if name.startswith("_global_") and isinstance(value, dict)
        },
        "optimizer hooks": {
            name: len(value)
            for name, value in vars(sys.modules["torch.optim.optimizer"]).items()
            if name.startswith("_global_") and isinstance(value, dict)
        },
        "sharing": torch.multiprocessing.get_sharing_strategy(),
        "start method": torch.multiprocessing.get_start_method(allow_none=True),
        "distributed": torch.distributed.is_available() and torch.distributed.is_initialized(),
        "loading": set(torch.serialization.get_safe_globals()),
        "patched": [
            torch.Tensor.__torch_function__,
            torch.Tensor.backward,
            torch.nn.Module.__call__,
            torch.nn.Module.__setattr__,
            torch.autograd.backward,
            torch.utils.data.DataLoader.__iter__,
            torch.nn.functional.batch_norm,
            torch.nn.functional.cross_entropy,
            torch.optim.Optimizer.step,
        ],
    }


def _matplotlib(matplotlib: Any) -> dict[str, object]:
    return {
        "settings": dict(matplotlib.rcParams.copy()),
        "backend": dict.__getitem__(matplotlib.rcParams, "backend"),
        "interactive": matplotlib.is_interactive(),
        "pyplot": "matplotlib.pyplot" in sys.modules,
    }


_READERS: Final[dict[str, Callable[[Any], dict[str, object]]]] = {
    "python": lambda _: _python(),
    "numpy": _numpy,
    "torch": _torch,
    "matplotlib": _matplotlib,
}
