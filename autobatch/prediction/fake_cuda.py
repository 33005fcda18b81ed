"""CUDA without a GPU: tensors that have a shape, a dtype and a device, and no values.

Every private hook of torch that prediction needs is in this file, each with its reason. Tested with
torch 2.13 on a CPU build; ``install`` tries them on a net of three layers, and where one of them is
gone the step is traced as on the CPU, which is told.

* ``c10::impl::device_guard_impl_registry``, ``torch._C._ensureCUDADeviceGuardSet``: a CPU build
  has no device guard for CUDA, and autograd aborts without one. torch puts a guard that does
  nothing where the registered one sees no device, and that of Lazy sees none.
* ``torch.autograd._engine_run_backward``, ``torch.ops.prim.device``: where gradients meet, the
  engine asks for the stream of the tensors' device. It is told that they are on ``meta``; what else
  asks while it runs is told where they are.
* ``torch.cuda.amp.common.amp_definitely_not_available``, ``torch.cuda.is_bf16_supported``: autocast
  turns itself off without a GPU.
* ``torch.optim.optimizer._foreach_supported_types``: optimizers work on all tensors at once on
  CUDA, but not on those of a class of their own.
* ``torch.nn.functional.scaled_dot_product_attention``: without a GPU torch takes the slow kernel,
  which keeps every weight of the attention.
* ``torch._subclasses.fake_tensor``: the tensors themselves; what is on the host stays real there.
* ``is_tracing`` and ``is_fake_tensor`` of transformers: it takes another path for fake tensors.
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
from autobatch.prediction.op_cache import Remembered

_MOST_TRUE: Final = (
    5000  # Conditions in a step. Where there are more, a loop waits for one to fail.
)
_Patch = tuple[Any, str, object]  # Whose attribute, its name, its new value.

_REGISTRY: Final = "_ZN3c104impl26device_guard_impl_registryE"
_CUDA, _LAZY, _DEVICE_TYPES = 1, 17, 22  # Of c10/core/DeviceType.h.
_META: Final = torch.device("meta")
_COMPOSITE: Final = torch._C.DispatchKey.CompositeImplicitAutograd
_aten: Final[Any] = torch.ops.aten
_autograd: Final[Any] = torch.autograd
RECURRENT: Final = (
    "recurrent layers were traced as single cells: what cuDNN's own kernels keep is not known"
)
_PACKAGE: Final = Path(__file__).parent.parent
_NO_CUDA: Final = "Torch not compiled with CUDA enabled"
_ASKS: Final = (_aten.isnan.default, _aten.isinf.default)
_HANDS_ON: Final = (
    *(_aten.any.default, _aten.any.dim, _aten.sum.default, _aten.max.default),
    *(_aten.logical_or.default, _aten.bitwise_or.Tensor, _aten.view.default),
    *(_aten.gt.Scalar, _aten.ne.Scalar),  # What is counted is more than 0, or is not 0.
)
_ENGINE_CODE: Final = _autograd.graph._engine_run_backward.__code__
_WRAPPERS: Final = ("torch._compile", "torch._dynamo.eval_frame")  # Of every __torch_dispatch__.


class OnFakeCuda(TorchDispatchMode):
    """Answers for the device that is not there. Entered inside a ``FakeTensorMode``.

    Args:
        device: Of the fake tensors; what is elsewhere is real.

    Attributes:
        guessed: How often a value was needed that nobody knows, by what was guessed and where.
        backward: Whether the autograd engine runs.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not type it.
        self.device = device
        self.guessed: Counter[str] = Counter()
        self.backward = False
        self._conditions = 0
        self._run = Remembered()

    def seen(self, func: Any, args: Sequence[Any], out: object) -> None:
        """Take note of an operation on fake tensors, and of what it returned."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation: on the host for real, on fake tensors without values."""
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            return _META if self._engine_asks() else args[0].fake_device
        if self.backward and kwargs.get("device") == _META:
            kwargs["device"] = self.device
        if torch.is_inference_mode_enabled() and func.has_kernel_for_dispatch_key(_COMPOSITE):
            with self:  # With gradients, autograd has taken it apart before.
                return func.decompose(*args, **kwargs)
        if FakeTensor not in types and not self._makes_fake(args, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if not func._schema.returns:  # In place, and some, as SGD's fused step, have no fake form.
            return None
        out = self._made(func, args, kwargs)
        if isinstance(out, Tensor | list | tuple):
            self._mark(func, args, out)
            self.seen(func, args, out)
        return out

    def _made(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What an operation on fake tensors returns; a number is guessed."""
        try:
            return FORMS.get(func, functools.partial(self._run, func))(args, kwargs)
        except DataDependentOutputException:
            return self._guess(func, args)
        except DynamicOutputShapeException:
            raise AutobatchError(
                f"{func} makes a tensor whose shape depends on values, at {_asker()}, and without "
                "a GPU no values are known: what is predicted must have shapes of its own (a mask "
                "may weigh what it would pick)"
            ) from None
        except (AssertionError, NotImplementedError) as error:
            if _NO_CUDA not in str(error):
                raise
            raise AutobatchError(
                f"{func}, at {_asker()}, cannot be traced without a GPU: torch "
                f"{torch.__version__} has no form of it for tensors without values"
            ) from None

    def _mark(self, func: Any, args: Sequence[Any], out: object) -> None:
        """Remember what asks whether something is not a number (it is not), and what is a guess."""
        if func in RECURRENT_CELLS:
            self.guessed[RECURRENT] = 1
        asks = func in _ASKS or (func in _HANDS_ON and any(_is_doubt(value) for value in args))
        if asks and isinstance(out, Tensor):
            out._autobatch_doubt = True  # type: ignore[attr-defined]

    def _engine_asks(self) -> bool:
        """Whether the engine itself wants to know, and no code that it runs, as for a checkpoint.

        Then what called here is the frame that has started the engine, or a thread of its own.
        """
        if not self.backward or self.device.type != "cuda":
            return False
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and frame.f_globals.get("__name__") in _WRAPPERS:
            frame = frame.f_back
        return frame is None or frame.f_code is _ENGINE_CODE

    def _makes_fake(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether an operation on no fake tensor makes one."""
        asked = kwargs.get("device")
        if self.device.type == "cuda":
            return asked is not None and torch.device(asked).type == "cuda"
        return not any(isinstance(argument, Tensor) for argument in args)

    def _guess(self, func: Any, args: Sequence[Any]) -> bool | int | float:
        """A condition holds, unless it can only be that of a loop; a number is one.

        What asks for nan or infinity finds none. To a GradScaler that asks whether a gradient
        overflows it is zero.
        """
        if func is not _aten._local_scalar_dense.default:
            raise NotImplementedError(f"{func} depends on values")
        dtype = args[0].dtype
        if _is_doubt(args[0]):
            self.guessed[f"all is a number at {_asker()}"] += 1
            return 0 if dtype is not torch.bool else False
        if dtype is torch.bool:
            self._conditions += 1
            self.guessed[f"a condition holds at {_asker()}"] += 1
            return self._conditions <= _MOST_TRUE
        value = float(not _scaler_asks()) if dtype.is_floating_point else 1
        self.guessed[
            f"a value of {str(dtype).removeprefix('torch.')} is {value:g} at {_asker()}"
        ] += 1
        return value


def _is_doubt(value: object) -> bool:
    return getattr(value, "_autobatch_doubt", False) is True


def _asker() -> str:
    """The line of code that needs a value: the innermost that is neither torch's nor ours."""
    for frame, line in traceback.walk_stack(None):
        module = str(frame.f_globals.get("__name__"))
        ours = Path(frame.f_code.co_filename).is_relative_to(_PACKAGE)
        if module == "__main__" and ours:  # This process itself; nobody of the user's has asked.
            break
        if module.partition(".")[0] != "torch" and not ours:
            return f"{Path(frame.f_code.co_filename).name}:{line}"
    return "a line of torch's"


def _scaler_asks() -> bool:
    return any(
        frame.f_globals.get("__name__") == GradScaler.__module__
        for frame, _ in traceback.walk_stack(None)
    )


def home_of(value: object) -> torch.device | None:
    """Return where a fake tensor is; None for anything else."""
    return value.fake_device if isinstance(value, FakeTensor) else None


def with_values() -> contextlib.AbstractContextManager[TorchDispatchMode | None]:
    """Make real tensors inside; entering what this gives makes fake ones again."""
    return unset_fake_temporarily()


def install() -> None:
    """Make CUDA's tensors possible in this process, which must have no use for real ones.

    Raises:
        OSError, AttributeError, ValueError, RuntimeError: If this build of torch is another.
    """
    if torch.version.cuda is None and torch.version.hip is None:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        guards = (ctypes.c_void_p * _DEVICE_TYPES).in_dll(library, _REGISTRY)
        if guards[_CUDA] is None:
            guards[_CUDA] = guards[_LAZY]
    torch._C._ensureCUDADeviceGuardSet()


@contextlib.contextmanager
def fake_cuda(mode: OnFakeCuda, *, flash: bool) -> Iterator[None]:
    """Make what is on ``mode.device`` fake inside.

    Args:
        mode: Looks on.
        flash: Whether the GPU has flash attention: compute capability 8.0 or later.
    """
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mode,
        # A thread of its own lets go of what it has computed some time after it has handed it over.
        torch.autograd.set_multithreading_enabled(False),
        _patched(_patches(mode, flash=flash)),
    ):
        yield


def fake_is_real() -> contextlib.AbstractContextManager[None]:
    """Keep libraries that are imported by now from treating fake tensors as others inside."""
    found: list[_Patch] = []
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "transformers":
            own = [asked for asked in ("is_tracing", "is_fake_tensor") if asked in vars(module)]
            found += [(module, asked, lambda *_, **__: False) for asked in own]
    return _patched(found)


@contextlib.contextmanager
def _patched(patches: Iterable[_Patch]) -> Iterator[None]:
    with contextlib.ExitStack() as before:
        for owner, name, value in patches:
            before.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield


def works() -> bool:
    """Try every hook on three layers; False where this build of torch is another."""
    mode, dtype = OnFakeCuda(torch.device("cuda:0")), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        install()
        with fake_cuda(mode, flash=True):
            return _three_layers_train(mode.device)
    except Exception:  # noqa: BLE001  # Whatever it is, the hooks cannot be relied on.
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
    optimizers = sys.modules["torch.optim.optimizer"]  # torch.optim hides its own module.
    types = optimizers._foreach_supported_types
    patches: list[_Patch] = [
        (_autograd, "_engine_run_backward", _announced(mode)),
        (optimizers, "_foreach_supported_types", [*types, FakeTensor]),
    ]
    if mode.device.type == "cuda":
        patches += [
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
            (nn.functional, "scaled_dot_product_attention", attention_of_cuda(flash=flash)),
        ]
    return patches


def _announced(mode: OnFakeCuda) -> Callable[..., Any]:
    """The engine's run, with ``mode`` told of it."""
    run = _autograd._engine_run_backward

    def announced(*args: Any, **kwargs: Any) -> Any:
        before, mode.backward = mode.backward, True
        try:
            return run(*args, **kwargs)
        finally:
            mode.backward = before

    return announced
