"""Linear layers side by side as one product, with the low-rank adapters of PEFT: W x + scaling * B A x.

The weights are read from ordinary ``nn.Linear`` modules, adapted by PEFT or not, kept in full or in 4 bits by
bitsandbytes. The factors of a model's adapters are made ready for all of its layers together: a few operations a
forward pass, not a dozen for every layer, which is what a small batch on a fast device spends its time on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from koret.retrieval.compiled import CompiledDropout, CompiledKernel
from koret.retrieval.products import multiply_ordered

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # of numbers of so many bytes


@dataclass
class Linear:
    """One or several linear layers side by side, as one product: W x + scaling * B A dropout(x) + bias.

    LoRA (Hu et al. 2021, arXiv 2106.09685) has the A of all layers stacked and the B block-diagonal, so that any
    number of adapted layers costs two more products. DoRA (Liu et al. 2024, arXiv 2402.09353) multiplies W + B A by
    ``factors``, m / |W + scaling * B A|, row by row, before the bias is added; its dropout is on A's input alone, where
    PEFT drops the input of W too.
    """

    weight: Tensor | None  # (sum of widths, C), compute type; None where the layers' weights are one of the next two
    ordered: OrderedWeight | None
    four_bit: list[Tensor]
    bias: Tensor | None  # (sum of widths,)
    adapters: Adapters | None
    trains: bool  # whether W or the bias is trained

    @property
    def drops(self) -> bool:
        """Whether dropout is drawn."""
        return self.adapters is not None and self.adapters.dropout > 0

    def apply(self, x: Tensor, kernel: CompiledKernel | None = None) -> Tensor:
        """x (T, C) -> (T, sum of widths). A ``kernel`` computes dropout."""
        adapters = self.adapters
        factors = None if adapters is None else adapters.factors
        early = self.bias if factors is None else None
        if self.ordered is not None:
            y = OrderedLinear.apply(x, self.ordered, early)
        elif self.weight is not None:
            y = F.linear(x, self.weight, early)
        else:
            y = torch.cat([FourBitLinear.apply(x, weight) for weight in self.four_bit], dim=1)
            y = y if early is None else y + early
        if adapters is not None:
            dropped = drop_fast(x, adapters.dropout, kernel) if self.drops else x
            y = y.addmm_(F.linear(dropped, adapters.down.to(x.dtype)), adapters.up.to(x.dtype).t())
        if factors is not None:
            y = y * factors
            y = y if self.bias is None else y + self.bias
        return y

    def multiply(self, x: Tensor) -> Tensor:
        """x (T, C) -> (T, sum of widths), W x + bias alone and outside of autograd."""
        if self.ordered is not None:
            return multiply_ordered(x, self.ordered.forward, self.bias)
        if self.weight is not None:
            return F.linear(x, self.weight, self.bias)
        y = torch.cat([F.linear(x, dequantize(weight).to(x.dtype)) for weight in self.four_bit], dim=1)
        return y if self.bias is None else y.add_(self.bias)

    def multiply_back(self, gradient: Tensor) -> Tensor:
        """The gradient of ``multiply``'s result (T, sum of widths) -> that of x (T, C)."""
        if self.ordered is not None:
            return multiply_ordered(gradient, self.ordered.backward)
        if self.weight is not None:
            return gradient @ self.weight
        weights = [dequantize(weight).to(gradient.dtype) for weight in self.four_bit]
        return gradient @ (weights[0] if len(weights) == 1 else torch.cat(weights))


@dataclass
class Adapters:
    """The adapters of linear layers side by side; layers without one have zeros in ``up``."""

    down: Tensor  # (sum of ranks, C)
    up: Tensor  # (sum of widths, sum of ranks), scaling included
    dropout: float  # 0 outside of training
    factors: Tensor | None  # (sum of widths,) DoRA's, in the compute type


@dataclass
class _Adapter:
    down: Tensor  # (rank, in)
    up: Tensor  # (out, rank)
    scaling: float
    dropout: float  # 0 outside of training
    magnitude: Tensor | None  # (out,) DoRA's trained lengths

    def find_factors(self, base: nn.Module) -> Tensor | None:
        """(out,) what DoRA multiplies each output by: the trained length over the one W + B A has, a constant."""
        if self.magnitude is None:
            return None
        with torch.no_grad():
            found = torch.linalg.vector_norm(dequantize(base.weight) + self.scaling * self.up @ self.down, dim=1)
        return self.magnitude / found


def find_base(module: nn.Module) -> nn.Module:
    """The linear layer below its adapter, where it has one."""
    return getattr(module, "base_layer", module)


def read_adapters(groups: Sequence[Sequence[nn.Module]], dtype: torch.dtype) -> list[Adapters | None]:
    """The active adapters of every group of linear layers side by side; None for a group that has none.

    Groups of one shape are read together: their factors are stacked once, and their gradients come back as one tensor.
    On CPU they stay in the type they are trained in, and are cast at every use: the gradients of a batch's slices add
    up unrounded. Elsewhere a batch is one slice, and they are cast to ``dtype`` together.
    """
    found = [[_find_adapter(module) for module in group] for group in groups]
    alike: dict[tuple, list[int]] = {}
    for number, (group, adapters) in enumerate(zip(groups, found, strict=True)):
        if any(adapters):
            widths = [find_base(module).out_features for module in group]
            key = tuple(
                (width, None if a is None else (a.down.shape, a.scaling))
                for width, a in zip(widths, adapters, strict=True)
            )
            alike.setdefault(key, []).append(number)
    read: list[Adapters | None] = [None] * len(groups)
    for key, numbers in alike.items():
        downs, ups = _stack_factors([found[n] for n in numbers], [width for width, _ in key])
        if downs.device.type != "cpu":
            downs, ups = downs.to(dtype), ups.to(dtype)
        for number, down, up in zip(numbers, downs.unbind(), ups.unbind(), strict=True):
            dropout = next(a.dropout for a in found[number] if a is not None)
            read[number] = Adapters(down, up, dropout, _stack_lengths(found[number], groups[number], dtype))
    return read


