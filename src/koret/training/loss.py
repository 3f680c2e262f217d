"""InfoNCE with known positives left out of the negatives; pure arithmetic on tensors.

Letters: B questions, M distinct targets (passages, answers, hard negatives), D dimensions.

Sources: van den Oord et al. 2018 (InfoNCE, arXiv:1807.03748); Henderson et al. 2017 (in-batch negatives for
retrieval, arXiv:1705.00652); Khosla et al. 2020 (several positives, the mean outside the logarithm,
arXiv:2004.11362, here without the other positives in the denominator); Chen et al. 2020 (negatives of one's own side,
NT-Xent, arXiv:2002.05709); Lan et al. 2025 (negatives weighted by how hard they are, arXiv:2503.04812).
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Loss(NamedTuple):
    """A loss and what went into it, as zero-dimensional tensors: nothing waits for the device until one is read."""

    value: torch.Tensor  # () mean over the questions that have a negative; 0 with zero gradient where none has
    masked: torch.Tensor  # () how many (question, target) pairs were left out as known positives
    skipped: torch.Tensor  # () questions without any negative, which say nothing and are left out of the mean
    guided: torch.Tensor  # () how many more pairs were left out because a guide model holds them for positive


class Peers(NamedTuple):
    """Negatives of one's own side: other questions for a question, other targets for a target."""

    questions: torch.Tensor  # (Q, D) unit vectors, each distinct question once
    of_questions: torch.Tensor  # (B, Q) bool: may serve as a negative of that question
    of_targets: torch.Tensor  # (M, M) bool: may serve as a negative of that target


def info_nce(
    queries: torch.Tensor,
    targets: torch.Tensor,
    positives: torch.Tensor,
    known: torch.Tensor | None = None,
    *,
    scale: float | torch.Tensor = 20.0,
    symmetric: bool = False,
    guided: torch.Tensor | None = None,
    peers: Peers | None = None,
    hardness: float = 0.0,
) -> Loss:
    """Cross-entropy of each question's positive against the targets that are not positive for it.

    For question i with positives P(i) and negatives N(i) (every target that is neither in P(i) nor known):

        mean over p in P(i) of  -log( e^{s_ip} / (e^{s_ip} + sum over n in N(i) of e^{s_in}) ),   s = scale * Q @ T.T

    so no positive is ever a negative of another one. With one positive a question and nothing known this is
    ``cross_entropy(scale * Q @ T.T, positives)``, the multiple-negatives ranking loss.

    Args:
        queries: (B, D) unit vectors.
        targets: (M, D) unit vectors, each distinct text once.
        positives: (B,) column of each question's positive, or (B, M) bool with at least one positive a row.
        known: (B, M) bool, pairs known to be positive that must not serve as negatives (own positives may be set).
        scale: one over the temperature.
        symmetric: average with the same loss from targets to questions.
        guided: (B, M) bool, more pairs that must not serve as negatives, counted apart.
        peers: negatives of one's own side; with ``symmetric`` this is NT-Xent, a denominator for each direction.
        hardness: every negative counts e^{hardness * cosine} times, a weight without gradient.
    """
    scores = scale * queries @ targets.T  # (B, M)
    own = positives if positives.dtype == torch.bool else mark_columns(positives, scores)
    excluded = own if known is None else own | known
    spared = excluded if guided is None else excluded | guided
    beside = None if peers is None else (scale * queries @ peers.questions.T, peers.of_questions)
    emphasis = hardness / scale if hardness else None
    value, skipped = _rank(scores, own, ~spared, beside, emphasis)
    if symmetric:
        # A target is ranked against the questions it is no known positive of, for targets that have a question.
        beside = None if peers is None else (scale * targets @ targets.T, peers.of_targets)
        backward, _ = _rank(scores.T, own.T, ~spared.T, beside, emphasis)
        value = (value + backward) / 2
    removed = spared & ~excluded
    return Loss(value, masked=(excluded & ~own).sum(), skipped=skipped, guided=removed.sum())


def _rank(
    scores: torch.Tensor,
    positive: torch.Tensor,
    negative: torch.Tensor,
    beside: tuple[torch.Tensor, torch.Tensor] | None,
    emphasis: float | torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean loss over the rows of (B, M) scores that have a positive and a negative; how many have no negative.

    ``beside``: scores of further columns, and which of them are negatives.
    """
    against, columns = scores, negative
    if beside is not None:
        against, columns = torch.cat([scores, beside[0]], dim=1), torch.cat([negative, beside[1]], dim=1)
    if emphasis is not None:
        against = against + (emphasis * against).detach()
    lonely = ~columns.any(dim=1)  # (B,)
    asked = positive.sum(dim=1)
    usable = ~lonely & (asked > 0)
    # A row without negatives gets harmless numbers first and weight zero after: minus infinity would turn into NaN
    # in the backward pass even where it is multiplied by zero.
    negatives = against.masked_fill(~columns & ~lonely[:, None], float("-inf"))
    summed = torch.logsumexp(negatives, dim=1, keepdim=True)  # (B, 1)
    terms = (torch.logaddexp(scores, summed) - scores) * positive  # (B, M)
    rows = terms.sum(dim=1) / asked.clamp(min=1)
    return (rows * usable).sum() / usable.sum().clamp(min=1), lonely.sum()


def mark_columns(columns: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """(B,) column numbers -> (B, M) bool with exactly that column set."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, columns[:, None], True)
