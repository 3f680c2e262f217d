"""A padding-free forward for BERT-family encoders: flat tokens, attention within each text, pooling on flat tokens.

It reads the weights of an ordinary Hugging Face BERT, RoBERTa or XLM-RoBERTa module, adapters of PEFT included, and
computes what that module computes, without spending anything on padding; linear layers may be kept in 4 bits by
bitsandbytes. Shapes below: N texts, T tokens in all,
C width, H heads, D = C / H.

    texts  [a a a] [b b b b b] [c c]        padded: 3 x 5 positions, 5 of them wasted
    flat   [a a a c c | b b b b b]          short texts share a block, long ones stand alone; T positions

Attention runs per block with a mask that keeps texts apart, or, for long texts, on groups of exactly equal length;
its probabilities are recomputed in the backward pass, never stored (Chen et al. 2016, arXiv 1604.06174). On CPU the
flat tokens go through all layers slice by slice, each slice small enough for the caches; texts stay whole. On CUDA the
texts stand side by side without blocks, for a kernel that takes sequences of any length, or, where there is none, are
padded to the longest of a few groups of like length: ``attention.choose_path`` decides. Where a text is its first token
(pooling 'cls'), nothing but first tokens is computed behind the attention of the last layer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from koret.retrieval.attention import AttentionPath, FlatTexts, Groups, PaddedTexts, choose_path, mix_tokens
from koret.retrieval.layout import Layout, cut_slices, find_firsts, plan_flat_layout, plan_layout, plan_padded_layout

FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "electra")
FEW = 48  # tokens: more of float32, without AVX-512, lose by weights in oneDNN's order
SLICE = 1024  # tokens that go through the layers together on CPU, for each thread; more run out of the caches
log = logging.getLogger(__name__)


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


class PackedEncoder:
    """Computes pooled text vectors with the weights of a Hugging Face module, in ``dtype``.

    Frozen weights are kept a second time in ``dtype`` (they are small: everything but the embedding table), for
    inference on CPU in the order oneDNN multiplies them in where that is faster;
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
        from transformers.activations import ACT2FN  # brings half of torch, which a search by words does without

        self.backbone, self.pooling, self.dtype, self.checkpointing = backbone, pooling, dtype, checkpointing
        self.core = find_core(backbone)
        config = backbone.config
        self.heads = config.num_attention_heads
        self.head_size = config.hidden_size // self.heads
        self.epsilon = config.layer_norm_eps
        self.activation: Callable[[Tensor], Tensor] = ACT2FN[config.hidden_act]
        # RoBERTa counts positions from padding_idx + 1
        offset = config.model_type in ("roberta", "xlm-roberta", "camembert")
        self.first_position = config.pad_token_id + 1 if offset else 0
        self._paths: dict[torch.device, AttentionPath] = {}
        self._frozen: dict[tuple[int, ...], tuple[tuple[int, ...], Tensor, list[Tensor]]] = {}

    @property
    def device(self) -> torch.device:
        return self.core.embeddings.word_embeddings.weight.device

    @property
    def path(self) -> AttentionPath:
        """Which attention runs where the module is now; decided once for a device."""
        device = self.device
        if device not in self._paths:
            self._paths[device] = choose_path(device, self.dtype, self.head_size)
            log.info("on %s: %s", device, self._paths[device].words)
        return self._paths[device]

    def forward(self, ids: Sequence[np.ndarray]) -> Tensor:
        """Token ids of N texts -> (N, C) pooled vectors, float32 at least, not normalised, in the given order."""
        device, path = self.device, self.path
        plan = {"blocks": plan_layout, "padded": plan_padded_layout, "flat": plan_flat_layout}[path.layout]
        layout = plan([len(x) for x in ids])
        flat = np.zeros((3, layout.tokens), np.int64)  # ids, positions, text number (N: no text)
        flat[2] = len(ids)
        for number, (start, tokens) in enumerate(zip(layout.starts, ids, strict=True)):
            span = slice(start, start + len(tokens))
            flat[0, span], flat[1, span], flat[2, span] = tokens, np.arange(len(tokens)), number
        # All that the layers and pooling need of the layout goes ahead of them: none of it is waited for in between.
        tokens, positions, owner = torch.from_numpy(flat).to(device, non_blocking=True)
        lengths = torch.tensor(layout.lengths).to(device, non_blocking=True)
        groups = self._move_groups(layout, path, device)
        x = self._embed(tokens, positions + self.first_position)
        layers = [self._read_layer(layer, layout.tokens) for layer in self.core.encoder.layer]
        slices = [(layout.tokens, groups)]
        # Trained weights would be cast for every slice, and each slice's gradient rounded on its own.
        if path.layout == "blocks" and device.type == "cpu" and not any(layer.trains for layer in layers):
            slices = cut_slices(groups, SLICE * torch.get_num_threads())
        sizes = [size for size, _ in slices]
        rows, places = find_firsts(layout, sizes, device) if self.pooling == "cls" else ([None] * len(sizes), None)
        parts = [
            self._run_slice(layers, part, inside, wanted)
            for part, (_, inside), wanted in zip(x.split(sizes), slices, rows, strict=True)
        ]
        x = _widen(parts[0] if len(parts) == 1 else torch.cat(parts))
        return _average(x, owner, lengths) if places is None else x[places]

    def _move_groups(self, layout: Layout, path: AttentionPath, device: torch.device) -> Groups:
        """What attention needs to keep texts apart, on the device, once for all layers."""
        if path.kernel is not None:
            bounds = torch.tensor([*layout.starts, layout.tokens], dtype=torch.int32)
            return FlatTexts(bounds.to(device, non_blocking=True), max(layout.lengths), path.kernel)
        groups = [
            (at, n, length, None if mask is None else mask.to(device, self.dtype))
            for at, n, length, mask in layout.groups
        ]
        return PaddedTexts(groups) if path.layout == "padded" else groups

    def _run_slice(self, layers: list[_Layer], x: Tensor, groups: Groups, rows: Tensor | None) -> Tensor:
        """Flat tokens (T, C) through all layers; only ``rows`` come out of the last one, where they are given."""
        for layer in layers:
            wanted = rows if layer is layers[-1] else None
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(self._run_layer, layer, x, groups, wanted, use_reentrant=False)
            else:
                x = self._run_layer(layer, x, groups, wanted)
        return x

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        parts = self.core.embeddings
        x = F.embedding(tokens, parts.word_embeddings.weight) + F.embedding(positions, parts.position_embeddings.weight)
        x = x + parts.token_type_embeddings.weight[0]
        norm = parts.LayerNorm
        x = F.layer_norm(_widen(x), (x.shape[1],), norm.weight, norm.bias, self.epsilon).to(self.dtype)
        projection = getattr(self.core, "embeddings_project", None)
        return x if projection is None else self._read_linear(projection, tokens=len(x)).apply(x)

    def _read_layer(self, layer: nn.Module, tokens: int) -> _Layer:
        """A layer's parameters for so many tokens, gathered once however many slices go through it."""
        attention, joined = layer.attention.self, layer.attention.output
        linears = [
            self._read_linear(*modules, tokens=tokens)
            for modules in (
                (attention.query, attention.key, attention.value),
                (joined.dense,),
                (layer.intermediate.dense,),
                (layer.output.dense,),
            )
        ]
        norms = [(self._read([n.weight]), self._read([n.bias])) for n in (joined.LayerNorm, layer.output.LayerNorm)]
        return _Layer(linears, norms)

    def _run_layer(self, layer: _Layer, x: Tensor, groups: Groups, rows: Tensor | None) -> Tensor:
        qkv, join, widen, narrow = layer.linears
        mixed = mix_tokens(qkv.apply(x), groups, self.heads)
        if rows is not None:  # nothing behind attention looks at another token
            mixed, x = mixed.index_select(0, rows), x.index_select(0, rows)
        x = F.layer_norm(join.apply(mixed) + x, (x.shape[1],), *layer.norms[0], self.epsilon)
        hidden = self.activation(widen.apply(x))
        return F.layer_norm(narrow.apply(hidden) + x, (x.shape[1],), *layer.norms[1], self.epsilon)

    def _read_linear(self, *modules: nn.Module, tokens: int) -> _Linear:
        bases = [getattr(m, "base_layer", m) for m in modules]
        weights, biases = [b.weight for b in bases], [b.bias for b in bases]
        adapters = [_find_adapter(m) for m in modules]
        active = [a for a in adapters if a is not None]
        found = [None if a is None else a.find_factors(b) for a, b in zip(adapters, bases, strict=True)]
        factors = None
        if any(factor is not None for factor in found):
            like = next(factor for factor in found if factor is not None)
            ones = [like.new_ones(b.out_features) for b in bases]
            factors = torch.cat([one if f is None else f for f, one in zip(found, ones, strict=True)]).to(self.dtype)
        four_bit = any(map(is_four_bit, weights))
        ordered = not four_bit and not torch.is_grad_enabled() and gains_from_order(self.dtype, weights, tokens)
        return _Linear(
            weight=None if four_bit else self._read(weights, reorder=ordered),
            ordered=ordered,
            four_bit=weights if four_bit else [],
            bias=None if biases[0] is None else self._read(biases),
            down=torch.cat([a.down for a in active]) if active else None,
            up=_stack_diagonal(adapters, [b.out_features for b in bases]) if active else None,
            dropout=active[0].dropout if active and active[0].training else 0.0,
            factors=factors,
            trains=any(p.requires_grad for p in (*weights, *biases) if p is not None),
        )

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


