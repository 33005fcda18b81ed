"""CUDA without a GPU: tensors that have a shape, a dtype and a device, and no values.

This file holds every private hook of torch that prediction needs, each with its reason. The hooks
were tested with torch 2.13 on a CPU build. ``works`` tries them on a net of three layers; if one of
them fails, the step is traced as on the CPU, and the prediction's notes say so.

* ``c10::impl::device_guard_impl_registry``, ``torch._C._ensureCUDADeviceGuardSet``: a CPU build has
  no device guard for CUDA, and autograd aborts without one. torch installs a guard that does
  nothing if the registered guard sees no device, and the guard of the Lazy device sees none.
* ``torch.autograd._engine_run_backward``, ``torch.ops.prim.device``: where gradients meet, the
  engine asks for the stream of the tensors' device. The engine gets ``meta`` as the device; other
  code that asks while the engine runs gets the fake device.
* ``torch.cuda.amp.common.amp_definitely_not_available``, ``torch.cuda.is_bf16_supported``: autocast
  disables itself without a GPU.
* ``torch.optim.optimizer._foreach_supported_types``: on CUDA optimizers update all tensors at once,
  but only tensors of the types in this list.
* ``torch.nn.functional.scaled_dot_product_attention``: without a GPU torch takes the slow kernel,
  which keeps all weights of the attention.
* ``torch._subclasses.fake_tensor``: the fake tensors themselves; tensors on the host stay real.
* ``is_tracing`` and ``is_fake_tensor`` of transformers: transformers runs other code for fake
  tensors.
"""

import contextlib
import ctypes
import functools
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.amp import GradScaler
from torch.utils._python_dispatch import TorchDispatchMode

from autobatch.errors import AutobatchError
from autobatch.prediction.kernels import FORMS, RECURRENT_CELLS, attention_of_cuda
from autobatch.prediction.op_cache import OperationCache

# A step with more conditions than this has a loop that waits for a condition to fail.
_MOST_TRUE: Final = 5000
_Patch = tuple[Any, str, object]  # An object, the name of its attribute, and the new value.

_REGISTRY: Final = "_ZN3c104impl26device_guard_impl_registryE"
_CUDA, _LAZY, _DEVICE_TYPES = 1, 17, 22  # The numbers of c10/core/DeviceType.h.
_META: Final = torch.device("meta")
_COMPOSITE: Final = torch._C.DispatchKey.CompositeImplicitAutograd
_aten: Final[Any] = torch.ops.aten
_autograd: Final[Any] = torch.autograd
RECURRENT: Final = (
    "recurrent layers were traced as single cells: what cuDNN's own kernels keep is not known"
)
_PACKAGE: Final = Path(__file__).parent.parent
_NO_CUDA: Final = "Torch not compiled with CUDA enabled"
_NAN_CHECKS: Final = (_aten.isnan.default, _aten.isinf.default)
_PASSES_MARK_ON: Final = (
    *(_aten.any.default, _aten.any.dim, _aten.sum.default, _aten.max.default),
    *(_aten.logical_or.default, _aten.bitwise_or.Tensor, _aten.view.default),
    *(_aten.gt.Scalar, _aten.ne.Scalar),  # They compare a count of such values with 0.
)
_ENGINE_CODE: Final = _autograd.graph._engine_run_backward.__code__
# The modules that wrap every __torch_dispatch__.
_WRAPPERS: Final = ("torch._compile", "torch._dynamo.eval_frame")


