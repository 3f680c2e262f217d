"""Every objective against a reference: sentence-transformers' own losses, loops, finite differences, GradCache."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer import losses

from koret.training.gradcache import embed_and_backward
from koret.training.loss import info_nce
from koret.training.objectives import Objective, Relations, find_limits, find_peers, match_distributions, match_margins

VARIANTS = {
    "plain": {},
    "multi": {"multi_positive": True},
    "both ways": {"symmetric": True},
    "peers": {"same_tower_negatives": True},
    "peers both ways": {"same_tower_negatives": True, "symmetric": True, "multi_positive": True},
    "relative": {"guide_margin": 0.1, "guide_margin_kind": "relative", "same_tower_negatives": True},
    "short": {"matryoshka_dims": (2, 4)},
    "margins": {"distillation": "margin_mse"},
    "kl": {"distillation": "kl", "symmetric": True},
    "hard": {"hardness_weight": 2.0},
}


def unit(rows, seed, size=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, size, generator=generator, dtype=torch.float64), dim=1)


def make_batch(seed=0, questions=5, targets=6, guide=True):
    generator = torch.Generator().manual_seed(seed)
    positives = torch.randint(targets, (questions,), generator=generator)
    known = torch.rand(questions, targets, generator=generator) < 0.2
    known[torch.arange(questions), positives] = True
    teacher = torch.rand(questions, targets, generator=generator, dtype=torch.float64)
    teacher[torch.rand(questions, targets, generator=generator) < 0.3] = math.nan
    vectors = unit(questions + targets, seed + 7, 4) if guide else None
    at = torch.arange(questions + targets)
    right = known & (torch.rand(questions, targets, generator=generator) < 0.5)
    return Relations(at[:questions], at[questions:], positives, known, None, vectors, teacher, right)


def st(kind, **options):
    return kind(SimpleNamespace(get_embedding_dimension=lambda: 7), **options)


def test_same_tower_and_hardness_equal_sentence_transformers():
    q, p = unit(6, 1), unit(6, 2)
    at = torch.arange(12)
    batch = Relations(at[:6], at[6:], at[:6])
    forth = losses.MultipleNegativesRankingLoss(None, scale=20.0, directions=("query_to_doc", "query_to_query"))
    there, back = (forth.compute_loss_from_embeddings(pair, None).item() for pair in ([q, p], [p, q]))
    both = torch.cat([q, p])
    assert Objective(same_tower_negatives=True).measure(both, batch, 20.0).value.item() == pytest.approx(there)
    found = Objective(same_tower_negatives=True, symmetric=True).measure(both, batch, 20.0)
    assert found.value.item() == pytest.approx((there + back) / 2)
    hard = losses.MultipleNegativesRankingLoss(
        None, scale=20.0, hardness_mode="in_batch_negatives", hardness_strength=3.0
    )
    wanted = hard.compute_loss_from_embeddings([q, p], None).item()
    assert Objective(hardness_weight=3.0).measure(both, batch, 20.0).value.item() == pytest.approx(wanted)


def test_several_positives_are_those_right_for_the_question():
    vectors, batch = unit(11, 4), make_batch(3, guide=False)
    right = batch.right.clone()
    right[torch.arange(5), batch.positives] = True
    wanted = info_nce(vectors[:5], vectors[5:], right, batch.known, scale=20.0).value
    found = Objective(multi_positive=True).measure(vectors, batch, 20.0).value
    others = info_nce(vectors[:5], vectors[5:], batch.known, batch.known, scale=20.0).value
    assert found.item() == pytest.approx(wanted.item()) and abs((found - others).item()) > 1e-3


@pytest.mark.parametrize("kind", ["absolute", "relative"])
def test_guided_filtering_equals_a_loop(kind):
    batch = make_batch(3)
    guide = batch.guide[batch.queries] @ batch.guide[batch.targets].T
    limit = find_limits(guide, batch.positives, 0.2, kind)
    out = 0
    for i in range(5):
        own = guide[i, batch.positives[i]].item()
        top = own - (0.2 if kind == "absolute" else 0.2 * abs(own))
        assert limit[i].item() == pytest.approx(top)
        out += sum(guide[i, j].item() > top and not batch.known[i, j] for j in range(6))
    objective = Objective(guide_margin=0.2, guide_margin_kind=kind)
    loss = objective.measure(unit(11, 4), batch, 20.0)
    assert out and loss.guided.item() == out
    curated = batch._replace(curated=torch.ones(5, 6, dtype=torch.bool))
    assert objective.measure(unit(11, 4), curated, 20.0).guided.item() == 0


class Given(torch.nn.Module):
    """A model that is handed its vectors."""

    def __init__(self, name="vectors"):
        super().__init__()
        self.name = name

    def forward(self, features):
        return {"sentence_embedding": features[self.name]}

    def get_embedding_dimension(self):
        return 7


def say_vectors(*parts):
    return [{"vectors": part} for part in parts]


@pytest.mark.parametrize("kind", ["absolute", "relative"])
@pytest.mark.parametrize("anchors", [False, True])
def test_guided_filtering_equals_sentence_transformers(kind, anchors):
    q, p, guide = unit(6, 1), unit(6, 2), unit(12, 3, 4)
    reference = losses.GISTEmbedLoss.__new__(losses.GISTEmbedLoss)  # its constructor wants tokenizers
    torch.nn.Module.__init__(reference)
    reference.model, reference.guide = Given(), Given("guide")
    reference.similarity_fct, reference.cross_entropy_loss = torch.nn.CosineSimilarity(-1), torch.nn.CrossEntropyLoss()
    reference.must_retokenize = reference.gather_across_devices = reference.contrast_positives = False
    reference.margin_strategy, reference.margin, reference.temperature = kind, 0.2, 0.05
    reference.contrast_anchors = anchors
    features = [{"vectors": v, "guide": g} for v, g in ((q, guide[:6]), (p, guide[6:]))]
    wanted = reference(features, None).item()
    at = torch.arange(12)
    batch = Relations(at[:6], at[6:], at[:6], guide=guide)
    objective = Objective(guide_margin=0.2, guide_margin_kind=kind, same_tower_negatives=anchors)
    found = objective.measure(torch.cat([q, p]), batch, 20.0)
    asked = 6 - found.skipped.item()  # there, a question without negatives counts as a loss of zero
    assert found.guided.item() > 0 and found.value.item() * asked / 6 == pytest.approx(wanted)


def test_truncations_equal_sentence_transformers():
    q, p, at = unit(6, 1), unit(6, 2), torch.arange(12)
    model = Given()
    reference = losses.MatryoshkaLoss(
        model, losses.MultipleNegativesRankingLoss(model, scale=20.0), [7, 4, 2], matryoshka_weights=[1 / 3] * 3
    )
    wanted = reference(say_vectors(q, p), None).item()
    batch = Relations(at[:6], at[6:], at[:6])
    found = Objective(matryoshka_dims=(4, 2)).measure(torch.cat([q, p]), batch, 20.0)
    assert found.value.item() == pytest.approx(wanted)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("guided", [False, True])
def test_who_may_be_a_negative_on_ones_own_side_equals_a_loop(seed, guided):
    """Pairs that share questions and targets, with known positives; every pair of texts decided by itself."""
    generator = torch.Generator().manual_seed(seed)
    pairs, questions, targets = 9, 5, 6
    asked = torch.randint(questions, (pairs,), generator=generator)
    own = torch.randint(targets, (pairs,), generator=generator)
    known = torch.rand(pairs, targets, generator=generator) < 0.15
    known[torch.arange(pairs), own] = True
    vectors = unit(questions + targets, seed, 4)
    batch = Relations(asked, questions + torch.arange(targets), own, known, guide=vectors if guided else None)
    limit = None
    if guided:
        limit = find_limits(vectors[asked] @ vectors[questions:].T, own, 0.1, "absolute")
    found = find_peers(unit(questions + targets, seed + 9), batch, limit)
    for i in range(pairs):
        for j in range(questions):
            asking = [k for k in range(pairs) if asked[k] == j]  # the pairs of question j
            tied = any(known[i, own[k]] or known[k, own[i]] for k in asking)
            close = guided and (vectors[asked[i]] @ vectors[j] > limit[i]).item()
            assert found.of_questions[i, j].item() == (not (asked[i] == j or tied or close))
    for t in range(targets):
        mine = [k for k in range(pairs) if own[k] == t]
        for u in range(targets):
            theirs = [k for k in range(pairs) if own[k] == u]
            tied = any(known[k, u] for k in mine) or any(known[k, t] for k in theirs)
            close = guided and any((vectors[questions + t] @ vectors[questions + u] > limit[k]).item() for k in mine)
            assert found.of_targets[t, u].item() == (not (t == u or tied or close))


def test_distillation_equals_sentence_transformers():
    q, sides = unit(5, 1), [unit(5, seed) for seed in (2, 3, 4)]
    teacher = torch.rand(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    cosines = torch.stack([(q * side).sum(1) for side in sides], dim=1)
    margin = st(losses.MarginMSELoss).compute_loss_from_embeddings([q, *sides], teacher[:, :1] - teacher[:, 1:])
    assert match_margins(cosines, teacher, torch.zeros(5, dtype=torch.long)).item() == pytest.approx(margin.item())
    reference = st(losses.DistillKLDivLoss, student_temperature=0.05, teacher_temperature=0.1)
    wanted = reference.compute_loss_from_embeddings([q, *sides], teacher).item() / 0.05**2
    assert match_distributions(20 * cosines, teacher / 0.1).item() == pytest.approx(wanted)
    unknown = torch.full_like(teacher, math.nan)
    assert match_margins(cosines, unknown, torch.zeros(5, dtype=torch.long)).item() == 0
    assert match_distributions(cosines, unknown).item() == 0


def test_truncations_are_the_mean_of_losses_of_renormalised_vectors():
    vectors, batch = unit(11, 1), make_batch(1, guide=False)
    wanted = [
        info_nce(*(torch.nn.functional.normalize(vectors[part, :d]) for part in (slice(0, 5), slice(5, 11))),
                 batch.positives, batch.known).value.item()
        for d in (2, 4, 7)
    ]  # fmt: skip
    found = Objective(matryoshka_dims=(2, 4)).measure(vectors, batch, 20.0)
    assert found.value.item() == pytest.approx(np.mean(wanted))


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_are_right_also_through_gradcache(name):
    objective, batch = Objective(**VARIANTS[name]), make_batch(2)
    raw = torch.randn(11, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(9), requires_grad=True)

    def whole(x):
        return objective.measure(torch.nn.functional.normalize(x, dim=1), batch, 5.0).value

    if not objective.hardness_weight:  # its weight has no gradient on purpose
        assert torch.autograd.gradcheck(whole, raw)
    expected = torch.autograd.grad(whole(raw), raw)[0]
    texts = [np.array([i]) for i in range(11)]

    def embed(ids):
        return torch.nn.functional.normalize(raw[torch.tensor([int(x[0]) for x in ids])], dim=1)

    chunks = np.array_split(np.arange(11), 3)
    embed_and_backward(embed, texts, chunks, lambda e: objective.measure(e, batch, 5.0).value)
    torch.testing.assert_close(raw.grad, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("case", ["one", "all known", "one answer", "nothing taught"])
def test_nothing_is_ever_nan(name, case):
    batch = make_batch(4, 1 if case == "one" else 5, 1 if case in ("one", "one answer") else 6)
    batch = batch._replace(guide=None)
    if case == "all known":
        batch = batch._replace(known=torch.ones_like(batch.known))
    if case == "nothing taught":
        batch = batch._replace(teacher=torch.full_like(batch.teacher, math.nan))
    count = len(batch.queries) + len(batch.targets)
    vectors = unit(count, 5).requires_grad_()
    loss = Objective(**VARIANTS[name]).measure(vectors, batch, 20.0)
    loss.value.backward()
    assert torch.isfinite(loss.value) and torch.isfinite(vectors.grad).all()
    if case in ("one", "all known", "one answer"):
        assert loss.skipped.item() == len(batch.queries)
