"""Chunked gradients are the whole batch's gradients, dropout included."""

import numpy as np
import pytest
import torch

from koret.retrieval.encoder import load_encoder
from koret.training.batches import cut_micro_batches
from koret.training.gradcache import embed_and_backward
from koret.training.lora import setup_lora_model
from koret.training.loss import info_nce

TEXTS = [np.array([2, *range(5, 5 + n), 3], dtype=np.int32) for n in (3, 30, 7, 12, 1, 25, 7, 18, 9, 40, 2, 33)]


def make_encoder(tiny_model, dtype, dropout):
    encoder = load_encoder(tiny_model, max_seq_length=48, device="cpu")
    torch.manual_seed(3)
    setup_lora_model(encoder, r=4, alpha=8, dropout=dropout)
    for name, parameter in encoder.backbone.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)  # fresh adapters have no effect, and no gradient on A
    encoder.model.to(dtype)
    if dtype == torch.float64:
        encoder.slow_path_reason = "float64"  # embed() narrows to float32, so go through the model itself
    encoder.model.train()
    for module in encoder.backbone.modules():
        if isinstance(module, torch.nn.Dropout) and module.p != dropout:
            module.p = 0.0
    return encoder


def embed_in_float64(encoder):
    def embed(ids):
        longest = max(map(len, ids))
        tokens = torch.tensor([[*map(int, x), *[0] * (longest - len(x))] for x in ids])
        mask = torch.tensor([[1] * len(x) + [0] * (longest - len(x)) for x in ids])
        hidden = encoder.backbone(input_ids=tokens, attention_mask=mask).last_hidden_state
        pooled = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        return torch.nn.functional.normalize(pooled, dim=1)

    return embed


def loss_of(embeddings):
    known = torch.zeros(6, 6, dtype=torch.bool)
    known[0, 3] = known[2, 1] = True
    return info_nce(embeddings[:6], embeddings[6:], torch.arange(6), known, scale=20.0).value


def gradients(encoder, embed, chunks):
    encoder.model.zero_grad()
    torch.manual_seed(11)
    loss = embed_and_backward(embed, TEXTS, chunks, loss_of)
    grads = {n: p.grad.clone() for n, p in encoder.backbone.named_parameters() if p.grad is not None}
    return loss, grads, torch.get_rng_state()


