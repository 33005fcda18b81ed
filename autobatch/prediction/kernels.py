"""Operations for which torch runs other kernels on CUDA than without a GPU.

Without a GPU, attention takes a slow kernel that keeps every weight, and a GRU's cell has no fake
form.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

_HALF: Final = (torch.float16, torch.bfloat16)
_aten: Final[Any] = torch.ops.aten
_attention: Final = nn.functional.scaled_dot_product_attention

RECURRENT_CELLS: Final = (_aten._thnn_fused_lstm_cell.default, _aten._thnn_fused_gru_cell.default)


def attention_of_cuda(*, flash: bool) -> Callable[..., Tensor]:
    """Return scaled dot-product attention by the kernel that torch would choose on CUDA.

    The choice follows aten/src/ATen/native/transformers/cuda/sdp_utils.cpp.

    Args:
        flash: Whether the GPU has flash attention.

    Returns:
        A function with the signature of ``torch.nn.functional.scaled_dot_product_attention``.
    """

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        q, k, v, mask = query, key, value, attn_mask
        kind = query.device.type
        if kind == "cuda" and torch.is_autocast_enabled(kind):
            lower = functools.partial(_lowered, dtype=torch.get_autocast_dtype(kind))
            q, k, v, mask = lower(q), lower(k), lower(v), None if mask is None else lower(mask)
        kernel = "math" if kind != "cuda" or q.ndim != 4 else _kernel(q, mask, enable_gqa, flash)
        if kernel == "flash":
            return _flash(q, k, v, dropout_p, is_causal, scale)
        if kernel == "efficient":
            return _efficient(q, k, v, mask, dropout_p, is_causal, scale)
        return _attention(q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    return attention


def _lowered(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor as autocast passes it to attention, which autocast runs in 16 bits."""
    return tensor.to(dtype) if tensor.dtype is torch.float32 else tensor


def _kernel(query: Tensor, mask: Tensor | None, grouped: bool, flash: bool) -> str:
    half, kernels = query.dtype in _HALF, torch.backends.cuda
    if flash and kernels.flash_sdp_enabled() and half and mask is None and query.shape[-1] <= 256:
        return "flash"
    known = kernels.mem_efficient_sdp_enabled() and (half or query.dtype is torch.float32)
    if not known or grouped or (query.dtype is torch.bfloat16 and not flash):
        return "math"
    return "efficient"


def _flash(
    q: Tensor, k: Tensor, v: Tensor, dropout: float, causal: bool, scale: float | None
) -> Tensor:
    """Call flash attention with heads that are padded to a width that is a multiple of 8."""
    width = q.shape[-1]
    scale = width**-0.5 if scale is None else scale
    if width % 8:
        q, k, v = (nn.functional.pad(tensor, (0, 8 - width % 8)) for tensor in (q, k, v))
    kernel = _aten._scaled_dot_product_flash_attention
    out: Tensor = kernel(q, k, v, dropout, causal, scale=scale)[0]
    return out[..., :width] if width % 8 else out


def _efficient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
) -> Tensor:
    if mask is not None:
        if mask.dtype is torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
        mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v))
    kernel = _aten._scaled_dot_product_efficient_attention
    out: Tensor = kernel(q, k, v, mask, learns, dropout, causal, scale=scale)[0]
    return out


def _gru_cell(args: Sequence[Any], _: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the new state and the backward pass's workspace (aten/src/ATen/native/cuda/RNN.cu)."""
    state = args[2]
    return state.new_empty(state.shape), state.new_empty(state.shape[0], 5 * state.shape[1])


def _gru_cell_backward(
    args: Sequence[Any], _: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of both gates, of the state, and of both biases."""
    gradient, _, has_bias = args
    rows, width = gradient.shape

    def of_gates() -> Tensor:
        made: Tensor = gradient.new_empty(rows, 3 * width)
        return made

    def of_bias() -> Tensor | None:
        return gradient.new_empty(3 * width) if has_bias else None

    return of_gates(), of_gates(), gradient.new_empty(gradient.shape), of_bias(), of_bias()


# Fake forms of operations for which torch has none.
FORMS: Final[dict[Any, Callable[..., Any]]] = {
    _aten._thnn_fused_gru_cell.default: _gru_cell,
    _aten._thnn_fused_gru_cell_backward.default: _gru_cell_backward,
}
