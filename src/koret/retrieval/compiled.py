"""koret's own compiled kernels (``csrc``) on CPU: attention within each text, norms, GELU and dropout, there and back.

Attention reads q, k and v where the projection wrote them, keeps nothing as large as length x length, and needs no
masks. GELU gives its slope along with its value, so that its backward pass is a product. Dropout keeps a bit a number.
A norm adds two tensors first, and its backward pass adds up all gradients of its result first. There are kernels for
bfloat16, where the processor multiplies pairs of it (AVX-512), and for float32, with AVX-512 or AVX2;
elsewhere, and where no compiler was found, torch computes the same: ``attention.BlockAttention``. KORET_PURE_PYTHON=1
chooses that.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from koret.native import load_extension

Norm = tuple[Tensor, Tensor]  # weight and bias

VERSION = 4  # of the extension's calls and results
HEAD_STEP, LARGEST_HEAD = 16, 256  # numbers of a head that the kernels take
DRAWS = 128  # places that dropout draws together
STATISTICS = 2  # float32 numbers that a norm keeps of a row: its mean, and one over its deviation


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
    """The best kernel this processor has for heads of ``head_size`` numbers of ``dtype``, or None.

    Where torch is held to AVX2 (``ATEN_CPU_CAPABILITY``), so is this.
    """
    extension = load_kernels()
    if extension is None or head_size % HEAD_STEP or head_size > LARGEST_HEAD:
        return None
    kernels = map(CompiledKernel, extension.list_kernels())
    held = "AVX2" in torch.backends.cpu.get_cpu_capability()
    return next((k for k in kernels if k.dtype == dtype and not (held and "AVX-512" in k.instructions)), None)


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
        return attend(qkv, None, bounds, *ctx.rest) if wanted else qkv.new_empty(len(qkv), qkv.shape[1] // 3)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        qkv, bounds = ctx.saved_tensors
        return attend(qkv, gradient, bounds, *ctx.rest), None, None, None, None, None


def _hold(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x, its numbers side by side in memory that a kernel may be given the address of."""
    if x.device.type != "cpu" or x.dtype != dtype:
        raise TypeError(f"the kernel takes {dtype} on the CPU, not {x.dtype} on {x.device}")
    return x if x.is_contiguous() else x.contiguous()


