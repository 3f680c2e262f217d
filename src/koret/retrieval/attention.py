"""Attention among the tokens of each text, on the flat tokens of many texts.

Three ways to keep texts apart, and ``choose_path`` says which one a device takes. T tokens in all, C width, H heads,
D = C / H:

    flat    texts side by side and their bounds, for a kernel that takes sequences of any length: CUDA in half
            precision, and CPU where koret's own kernels were built and the processor has what they need
    blocks  short texts share a block under a mask, long ones stand in groups of equal length: other CPUs
    padded  a few groups of texts of like length, each padded to its longest: other devices

The kernels of the first are FlashAttention's (Dao 2023, arXiv 2307.08691) on CUDA, from torch or from the flash-attn
package, and ``compiled`` on CPU. Each is checked against the formula before its first use on a device. Padded groups go
through torch's own scaled_dot_product_attention, forward and backward.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from koret.retrieval.compiled import CompiledAttention, CompiledKernel, find_compiled

CHUNK_BYTES = 1_600_000  # attention scores worked on at a time: about what a CPU's cache holds
LEAST_CAPABILITY = 8, 0  # of a CUDA device, for FlashAttention: Ampere
LARGEST_HEAD, HEAD_STEP = 256, 8  # numbers of a head that FlashAttention takes
CHECKED_LENGTHS = 1, 17, 64, 130  # one token, odd, a whole tile, more than one
# Of the largest value, in steps of the type: the kernels' own arithmetic strays by 1, a scale wrong by a tenth by 7; in
# float32, whose steps are so small that long sums count, by 9 and by 400,000.
CHECKED_STEPS = {torch.bfloat16: 4, torch.float16: 4, torch.float32: 20}
log = logging.getLogger(__name__)

# q, k, v (T, H, D), bounds of queries and of keys (N + 1,) int32, longest of each -> (T, H, D). It scales by 1/sqrt(D).
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Tensor]


@dataclass(frozen=True)
class AttentionPath:
    """How attention runs on a device: the layout of the tokens, the kernel of the flat one, and both in words."""

    layout: Literal["blocks", "padded", "flat"]
    kernel: Kernel | CompiledKernel | None
    words: str

    @property
    def takes_slices(self) -> bool:
        """Whether it runs on CPU, where some of the texts at a time, and tokens of no text behind them, are welcome."""
        return self.layout == "blocks" or isinstance(self.kernel, CompiledKernel)


@dataclass(frozen=True)
class FlatTexts:
    """N texts side by side: ``bounds`` (N + 1,) int32 on the device says where each begins, and where the last ends."""

    bounds: Tensor
    longest: int
    kernel: Kernel | CompiledKernel


@dataclass(frozen=True)
class PaddedTexts:
    """Groups of texts padded to one length: (first flat position, texts, length, bias) of each.

    ``bias`` (texts, 1, 1, length) is -inf where a text has ended; None where all of the group have that length.
    """

    groups: list[tuple[int, int, int, Tensor | None]]


# What keeps texts apart: blocks, as (first flat position, sequences, length, mask), or one of the other two.
Groups = list[tuple[int, int, int, Tensor | None]] | FlatTexts | PaddedTexts


def choose_path(device: torch.device, dtype: torch.dtype, head_size: int) -> AttentionPath:
    """How attention over heads of ``head_size`` numbers of ``dtype`` runs on ``device``.

    A kernel is run once, on a few tokens, and left alone with a warning where it is wrong or raises.
    """
    if device.type == "cpu":
        compiled = find_compiled(dtype, head_size)
        if compiled is not None and check_kernel(compiled.name, compiled, device, dtype, head_size):
            return AttentionPath("flat", compiled, f"padding-free, compiled kernels ({compiled.instructions})")
        return AttentionPath("blocks", None, "padding-free")
    if device.type == "cuda":
        reason = explain_padding(dtype, head_size, torch.cuda.get_device_capability(device))
    else:
        reason = f"a device of type {device.type} has no variable-length kernel"
    if reason is None:
        reason = f"torch {torch.__version__} has no variable-length attention, and flash-attn is not installed"
        for name, kernel in find_kernels().items():
            if check_kernel(name, kernel, device, dtype, head_size):
                return AttentionPath("flat", kernel, f"padding-free, variable-length attention ({name})")
            reason = f"the variable-length attention of {name} failed its check"
    return AttentionPath("padded", None, f"texts of like length padded together ({reason})")


def explain_padding(dtype: torch.dtype, head_size: int, capability: tuple[int, int]) -> str | None:
    """None where variable-length kernels take such numbers on a CUDA device of this capability, else why not."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{str(dtype).removeprefix('torch.')} has no variable-length kernel"
    if capability < LEAST_CAPABILITY:
        return f"a device of compute capability {'.'.join(map(str, capability))} has no variable-length kernel"
    if head_size % HEAD_STEP or head_size > LARGEST_HEAD:
        return f"heads of {head_size} numbers have no variable-length kernel"
    return None


