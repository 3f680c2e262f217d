"""Products of tokens with frozen weights on a CPU: the ways there are, and which is the faster one, measured.

torch multiplies float32 by MKL where that is there, and half precision by oneDNN. oneDNN has an order of its own for
weights: once they are brought into it, no product has to do that again. Shapes below: T tokens, C width.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 48  # tokens: up to so many gain from weights in oneDNN's order on every processor
ROUNDS = 40  # of timing two ways in turns
HOPELESS = 2, 2.0  # after so many rounds, a way that takes so many times as long will not be the faster one
WORTH = 0.95  # of the other's time: what takes less is worth a second copy of the weights
TOKENS, WIDTH, INNER = 512, 384, 1536  # of the product that is timed
PRODUCTS_KEPT = "256"  # those of a few slices of a batch


def multiply_ordered(x: Tensor, weight: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """x (T, C) and an ordered W -> W x + bias (T, width)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def order_weight(weight: Tensor) -> Tensor:
    """W (width, C) in oneDNN's order, for ``multiply_ordered`` alone."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())


def can_order(dtype: torch.dtype, weights: list[Tensor]) -> bool:
    """Whether oneDNN can multiply numbers of ``dtype`` with these frozen weights, kept in an order of its own."""
    return (
        weights[0].device.type == "cpu"
        and not any(weight.requires_grad for weight in weights)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and (dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()))
    )


def gains_from_order(dtype: torch.dtype, weights: list[Tensor], tokens: int, prefers: bool | None = None) -> bool:
    """Whether so many tokens of ``dtype`` are multiplied faster with these frozen weights in oneDNN's own order.

    A few tokens gain most. Of many in float32 it depends on the processor: ``prefers`` says, or ``prefers_order``.
    """
    if not can_order(dtype, weights):
        return False
    if tokens <= FEW or dtype != torch.float32:
        return True
    return prefers_order() if prefers is None else prefers


@functools.lru_cache
def prefers_order() -> bool:
    """Whether many tokens of float32 are multiplied faster in oneDNN's order: with AVX-512 they are, else measured.

    Without AVX-512 MKL's own kernels win on some processors, and lose on others.
    """
    if "AVX512" in torch.backends.cpu.get_cpu_capability():
        return True
    x, weight = _make_factors(torch.float32)
    if not can_order(torch.float32, [weight]):
        return False
    ordered = order_weight(weight)
    return compare_times(lambda: multiply_ordered(x, ordered), lambda: F.linear(x, weight)) < WORTH


def compare_types(a: torch.dtype, b: torch.dtype) -> float:
    """How long a layer's product takes in ``a``, as a share of the time in ``b``, each the way it would be taken."""
    return compare_times(*map(_prepare_product, (a, b)))


def _prepare_product(dtype: torch.dtype) -> Callable[[], Tensor]:
    x, weight = _make_factors(dtype)
    if gains_from_order(dtype, [weight], len(x)):
        ordered = order_weight(weight)
        return lambda: multiply_ordered(x, ordered)
    return lambda: F.linear(x, weight)


def _make_factors(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of a product; nothing is drawn from torch's own generator."""
    own = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, WIDTH, generator=own).to(dtype) for rows in (TOKENS, INNER))
    return x, weight


def compare_times(a: Callable[[], object], b: Callable[[], object]) -> float:
    """How long ``a`` takes, as a share of the time of ``b``: the fastest call of each, taken in turns.

    Turns over a fifth of a second: what else runs on the machine then slows both alike, or neither's fastest. Fewer
    where ``a`` is out of the question: a processor without bfloat16 takes ten times as long for it.
    """
    best = [float("inf")] * 2
    for done in range(ROUNDS):
        for number, call in enumerate((a, b)):
            began = time.perf_counter()
            call()
            best[number] = min(best[number], time.perf_counter() - began)
        if done >= HOPELESS[0] and best[0] > HOPELESS[1] * best[1]:
            break
    return best[0] / best[1]


def limit_products() -> None:
    """Before the first product, which reads it: how many compiled ones oneDNN keeps, a thousand where nobody says.

    A training, whose batches all differ, would hold more from step to step.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", PRODUCTS_KEPT)
