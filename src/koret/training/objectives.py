"""What a training minimises: InfoNCE as the settings shape it, truncations, a guide, a teacher; pure arithmetic.

Letters: B questions, M distinct targets, U distinct texts, D dimensions, G dimensions of a guide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from koret.config import TrainingConfig
from koret.training.loss import Loss, Peers, info_nce, mark_columns

MOST_SCALE = 100.0  # a learned scale is kept at or below this, as in CLIP (arXiv:2103.00020)


class Relations(NamedTuple):
    """A batch on the device: who is what to whom."""

    queries: torch.Tensor  # (B,) each pair's question among the texts, which begin with the questions
    targets: torch.Tensor  # (M,) the targets among the texts, which end with them
    positives: torch.Tensor  # (B,) column of each pair's own positive
    known: torch.Tensor | None = None  # (B, M) bool, never negatives
    curated: torch.Tensor | None = None  # (B, M) bool, the pair's own hard negatives: a guide never takes them out
    guide: torch.Tensor | None = None  # (U, G) the guide's unit vectors of the texts
    teacher: torch.Tensor | None = None  # (B, M) float32 scores, NaN where unknown
    right: torch.Tensor | None = None  # (B, M) bool, known to be right, not only of an equal answer


@dataclass(frozen=True)
class Objective:
    """Which loss; the fields are the settings of the same name."""

    scale: float = 20.0
    multi_positive: bool = False
    symmetric: bool = False
    same_tower_negatives: bool = False
    guide_margin: float | None = 0.0
    guide_margin_kind: str = "absolute"
    matryoshka_dims: tuple[int, ...] = ()
    distillation: str = "none"
    distillation_weight: float = 1.0
    distillation_temperature: float = 0.05
    hardness_weight: float = 0.0

    @classmethod
    def from_config(cls, config: TrainingConfig) -> Objective:
        return cls(**{name: getattr(config, name) for name in cls.__dataclass_fields__})

    def measure(self, embeddings: torch.Tensor, batch: Relations, scale: float | torch.Tensor) -> Loss:
        """The loss of (U, D) unit vectors; with ``matryoshka_dims`` the mean over truncations and the full vector.

        Every truncation is made a unit vector again (Kusupati et al. 2022, arXiv:2205.13147).
        """
        guide = None if batch.guide is None else batch.guide[batch.queries] @ batch.guide[batch.targets].T
        full = embeddings.shape[1]
        dims = sorted({*self.matryoshka_dims, full}, reverse=True)
        losses = [
            self._measure(embeddings if d == full else F.normalize(embeddings[:, :d], dim=1), batch, guide, scale)
            for d in dims
        ]
        if len(losses) == 1:
            return losses[0]
        return losses[0]._replace(value=torch.stack([loss.value for loss in losses]).mean())

    def _measure(
        self, embeddings: torch.Tensor, batch: Relations, guide: torch.Tensor | None, scale: float | torch.Tensor
    ) -> Loss:
        queries, targets = embeddings[batch.queries], embeddings[batch.targets]
        positives: torch.Tensor = batch.positives
        if self.multi_positive and batch.right is not None:
            positives = batch.right | mark_columns(positives, batch.right)
        limit = guided = None
        if guide is not None and self.guide_margin is not None:
            limit = find_limits(guide, batch.positives, self.guide_margin, self.guide_margin_kind)
            guided = guide > limit[:, None]
            guided = guided if batch.curated is None else guided & ~batch.curated
        peers = find_peers(embeddings, batch, limit) if self.same_tower_negatives else None
        loss = info_nce(
            queries, targets, positives, batch.known,
            scale=scale, symmetric=self.symmetric, guided=guided, peers=peers, hardness=self.hardness_weight,
        )  # fmt: skip
        teacher = batch.teacher if guide is None else guide
        if self.distillation == "none" or teacher is None:
            return loss
        cosines = queries @ targets.T
        if self.distillation == "margin_mse":
            taught = match_margins(cosines, teacher, batch.positives)
        else:
            taught = match_distributions(scale * cosines, teacher / self.distillation_temperature)
        return loss._replace(value=loss.value + self.distillation_weight * taught)


def find_limits(guide: torch.Tensor, positives: torch.Tensor, margin: float, kind: str) -> torch.Tensor:
    """(B,) the guide's score above which a text is held for a positive of the question.

    ``guide`` (B, M) are its cosines. absolute: the own positive's less ``margin`` (GISTEmbed, arXiv:2402.16829);
    relative: less that share of it (NV-Retriever, arXiv:2407.15831).
    """
    own = guide.gather(1, positives[:, None]).squeeze(1)
    return own - margin * (own.abs() if kind == "relative" else 1)


def find_peers(embeddings: torch.Tensor, batch: Relations, limit: torch.Tensor | None) -> Peers:
    """Which questions may be negatives of a question and which targets of a target (NT-Xent, arXiv:2002.05709).

    Never itself, an equal text, or one tied by a known positive: question j when a known positive of i is j's own or
    the other way round; target u when it is a known positive of a question of t, or the other way round. GTE
    (arXiv:2308.03281) sums the same terms in one denominator; here each direction has its own, so that a target with
    several questions is no special case. A guide's ``limit`` (B,) holds here too.
    """
    count = embeddings.shape[0] - batch.targets.shape[0]  # distinct questions: the texts before the targets
    asks = batch.queries[:, None] == torch.arange(count, device=embeddings.device)  # (B, Q)
    cells = embeddings.new_empty(batch.queries.shape[0], batch.targets.shape[0])
    own = mark_columns(batch.positives, cells)
    spared = own if batch.known is None else own | batch.known
    asks, own_float, spared = asks.float(), own.float(), spared.float()
    tied = spared @ own_float.T  # (B, B)
    near = (tied + tied.T) @ asks + asks > 0  # (B, Q)
    joined = own_float.T @ spared  # (M, M)
    close = joined + joined.T + torch.eye(joined.shape[0], device=joined.device) > 0
    if limit is not None:
        asked, answers = batch.guide[batch.queries], batch.guide[batch.targets]
        near |= asked @ batch.guide[:count].T > limit[:, None]
        lowest = torch.where(own, limit[:, None], torch.inf).amin(dim=0)  # (M,) of the target's questions
        close |= answers @ answers.T > lowest[:, None]
    return Peers(embeddings[:count], ~near, ~close)


def match_margins(cosines: torch.Tensor, teacher: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """Margin-MSE (Hofstätter et al. 2020, arXiv:2010.02666) over every (positive, other) whose scores are known.

    Mean of ((s_ip - s_in) - (t_ip - t_in))^2; ``cosines`` and ``teacher`` are (B, M), NaN where unknown; 0 for none.
    """
    at = positives[:, None]
    gap = (cosines.gather(1, at) - cosines) - (teacher.gather(1, at) - teacher)
    counted = ~torch.isnan(gap) & ~mark_columns(positives, cosines)
    return gap.masked_fill(~counted, 0.0).square().sum() / counted.sum().clamp(min=1)


def match_distributions(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) of the softmax over the targets whose teacher score is known (arXiv:1503.02531).

    ``student`` and ``teacher`` (B, M) are logits, ``teacher`` NaN where unknown. Mean over the rows with at least two
    known scores; 0 where there is none.
    """
    known = ~torch.isnan(teacher)
    usable = known.sum(dim=1) > 1  # (B,)
    hidden = ~known & usable[:, None]
    wanted = torch.log_softmax(torch.nan_to_num(teacher).masked_fill(hidden, float("-inf")), dim=1)
    found = torch.log_softmax(student.masked_fill(hidden, float("-inf")), dim=1)
    counted = known & usable[:, None]
    wanted, found = wanted.masked_fill(~counted, 0.0), found.masked_fill(~counted, 0.0)
    return (wanted.exp() * (wanted - found) * counted).sum() / usable.sum().clamp(min=1)