def find_kernels() -> dict[str, Kernel]:
    """The kernels that are installed, by the name of their library, best first: torch's own from 2.10 on."""
    found: dict[str, Kernel] = {}
    try:
        from torch.nn.attention.varlen import varlen_attn

        found["torch"] = varlen_attn
    except ImportError:
        pass
    try:
        from flash_attn import flash_attn_varlen_func

        found["flash-attn"] = flash_attn_varlen_func
    except (ImportError, OSError):  # not there, or built for another torch
        pass
    return found


@functools.lru_cache
def check_kernel(
    name: str, kernel: Kernel | CompiledKernel, device: torch.device, dtype: torch.dtype, head_size: int
) -> bool:
    """Whether ``kernel`` gives the formula's values and gradients on a few tokens; else a warning says what it did.

    The formula is taken in float64 on the CPU. Nothing is drawn from torch's own generators.
    """
    try:
        with (  # a caller's modes and hooks are not the check's
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
            torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor),
        ):
            problem = _find_difference(kernel, device, dtype, head_size)
    except torch.OutOfMemoryError:
        raise  # says nothing about the kernel
    except Exception as error:  # whatever a kernel does that was built for something else
        problem = f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
    if problem:
        log.warning(
            "the variable-length attention of %s is not used on %s (%s); another way is taken",
            name,
            device,
            problem,
        )
    return not problem


def _find_difference(
    kernel: Kernel | CompiledKernel, device: torch.device, dtype: torch.dtype, head_size: int
) -> str | None:
    """In words, the first of output and gradients that strays from the formula's; None where none does."""
    heads, lengths = 2, CHECKED_LENGTHS
    own = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(lengths), 3 * heads * head_size, generator=own)
    qkv[:, : heads * head_size] *= 2  # sharper probabilities: what is scaled wrongly shows
    weights = torch.randn(sum(lengths), heads * head_size, generator=own)
    qkv, weights = qkv.to(dtype), weights.to(dtype)
    bounds = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32)
    texts = FlatTexts(bounds, max(lengths), kernel)

    def differentiate(mix: Callable[[Tensor], Tensor], qkv: Tensor, weights: Tensor) -> list[Tensor]:
        qkv = qkv.detach().requires_grad_()
        mixed = mix(qkv)
        (gradient,) = torch.autograd.grad(mixed, qkv, weights)
        return [part.detach().double().cpu() for part in (mixed, *gradient.chunk(3, dim=1))]

    found = differentiate(lambda x: mix_flat(x, texts, heads), qkv.to(device), weights.to(device))
    expected = differentiate(lambda x: mix_plainly(x, lengths, heads), qkv.double(), weights.double())
    allowed = CHECKED_STEPS[dtype] * torch.finfo(dtype).eps
    names = "output", "gradient of q", "gradient of k", "gradient of v"
    for what, mine, exact in zip(names, found, expected, strict=True):
        off = ((mine - exact).abs().max() / exact.abs().max()).item()
        if not off <= allowed:  # not a number is no better
            return f"its {what} is off by {off:.2g} of the largest value, {allowed:.2g} allowed"
    return None


