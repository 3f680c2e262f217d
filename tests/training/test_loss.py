"""The loss against sentence-transformers, a brute-force loop and batches that can be counted by hand."""

import math

import pytest
import torch
from sentence_transformers import util
from sentence_transformers.sentence_transformer import losses

from koret.training.loss import info_nce


def unit_vectors(rows: int, seed: int, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, 7, generator=generator, dtype=dtype), dim=1)


def brute_force(scores, positives, known):
    """The formula of the docstring, one question and one number at a time."""
    rows, skipped = [], 0
    for i, own in enumerate(positives):
        negatives = [j for j in range(scores.shape[1]) if j not in own and not known[i][j]]
        if not negatives:
            skipped += 1
            continue
        e = [math.exp(score) for score in scores[i].tolist()]
        total = sum(e[n] for n in negatives)
        rows.append(sum(-math.log(e[p] / (e[p] + total)) for p in own) / len(own))
    return (sum(rows) / len(rows) if rows else 0.0), skipped


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("symmetric", [False, True])
def test_equals_sentence_transformers(seed, symmetric):
    queries, targets = unit_vectors(9, seed).requires_grad_(), unit_vectors(9, seed + 100).requires_grad_()
    kind = losses.MultipleNegativesSymmetricRankingLoss if symmetric else losses.MultipleNegativesRankingLoss
    reference = kind(model=None, scale=20.0, similarity_fct=util.cos_sim)
    expected = reference.compute_loss_from_embeddings([queries, targets], None)
    wanted = torch.autograd.grad(expected, (queries, targets))

    loss = info_nce(queries, targets, torch.arange(9), scale=20.0, symmetric=symmetric)
    found = torch.autograd.grad(loss.value, (queries, targets))

    assert loss.value.item() == pytest.approx(expected.item(), rel=1e-12)
    # The reference normalises inside the loss: on unit vectors its gradient is ours without the radial part.
    for vectors, ours, theirs in zip((queries, targets), found, wanted, strict=True):
        tangent = ours - (ours * vectors).sum(dim=1, keepdim=True) * vectors
        torch.testing.assert_close(tangent, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_equals_brute_force_with_several_positives_and_known_ones(seed):
    generator = torch.Generator().manual_seed(seed)
    queries, targets = unit_vectors(6, seed), unit_vectors(8, seed + 50)
    positive = torch.rand(6, 8, generator=generator) < 0.2
    positive[torch.arange(6), torch.randint(8, (6,), generator=generator)] = True
    known = torch.rand(6, 8, generator=generator) < 0.4

    loss = info_nce(queries, targets, positive, known, scale=5.0)

    columns = [row.nonzero().flatten().tolist() for row in positive]
    value, skipped = brute_force(5.0 * queries @ targets.T, columns, known)
    assert loss.value.item() == pytest.approx(value, rel=1e-12)
    assert loss.skipped.item() == skipped
    assert loss.masked.item() == (known & ~positive).sum().item()


def test_single_positive_column_is_the_one_column_case_of_the_matrix():
    queries, targets, columns = unit_vectors(4, 1), unit_vectors(5, 2), torch.tensor([3, 0, 0, 4])
    matrix = torch.nn.functional.one_hot(columns, 5).bool()
    assert torch.equal(info_nce(queries, targets, columns).value, info_nce(queries, targets, matrix).value)


def test_masked_pairs_get_no_gradient():
    queries, targets = unit_vectors(2, 3), unit_vectors(3, 4).requires_grad_()
    known = torch.tensor([[False, True, False], [False, False, False]])
    loss = info_nce(queries[:1], targets, torch.tensor([0]), known[:1])
    loss.value.backward()
    assert torch.all(targets.grad[1] == 0) and torch.any(targets.grad[2] != 0)


def test_questions_without_negatives_are_skipped_and_counted_never_nan():
    queries, targets = unit_vectors(3, 5).requires_grad_(), unit_vectors(3, 6).requires_grad_()
    known = torch.tensor([[True, True, True], [False, False, True], [True, True, True]])
    with torch.autograd.detect_anomaly(check_nan=True):
        loss = info_nce(queries, targets, torch.arange(3), known, symmetric=False)
        loss.value.backward()
    alone = info_nce(queries[1:2].detach(), targets.detach(), torch.tensor([1]), known[1:2])
    assert loss.skipped.item() == 2
    assert loss.value.item() == pytest.approx(alone.value.item(), rel=1e-12)
    assert torch.all(queries.grad[[0, 2]] == 0) and torch.any(queries.grad[1] != 0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_batch_without_any_negative_is_zero_with_zero_gradient(symmetric):
    queries, targets = unit_vectors(4, 7).requires_grad_(), unit_vectors(1, 8).requires_grad_()
    loss = info_nce(queries, targets, torch.zeros(4, dtype=torch.long), symmetric=symmetric)
    loss.value.backward()
    assert loss.value.item() == 0.0 and loss.skipped.item() == 4
    assert torch.all(queries.grad == 0) and torch.all(targets.grad == 0)


def test_hand_countable_batch():
    """Two questions, orthogonal targets: every score is 0 or 1, so the loss can be written down."""
    queries, targets = torch.eye(3, dtype=torch.float64)[:2], torch.eye(3, dtype=torch.float64)
    loss = info_nce(queries, targets, torch.tensor([0, 1]), scale=1.0)
    assert loss.value.item() == pytest.approx(-math.log(math.e / (math.e + 2)))
    known = torch.tensor([[False, True, False], [False, False, False]])
    loss = info_nce(queries, targets, torch.tensor([0, 1]), known, scale=1.0)
    assert loss.masked.item() == 1
    assert loss.value.item() == pytest.approx(-(math.log(math.e / (math.e + 1)) + math.log(math.e / (math.e + 2))) / 2)


def test_extreme_scores_stay_finite():
    queries = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), dim=1).requires_grad_()
    loss = info_nce(queries, queries.detach().flip(0), torch.arange(2), scale=1e4)
    loss.value.backward()
    assert torch.isfinite(loss.value) and torch.isfinite(queries.grad).all()