@pytest.mark.parametrize("budget", [1, 20, 45, 100])
def test_equals_the_whole_batch_in_float64(tiny_model, budget):
    encoder = make_encoder(tiny_model, torch.float64, dropout=0.0)
    embed = embed_in_float64(encoder)
    chunks = cut_micro_batches(TEXTS, budget)
    assert len(chunks) > 1
    whole_loss, whole, _ = gradients(encoder, embed, [np.arange(len(TEXTS))])
    loss, chunked, _ = gradients(encoder, embed, chunks)
    assert abs(loss - whole_loss) < 1e-12
    assert whole and all(g.abs().max() > 0 for g in whole.values())
    for name in whole:
        torch.testing.assert_close(chunked[name], whole[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("budget", [1, 45, 100])
def test_equals_the_whole_batch_in_float32_through_the_packed_encoder(tiny_model, budget):
    encoder = make_encoder(tiny_model, torch.float32, dropout=0.0)
    assert encoder.slow_path_reason is None
    _, whole, _ = gradients(encoder, encoder.embed, [np.arange(len(TEXTS))])
    _, chunked, _ = gradients(encoder, encoder.embed, cut_micro_batches(TEXTS, budget))
    for name in whole:
        assert (chunked[name] - whole[name]).abs().max() <= 1e-5 * whole[name].abs().max(), name


@pytest.mark.parametrize("path", ["packed", "padded"])
def test_both_passes_draw_the_same_dropout(tiny_model, path):
    """With dropout the chunks' gradients equal those of the same chunks embedded in one graph."""
    encoder = make_encoder(tiny_model, torch.float32, dropout=0.3)
    if path == "padded":
        encoder.slow_path_reason = "asked for"
    chunks = cut_micro_batches(TEXTS, 60)
    order = np.argsort(np.concatenate(chunks))

    def in_one_graph(ids):
        assert len(ids) == len(TEXTS)
        return torch.cat([encoder.embed([ids[i] for i in chunk]) for chunk in chunks])[order]

    _, whole, state = gradients(encoder, in_one_graph, [np.arange(len(TEXTS))])
    _, chunked, chunked_state = gradients(encoder, encoder.embed, chunks)
    for name in whole:
        assert (chunked[name] - whole[name]).abs().max() <= 1e-5 * whole[name].abs().max(), name
    assert torch.equal(state, chunked_state)  # and the generator goes on as after one pass
    torch.manual_seed(12)
    assert not torch.equal(encoder.embed(TEXTS[:2]), encoder.embed(TEXTS[:2]))  # dropout was really on


@pytest.mark.parametrize("budget", [None, 100, 1])
def test_every_chunk_but_the_last_is_embedded_twice(tiny_model, budget):
    encoder = make_encoder(tiny_model, torch.float32, dropout=0.0)
    graphs = []

    def embed(ids):
        graphs.append(torch.is_grad_enabled())
        return encoder.embed(ids)

    chunks = cut_micro_batches(TEXTS, budget)
    gradients(encoder, embed, chunks)
    assert len(graphs) == 2 * len(chunks) - 1
    assert sum(graphs) == len(chunks)  # each has a graph once


def test_loss_curve_coincides_with_that_of_sentence_transformers(tiny_model):
    """Ten AdamW steps on the same batches from the same adapters: koret in chunks, the peer on padded batches."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    ours, plain = (make_encoder(tiny_model, torch.float32, dropout=0.0) for _ in range(2))
    theirs = SentenceTransformer(str(tiny_model), device="cpu").train()
    theirs[0].model = plain.backbone
    set_peft_model_state_dict(theirs[0].model, get_peft_model_state_dict(ours.backbone))
    judge, none = MultipleNegativesRankingLoss(theirs, scale=20.0), torch.zeros(8, 8, dtype=torch.bool)
    optimizers = [
        torch.optim.AdamW([p for p in backbone.parameters() if p.requires_grad], lr=3e-3)
        for backbone in (ours.backbone, theirs[0].model)
    ]
    curves, rng, vocabulary = [], np.random.default_rng(0), len(ours.tokenizer)
    batches = [[rng.integers(5, vocabulary, rng.integers(4, 40)).astype(np.int32) for _ in range(16)] for _ in range(2)]

    def pad(texts):
        rows = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(t).long() for t in texts], batch_first=True)
        inside = torch.arange(rows.shape[1])[None] < torch.tensor([[len(t)] for t in texts])
        return {"input_ids": rows, "attention_mask": inside.long(), "modality": "text"}

    for step in range(10):
        texts = batches[step % 2]
        mine = embed_and_backward(
            ours.embed,
            texts,
            cut_micro_batches(texts, 150),
            lambda found: info_nce(found[:8], found[8:], torch.arange(8), none, scale=20.0).value,
        )
        other = judge([pad(texts[:8]), pad(texts[8:])], None)
        other.backward()
        curves.append((mine.item(), other.item()))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    mine, other = np.array(curves).T
    assert other.max() - other.min() > 0.05  # the curve moves, so agreement says something
    np.testing.assert_allclose(mine, other, rtol=0, atol=1e-3)


def test_chunks_hold_every_text_once_within_the_budget():
    lengths = np.array([len(t) for t in TEXTS])
    for budget in (1, 10, 42, 80, 1000, None):
        chunks = cut_micro_batches(TEXTS, budget)
        flat = np.concatenate(chunks)
        assert sorted(flat) == list(range(len(TEXTS)))
        assert all((np.diff(lengths[chunk]) <= 0).all() for chunk in chunks)
        assert lengths[chunks[-1]].sum() == max(lengths[chunk].sum() for chunk in chunks)  # embedded once
        if budget:
            assert all(lengths[c].sum() <= budget or len(c) == 1 for c in chunks)
