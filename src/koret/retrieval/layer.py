"""One layer of a transformer: what it is made of, and, where only adapters train, all of it as one step of autograd.

``FrozenLayer`` is written out by hand, there and back, over the compiled kernels. So it says itself what is kept for
the backward pass, and puts it on a shelf: two sums, q, k and v, a byte or a number for every slope of GELU, a bit for
every number that dropout looked at. Norms are taken again from their sums, and where a layer ``mixes_again`` so are q,
k and v, with the same bits. Shapes below: T tokens, C width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from koret.retrieval.compiled import (
    STATISTICS,
    CompiledKernel,
    Norm,
    activate,
    attend,
    count_bit_bytes,
    descend,
    descend_norm,
    draw_kept,
    drop,
    normalize,
)
from koret.retrieval.linear import Linear
from koret.retrieval.shelf import Shelf

MIX, JOIN, WIDEN, NARROW = range(4)  # q, k and v; attention's output; feed-forward up and down
PLACES = 18  # on a shelf that a layer takes at most


@dataclass
class Layer:
    """A transformer layer: q/k/v, attention's output, feed-forward up and down; norms after attention and at end."""

    linears: list[Linear]
    norms: list[Norm]

    @property
    def trains(self) -> bool:
        """Whether anything but adapters is trained."""
        return any(linear.trains for linear in self.linears) or any(
            p.requires_grad for norm in self.norms for p in norm
        )

    @property
    def is_frozen(self) -> bool:
        """Whether nothing but A and B of adapters trains, and norms are of float32."""
        adapters = [linear.adapters for linear in self.linears if linear.adapters is not None]
        norms = all(p.dtype == torch.float32 and p.is_contiguous() for norm in self.norms for p in norm)
        return norms and not self.trains and all(a.factors is None for a in adapters)

    @property
    def factors(self) -> Iterator[Tensor]:
        """A and B of every linear layer with adapters."""
        for linear in self.linears:
            if linear.adapters is not None:
                yield from (linear.adapters.down, linear.adapters.up)


def list_linears(layer: nn.Module) -> list[tuple[nn.Module, ...]]:
    """A layer's linear modules, those side by side together, in the order of ``Layer.linears``."""
    attention = layer.attention.self
    return [
        (attention.query, attention.key, attention.value),
        (layer.attention.output.dense,),
        (layer.intermediate.dense,),
        (layer.output.dense,),
    ]