def _average(x: Tensor, owner: Tensor, lengths: Tensor) -> Tensor:
    """Flat tokens (T, C) and each one's text, N for none -> (N, C) means."""
    sums = x.new_zeros(len(lengths) + 1, x.shape[1]).index_add(0, owner, x)
    return sums[:-1] / lengths.to(x.dtype)[:, None]


@dataclass
class _Linear:
    """One or several linear layers side by side, as one product: W x + scaling * B A dropout(x) + bias.

    LoRA (Hu et al. 2021, arXiv 2106.09685) has the A of all layers stacked and the B block-diagonal, so that any
    number of adapted layers costs two more products. DoRA (Liu et al. 2024, arXiv 2402.09353) multiplies W + B A by
    ``factors``, m / |W + scaling * B A|, row by row, before the bias is added; its dropout is on A's input alone, where
    PEFT drops the input of W too.
    """

    weight: Tensor | None  # (sum of widths, C), compute type; None where ``four_bit`` has the layers' weights
    ordered: bool  # whether ``weight`` is in the order oneDNN multiplies it in
    four_bit: list[Tensor]
    bias: Tensor | None  # (sum of widths,)
    down: Tensor | None  # (sum of ranks, C), as trained: cast at every use, so that slices' gradients add up in it
    up: Tensor | None  # (sum of widths, sum of ranks), scaling included
    dropout: float  # 0 outside of training
    factors: Tensor | None  # (sum of widths,)
    trains: bool  # whether W or the bias is trained

    def apply(self, x: Tensor) -> Tensor:
        """x (T, C) -> (T, sum of widths)."""
        early = self.bias if self.factors is None else None
        if self.ordered:
            y = torch.ops.mkldnn._linear_pointwise(x, self.weight, early, "none", [], "")
        elif self.weight is not None:
            y = F.linear(x, self.weight, early)
        else:
            y = torch.cat([FourBitLinear.apply(x, weight) for weight in self.four_bit], dim=1)
            y = y if early is None else y + early
        if self.down is not None:
            dropped = drop_fast(x, self.dropout) if self.dropout else x
            y = y.addmm_(F.linear(dropped, self.down.to(x.dtype)), self.up.to(x.dtype).t())
        if self.factors is not None:
            y = y * self.factors
            y = y if self.bias is None else y + self.bias
        return y


