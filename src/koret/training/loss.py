"""InfoNCE with known positives left out of the negatives; pure arithmetic on tensors.

Letters: B questions, M distinct targets (passages, answers, hard negatives), D dimensions.

Sources: van den Oord et al. 2018 (InfoNCE, arXiv:1807.03748); Henderson et al. 2017 (in-batch negatives for
retrieval, arXiv:1705.00652); Khosla et al. 2020 (several positives, the mean outside the logarithm,
arXiv:2004.11362, here without the other positives in the denominator).
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Loss(NamedTuple):
    """A loss and what went into it, as zero-dimensional tensors: nothing waits for the device until one is read."""

    value: torch.Tensor  # () mean over the questions that have a negative; 0 with zero gradient where none has
    masked: torch.Tensor  # () how many (question, target) pairs were left out as known positives
    skipped: torch.Tensor  # () questions without any negative, which say nothing and are left out of the mean


def info_nce(
    queries: torch.Tensor,
    targets: torch.Tensor,
    positives: torch.Tensor,
    known: torch.Tensor | None = None,
    *,
    scale: float = 20.0,
    symmetric: bool = False,
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
    """
    scores = scale * queries @ targets.T  # (B, M)
    own = positives if positives.dtype == torch.bool else _mark_columns(positives, scores)
    excluded = own if known is None else own | known
    value, skipped = _rank(scores, own, ~excluded)
    if symmetric:
        # A target is ranked against the questions it is no known positive of, for targets that have a question.
        asked = own.any(dim=0)
        backward, _ = _rank(scores.T[asked], own.T[asked], ~excluded.T[asked])
        value = (value + backward) / 2
    return Loss(value, masked=(excluded & ~own).sum(), skipped=skipped)


def _rank(scores: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean loss over the rows of (B, M) scores that have a negative, and how many rows have none."""
    usable = negative.any(dim=1)  # (B,)
    # A row without negatives gets harmless numbers first and weight zero after: minus infinity would turn into NaN
    # in the backward pass even where it is multiplied by zero.
    negatives = scores.masked_fill(~negative & usable[:, None], float("-inf"))
    against = torch.logsumexp(negatives, dim=1, keepdim=True)  # (B, 1)
    terms = (torch.logaddexp(scores, against) - scores) * positive  # (B, M)
    rows = terms.sum(dim=1) / positive.sum(dim=1)
    return (rows * usable).sum() / usable.sum().clamp(min=1), (~usable).sum()


def _mark_columns(columns: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """(B,) column numbers -> (B, M) bool with exactly that column set."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, columns[:, None], True)
