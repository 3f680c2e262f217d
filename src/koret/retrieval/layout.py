"""Where the tokens of many texts stand among flat tokens, and which of them attend to each other.

T tokens in all. One layout for each way of attention (``attention.choose_path``): blocks, flat, padded.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from koret.retrieval.devices import send

BLOCK = 64  # tokens of a block that short texts share
SHORT = 48  # texts up to this many tokens share blocks; longer ones stand alone
PADDED_GROUPS, STEP = 4, 8  # where texts are padded: groups of like length at most, and what lengths are multiples of


@dataclass
class Layout:
    """Where each text's tokens stand among the T flat tokens, and how attention groups them.

    ``groups`` holds (first flat position, sequences, length, mask): ``mask`` (sequences, length, length) keeps the
    texts of shared blocks apart and is None where a sequence is one text. Positions of a block that hold no text
    attend to each other only and are dropped by pooling. Where texts are padded, ``mask`` is (sequences, 1, 1, length).
    """

    tokens: int
    starts: list[int]
    lengths: list[int]
    groups: list[tuple[int, int, int, Tensor | None]]
    counts: list[int] = field(default_factory=list)  # of groups in each slice, where the order was chosen for slices


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


def plan_flat_layout(lengths: Sequence[int], most: int | None = None) -> Layout:
    """The texts one behind the other and nothing between them, for variable-length attention.

    Where there are more than ``most`` tokens, texts that go into one of several slices stand together.
    """
    slices = deal_out(lengths, 1 if most is None else -(-sum(lengths) // most))
    order = [text for own in slices for text in own]
    places = np.cumsum([0, *(lengths[text] for text in order)]).tolist()
    tokens, starts = places.pop(), [0] * len(lengths)
    for text, at in zip(order, places, strict=True):
        starts[text] = at
    groups = [(at, 1, lengths[text], None) for text, at in zip(order, places, strict=True)]
    return Layout(tokens, starts, list(lengths), groups, [len(own) for own in slices])


def deal_out(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """The numbers of texts in at most ``parts`` parts of as many tokens, or nearly.

    The longest that is left goes where least is (Graham 1969, Bounds on multiprocessing timing anomalies). Parts of
    like size are multiplied by products that oneDNN has compiled already.
    """
    if parts <= 1:
        return [list(range(len(lengths)))]
    dealt = [(0, part, []) for part in range(min(parts, len(lengths)))]
    for text in sorted(range(len(lengths)), key=lambda text: (-lengths[text], text)):
        tokens, part, own = dealt[0]
        own.append(text)
        heapq.heapreplace(dealt, (tokens + lengths[text], part, own))
    return [own for _, _, own in sorted(dealt, key=lambda one: one[1])]


def plan_padded_layout(lengths: Sequence[int], most: int = PADDED_GROUPS, step: int = STEP) -> Layout:
    """At most ``most`` groups of like length, each padded to a multiple of ``step``, with as few tokens as can be.

    For devices without variable-length attention.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    padded = [-(-lengths[i] // step) * step for i in order]
    starts, groups, at = [0] * len(lengths), [], 0
    for first, last in cut_by_length(padded, most):
        texts, length = order[first:last], padded[first]
        own = torch.tensor([lengths[i] for i in texts])
        ended = torch.arange(length) >= own[:, None]
        bias = torch.zeros(ended.shape).masked_fill_(ended, float("-inf"))[:, None, None] if ended.any() else None
        for n, i in enumerate(texts):
            starts[i] = at + n * length
        groups.append((at, len(texts), length, bias))
        at += len(texts) * length
    return Layout(at, starts, list(lengths), groups)


def cut_by_length(lengths: Sequence[int], most: int) -> list[tuple[int, int]]:
    """(first, behind the last) of at most ``most`` runs of falling ``lengths`` that cost least; a run costs its first
    length for each of its members.

    Dynamic programming over the places where the length changes.
    """
    falls = [0, *(i for i in range(1, len(lengths)) if lengths[i] != lengths[i - 1]), len(lengths)]
    bounds, firsts = np.array(falls), np.array([lengths[i] for i in falls[:-1]])
    costs = np.full(len(falls), np.inf)  # of everything before a bound, in so many runs
    costs[0] = 0
    came_from: list[list[int]] = []
    for _ in range(min(most, len(firsts))):
        ways = [costs[:end] + firsts[:end] * (bounds[end] - bounds[:end]) for end in range(1, len(falls))]
        came_from.append([0, *(int(way.argmin()) for way in ways)])
        costs = np.array([np.inf, *(way.min() for way in ways)])
    runs, end = [], len(falls) - 1
    for origins in reversed(came_from):
        runs.append((falls[origins[end]], falls[end]))
        end = origins[end]
    return runs[::-1]


def cut_slices(layout: Layout, most: int) -> list[tuple[int, list]]:
    """The groups in slices of at most ``most`` tokens, or one sequence: (tokens, groups counted from 0) of each.

    As they were planned, where they were. Else a group that does not fit into what is left of a slice is continued in
    the next one.
    """
    slices: list[tuple[int, list]] = []
    ends = np.cumsum(layout.counts)
    for first, end in zip([0, *ends], ends, strict=False):
        own = layout.groups[first:end]
        begin = own[0][0]
        pieces = [(at - begin, *rest) for at, *rest in own]
        slices.append((sum(n * length for _, n, length, _ in own), pieces))
    for _, n, length, mask in () if slices else layout.groups:
        first = 0
        while first < n:
            if not slices or slices[-1][0] + length > most:
                slices.append((0, []))
            filled, pieces = slices[-1]
            last = min(n, first + max(1, (most - filled) // length))
            pieces.append((filled, last - first, length, None if mask is None else mask[first:last]))
            slices[-1] = filled + (last - first) * length, pieces
            first = last
    return slices


def find_firsts(layout: Layout, sizes: Sequence[int], device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Where the first tokens of texts stand in each slice of so many tokens; and of each text, which of them is its."""
    order = np.argsort(layout.starts)
    starts, ends = np.array(layout.starts)[order], np.cumsum(sizes)
    cuts = np.searchsorted(starts, ends)
    rows = [own - end + size for own, end, size in zip(np.split(starts, cuts[:-1]), ends, sizes, strict=True)]
    places = np.argsort(order)
    *own, back = (send(part, device) for part in (*rows, places))
    return own, back