def _stack_factors(groups: list[list[_Adapter | None]], widths: list[int]) -> tuple[Tensor, Tensor]:
    """G groups of one shape -> A of each stacked (G, ranks, C), B of each on a diagonal (G, widths, ranks), in sums."""
    downs = torch.cat([a.down for group in groups for a in group if a is not None])
    downs = downs.view(len(groups), -1, downs.shape[1])
    ranks, blocks, at = downs.shape[1], [], 0
    for place, width in enumerate(widths):
        column = [group[place] for group in groups]
        if column[0] is None:
            blocks.append(downs.new_zeros(len(groups), width, ranks))
            continue
        ups = torch.stack([a.up for a in column if a is not None]) * column[0].scaling
        blocks.append(F.pad(ups, (at, ranks - at - ups.shape[2])))
        at += ups.shape[2]
    return downs, blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)


def _stack_lengths(adapters: list[_Adapter | None], group: Sequence[nn.Module], dtype: torch.dtype) -> Tensor | None:
    """(sum of widths,) DoRA's factors, 1 for layers without; None where no layer has any."""
    bases = [find_base(module) for module in group]
    found = [None if a is None else a.find_factors(b) for a, b in zip(adapters, bases, strict=True)]
    if all(factor is None for factor in found):
        return None
    like = next(factor for factor in found if factor is not None)
    ones = [like.new_ones(base.out_features) for base in bases]
    return torch.cat([one if f is None else f for f, one in zip(found, ones, strict=True)]).to(dtype)


def _find_adapter(module: nn.Module) -> _Adapter | None:
    """The active LoRA adapter PEFT put on a linear layer, or None (no adapter, disabled, or merged)."""
    if not hasattr(module, "lora_A") or module.disable_adapters or module.merged:
        return None
    names = [name for name in module.active_adapters if name in module.lora_A]
    if not names:
        return None
    if len(names) > 1:
        raise ValueError("the padding-free forward supports one active adapter at a time")
    name = names[0]
    dropout = module.lora_dropout[name]
    return _Adapter(
        down=module.lora_A[name].weight,
        up=module.lora_B[name].weight,
        scaling=module.scaling[name],
        dropout=getattr(dropout, "p", 0.0) if dropout.training else 0.0,
        magnitude=module.lora_magnitude_vector[name].weight if name in module.lora_magnitude_vector else None,
    )


@dataclass
class OrderedWeight:
    """A frozen W in the order oneDNN multiplies it in, and W^T likewise: no product has to bring them into it."""

    forward: Tensor
    backward: Tensor | None  # None where no gradient is taken


class OrderedLinear(torch.autograd.Function):
    """W x + bias of a frozen, ordered W."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: OrderedWeight, bias: Tensor | None) -> Tensor:
        """x (T, C) -> (T, width)."""
        ctx.weight = weight
        return multiply_ordered(x, weight.forward, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        wanted, _, trained = ctx.needs_input_grad
        return (
            multiply_ordered(gradient, ctx.weight.backward) if wanted else None,
            None,
            gradient.sum(dim=0) if trained else None,
        )


def is_four_bit(weight: Tensor) -> bool:
    """Whether bitsandbytes keeps this weight in 4 bits (Dettmers et al. 2023, arXiv 2305.14314)."""
    return getattr(weight, "quant_state", None) is not None


def dequantize(weight: Tensor) -> Tensor:
    """The (out, in) values a weight's 4 bits stand for; any other weight as it is."""
    if not is_four_bit(weight):
        return weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)


class FourBitLinear(torch.autograd.Function):
    """W x of a frozen W in 4 bits; the backward pass reads W from its 4 bits again instead of keeping it."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        """x (T, C) -> (T, width)."""
        ctx.weight = weight
        return F.linear(x, dequantize(weight).to(x.dtype))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ dequantize(ctx.weight).to(gradient.dtype), None


def drop_fast(x: Tensor, p: float, kernel: CompiledKernel | None = None) -> Tensor:
    """Dropout with probability ``p`` (in steps of 1/65536); on CPU from 16-bit draws, faster than F.dropout.

    The draws come from torch's default generator, so restoring its state repeats the mask. A byte a value is kept, and
    a bit where a compiled ``kernel`` draws.
    """
    if kernel is not None:
        return CompiledDropout.apply(x, p, kernel)
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p, True)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    least = min(max(round(p * 65536), 1), 65535) - 32768  # smaller draws are dropped
    kept = words.view(torch.int16)[: x.numel()].view(x.shape).clamp_(least - 1, least)
    kept = kept.neg_().add_(least - 1).to(torch.int8)  # comparing would take several times as long
    return MaskedScale.apply(x, kept, 1 / (1 - p))


class MaskedScale(torch.autograd.Function):
    """x * factor where the mask is -1, that is all bits, and 0 where it is 0; keeps the mask."""

    @staticmethod
    def forward(ctx, x: Tensor, kept: Tensor, factor: float) -> Tensor:
        """x and its mask, int8, of one shape -> the same shape."""
        ctx.save_for_backward(kept)
        ctx.factor = factor
        return _mask(x, kept).mul_(factor)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return _mask(gradient, kept).mul_(ctx.factor), None, None


def _mask(x: Tensor, kept: Tensor) -> Tensor:
    bits = x.view(BITS[x.element_size()])
    return (bits & kept.to(bits.dtype)).view(x.dtype)