@dataclass
class _Layer:
    """A transformer layer: q/k/v, attention's output, feed-forward up and down; norms after attention and at end."""

    linears: list[_Linear]
    norms: list[tuple[Tensor, Tensor]]

    @property
    def trains(self) -> bool:
        """Whether anything but adapters is trained."""
        return any(linear.trains for linear in self.linears) or any(w.requires_grad for w, _ in self.norms)


def gains_from_order(dtype: torch.dtype, weights: list[Tensor], tokens: int) -> bool:
    """Whether so many tokens of ``dtype`` are multiplied faster with these frozen weights in oneDNN's own order.

    Nothing is reordered at every product then: a few tokens gain most, long batches least, and long batches of float32
    lose where the processor has no AVX-512, for MKL's kernels are faster there.
    """
    if not can_reorder(dtype, weights):
        return False
    return tokens <= FEW or dtype != torch.float32 or "AVX2" not in torch.backends.cpu.get_cpu_capability()


def can_reorder(dtype: torch.dtype, weights: list[Tensor]) -> bool:
    """Whether oneDNN can multiply numbers of ``dtype`` with these frozen weights, kept in an order of its own."""
    return (
        weights[0].device.type == "cpu"
        and not any(weight.requires_grad for weight in weights)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and (dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()))
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

    The draws come from torch's default generator, so restoring its state repeats the mask. A byte a value is kept.
    """
    if x.device.type != "cpu":
        return F.dropout(x, p, True)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    keep = words.view(torch.int16)[: x.numel()].view(x.shape) >= round(p * 65536) - 32768
    return MaskedScale.apply(x, keep, 1 / (1 - p))


class MaskedScale(torch.autograd.Function):
    """x * keep * factor; keeps the mask as bytes."""

    @staticmethod
    def forward(ctx, x: Tensor, keep: Tensor, factor: float) -> Tensor:
        """x and keep of one shape -> the same shape."""
        ctx.save_for_backward(keep)
        ctx.factor = factor
        return keep.to(x.dtype).mul_(factor).mul_(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        return keep.to(gradient.dtype).mul_(ctx.factor).mul_(gradient), None, None
