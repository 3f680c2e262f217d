"""A padding-free forward for BERT-family encoders: flat tokens, attention within each text, pooling on flat tokens.

It reads the weights of an ordinary Hugging Face BERT, RoBERTa or XLM-RoBERTa module, adapters of PEFT included, and
computes what that module computes, without spending anything on padding; linear layers may be kept in 4 bits by
bitsandbytes. Shapes below: N texts, T tokens in all,
C width, H heads, D = C / H.

    texts  [a a a] [b b b b b] [c c]        padded: 3 x 5 positions, 5 of them wasted
    flat   [a a a c c | b b b b b]          short texts share a block, long ones stand alone; T positions

Attention runs per block with a mask that keeps texts apart, or, for long texts, on groups of exactly equal length;
its probabilities are recomputed in the backward pass, never stored (Chen et al. 2016, arXiv 1604.06174). Where a kernel
takes sequences of any length, koret's own on CPU among them, the texts stand side by side without blocks; on other
devices than CPU they are else padded to the longest of a few groups of like length: ``attention.choose_path`` decides.
On CPU the flat tokens go through all layers slice by slice, each slice small enough for the caches; texts stay whole.
There a layer is one step of autograd (``layer.FrozenLayer``) wherever only adapters train; else its parts may be
compiled by torch (``tokenwise``).
Where a text is its first token (pooling 'cls'), nothing but first tokens is computed behind the attention of the last
layer.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from koret.retrieval.attention import AttentionPath, FlatTexts, Groups, PaddedTexts, choose_path, mix_tokens
from koret.retrieval.compiled import CompiledGelu, CompiledKernel, Norm
from koret.retrieval.devices import send
from koret.retrieval.layer import PLACES, FrozenLayer, Layer, LayerRun, count_kept, list_linears
from koret.retrieval.layout import cut_slices, find_firsts, plan_flat_layout, plan_layout, plan_padded_layout
from koret.retrieval.linear import (
    Adapters,
    Linear,
    OrderedWeight,
    find_base,
    is_four_bit,
    read_adapters,
)
from koret.retrieval.products import gains_from_order, order_weight
from koret.retrieval.shelf import Shelf, ShelfStore
from koret.retrieval.tokenwise import Parts, begin_layer, compile_parts, end_layer, normalize_plainly

# What is not kept for the backward pass but computed again there, with the same bits: q, k and v of so many layers, or
# all inside of every layer (gradient checkpointing).
Recompute = int | Literal["layers"]
FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "electra")
SLICE = 3072  # tokens that go through the layers together on CPU, for each thread: fewer take longer, more gain nothing
MANY = 4  # slices: a batch of more goes in slices half as large, for what passes is memory beside all that it keeps
ROWS = 16  # oneDNN compiles a product for every number of rows, and keeps parts of it for good: multiples of this one
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


def count_slice_tokens(tokens: int) -> int:
    """Of so many tokens, those that go through the layers together on CPU, on all threads."""
    most = SLICE * torch.get_num_threads()
    return most // 2 if tokens > MANY * most else most


class PackedEncoder:
    """Computes pooled text vectors with the weights of a Hugging Face module, in ``dtype``.

    Frozen weights are kept a second time in ``dtype`` (they are small: everything but the embedding table), on CPU in
    the order oneDNN multiplies them in where that is faster, and then a third time, transposed, for gradients;
    trainable ones are read from the module at every call, so gradients reach them. The base's own dropout is off;
    adapters keep theirs in training mode.
    """

    def __init__(
        self,
        backbone: nn.Module,
        pooling: str = "mean",
        dtype: torch.dtype = torch.float32,
        recompute: Recompute = 0,
        compiles: bool = False,
        prefers_order: bool | None = None,
    ) -> None:
        """``compiles``: whether torch.compile has a part in training; ``prefers_order``: see ``gains_from_order``."""
        reason = explain_unsupported(backbone)
        if reason:
            raise ValueError(reason)
        from transformers.activations import ACT2FN  # brings half of torch, which a search by words does without

        self.backbone, self.pooling, self.dtype, self.recompute = backbone, pooling, dtype, recompute
        self.compiles, self.prefers_order = compiles, prefers_order
        self.core = find_core(backbone)
        config = backbone.config
        self.heads = config.num_attention_heads
        self.head_size = config.hidden_size // self.heads
        self.epsilon = config.layer_norm_eps
        self.activation: Callable[[Tensor], Tensor] = ACT2FN[config.hidden_act]
        self.has_gelu = config.hidden_act == "gelu"  # the exact one
        # RoBERTa counts positions from padding_idx + 1
        offset = config.model_type in ("roberta", "xlm-roberta", "camembert")
        self.first_position = config.pad_token_id + 1 if offset else 0
        self.shelves = ShelfStore()
        self._compiled: Parts | None = None
        self._paths: dict[torch.device, AttentionPath] = {}
        self._frozen: dict[tuple[str | int, ...], tuple[tuple[int, ...], Tensor, list[Tensor]]] = {}

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
        total = sum(map(len, ids))
        layers = self._read_layers(total)
        # Trained weights would be cast for every slice, and each slice's gradient rounded on its own.
        takes_slices = path.takes_slices and not any(layer.trains for layer in layers)
        most = count_slice_tokens(total) if takes_slices else None
        flat_plan = partial(plan_flat_layout, most=most)
        plan = {"blocks": plan_layout, "padded": plan_padded_layout, "flat": flat_plan}[path.layout]
        layout = plan([len(x) for x in ids])
        flat = np.zeros((3, layout.tokens), np.int64)  # ids, positions, text number (N: no text)
        flat[2] = len(ids)
        for number, (start, tokens) in enumerate(zip(layout.starts, ids, strict=True)):
            span = slice(start, start + len(tokens))
            flat[0, span], flat[1, span], flat[2, span] = tokens, np.arange(len(tokens)), number
        # All that the layers and pooling need of the layout goes ahead of them: none of it is waited for in between.
        tokens, positions, owner = send(flat, device)
        lengths = send(torch.tensor(layout.lengths), device)
        slices = [(layout.tokens, layout.groups)] if most is None else cut_slices(layout, most)
        step = ROWS if path.takes_slices and self._multiplies_by_onednn(layers) else 1
        sizes = [size for size, _ in slices]
        groups = [self._move_groups(inside, path, device) for _, inside in slices]
        rows, places = find_firsts(layout, sizes, device) if self.pooling == "cls" else ([None] * len(sizes), None)
        room = max(sizes) + step
        embed = self._plan_embedding(tokens.split(sizes), (positions + self.first_position).split(sizes))
        owners, pooled = owner.split(sizes), [lengths] * len(sizes)
        for at in sorted(range(len(sizes)), key=lambda at: -sizes[at]):  # each fits into what the one before it freed
            x = self._run_slice(layers, embed(at), groups[at], rows[at], spare=-sizes[at] % step, room=room)
            pooled[at] = _TextSums.apply(x, owners[at], len(ids)) if places is None else _widen(x)
        return sum(pooled) / lengths[:, None] if places is None else torch.cat(pooled)[places]

    def _move_groups(self, groups: list, path: AttentionPath, device: torch.device) -> Groups:
        """What attention needs to keep the texts of a slice apart, on the device, once for all layers."""
        if path.kernel is not None:
            at, _, length, _ = groups[-1]
            bounds = torch.tensor([*(at for at, *_ in groups), at + length], dtype=torch.int32)
            longest = max(length for _, _, length, _ in groups)
            return FlatTexts(send(bounds, device), longest, path.kernel)
        groups = [
            (at, n, length, None if mask is None else send(mask, device, self.dtype)) for at, n, length, mask in groups
        ]
        return PaddedTexts(groups) if path.layout == "padded" else groups

    def _multiplies_by_onednn(self, layers: list[Layer]) -> bool:
        """Whether the layers do, on CPU."""
        half = self.dtype in (torch.bfloat16, torch.float16)
        return half or any(linear.ordered for layer in layers for linear in layer.linears)

    def _run_slice(
        self, layers: list[Layer], x: Tensor, groups: Groups, rows: Tensor | None, *, spare: int, room: int
    ) -> Tensor:
        """Flat tokens (T, C) through all layers; only ``rows`` come out of the last one, where they are given.

        ``spare`` tokens of no text go along; other slices may have up to ``room`` tokens.
        """
        tokens, norm = len(x), None
        x = F.pad(x, (0, 0, 0, spare)) if spare else x
        run_layer = self._run_layer
        if self.runs_by_hand(layers):
            run_layer = partial(self._run_by_hand, shelf=self._open_shelf(layers, max(len(x), room)))
        for number, layer in enumerate(layers):
            run = partial(
                run_layer, layer, norm, groups, rows if layer is layers[-1] else None, self._mixes_again(number)
            )
            x = checkpoint(run, x, use_reentrant=False) if self._runs_again else run(x)
            norm = layer.norms[1]
        x = self._normalize(x, norm)
        return x[:tokens] if spare and rows is None else x

    @property
    def _runs_again(self) -> bool:
        """Whether layers run again in the backward pass."""
        return self.recompute == "layers" and torch.is_grad_enabled()

    def _mixes_again(self, number: int) -> bool:
        """Whether q, k and v of a layer are computed again in the backward pass."""
        return self.recompute != "layers" and number < self.recompute and torch.is_grad_enabled()

    def runs_by_hand(self, layers: list[Layer] | None = None) -> bool:
        """Whether each layer is one step of autograd, which has kernels for all of it."""
        if self._kernel is None or not self.has_gelu or self._runs_compiled:
            return False
        return all(layer.is_frozen for layer in (self._read_layers(1) if layers is None else layers))

    @property
    def _runs_compiled(self) -> bool:
        """Whether layers run as torch compiled them: in training, the first pass of GradCache among it."""
        return self.compiles and (torch.is_grad_enabled() or self.backbone.training)

    @property
    def _parts(self) -> Parts:
        if not self._runs_compiled:
            return Parts(begin_layer, end_layer, self._activate, self._kernel)
        self._compiled = self._compiled or compile_parts(self.activation)
        return self._compiled

    def _open_shelf(self, layers: list[Layer], tokens: int) -> Shelf | None:
        """Memory for all that so many tokens of a slice keep."""
        if self._runs_again or not torch.is_grad_enabled():
            return None
        sizes = self.core.config.hidden_size, self.core.config.intermediate_size
        kept = [count_kept(layer, *sizes, self._kernel, self._mixes_again(n)) for n, layer in enumerate(layers)]
        return self.shelves.open(tokens * sum(kept), PLACES * len(layers))

    def _plan_embedding(self, tokens: Sequence[Tensor], positions: Sequence[Tensor]) -> Callable[[int], Tensor]:
        """What embeds the flat tokens of a slice: all slices at once where tables train, for a table's gradient is as
        large as the table."""
        if not any(p.requires_grad for p in self.core.embeddings.parameters()):
            return lambda at: self._embed(tokens[at], positions[at])
        x = self._embed(torch.cat(list(tokens)), torch.cat(list(positions))).split([len(part) for part in tokens])
        return x.__getitem__

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        parts = self.core.embeddings
        x = F.embedding(tokens, parts.word_embeddings.weight) + F.embedding(positions, parts.position_embeddings.weight)
        x = x.add_(parts.token_type_embeddings.weight[0])
        norm = parts.LayerNorm
        x = F.layer_norm(_widen(x), (x.shape[1],), norm.weight, norm.bias, self.epsilon).to(self.dtype)
        projection = getattr(self.core, "embeddings_project", None)
        if projection is None:
            return x
        (adapters,) = read_adapters([[projection]], self.dtype)
        return self._read_linear([projection], adapters, len(x)).apply(x)

    def _read_layers(self, tokens: int) -> list[Layer]:
        """Every layer's parameters for so many tokens, gathered once however many slices go through them."""
        modules = [list_linears(layer) for layer in self.core.encoder.layer]
        groups = [group for linears in modules for group in linears]
        adapters = iter(read_adapters(groups, self.dtype))
        return [
            Layer(
                linears=[self._read_linear(group, next(adapters), tokens) for group in linears],
                norms=[(norm.weight, norm.bias) for norm in (layer.attention.output.LayerNorm, layer.output.LayerNorm)],
            )
            for layer, linears in zip(self.core.encoder.layer, modules, strict=True)
        ]

    def _run_layer(
        self, layer: Layer, norm: Norm | None, groups: Groups, rows: Tensor | None, mixes_again: bool, x: Tensor
    ) -> Tensor:
        """One layer but for its last norm: x as the layer before it left it, whose last norm is ``norm``."""
        mix = _MixAgain(self, layer, norm, groups)
        x, mixed = checkpoint(mix, x, use_reentrant=False) if mixes_again else mix(x)
        if rows is not None:  # nothing behind attention looks at another token
            mixed, x = mixed.index_select(0, rows), x.index_select(0, rows)
        parts, norm = self._parts, self._read_norm(layer.norms[0])
        return parts.end(layer, norm, self.epsilon, parts.activate, parts.kernel, mixed, x)

    def _run_by_hand(
        self,
        layer: Layer,
        norm: Norm | None,
        texts: FlatTexts,
        rows: Tensor | None,
        mixes_again: bool,
        x: Tensor,
        *,
        shelf: Shelf | None,
    ) -> Tensor:
        factors = tuple(layer.factors)
        keeps = torch.is_grad_enabled() and any(part.requires_grad for part in (x, *factors))
        run = LayerRun(
            layer,
            norm,
            texts.bounds,
            texts.longest,
            self.heads,
            self.epsilon,
            self._kernel,
            rows,
            shelf,
            keeps,
            mixes_again,
        )
        return FrozenLayer.apply(x, run, *factors)

    def _normalize(self, x: Tensor, norm: Norm | None) -> Tensor:
        return normalize_plainly(x, self._read_norm(norm), self.epsilon)

    def _read_norm(self, norm: Norm | None) -> Norm | None:
        return None if norm is None else (self._read([norm[0]]), self._read([norm[1]]))

    @property
    def _kernel(self) -> CompiledKernel | None:
        kernel = self.path.kernel
        return kernel if isinstance(kernel, CompiledKernel) else None

    def _activate(self, x: Tensor) -> Tensor:
        if self._kernel is None or not self.has_gelu or not torch.is_grad_enabled():
            return self.activation(x)
        return CompiledGelu.apply(x, self._kernel)

    def _read_linear(self, modules: Sequence[nn.Module], adapters: Adapters | None, tokens: int) -> Linear:
        bases = [find_base(module) for module in modules]
        weights, biases = [b.weight for b in bases], [b.bias for b in bases]
        four_bit = any(map(is_four_bit, weights))
        if torch.is_grad_enabled():
            tokens = sys.maxsize  # a few are no training: memory is not worth being spent on them
        gains = gains_from_order(self.dtype, weights, tokens, self.prefers_order)
        ordered = gains and not four_bit and not self._runs_compiled
        return Linear(
            weight=None if four_bit or ordered else self._read(weights),
            ordered=self._read_ordered(weights) if ordered else None,
            four_bit=weights if four_bit else [],
            bias=None if biases[0] is None else self._read(biases),
            adapters=adapters,
            trains=any(p.requires_grad for p in (*weights, *biases) if p is not None),
        )

    def _read(self, parameters: list[Tensor]) -> Tensor:
        """The parameters stacked in the compute type: cached while frozen, live while trained."""
        if any(p.requires_grad for p in parameters):
            return torch.cat([p.to(self.dtype) for p in parameters])
        return self._read_frozen("plain", parameters, lambda stacked: stacked)

    def _read_ordered(self, weights: list[Tensor]) -> OrderedWeight:
        forward, backward = self._read_frozen("forward", weights, order_weight), None
        if torch.is_grad_enabled():
            backward = self._read_frozen("backward", weights, lambda w: order_weight(w.t()))
        return OrderedWeight(forward, backward)

    def _read_frozen(self, use: str, parameters: list[Tensor], prepare: Callable[[Tensor], Tensor]) -> Tensor:
        """The parameters stacked in the compute type and prepared for a use; kept until one of them changes."""
        key, version = (use, *map(id, parameters)), tuple(p._version for p in parameters)
        if self._frozen.get(key, (None,))[0] != version:
            copies = [p.detach().to(self.dtype) for p in parameters]
            stacked = prepare(copies[0] if len(copies) == 1 else torch.cat(copies))
            self._frozen[key] = version, stacked, parameters  # kept alive, so that no other takes their ids
        return self._frozen[key][1]


