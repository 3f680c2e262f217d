"""Layouts: every token has a place of its own, groups cover them all, and padding is the least there can be."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from koret.retrieval import layout as layouts
from koret.retrieval.layout import cut_by_length, cut_slices, plan_flat_layout, plan_layout, plan_padded_layout


@pytest.mark.parametrize("plan", [plan_layout, plan_flat_layout, plan_padded_layout])
def test_a_layout_covers_every_token_once(plan):
    rng = np.random.default_rng(1)
    for _ in range(50):
        lengths = rng.integers(1, 120, rng.integers(1, 40)).tolist()
        layout = plan(lengths)
        spans = [position for s, n in zip(layout.starts, lengths, strict=True) for position in range(s, s + n)]
        assert len(set(spans)) == len(spans) == sum(lengths)
        assert max(spans) < layout.tokens == sum(n * length for _, n, length, _ in layout.groups)


def test_slices_hold_every_sequence_once_within_their_size():
    rng = np.random.default_rng(2)
    for _ in range(50):
        layout = plan_layout(rng.integers(1, 200, rng.integers(1, 60)).tolist())
        slices = cut_slices(layout, 256)
        assert sum(tokens for tokens, _ in slices) == layout.tokens
        counts: dict[int, int] = {}
        for tokens, pieces in slices:
            assert tokens <= 256
            at = 0
            for start, n, length, mask in pieces:
                assert start == at and n > 0 and (mask is None or mask.shape == (n, length, length))
                at += n * length
                counts[length] = counts.get(length, 0) + n
            assert at == tokens
        expected: dict[int, int] = {}
        for _, n, length, _ in layout.groups:
            expected[length] = expected.get(length, 0) + n
        assert counts == expected


def test_texts_are_dealt_out_evenly_and_stand_together_in_their_slices():
    rng = np.random.default_rng(4)
    for _ in range(50):
        lengths = rng.integers(1, 200, rng.integers(1, 90)).tolist()
        layout = plan_flat_layout(lengths, 700)
        slices, spans = cut_slices(layout, 700), []
        assert len(slices) == min(len(lengths), -(-sum(lengths) // 700))
        assert max(tokens for tokens, _ in slices) - min(tokens for tokens, _ in slices) <= max(lengths)
        end = 0
        for tokens, pieces in slices:
            assert pieces[0][0] == 0 and sum(length for _, _, length, _ in pieces) == tokens
            spans += [(end + at, length) for at, _, length, _ in pieces]
            end += tokens
        assert end == layout.tokens == sum(lengths)
        assert sorted(spans) == spans == sorted(zip(layout.starts, lengths, strict=True))
    lengths = [200, 190, 40, 30, 20, 10] * 12  # long texts and short ones: no slice is much smaller than another
    sizes = [tokens for tokens, _ in cut_slices(plan_flat_layout(lengths, 700), 700)]
    assert len(sizes) == 9 and max(sizes) - min(sizes) <= 20


def test_a_padded_group_hides_exactly_what_is_behind_its_texts():
    rng = np.random.default_rng(3)
    for _ in range(20):
        lengths = rng.integers(1, 90, rng.integers(1, 30)).tolist()
        layout = plan_padded_layout(lengths)
        assert 1 <= len(layout.groups) <= layouts.PADDED_GROUPS
        owners = {start: length for start, length in zip(layout.starts, lengths, strict=True)}
        end = 0
        for at, n, length, bias in layout.groups:
            assert at == end and length % layouts.STEP == 0
            end = at + n * length
            own = torch.tensor([owners.pop(at + i * length) for i in range(n)])
            visible = torch.ones(n, 1, 1, length, dtype=torch.bool) if bias is None else bias == 0
            assert bias is None or set(bias.unique().tolist()) == {0.0, float("-inf")}
            assert torch.equal(visible.sum(dim=(1, 2, 3)), own)
            assert torch.equal(visible[:, 0, 0], torch.arange(length) < own[:, None])
        assert not owners


def test_questions_beside_passages_are_hardly_padded():
    rng = np.random.default_rng(4)
    lengths = [*rng.integers(12, 40, 64).tolist(), *rng.integers(200, 257, 64).tolist()]
    assert plan_padded_layout(lengths).tokens < 1.1 * sum(lengths)
    assert plan_padded_layout(lengths, most=1).tokens == 128 * -(-max(lengths) // 8) * 8


@pytest.mark.parametrize("most", [1, 2, 3, 4])
def test_lengths_are_cut_where_it_costs_least(most):
    rng = np.random.default_rng(most)
    for _ in range(60):
        lengths = sorted(rng.integers(1, 12, rng.integers(1, 9)).tolist(), reverse=True)
        inner = range(1, len(lengths))
        best = min(
            sum(lengths[a] * (b - a) for a, b in itertools.pairwise((0, *cuts, len(lengths))))
            for k in range(min(most, len(lengths)))
            for cuts in itertools.combinations(inner, k)
        )
        runs = cut_by_length(lengths, most)
        assert len(runs) <= most and runs[0][0] == 0 and runs[-1][1] == len(lengths)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(runs))
        assert sum(lengths[a] * (b - a) for a, b in runs) == best
