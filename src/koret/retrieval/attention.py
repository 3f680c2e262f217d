"""Attention among the tokens of each text, on the flat tokens of many texts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 1_600_000  # attention scores worked on at a time on CPU: about what its cache holds


class BlockAttention(torch.autograd.Function):
    """softmax(Q K^T / sqrt(D)) V per group of flat tokens (Vaswani et al. 2017); keeps no probabilities."""

    @staticmethod
    def forward(ctx, qkv: Tensor, groups: list, heads: int) -> Tensor:
        """qkv (T, 3C) -> (T, C)."""
        out = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)
        scratch = _Scratch(qkv)
        for at, n, length, mask in _cut_groups(groups, heads, qkv):
            q, k, v = _split_heads(qkv, at, n, length, heads)
            if qkv.device.type == "cpu":
                mixed = torch.bmm(_attend(q, k, mask, scratch.take("scores", n * heads, length)), v)
            else:
                mixed = _mix_fused(q, k, v, mask, heads)
            _join_heads(out, at, n, length, heads).copy_(mixed.view(n, heads, length, -1).transpose(1, 2))
        ctx.save_for_backward(qkv)
        ctx.groups, ctx.heads = groups, heads
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (qkv,) = ctx.saved_tensors
        result, scratch = torch.empty_like(qkv), _Scratch(qkv)
        for at, n, length, mask in _cut_groups(ctx.groups, ctx.heads, qkv):
            q, k, v = _split_heads(qkv, at, n, length, ctx.heads)
            p = _attend(q, k, mask, scratch.take("scores", n * ctx.heads, length))
            outer = _join_heads(gradient, at, n, length, ctx.heads).transpose(1, 2).reshape(q.shape)
            parts = result[at : at + n * length].view(n, length, 3, ctx.heads, -1).permute(2, 0, 3, 1, 4)
            parts[2].copy_(torch.bmm(p.transpose(1, 2), outer).view(parts[2].shape))
            d_scores = torch.bmm(outer, v.transpose(1, 2), out=scratch.take("gradients", n * ctx.heads, length))
            torch._softmax_backward_data(d_scores, p, -1, p.dtype, grad_input=d_scores)
            parts[0].copy_(torch.bmm(d_scores, k).mul_(q.shape[-1] ** -0.5).view(parts[0].shape))
            parts[1].copy_(torch.bmm(d_scores.transpose(1, 2), q).view(parts[1].shape))
        return result, None, None


def _mix_fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, heads: int) -> Tensor:
    """softmax(q k^T + mask) v by the framework's fused kernels, which keep no scores: (n H, L, D) -> (n, H, L, D)."""
    q, k, v = (part.view(-1, heads, *part.shape[1:]) for part in (q, k, v))
    bias = None if mask is None else mask[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)  # q is scaled already


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
    """The groups, cut so that one piece's scores stay in the CPU's cache; whole on other devices."""
    for at, n, length, mask in groups:
        piece = n
        if qkv.device.type == "cpu":
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
