"""The two parts of a layer that look at each token alone, before attention and behind it, plainly or compiled by torch.

Operation by operation, whatever stands between two products (norms, GELU, dropout, sums, casts) is a pass of its own
over all tokens, and a kernel to start. ``compile_parts`` lets torch.compile write them as few kernels. Tokens are the
only dimension that changes from batch to batch, and it is left open: a part is compiled once for all layers of a kind
and all batches. Shapes below: T tokens, C width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from koret.retrieval.compiled import CompiledKernel, Norm
from koret.retrieval.layer import Layer

Activation = Callable[[Tensor], Tensor]


class Parts(NamedTuple):
    """``begin_layer`` and ``end_layer`` or what computes the same, and what they are to be given."""

    begin: Callable[..., tuple[Tensor, Tensor]]
    end: Callable[..., Tensor]
    activate: Activation
    kernel: CompiledKernel | None  # for dropout


def normalize_plainly(x: Tensor, norm: Norm | None, epsilon: float) -> Tensor:
    """x (T, C) behind a norm whose weight and bias are of its type; itself without one."""
    return x if norm is None else F.layer_norm(x, (x.shape[1],), *norm, epsilon)


def begin_layer(
    layer: Layer, norm: Norm | None, epsilon: float, kernel: CompiledKernel | None, x: Tensor
) -> tuple[Tensor, Tensor]:
    """x (T, C) as the layer before left it, whose last norm is ``norm`` -> x behind it, and q, k and v (T, 3C)."""
    x = normalize_plainly(x, norm, epsilon)
    return x, layer.linears[0].apply(x, kernel)


def end_layer(
    layer: Layer,
    norm: Norm,
    epsilon: float,
    activate: Activation,
    kernel: CompiledKernel | None,
    mixed: Tensor,
    x: Tensor,
) -> Tensor:
    """Attention's outcome (T, C) and what came into it (T, C) -> the layer's outcome but for its last norm (T, C)."""
    _, join, widen, narrow = layer.linears
    x = normalize_plainly(join.apply(mixed, kernel).add_(x), norm, epsilon)
    return narrow.apply(activate(widen.apply(x, kernel)), kernel).add_(x)


def compile_parts(activation: Activation) -> Parts:
    """Both parts by torch.compile (Ansel et al. 2024, doi 10.1145/3620665.3640366), on first use for a kind of layer.

    Dropout comes from torch's own generator, so restoring its state repeats the mask.
    """
    return Parts(_compile(begin_layer), _compile(end_layer), activation, None)


def _compile(part: Callable) -> Callable:
    from torch._dynamo import maybe_mark_dynamic  # takes a while to import

    compiled = torch.compile(part, options={"fallback_random": True})

    def run(*arguments):
        for one in arguments:
            if isinstance(one, Tensor):
                maybe_mark_dynamic(one, 0)
        return compiled(*arguments)

    return run