def mix_tokens(qkv: Tensor, groups: Groups, heads: int, wanted: bool = True) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V within each text: qkv (T, 3C) -> (T, C).

    Where only what the backward pass needs is ``wanted``, and not the values, they may be anything.
    """
    if isinstance(groups, FlatTexts):
        return mix_flat(qkv, groups, heads, wanted)
    if isinstance(groups, PaddedTexts):
        return mix_padded(qkv, groups, heads)
    return BlockAttention.apply(qkv, groups, heads)


def mix_flat(qkv: Tensor, texts: FlatTexts, heads: int, wanted: bool = True) -> Tensor:
    """``mix_tokens`` by a variable-length kernel: it reads q, k and v where they stand and brings its own gradient."""
    if isinstance(texts.kernel, CompiledKernel):
        return CompiledAttention.apply(qkv, texts.bounds, texts.longest, heads, texts.kernel, wanted)
    q, k, v = qkv.view(len(qkv), 3, heads, -1).unbind(1)
    bounds, longest = texts.bounds, texts.longest
    # By position: torch and flash-attn name them differently.
    return texts.kernel(q, k, v, bounds, bounds, longest, longest).flatten(1)


def mix_padded(qkv: Tensor, texts: PaddedTexts, heads: int) -> Tensor:
    """``mix_tokens`` group by group, by the framework's fused kernels, which keep no probabilities."""
    mixed = []
    for at, n, length, bias in texts.groups:
        q, k, v = qkv[at : at + n * length].view(n, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
        mixed.append(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(n * length, -1))
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


def mix_plainly(qkv: Tensor, lengths: Sequence[int], heads: int) -> Tensor:
    """``mix_tokens`` as the formula is written, text by text: what kernels are checked against."""
    mixed = []
    for part in qkv.split(list(lengths)):
        q, k, v = part.view(len(part), 3, heads, -1).permute(1, 2, 0, 3)
        scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
        mixed.append((torch.softmax(scores, -1) @ v).transpose(0, 1).flatten(1))
    return torch.cat(mixed)


class BlockAttention(torch.autograd.Function):
    """softmax(Q K^T / sqrt(D)) V per group of flat tokens (Vaswani et al. 2017); keeps q, k and v, no probabilities.

    Tokens behind the last group are of no text: zeros come out for them, and no gradient.
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, groups: list, heads: int) -> Tensor:
        """qkv (T, 3C) -> (T, C)."""
        out = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)
        scratch, kept = _Scratch(qkv), []
        for at, n, length, mask in _cut_groups(groups, heads, qkv):
            q, k, v = parts = _split_heads(qkv, at, n, length, heads)
            if ctx.needs_input_grad[0]:
                kept.append(parts)
            mixed = torch.bmm(_attend(q, k, mask, scratch.take("scores", n * heads, length)), v)
            _join_heads(out, at, n, length, heads).copy_(mixed.view(n, heads, length, -1).transpose(1, 2))
        out[_find_end(groups) :] = 0
        ctx.save_for_backward(*kept)
        ctx.groups, ctx.heads, ctx.shape = groups, heads, qkv.shape
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        result, scratch = gradient.new_empty(ctx.shape), _Scratch(gradient)
        pieces = _cut_groups(ctx.groups, ctx.heads, gradient)
        for (at, n, length, mask), (q, k, v) in zip(pieces, ctx.saved_tensors, strict=True):
            p = _attend(q, k, mask, scratch.take("scores", n * ctx.heads, length))
            outer = _join_heads(gradient, at, n, length, ctx.heads).transpose(1, 2).reshape(q.shape)
            parts = result[at : at + n * length].view(n, length, 3, ctx.heads, -1).permute(2, 0, 3, 1, 4)
            parts[2].copy_(torch.bmm(p.transpose(1, 2), outer).view(parts[2].shape))
            d_scores = torch.bmm(outer, v.transpose(1, 2), out=scratch.take("gradients", n * ctx.heads, length))
            torch._softmax_backward_data(d_scores, p, -1, p.dtype, grad_input=d_scores)
            parts[0].copy_(torch.bmm(d_scores, k).mul_(q.shape[-1] ** -0.5).view(parts[0].shape))
            parts[1].copy_(torch.bmm(d_scores.transpose(1, 2), q).view(parts[1].shape))
        result[_find_end(ctx.groups) :] = 0
        return result, None, None


def _find_end(groups: list) -> int:
    at, n, length, _ = groups[-1]
    return at + n * length


class _Scratch:
    """Memory for scores that every piece of a call writes anew: fresh pages would cost more than the arithmetic."""

    def __init__(self, like: Tensor) -> None:
        self.like, self.kept = like, dict[str, Tensor]()

    def take(self, name: str, n: int, length: int) -> Tensor:
        """(n, length, length), not initialised."""
        size = n * length * length
        if name not in self.kept or self.kept[name].numel() < size:
            self.kept[name] = self.like.new_empty(size)
        return self.kept[name][:size].view(n, length, length)


def _cut_groups(groups: list, heads: int, qkv: Tensor):
    """The groups, cut so that one piece's scores stay in the CPU's cache."""
    for at, n, length, mask in groups:
        piece = max(1, CHUNK_BYTES // (heads * length * length * qkv.element_size()))
        for first in range(0, n, piece):
            last = min(n, first + piece)
            yield at + first * length, last - first, length, None if mask is None else mask[first:last]


def _split_heads(qkv: Tensor, at: int, n: int, length: int, heads: int) -> Tensor:
    """Flat (T, 3C) -> q / sqrt(D), k and v as one contiguous (3, n H, length, D)."""
    parts = qkv[at : at + n * length].view(n, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    parts = parts.clone(memory_format=torch.contiguous_format).view(3, n * heads, length, -1)
    parts[0].mul_(parts.shape[-1] ** -0.5)
    return parts


def _join_heads(flat: Tensor, at: int, n: int, length: int, heads: int) -> Tensor:
    """A (n, length, H, D) view of flat (T, C)."""
    return flat[at : at + n * length].view(n, length, heads, -1)


def _attend(q: Tensor, k: Tensor, mask: Tensor | None, out: Tensor) -> Tensor:
    """Attention probabilities (n H, length, length) of scaled q, written to ``out``."""
    if mask is not None:
        out.view(len(mask), -1, *mask.shape[1:]).copy_(mask[:, None].expand(-1, len(out) // len(mask), -1, -1))
        torch.baddbmm(out, q, k.transpose(1, 2), out=out)
    else:
        torch.bmm(q, k.transpose(1, 2), out=out)
    return torch.softmax(out, -1, out=out)
