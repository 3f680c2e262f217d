"""koret's own compiled kernels (``csrc``) on CPU: attention within each text, GELU and dropout, forward and backward.

Attention reads q, k and v where the projection wrote them, keeps nothing as large as length x length, and
needs no masks. GELU gives its slope along with its value, so that its backward pass is a product. Dropout draws its
mask again instead of keeping it. There are
kernels for bfloat16, where the processor multiplies pairs of it (AVX-512), and for float32, with AVX-512 or AVX2;
elsewhere, and where no compiler was found, torch computes the same: ``attention.BlockAttention``. KORET_PURE_PYTHON=1
chooses that.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from koret.native import load_extension

VERSION = 3  # of the extension's calls and results
HEAD_STEP, LARGEST_HEAD = 16, 256  # numbers of a head that the kernels take


@dataclass(frozen=True)
class CompiledKernel:
    """Kernels by the name that ``csrc`` gives them: the type of their numbers and what of the processor they need."""

    name: str

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.name.partition(", ")[0])

    @property
    def instructions(self) -> str:
        """What they need of the processor."""
        return self.name.rpartition(", ")[2]

    @property
    def slope_bytes(self) -> int:
        """Bytes in which a slope of GELU is kept."""
        return load_kernels().count_slope_bytes(self.name)


def load_kernels() -> ModuleType | None:
    """The extension that holds them, where it was built."""
    return load_extension("koret.retrieval._kernels", VERSION)


def find_compiled(dtype: torch.dtype, head_size: int) -> CompiledKernel | None:
    """The best kernel this processor has for heads of ``head_size`` numbers of ``dtype``, or None."""
    extension = load_kernels()
    if extension is None or head_size % HEAD_STEP or head_size > LARGEST_HEAD:
        return None
    kernels = map(CompiledKernel, extension.list_kernels())
    return next((kernel for kernel in kernels if kernel.dtype == dtype), None)


class CompiledAttention(torch.autograd.Function):
    """softmax(Q K^T / sqrt(D)) V within each text (Vaswani et al. 2017), by a compiled kernel; keeps q, k and v.

    Tokens behind the last text are of no text: zeros come out for them, and no gradient.
    """

    @staticmethod
    def forward(
        ctx, qkv: Tensor, bounds: Tensor, longest: int, heads: int, kernel: CompiledKernel, wanted: bool = True
    ) -> Tensor:
        """qkv (T, 3C) and where each text begins and the last ends (N + 1,) int32 -> (T, C), anything if not wanted."""
        ctx.save_for_backward(qkv, bounds)
        ctx.rest = longest, heads, kernel
        return _attend(qkv, None, bounds, *ctx.rest) if wanted else qkv.new_empty(len(qkv), qkv.shape[1] // 3)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        qkv, bounds = ctx.saved_tensors
        return _attend(qkv, gradient, bounds, *ctx.rest), None, None, None, None, None


def _hold(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x, its numbers side by side in memory that a kernel may be given the address of."""
    if x.device.type != "cpu" or x.dtype != dtype:
        raise TypeError(f"the kernel takes {dtype} on the CPU, not {x.dtype} on {x.device}")
    return x if x.is_contiguous() else x.contiguous()


def _attend(
    qkv: Tensor, gradient: Tensor | None, bounds: Tensor, longest: int, heads: int, kernel: CompiledKernel
) -> Tensor:
    """The output (T, C), or the gradient of qkv (T, 3C) where the output's is given."""
    tokens, width, end = len(qkv), qkv.shape[1] // 3, int(bounds[-1])
    qkv, bounds = _hold(qkv, kernel.dtype), _hold(bounds, torch.int32)
    fits = 0 <= bounds[0] and 0 <= bounds.diff().min() <= bounds.diff().max() <= longest and end <= tokens
    if not fits or qkv.shape[1] != 3 * width or width % (heads * HEAD_STEP):
        texts = f"{len(bounds) - 1} texts of at most {longest} tokens and {heads} heads of a multiple of {HEAD_STEP}"
        raise ValueError(f"q, k and v {tuple(qkv.shape)} are not those of {texts}")
    result = qkv.new_empty(tokens, width) if gradient is None else torch.empty_like(qkv)
    if gradient is not None:
        gradient = _hold(gradient.expand(tokens, width), kernel.dtype)
    load_kernels().attend(
        kernel.name,
        qkv.data_ptr(),
        0 if gradient is None else gradient.data_ptr(),
        result.data_ptr(),
        bounds.data_ptr(),
        len(bounds) - 1,
        longest,
        heads,
        width // heads,
        torch.get_num_threads(),
    )
    result[end:] = 0
    return result


class CompiledGelu(torch.autograd.Function):
    """x F(x), F being the normal distribution's (Hendrycks and Gimpel 2016, arXiv 1606.08415); keeps the slope, not x.

    The result takes the place of x: an operation that has saved x for its own backward pass raises there. In bfloat16 a
    slope is kept in a byte, about as exact as it would be in bfloat16 (Novikov et al. 2022, arXiv 2202.00441, do it in
    less).
    """

    @staticmethod
    def forward(ctx, x: Tensor, kernel: CompiledKernel, place: Tensor | None = None) -> Tensor:
        """x of any shape, which is overwritten -> the same shape; ``place``: bytes that may keep the slopes."""
        y, size = _hold(x, kernel.dtype), x.numel() * kernel.slope_bytes
        if y is x:
            ctx.mark_dirty(x)
        slopes = torch.empty(size, dtype=torch.uint8) if place is None else _hold(place, torch.uint8)
        if len(slopes) != size:
            raise ValueError(f"{len(slopes)} bytes are not those of the slopes of {x.numel()} numbers")
        _pass("activate", kernel, y, y, slopes)
        ctx.save_for_backward(slopes)
        ctx.kernel = kernel
        return y

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (slopes,), gradient = ctx.saved_tensors, _hold(gradient, ctx.kernel.dtype)
        return _pass("descend", ctx.kernel, gradient, torch.empty_like(gradient), slopes), None, None


class CompiledDropout(torch.autograd.Function):
    """x / (1 - p), or 0 with probability p, in steps of 1/65536; keeps no mask but the seed it is drawn from.

    Draws are Philox4x32-10's (Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3).
    """

    @staticmethod
    def forward(ctx, x: Tensor, p: float, kernel: CompiledKernel, seed: int) -> Tensor:
        """x of any shape -> the same shape."""
        least = min(max(round(p * 65536), 1), 65535)  # smaller draws are dropped
        ctx.settings = kernel, seed, least, 1 / (1 - p)
        return _drop(x, *ctx.settings)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _drop(gradient, *ctx.settings), None, None, None


def draw_seed() -> int:
    """64 bits from torch's default generator: restoring its state repeats them."""
    return int(torch.empty((), dtype=torch.int64).random_(-(2**63), None)) % 2**64


def _drop(x: Tensor, kernel: CompiledKernel, *draws: int | float) -> Tensor:
    """x by a seed, the least draw that stays, and a factor."""
    x = _hold(x, kernel.dtype)
    return _pass("drop", kernel, x, torch.empty_like(x), None, *draws)


def _pass(what: str, kernel: CompiledKernel, x: Tensor, y: Tensor, slopes: Tensor | None, *rest: int | float) -> Tensor:
    """One of the kernel's passes over numbers, from x to y, which is returned."""
    addresses = x.data_ptr(), y.data_ptr(), 0 if slopes is None else slopes.data_ptr()
    getattr(load_kernels(), what)(kernel.name, *addresses, x.numel(), torch.get_num_threads(), *rest)
    return y