@dataclass
class LayerRun:
    """What a layer's way through one slice of tokens needs beside the tokens.

    ``norm`` is the last one of the layer before. Only ``rows`` come out, where they are given. ``bounds`` (N + 1,)
    int32 keep texts of at most ``longest`` tokens apart. Nothing is kept for a backward pass unless it ``keeps``.
    """

    layer: Layer
    norm: Norm | None
    bounds: Tensor
    longest: int
    heads: int
    epsilon: float
    kernel: CompiledKernel
    rows: Tensor | None
    shelf: Shelf | None
    keeps: bool
    mixes_again: bool

    def take(self, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory for what is kept."""
        return torch.empty(size, dtype=dtype) if self.shelf is None else self.shelf.take(tuple(size), dtype)

    def keep(self, x: Tensor) -> Tensor:
        """x, where it is kept."""
        return self.take(x.shape, x.dtype).copy_(x)

    def attend(self, qkv: Tensor, gradient: Tensor | None = None) -> Tensor:
        """Attention's outcome (T, C), or the gradient of qkv (T, 3C)."""
        return attend(qkv, gradient, self.bounds, self.longest, self.heads, self.kernel)

    def normalize(
        self, norm: Norm, total: Tensor, a: Tensor | None = None, x: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The norm of ``total`` (T, C), which becomes a + x where they are given, and its statistics."""
        statistics = self.take((len(total), STATISTICS), torch.float32)
        if a is None:
            return normalize(total, norm, self.epsilon, statistics, self.kernel), statistics
        return normalize(a, norm, self.epsilon, statistics, self.kernel, x, total), statistics


@dataclass
class _Use:
    """One use of a linear layer, and what its adapters need for their gradients: the bits of dropout, drop(x) and
    A drop(x)."""

    linear: Linear
    run: LayerRun
    bits: Tensor | None = None
    entered: Tensor | None = None
    lower: Tensor | None = None

    def enter(self, x: Tensor) -> Tensor:
        """What comes to the adapters."""
        return x if self.bits is None else drop(x, self.bits, self.linear.adapters.dropout, self.run.kernel)

    def multiply(self, x: Tensor, place: Tensor | None = None) -> Tensor:
        """x (T, C) -> (T, width), to ``place`` where there is one. Bits are drawn where there are none yet."""
        y, adapters = self.linear.multiply(x), self.linear.adapters
        if adapters is None:
            return y if place is None else place.copy_(y)
        if self.linear.drops and self.bits is None:
            bits = self.run.take((count_bit_bytes(x.numel()),), torch.uint8)
            self.bits = draw_kept(bits, adapters.dropout, self.run.kernel)
        self.entered = self.enter(x)
        self.lower = F.linear(self.entered, adapters.down.to(x.dtype))
        up = adapters.up.to(x.dtype).t()
        return y.addmm_(self.lower, up) if place is None else torch.addmm(y, self.lower, up, out=place)

    def multiply_back(self, d: Tensor, wanted: bool = True) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
        """The gradient of the result -> that of x by way of W, by way of the adapters, and those of A and B."""
        back, adapters = self.linear.multiply_back(d) if wanted else None, self.linear.adapters
        if adapters is None:
            return back, None, []
        lower = d @ adapters.up.to(d.dtype)
        factors = [lower.t() @ self.entered, d.t() @ self.lower]
        also = lower @ adapters.down.to(d.dtype) if wanted else None
        if also is not None and self.bits is not None:
            drop(also, self.bits, adapters.dropout, self.run.kernel, also)
        return back, also, [x.to(adapters.up.dtype) for x in factors]


class FrozenLayer(torch.autograd.Function):
    """All of a layer but its last norm (Vaswani et al. 2017, arXiv 1706.03762), whose weights do not train.

    Gradients reach the tokens and the adapters' factors (Hu et al. 2021, arXiv 2106.09685): with d the gradient of
    W x + B A drop(x), those of B and A are d (A drop(x))^T and B^T d drop(x)^T, and that of x is
    W^T d + drop(A^T B^T d).
    """

    @staticmethod
    def forward(ctx, total: Tensor, run: LayerRun, *factors: Tensor) -> Tensor:
        """total (T, C), the sum that the layer before left -> (T, C) or (rows, C), the sum that this one leaves.

        ``factors`` are those of ``run.layer``, for autograd to know of.
        """
        uses = [_Use(linear, run) for linear in run.layer.linears]
        keeps_qkv = run.keeps and not run.mixes_again
        x, before = (total, None) if run.norm is None else run.normalize(run.norm, total)
        place = run.take((len(x), 3 * x.shape[1]), x.dtype) if keeps_qkv else None
        qkv = uses[MIX].multiply(x, place)
        mixed = run.attend(qkv)
        uses[MIX].entered = None
        if run.mixes_again:
            qkv = uses[MIX].lower = None
        if run.rows is not None:  # nothing behind attention looks at another token
            mixed, x = mixed.index_select(0, run.rows), x.index_select(0, run.rows)
        joined = uses[JOIN].multiply(mixed)
        inside = run.take(x.shape, x.dtype) if run.keeps else joined
        x, behind = run.normalize(run.layer.norms[0], inside, joined, x)
        hidden = uses[WIDEN].multiply(x)
        slopes = None
        if run.keeps:
            slopes = run.take((hidden.numel() * run.kernel.slope_bytes,), torch.uint8)
            activate(hidden, slopes, run.kernel)
        else:
            hidden = F.gelu(hidden)
        y = uses[NARROW].multiply(hidden)
        if run.keeps:
            for use in uses:
                use.entered = None if use.entered is None else run.keep(use.entered)
                use.lower = None if use.lower is None else run.keep(use.lower)
            ctx.run = replace(run, shelf=None)  # a graph whose tensors were freed would hold their memory
            ctx.save_for_backward(
                total,
                before,
                qkv,
                inside,
                behind,
                slopes,
                *(x for use in uses for x in (use.bits, use.entered, use.lower)),
            )
        return torch.add(y, x, out=run.take(x.shape, x.dtype)) if run.keeps else y.add_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        run, layer, wanted = ctx.run, ctx.run.layer, ctx.needs_input_grad[0]
        total, before, qkv, inside, behind, slopes, *adapted = ctx.saved_tensors
        uses = [_Use(layer.linears[n], run, *adapted[3 * n : 3 * n + 3]) for n in range(len(layer.linears))]
        gradient = gradient.contiguous()
        d, also, narrow = uses[NARROW].multiply_back(gradient)
        d = descend(d if also is None else d.add_(also), slopes, run.kernel, d)
        d, also, widen = uses[WIDEN].multiply_back(d)
        rest = descend_norm(d, layer.norms[0], inside, behind, run.kernel, (gradient, also))
        d, also, join = uses[JOIN].multiply_back(rest)
        d = d if also is None else d.add_(also)
        if run.rows is not None:
            d, rest = (x.new_zeros(len(total), x.shape[1]).index_copy_(0, run.rows, x) for x in (d, rest))
        if qkv is None or layer.linears[MIX].adapters is not None:
            x = total if run.norm is None else normalize(total, run.norm, None, before, run.kernel)
            if qkv is None:
                qkv = uses[MIX].multiply(x)
            else:
                uses[MIX].entered = uses[MIX].enter(x)
        d = run.attend(qkv, d)
        d, also, mix = uses[MIX].multiply_back(d, wanted)
        if d is not None:
            d = descend_norm(d, run.norm, total, before, run.kernel, (rest, also))
        return d, None, *mix, *join, *widen, *narrow


def count_kept(layer: Layer, width: int, inner: int, kernel: CompiledKernel, mixes_again: bool) -> int:
    """Bytes that ``FrozenLayer`` keeps of a token."""
    size = kernel.dtype.itemsize
    kept = 2 * (width * size + STATISTICS * 4) + inner * kernel.slope_bytes
    kept += 0 if mixes_again else 3 * width * size
    for number, linear in enumerate(layer.linears):
        if linear.adapters is not None:
            enters = inner if number == NARROW else width
            kept += enters // 8 if linear.drops else 0
            kept += 0 if number == MIX else enters * size
            kept += 0 if number == MIX and mixes_again else len(linear.adapters.down) * size
    return kept
