"""A padding-free forward for BERT-family encoders: flat tokens, block-diagonal attention, pooling on flat tokens.

It reads the weights of an ordinary Hugging Face BERT, RoBERTa or XLM-RoBERTa module, adapters of PEFT included, and
computes what that module computes, without spending anything on padding; linear layers may be kept in 4 bits by
bitsandbytes. Shapes below: N texts, T tokens in all,
C width, H heads, D = C / H.

    texts  [a a a] [b b b b b] [c c]        padded: 3 x 5 positions, 5 of them wasted
    flat   [a a a c c | b b b b b]          short texts share a block, long ones stand alone; T positions

Attention runs per block with a mask that keeps texts apart, or, for long texts, on groups of exactly equal length;
its probabilities are recomputed in the backward pass, never stored (Chen et al. 2016, arXiv 1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN

FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "electra")
BLOCK = 64  # tokens of a block that short texts share
SHORT = 48  # texts up to this many tokens share blocks; longer ones stand alone
CHUNK_BYTES = 1_500_000  # attention scores worked on at a time on CPU: about what its cache holds


def explain_unsupported(backbone: nn.Module) -> str | None:
    """None where the packed forward can compute ``backbone``, else the reason in words."""
    config = backbone.config
    if config.model_type not in FAMILIES:
        return f"architecture '{config.model_type}' has no padding-free forward"
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        return "decoders have no padding-free forward"
    if getattr(config, "position_embedding_type", "absolute") != "absolute":
        return f"position embeddings of type '{config.position_embedding_type}' have no padding-free forward"
    if not hasattr(find_core(backbone), "encoder"):
        return "its layers are not where BERT keeps them"
    return None


def find_core(backbone: nn.Module) -> nn.Module:
    """The bare transformer below PEFT's wrapper, where there is one."""
    return backbone.get_base_model() if hasattr(backbone, "get_base_model") else backbone


@dataclass
class Layout:
    """Where each text's tokens stand among the T flat tokens, and how attention groups them.

    ``groups`` holds (first flat position, sequences, length, mask): ``mask`` (sequences, length, length) keeps the
    texts of shared blocks apart and is None where a sequence is one text. Positions of a block that hold no text
    attend to each other only and are dropped by pooling.
    """

    tokens: int
    starts: list[int]
    lengths: list[int]
    groups: list[tuple[int, int, int, Tensor | None]]