class OnFakeCuda(TorchDispatchMode):
    """A dispatch mode that makes tensors on ``device`` fake. Enter it in a ``FakeTensorMode``.

    Args:
        device: The device of the fake tensors. Tensors on other devices are real.

    Attributes:
        device: As above.
        guessed: How often an operation needed an unknown value, by the guess and the line of code.
        backward: Whether the autograd engine runs.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not type it.
        self.device = device
        self.guessed: Counter[str] = Counter()
        self.backward = False
        self._conditions = 0
        self._run = OperationCache()

    def operation_ran(self, func: Any, args: Sequence[Any], out: object) -> None:
        """Called after each operation on fake tensors, with its arguments and its result."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation: on real tensors with values, on fake tensors without."""
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            return _META if self._engine_asks() else args[0].fake_device
        if self.backward and kwargs.get("device") == _META:
            kwargs["device"] = self.device
        if torch.is_inference_mode_enabled() and func.has_kernel_for_dispatch_key(_COMPOSITE):
            with self:  # Outside inference mode autograd decomposes the operation.
                return func.decompose(*args, **kwargs)
        if FakeTensor not in types and not self._makes_fake(args, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if not func._schema.returns:  # An in-place operation; SGD's fused step has no fake form.
            return None
        out = self._made(func, args, kwargs)
        if isinstance(out, Tensor | list | tuple):
            self._mark(func, args, out)
            self.operation_ran(func, args, out)
        return out

    def _made(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return an operation's result on fake tensors; if it is a number, guess it."""
        try:
            return FORMS.get(func, functools.partial(self._run, func))(args, kwargs)
        except DataDependentOutputException:
            return self._guess(func, args)
        except DynamicOutputShapeException:
            raise AutobatchError(
                f"{func} makes a tensor whose shape depends on values, at {_user_line()}, and "
                "without a GPU no values are known: shapes in a predicted step must not depend on "
                "values (multiply by a mask where the step indexes with one)"
            ) from None
        except (AssertionError, NotImplementedError) as error:
            if _NO_CUDA not in str(error):
                raise
            raise AutobatchError(
                f"{func}, at {_user_line()}, cannot be traced without a GPU: torch "
                f"{torch.__version__} has no form of it for tensors without values"
            ) from None

    def _mark(self, func: Any, args: Sequence[Any], out: object) -> None:
        """Mark results that say whether a value is nan or infinite, and note recurrent cells."""
        if func in RECURRENT_CELLS:
            self.guessed[RECURRENT] = 1
        is_marked = func in _PASSES_MARK_ON and any(_is_nan_check(value) for value in args)
        if (func in _NAN_CHECKS or is_marked) and isinstance(out, Tensor):
            out._autobatch_nan_check = True  # type: ignore[attr-defined]

    def _engine_asks(self) -> bool:
        """Return whether the engine itself asks for a device, and not code that the engine runs.

        The engine runs Python code for activation checkpointing, for example. If the engine asks,
        the calling frame is the one that started the engine, or the first of a thread.
        """
        if not self.backward or self.device.type != "cuda":
            return False
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and frame.f_globals.get("__name__") in _WRAPPERS:
            frame = frame.f_back
        return frame is None or frame.f_code is _ENGINE_CODE

    def _makes_fake(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Return whether an operation on real arguments makes a fake tensor."""
        device = kwargs.get("device")
        if self.device.type == "cuda":
            return device is not None and torch.device(device).type == "cuda"
        return not any(isinstance(argument, Tensor) for argument in args)

    def _guess(self, func: Any, args: Sequence[Any]) -> bool | int | float:
        """Return a guess of a tensor's value: True for a condition, 1 for a number.

        Exceptions: a check for nan or infinity finds none; a GradScaler finds no gradient that
        overflows, which is 0; and after 5,000 conditions further ones are False, so that a loop
        ends.
        """
        if func is not _aten._local_scalar_dense.default:
            raise NotImplementedError(f"{func} depends on values")
        dtype = args[0].dtype
        if _is_nan_check(args[0]):
            self.guessed[f"all is a number at {_user_line()}"] += 1
            return 0 if dtype is not torch.bool else False
        if dtype is torch.bool:
            self._conditions += 1
            self.guessed[f"a condition holds at {_user_line()}"] += 1
            return self._conditions <= _MOST_TRUE
        value = float(not _grad_scaler_calls()) if dtype.is_floating_point else 1
        self.guessed[
            f"a value of {str(dtype).removeprefix('torch.')} is {value:g} at {_user_line()}"
        ] += 1
        return value


def _is_nan_check(value: object) -> bool:
    return getattr(value, "_autobatch_nan_check", False) is True


def _user_line() -> str:
    """Return the innermost line of code on the stack that is neither torch's nor autobatch's."""
    for frame, line in traceback.walk_stack(None):
        module = str(frame.f_globals.get("__name__"))
        ours = Path(frame.f_code.co_filename).is_relative_to(_PACKAGE)
        if module == "__main__" and ours:  # The worker's entry point: no user code called.
            break
        if module.partition(".")[0] != "torch" and not ours:
            return f"{Path(frame.f_code.co_filename).name}:{line}"
    return "a line of torch's"


def _grad_scaler_calls() -> bool:
    return any(
        frame.f_globals.get("__name__") == GradScaler.__module__
        for frame, _ in traceback.walk_stack(None)
    )


def fake_device_of(value: object) -> torch.device | None:
    """Return the device of a fake tensor; None for any other value."""
    return value.fake_device if isinstance(value, FakeTensor) else None


def with_values() -> contextlib.AbstractContextManager[TorchDispatchMode | None]:
    """Return a context in which new tensors are real. It yields the mode that makes fake ones."""
    return unset_fake_temporarily()


def install() -> None:
    """Allow fake CUDA tensors in this process, which must not use real ones.

    Raises:
        OSError, AttributeError, ValueError, RuntimeError: If this build of torch lacks a hook.
    """
    if torch.version.cuda is None and torch.version.hip is None:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        guards = (ctypes.c_void_p * _DEVICE_TYPES).in_dll(library, _REGISTRY)
        if guards[_CUDA] is None:
            guards[_CUDA] = guards[_LAZY]
    torch._C._ensureCUDADeviceGuardSet()


@contextlib.contextmanager
def fake_cuda(mode: OnFakeCuda, *, flash: bool) -> Iterator[None]:
    """Make tensors on ``mode.device`` fake inside.

    Args:
        mode: A mode that has not been used before.
        flash: Whether the GPU has flash attention: compute capability 8.0 or later.

    Example:
        >>> install()
        >>> with fake_cuda(OnFakeCuda(torch.device("cuda:0")), flash=True):
        ...     torch.zeros(8, device="cuda").shape
    """
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mode,
        # A backward thread would free its results later than it returns them, at no fixed time.
        torch.autograd.set_multithreading_enabled(False),
        _patched(_patches(mode, flash=flash)),
    ):
        yield


def fake_looks_real() -> contextlib.AbstractContextManager[None]:
    """Inside, hide from libraries that are imported by now that tensors are fake."""
    found: list[_Patch] = []
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "transformers":
            own = [test for test in ("is_tracing", "is_fake_tensor") if test in vars(module)]
            found += [(module, test, lambda *_, **__: False) for test in own]
    return _patched(found)


@contextlib.contextmanager
def _patched(patches: Iterable[_Patch]) -> Iterator[None]:
    with contextlib.ExitStack() as before:
        for owner, name, value in patches:
            before.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield


def works() -> bool:
    """Return whether every hook works with this build of torch: three layers are trained."""
    mode, dtype = OnFakeCuda(torch.device("cuda:0")), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        install()
        with fake_cuda(mode, flash=True):
            return _three_layers_train(mode.device)
    except Exception:  # noqa: BLE001  # Any error means that a hook does not work.
        return False
    finally:
        torch.set_default_dtype(dtype)


def _three_layers_train(device: torch.device) -> bool:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 32)).to(device)
    optimizer = torch.optim.AdamW(net.parameters())
    scaler = torch.amp.GradScaler("cuda")
    images = torch.zeros(2, 3, 4, 4).to(device)
    with torch.autocast("cuda", torch.float16):
        out = net(images)
        heads = out.view(2, 2, 2, 8)
        out = out + nn.functional.scaled_dot_product_attention(heads, heads, heads).view(2, 32)
        loss = nn.functional.cross_entropy(out, torch.zeros(2, dtype=torch.long).to(device))
    scaler.scale(loss).backward()
    optimizer.step()
    gradients = [parameter.grad for parameter in net.parameters()]
    return out.dtype is torch.float16 and all(g is not None and g.is_cuda for g in gradients)


def _patches(mode: OnFakeCuda, *, flash: bool) -> list[_Patch]:
    optimizers = sys.modules["torch.optim.optimizer"]  # torch.optim hides this module.
    types = optimizers._foreach_supported_types
    patches: list[_Patch] = [
        (_autograd, "_engine_run_backward", _run_with_flag(mode)),
        (optimizers, "_foreach_supported_types", [*types, FakeTensor]),
    ]
    if mode.device.type == "cuda":
        patches += [
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
            (nn.functional, "scaled_dot_product_attention", attention_of_cuda(flash=flash)),
        ]
    return patches


def _run_with_flag(mode: OnFakeCuda) -> Callable[..., Any]:
    """Return the engine's entry function, changed to set ``mode.backward`` while it runs."""
    run = _autograd._engine_run_backward

    def run_with_flag(*args: Any, **kwargs: Any) -> Any:
        before, mode.backward = mode.backward, True
        try:
            return run(*args, **kwargs)
        finally:
            mode.backward = before

    return run_with_flag
