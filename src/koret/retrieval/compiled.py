"""Attention within each text by koret's own compiled kernels (``csrc``): on CPU, forward and backward.

A kernel reads q, k and v where the projection wrote them, keeps nothing as large as length x length, and spends nothing
on padding. There is one for bfloat16, where the processor multiplies pairs of it (AVX-512), and one for float32, with
AVX-512 or AVX2; elsewhere, and where no compiler was found, ``attention.BlockAttention`` does the same in torch.
KORET_PURE_PYTHON=1 chooses that.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from koret.native import load_extension

VERSION = 1  # of the extension's calls and results
HEAD_STEP, LARGEST_HEAD = 16, 256  # numbers of a head that the kernels take


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel by the name that ``csrc`` gives it: the type of its numbers and what of the processor it needs."""

    name: str


def load_kernels() -> ModuleType | None:
    """The extension that holds them, where it was built."""
    return load_extension("koret.retrieval._attention", VERSION)


def find_compiled(dtype: torch.dtype, head_size: int) -> CompiledKernel | None:
    """The best kernel this processor has for heads of ``head_size`` numbers of ``dtype``, or None."""
    extension = load_kernels()
    if extension is None or head_size % HEAD_STEP or head_size > LARGEST_HEAD:
        return None
    wanted = str(dtype).removeprefix("torch.")
    names = [name for name in extension.list_kernels() if name.startswith(f"{wanted},")]
    return CompiledKernel(names[0]) if names else None


class CompiledAttention(torch.autograd.Function):
    """softmax(Q K^T / sqrt(D)) V within each text (Vaswani et al. 2017), by a compiled kernel; keeps q, k and v.

    Tokens behind the last text are of no text: zeros come out for them, and no gradient.
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, bounds: Tensor, longest: int, heads: int, kernel: CompiledKernel) -> Tensor:
        """qkv (T, 3C) and where each text begins and the last ends (N + 1,) int32 -> (T, C)."""
        ctx.save_for_backward(qkv, bounds)
        ctx.rest = longest, heads, kernel
        return _run(qkv, None, bounds, *ctx.rest)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        qkv, bounds = ctx.saved_tensors
        return _run(qkv, gradient, bounds, *ctx.rest), None, None, None, None


def _run(
    qkv: Tensor, gradient: Tensor | None, bounds: Tensor, longest: int, heads: int, kernel: CompiledKernel
) -> Tensor:
    """The output (T, C), or the gradient of qkv (T, 3C) where the output's is given."""
    extension = load_kernels()
    assert extension is not None and qkv.device.type == bounds.device.type == "cpu"
    assert bounds.dtype == torch.int32 and bounds.is_contiguous()
    tokens, width = len(qkv), qkv.shape[1] // 3
    qkv = qkv.contiguous()
    result = qkv.new_empty(tokens, width) if gradient is None else torch.empty_like(qkv)
    if gradient is not None:
        gradient = gradient.to(qkv.dtype).contiguous()
        assert gradient.shape == (tokens, width)
    texts, end = len(bounds) - 1, int(bounds[-1])
    assert end <= tokens and longest >= int(bounds.diff().max())
    extension.run(
        kernel.name,
        qkv.data_ptr(),
        0 if gradient is None else gradient.data_ptr(),
        result.data_ptr(),
        bounds.data_ptr(),
        texts,
        longest,
        heads,
        width // heads,
        torch.get_num_threads(),
    )
    result[end:] = 0
    return result