def plan_layout(lengths: Sequence[int], block: int = BLOCK, short: int = SHORT) -> Layout:
    """Pack short texts into blocks first-fit by falling length; group longer ones by exact length."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    block = min(block, sum(length for length in lengths if length <= short))  # few texts: one block without room
    starts = [0] * len(lengths)
    room: list[int] = []
    owners: list[tuple[int, int]] = []  # (block, text)
    for i in order:
        if lengths[i] > short:
            continue
        home = next((b for b, free in enumerate(room) if free >= lengths[i]), len(room))
        if home == len(room):
            room.append(block)
        starts[i] = home * block + block - room[home]
        room[home] -= lengths[i]
        owners.append((home, i))
    groups: list[tuple[int, int, int, Tensor | None]] = []
    at = len(room) * block
    if room:
        text_of = np.full((len(room), block), -1)
        for home, i in owners:
            text_of[home, starts[i] - home * block :][: lengths[i]] = i
        apart = torch.from_numpy(text_of[:, :, None] != text_of[:, None, :])
        groups.append((0, len(room), block, torch.zeros(apart.shape).masked_fill_(apart, float("-inf"))))
    long = [i for i in order if lengths[i] > short]
    for length in dict.fromkeys(lengths[i] for i in long):
        same = [i for i in long if lengths[i] == length]
        for n, i in enumerate(same):
            starts[i] = at + n * length
        groups.append((at, len(same), length, None))
        at += len(same) * length
    return Layout(at, starts, list(lengths), groups)


def plan_padded_layout(lengths: Sequence[int]) -> Layout:
    """One group of all texts, each padded to the longest: few large kernels, for devices that prefer those."""
    longest = max(lengths)
    inside = torch.arange(longest)[None, :] < torch.tensor(lengths)[:, None]
    mask = torch.zeros(len(lengths), longest, longest).masked_fill_(~inside[:, None, :], float("-inf"))
    starts = [i * longest for i in range(len(lengths))]
    return Layout(len(lengths) * longest, starts, list(lengths), [(0, len(lengths), longest, mask)])


class PackedEncoder:
    """Computes pooled text vectors with the weights of a Hugging Face module, in ``dtype``.

    Frozen weights are kept a second time in ``dtype`` (they are small: everything but the embedding table), for
    inference on CPU in the order oneDNN multiplies them in;
    trainable ones are read from the module at every call, so gradients reach them. The base's own dropout is off;
    adapters keep theirs in training mode.
    """

    def __init__(
        self,
        backbone: nn.Module,
        pooling: str = "mean",
        dtype: torch.dtype = torch.float32,
        checkpointing: bool = False,
    ) -> None:
        reason = explain_unsupported(backbone)
        if reason:
            raise ValueError(reason)
        self.backbone, self.pooling, self.dtype, self.checkpointing = backbone, pooling, dtype, checkpointing
        self.core = find_core(backbone)
        config = backbone.config
        self.heads = config.num_attention_heads
        self.epsilon = config.layer_norm_eps
        self.activation: Callable[[Tensor], Tensor] = ACT2FN[config.hidden_act]
        # RoBERTa counts positions from padding_idx + 1
        offset = config.model_type in ("roberta", "xlm-roberta", "camembert")
        self.first_position = config.pad_token_id + 1 if offset else 0
        self._frozen: dict[tuple[int, ...], tuple[tuple[int, ...], Tensor, list[Tensor]]] = {}

    def forward(self, ids: Sequence[np.ndarray]) -> Tensor:
        """Token ids of N texts -> (N, C) pooled vectors, float32 at least, not normalised, in the given order."""
        device = self.core.embeddings.word_embeddings.weight.device
        lengths = [len(x) for x in ids]
        layout = plan_padded_layout(lengths) if device.type == "cuda" else plan_layout(lengths)
        flat = np.zeros((3, layout.tokens), np.int64)  # ids, positions, text number (N: no text)
        flat[2] = len(ids)
        for number, (start, tokens) in enumerate(zip(layout.starts, ids, strict=True)):
            span = slice(start, start + len(tokens))
            flat[0, span], flat[1, span], flat[2, span] = tokens, np.arange(len(tokens)), number
        tokens, positions, owner = torch.from_numpy(flat).to(device, non_blocking=True)
        groups = [
            (at, n, length, None if mask is None else mask.to(device, self.dtype))
            for at, n, length, mask in layout.groups
        ]
        x = self._embed(tokens, positions + self.first_position)
        for layer in self.core.encoder.layer:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(self._run_layer, layer, x, groups, use_reentrant=False)
            else:
                x = self._run_layer(layer, x, groups)
        return self._pool(x, layout, owner, device)

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        parts = self.core.embeddings
        x = F.embedding(tokens, parts.word_embeddings.weight) + F.embedding(positions, parts.position_embeddings.weight)
        x = x + parts.token_type_embeddings.weight[0]
        x = _normalize(_widen(x), parts.LayerNorm, self.epsilon).to(self.dtype)
        projection = getattr(self.core, "embeddings_project", None)
        return x if projection is None else self._linear(x, projection)

    def _run_layer(self, layer: nn.Module, x: Tensor, groups: list) -> Tensor:
        attention, joined = layer.attention.self, layer.attention.output
        qkv = self._linear(x, attention.query, attention.key, attention.value)
        mixed = BlockAttention.apply(qkv, groups, self.heads)
        x = _normalize(self._linear(mixed, joined.dense) + x, joined.LayerNorm, self.epsilon)
        hidden = self.activation(self._linear(x, layer.intermediate.dense))
        return _normalize(self._linear(hidden, layer.output.dense) + x, layer.output.LayerNorm, self.epsilon)

    def _linear(self, x: Tensor, *modules: nn.Module) -> Tensor:
        """x (T, C) through one or several linear layers side by side as one product: (T, sum of widths).

        LoRA (Hu et al. 2021, arXiv 2106.09685): W x + scaling * B A dropout(x), the A of all layers stacked, the B
        block-diagonal, so that any number of adapted layers costs two more products. DoRA (Liu et al. 2024, arXiv
        2402.09353) multiplies that by m / |W + scaling * B A|, row by row, before the bias is added; its dropout is
        on A's input alone, where PEFT drops the input of W too.
        """
        bases = [getattr(m, "base_layer", m) for m in modules]
        bias = self._read([b.bias for b in bases]) if bases[0].bias is not None else None
        adapters = [_find_adapter(m) for m in modules]
        active = [a for a in adapters if a is not None]
        factors = [None if a is None else a.find_factors(b) for a, b in zip(adapters, bases, strict=True)]
        scaled = any(factor is not None for factor in factors)
        y = self._multiply(x, [b.weight for b in bases], None if scaled else bias)
        if active:
            down = torch.cat([a.down for a in active]).to(self.dtype)  # (sum of ranks, C)
            up = _stack_diagonal(adapters, [b.out_features for b in bases]).to(self.dtype)  # (widths, ranks), summed
            dropped = drop_fast(x, active[0].dropout) if active[0].training else x
            y = torch.addmm(y, F.linear(dropped, down), up.t())
        if not scaled:
            return y
        like = next(factor for factor in factors if factor is not None)
        rows = [like.new_ones(b.out_features) if f is None else f for b, f in zip(bases, factors, strict=True)]
        y = y * torch.cat(rows).to(self.dtype)
        return y if bias is None else y + bias

    def _multiply(self, x: Tensor, weights: list[Tensor], bias: Tensor | None) -> Tensor:
        if not any(map(is_four_bit, weights)):
            if torch.is_grad_enabled() or not can_reorder(x, weights):
                return F.linear(x, self._read(weights), bias)
            return torch.ops.mkldnn._linear_pointwise(x, self._read(weights, reorder=True), bias, "none", [], "")
        y = torch.cat([FourBitLinear.apply(x, weight) for weight in weights], dim=1)
        return y if bias is None else y + bias

    def _read(self, parameters: list[Tensor], *, reorder: bool = False) -> Tensor:
        """The parameters stacked in the compute type: cached while frozen, live while trained.

        ``reorder``: frozen weights, in the order oneDNN multiplies them in.
        """
        if any(p.requires_grad for p in parameters):
            return torch.cat([p.to(self.dtype) for p in parameters])
        key, version = (reorder, *map(id, parameters)), tuple(p._version for p in parameters)
        if self._frozen.get(key, (None,))[0] != version:
            copies = [p.detach().to(self.dtype) for p in parameters]
            stacked = copies[0] if len(copies) == 1 else torch.cat(copies)
            if reorder:
                stacked = torch.ops.mkldnn._reorder_linear_weight(stacked.contiguous())
            self._frozen[key] = version, stacked, parameters  # kept alive, so that no other takes their ids
        return self._frozen[key][1]

    def _pool(self, x: Tensor, layout: Layout, owner: Tensor, device: torch.device) -> Tensor:
        if self.pooling == "cls":
            return _widen(x[torch.tensor(layout.starts, device=device)])
        x = _widen(x)
        sums = x.new_zeros(len(layout.lengths) + 1, x.shape[1]).index_add(0, owner, x)
        return sums[:-1] / torch.tensor(layout.lengths, dtype=x.dtype, device=device)[:, None]


def can_reorder(x: Tensor, weights: list[Tensor]) -> bool:
    """Whether oneDNN can multiply ``x`` (T, C) with these frozen weights, kept in an order of its own.

    Nothing is reordered at every product then: a few tokens gain most, long batches least.
    """
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and not any(weight.requires_grad for weight in weights)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
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


class BlockAttention(torch.autograd.Function):
    """softmax(Q K^T / sqrt(D)) V per group of flat tokens (Vaswani et al. 2017); keeps no probabilities."""

    @staticmethod
    def forward(ctx, qkv: Tensor, groups: list, heads: int) -> Tensor:
        """qkv (T, 3C) -> (T, C)."""
        out = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)
        for at, n, length, mask in _cut_groups(groups, heads, qkv):
            q, k, v = _split_heads(qkv, at, n, length, heads)
            bias = None if mask is None else mask[:, None]
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            _join_heads(out, at, n, length, heads).copy_(mixed.transpose(1, 2))
        ctx.save_for_backward(qkv)
        ctx.groups, ctx.heads = groups, heads
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (qkv,) = ctx.saved_tensors
        result = torch.empty_like(qkv)
        for at, n, length, mask in _cut_groups(ctx.groups, ctx.heads, qkv):
            q, k, v = _split_heads(qkv, at, n, length, ctx.heads)
            probabilities = _attend(q, k, mask)
            outer = _join_heads(gradient, at, n, length, ctx.heads).transpose(1, 2)
            d_scores = torch._softmax_backward_data(outer @ v.transpose(2, 3), probabilities, -1, qkv.dtype)
            d_scores.mul_(q.shape[-1] ** -0.5)
            parts = result[at : at + n * length].view(n, length, 3, ctx.heads, -1)
            parts[:, :, 0].copy_((d_scores @ k).transpose(1, 2))
            parts[:, :, 1].copy_((d_scores.transpose(2, 3) @ q).transpose(1, 2))
            parts[:, :, 2].copy_((probabilities.transpose(2, 3) @ outer).transpose(1, 2))
        return result, None, None


def _cut_groups(groups: list, heads: int, qkv: Tensor):
    """The groups, cut so that one piece's scores stay in the CPU's cache; whole on other devices."""
    for at, n, length, mask in groups:
        piece = n
        if qkv.device.type == "cpu":
            piece = max(1, CHUNK_BYTES // (heads * length * length * qkv.element_size()))
        for first in range(0, n, piece):
            last = min(n, first + piece)
            yield at + first * length, last - first, length, None if mask is None else mask[first:last]


def _split_heads(qkv: Tensor, at: int, n: int, length: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Flat (T, 3C) -> three (n, H, length, D) views."""
    q, k, v = qkv[at : at + n * length].view(n, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    return q, k, v


def _join_heads(flat: Tensor, at: int, n: int, length: int, heads: int) -> Tensor:
    """A (n, length, H, D) view of flat (T, C)."""
    return flat[at : at + n * length].view(n, length, heads, -1)


def _attend(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Attention probabilities (n, H, length, length)."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
    if mask is not None:
        scores += mask[:, None]
    return torch.softmax(scores, -1)


def _normalize(x: Tensor, layer: nn.LayerNorm, epsilon: float) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), layer.weight.to(x.dtype), layer.bias.to(x.dtype), epsilon)