def attend(
    qkv: Tensor, gradient: Tensor | None, bounds: Tensor, longest: int, heads: int, kernel: CompiledKernel
) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V within each text: the output (T, C), or given its gradient that of qkv (T, 3C).

    ``bounds`` (N + 1,) int32: where each text begins, and the last ends. Raises ValueError where they do not fit.
    """
    (tokens, width), texts = qkv.shape, len(bounds) - 1
    qkv, bounds = _hold(qkv, kernel.dtype), _hold(bounds, torch.int32)
    result = qkv.new_empty(tokens, width // 3) if gradient is None else torch.empty_like(qkv)
    if gradient is not None:
        gradient = _hold(gradient.expand(tokens, width // 3), kernel.dtype)
    addresses = map(_address, (qkv, gradient, result, bounds))
    sizes = tokens, texts, longest, heads, width // 3 // heads
    fits = texts >= 0 and not width % (3 * heads * HEAD_STEP)
    if not fits or not load_kernels().attend(kernel.name, *addresses, *sizes, torch.get_num_threads()):
        found = f"{texts} texts of at most {longest} tokens and {heads} heads of a multiple of {HEAD_STEP}"
        raise ValueError(f"q, k and v {tuple(qkv.shape)} are not those of {found}")
    result[int(bounds[-1]) :] = 0
    return result


class CompiledGelu(torch.autograd.Function):
    """x F(x), F being the normal distribution's (Hendrycks and Gimpel 2016, arXiv 1606.08415); keeps the slope, not x.

    The result takes the place of x: an operation that has saved x for its own backward pass raises there. In bfloat16 a
    slope is kept in a byte, about as exact as it would be in bfloat16 (Novikov et al. 2022, arXiv 2202.00441, do it in
    less).
    """

    @staticmethod
    def forward(ctx, x: Tensor, kernel: CompiledKernel) -> Tensor:
        """x of any shape, which is overwritten -> the same shape."""
        y = _hold(x, kernel.dtype)
        if y is x:
            ctx.mark_dirty(x)
        slopes = torch.empty(x.numel() * kernel.slope_bytes, dtype=torch.uint8)
        ctx.save_for_backward(activate(y, slopes, kernel))
        ctx.kernel = kernel
        return y

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (slopes,), gradient = ctx.saved_tensors, _hold(gradient, ctx.kernel.dtype)
        return descend(gradient, slopes, ctx.kernel, torch.empty_like(gradient)), None


def activate(x: Tensor, slopes: Tensor, kernel: CompiledKernel) -> Tensor:
    """GELU of x in its place, and to ``slopes``, ``kernel.slope_bytes`` for each number, its slopes: these."""
    x, slopes = _hold(x, kernel.dtype), _hold(slopes, torch.uint8)
    if len(slopes) != x.numel() * kernel.slope_bytes:
        raise ValueError(f"{len(slopes)} bytes are not those of the slopes of {x.numel()} numbers")
    _pass("activate", kernel, x.numel(), x, x, slopes)
    return slopes


def descend(gradient: Tensor, slopes: Tensor, kernel: CompiledKernel, out: Tensor) -> Tensor:
    """The gradient of what ``activate`` was given, to ``out``, which may be ``gradient``."""
    _pass("descend", kernel, gradient.numel(), gradient, out, slopes)
    return out


class CompiledDropout(torch.autograd.Function):
    """x / (1 - p), or 0 with probability p, in steps of 1/65536; keeps a bit a number.

    Draws are Philox4x32-10's (Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3).
    """

    @staticmethod
    def forward(ctx, x: Tensor, p: float, kernel: CompiledKernel) -> Tensor:
        """x of any shape -> the same shape."""
        kept = draw_kept(torch.empty(count_bit_bytes(x.numel()), dtype=torch.uint8), p, kernel)
        ctx.save_for_backward(kept)
        ctx.settings = p, kernel
        return drop(x, kept, *ctx.settings)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return drop(gradient, kept, *ctx.settings), None, None


def count_bit_bytes(count: int) -> int:
    """Bytes of a bit for each of so many numbers, as ``draw_kept`` wants them."""
    return -(-count // DRAWS) * (DRAWS // 8)


def draw_kept(kept: Tensor, p: float, kernel: CompiledKernel, seed: int | None = None) -> Tensor:
    """Draw for every bit of ``kept``, uint8, whether its number is kept, which it is not with probability ``p``.

    The seed comes from torch's default generator where none is given: restoring its state repeats the bits.
    """
    kept = _hold(kept, torch.uint8)
    if len(kept) % (DRAWS // 8):
        raise ValueError(f"bits are drawn {DRAWS} at a time: {len(kept)} bytes are no multiple of that")
    if seed is None:
        seed = int(torch.empty((), dtype=torch.int64).random_(-(2**63), None)) % 2**64
    least = min(max(round(p * 65536), 1), 65535)  # smaller draws are dropped
    _pass("draw", kernel, len(kept) * 8, None, None, kept, seed, least)
    return kept


def drop(x: Tensor, kept: Tensor, p: float, kernel: CompiledKernel, out: Tensor | None = None) -> Tensor:
    """x / (1 - p) where its bit is set, else 0: to ``out``, which may be x, or a new tensor."""
    x, kept = _hold(x, kernel.dtype), _hold(kept, torch.uint8)
    if len(kept) < count_bit_bytes(x.numel()):
        raise ValueError(f"{len(kept)} bytes are not the bits of {x.numel()} numbers")
    out = torch.empty_like(x) if out is None else out
    _pass("drop", kernel, x.numel(), x, out, kept, 0, 0, 1 / (1 - p))
    return out


def _pass(
    what: str, kernel: CompiledKernel, count: int, x: Tensor | None, y: Tensor | None, kept: Tensor, *rest: int | float
) -> None:
    """One of the kernel's passes over numbers."""
    getattr(load_kernels(), what)(kernel.name, *map(_address, (x, y, kept)), count, torch.get_num_threads(), *rest)


def normalize(
    x: Tensor,
    norm: Norm,
    epsilon: float | None,
    statistics: Tensor,
    kernel: CompiledKernel,
    other: Tensor | None = None,
    total: Tensor | None = None,
) -> Tensor:
    """The norm of rows x (T, C), or of x + ``other``, which goes to ``total`` (Ba et al. 2016, arXiv 1607.06450).

    ``norm``: weight and bias (C,) in float32. The rows' ``statistics`` (T, 2), float32, are written, and where
    ``epsilon`` is None read.
    """
    y = torch.empty_like(x)
    epsilon = -1.0 if epsilon is None else epsilon
    _pass_rows("normalize", kernel, x, other, total, y, statistics, *norm, None, None, epsilon)
    return y


def descend_norm(
    gradient: Tensor,
    norm: Norm | None,
    total: Tensor | None,
    statistics: Tensor | None,
    kernel: CompiledKernel,
    added: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """The gradient of ``total``, whose ``norm`` has the gradients (T, C) given, which are added up; without a norm,
    their sum. It takes the place of the first of them."""
    weight = None if norm is None else norm[0]
    _pass_rows("descend_norm", kernel, gradient, None, total, gradient, statistics, weight, None, *added, 0.0)
    return gradient


def _pass_rows(what: str, kernel: CompiledKernel, x: Tensor, *rest: Tensor | float | None) -> None:
    """One of the kernel's passes over rows; all tensors but the first may be left out."""
    *tensors, epsilon = rest
    rows, width = x.shape
    types = [kernel.dtype] * 3 + [torch.float32] * 3 + [kernel.dtype] * 2
    sizes = [rows * width] * 3 + [rows * STATISTICS, width, width] + [rows * width] * 2
    for tensor, dtype, size in zip((x, *tensors), (kernel.dtype, *types), (rows * width, *sizes), strict=True):
        if tensor is not None and (_hold(tensor, dtype) is not tensor or tensor.numel() != size):
            raise ValueError(
                f"a tensor {tuple(tensor.shape)} does not go with {rows} rows of {width} numbers side by side"
            )
    addresses = map(_address, (x, *tensors))
    getattr(load_kernels(), what)(kernel.name, *addresses, rows, width, epsilon, torch.get_num_threads())


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