class _MixAgain:
    """Flat tokens (T, C) -> the same behind ``norm``, and attention's outcome; a second call is the backward pass's."""

    def __init__(self, encoder: PackedEncoder, layer: Layer, norm: Norm | None, groups: Groups) -> None:
        self.encoder, self.layer, self.norm, self.groups, self.was_called = encoder, layer, norm, groups, False

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        encoder, wanted, self.was_called = self.encoder, not self.was_called, True
        parts, norm = encoder._parts, encoder._read_norm(self.norm)
        x, qkv = parts.begin(self.layer, norm, encoder.epsilon, parts.kernel, x)
        return x, mix_tokens(qkv, self.groups, encoder.heads, wanted)


class _TextSums(torch.autograd.Function):
    """Flat tokens added up text by text, in float32 at least; keeps no token, as index_add does."""

    @staticmethod
    def forward(ctx, x: Tensor, owner: Tensor, texts: int) -> Tensor:
        """x (T, C), each token's text (T,), N for none -> (N, C)."""
        ctx.save_for_backward(owner)
        ctx.dtype = x.dtype
        wide = _widen(x)
        return wide.new_zeros(texts + 1, x.shape[1]).index_add_(0, owner, wide)[:-1]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (owner,) = ctx.saved_tensors
        return F.pad(gradient.to(ctx.dtype), (0, 0, 0, 1)).index_select(0, owner), None, None


def _widen(x: Tensor) -> Tensor:
    """At least float32: sums and norms over many values are never taken in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