def _widen(x: Tensor) -> Tensor:
    """At least float32: sums and norms over many values are never taken in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass
class _Adapter:
    down: Tensor  # (rank, in)
    up: Tensor  # (out, rank), scaling included
    dropout: float
    training: bool
    magnitude: Tensor | None  # (out,) DoRA's trained lengths

    def find_factors(self, base: nn.Module) -> Tensor | None:
        """(out,) what DoRA multiplies each output by: the trained length over the one W + B A has, a constant."""
        if self.magnitude is None:
            return None
        with torch.no_grad():
            found = torch.linalg.vector_norm(dequantize(base.weight) + self.up @ self.down, dim=1)
        return self.magnitude / found


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
    dora = module.lora_magnitude_vector[name].weight if name in module.lora_magnitude_vector else None
    return _Adapter(
        down=module.lora_A[name].weight,
        up=module.lora_B[name].weight * module.scaling[name],
        dropout=getattr(dropout, "p", 0.0),
        training=dropout.training and getattr(dropout, "p", 0.0) > 0,
        magnitude=dora,
    )


def _stack_diagonal(adapters: list[_Adapter | None], widths: list[int]) -> Tensor:
    """Up-projections on the diagonal of a (sum of widths, sum of ranks) matrix; layers without adapter get zeros."""
    like = next(a.up for a in adapters if a is not None)
    return torch.block_diag(
        *(like.new_zeros(width, 0) if a is None else a.up for a, width in zip(adapters, widths, strict=True))
    )


def drop_fast(x: Tensor, p: float) -> Tensor:
    """Dropout with probability ``p`` (in steps of 1/65536); on CPU from 16-bit draws, faster than F.dropout.

    The draws come from torch's default generator, so restoring its state repeats the mask.
    """
    if x.device.type != "cpu":
        return F.dropout(x, p, True)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    keep = words.view(torch.int16)[: x.numel()].view(x.shape) >= round(p * 65536) - 32768
    return x * keep.to(x.dtype).mul_(1 / (1 - p))
