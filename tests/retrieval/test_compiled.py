"""koret's compiled attention against the formula in float64: values, gradients, and memory that is not its own."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_packed import FAMILIES, ODD_LENGTHS, SHAPE, draw_ids, pool_padded
from torch.autograd.graph import saved_tensors_hooks
from transformers import BertConfig, BertModel

from koret.retrieval import attention, compiled, packed
from koret.retrieval.attention import BlockAttention, FlatTexts, mix_flat, mix_plainly
from koret.retrieval.compiled import CompiledAttention, CompiledGelu, CompiledKernel, find_compiled, load_kernels
from koret.retrieval.layout import plan_layout
from koret.retrieval.linear import drop_fast

CPU = torch.device("cpu")
KERNELS = [] if load_kernels() is None else load_kernels().list_kernels()
EVERY_KERNEL = pytest.mark.parametrize(
    "name", KERNELS or [pytest.param("none", marks=pytest.mark.skip(reason="no compiled kernel for this processor"))]
)
HEADS = 2


def find_type(name: str) -> torch.dtype:
    return CompiledKernel(name).dtype


def draw(name: str, lengths, size: int, spare: int = 0, sharp: float = 1.5):
    """q, k and v of tokens, and a gradient of the output, in the kernel's type."""
    own = torch.Generator().manual_seed(len(lengths) + size)
    tokens, width = sum(lengths) + spare, HEADS * size
    qkv = sharp * torch.randn(tokens, 3 * width, generator=own)
    return qkv.to(find_type(name)), torch.randn(tokens, width, generator=own).to(find_type(name))


def describe(name: str, lengths) -> FlatTexts:
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    return FlatTexts(bounds, max(lengths), CompiledKernel(name))


def differentiate(mix, qkv, gradient):
    qkv = qkv.detach().requires_grad_()
    mixed = mix(qkv)
    return [part.detach() for part in (mixed, *torch.autograd.grad(mixed, qkv, gradient)[0].chunk(3, dim=1))]


def run(name, lengths, qkv, gradient):
    return differentiate(lambda x: mix_flat(x, describe(name, lengths), HEADS), qkv, gradient)


def measure(found, exact) -> float:
    """The largest difference, of the largest value."""
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, exact, strict=True))


@EVERY_KERNEL
@pytest.mark.parametrize("size", [16, 32, 48, 64, 80, 96, 112, 128, 256])
def test_gives_the_values_and_gradients_of_the_formula(name, size):
    lengths = [*ODD_LENGTHS, 16, 17, 15, 32, 300]
    qkv, gradient = draw(name, lengths, size)
    exact = differentiate(lambda x: mix_plainly(x, lengths, HEADS), qkv.double(), gradient.double())
    allowed = 3e-6 if find_type(name) == torch.float32 else 0.012
    assert measure(run(name, lengths, qkv, gradient), exact) < allowed


@pytest.mark.parametrize("name", [name for name in KERNELS if name.startswith("bfloat16")] or ["none"])
def test_bfloat16_is_no_less_exact_than_torchs_products(name):
    if name == "none":
        pytest.skip("this processor multiplies no pairs of bfloat16")
    lengths = [40, 100, 256]
    qkv, gradient = draw(name, lengths, 32)
    exact = differentiate(lambda x: mix_plainly(x, lengths, HEADS), qkv.double(), gradient.double())
    layout = plan_layout(lengths)
    groups = [(at, n, length, None if m is None else m.bfloat16()) for at, n, length, m in layout.groups]
    rows = torch.cat([torch.arange(s, s + n) for s, n in zip(layout.starts, layout.lengths, strict=True)])
    packed_qkv, packed_gradient = qkv.new_zeros(layout.tokens, qkv.shape[1]), gradient.new_zeros(layout.tokens, 64)
    packed_qkv[rows], packed_gradient[rows] = qkv, gradient
    blocks = differentiate(lambda x: BlockAttention.apply(x, groups, HEADS), packed_qkv, packed_gradient)
    for mine, theirs, true in zip(run(name, lengths, qkv, gradient), blocks, exact, strict=True):
        assert (mine.double() - true).pow(2).mean() < 1.1 * (theirs[rows].double() - true).pow(2).mean()


@EVERY_KERNEL
def test_a_text_is_the_same_alone_and_among_others_and_with_any_number_of_threads(name):
    lengths = [7, 129, 33, 1, 16, 250]
    qkv, gradient = draw(name, lengths, 32)
    threads = torch.get_num_threads()
    together = run(name, lengths, qkv, gradient)
    try:
        torch.set_num_threads(2)
        for again in (run(name, lengths, qkv, gradient) for _ in range(3)):
            assert all(map(torch.equal, again, together))
    finally:
        torch.set_num_threads(threads)
    at = 0
    for length in lengths:
        own = slice(at, at + length)
        alone = run(name, [length], qkv[own], gradient[own])
        assert all(torch.equal(a, b[own]) for a, b in zip(alone, together, strict=True))
        at += length


@EVERY_KERNEL
def test_scores_of_any_size_are_no_exception(name):
    lengths = [5, 70]
    for sharp in (1e-3, 30.0, 1e3):  # all alike; one key takes all; far beyond what e^x can hold
        qkv, gradient = draw(name, lengths, 32, sharp=sharp)
        exact, *_ = differentiate(lambda x: mix_plainly(x, lengths, HEADS), qkv.double(), gradient.double())
        mixed, *grads = run(name, lengths, qkv, gradient)
        assert measure([mixed], [exact]) < (1e-4 if find_type(name) == torch.float32 else 0.012), sharp
        assert all(torch.isfinite(part.float()).all() for part in grads), sharp


@EVERY_KERNEL
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_what_is_no_number_stays_in_its_text_and_is_not_swallowed(name, bad, part):
    lengths = [20, 40, 9]
    qkv, gradient = draw(name, lengths, 16)
    before = run(name, lengths, qkv, gradient)
    qkv[30, part * HEADS * 16 + 3] = bad  # one number of one token of the second text
    after = run(name, lengths, qkv, gradient)
    formula = differentiate(lambda x: mix_plainly(x, lengths, HEADS), qkv.double(), gradient.double())
    for mine, true in zip(after, formula, strict=True):
        assert torch.isfinite(mine[20:60].float()).all() == torch.isfinite(true[20:60]).all()
    assert not torch.isfinite(after[0][20:60].float()).all()
    for own in (slice(0, 20), slice(60, 69)):
        assert all(torch.equal(a[own], b[own]) for a, b in zip(after, before, strict=True))


@EVERY_KERNEL
def test_tokens_of_no_text_get_zeros_whatever_they_hold(name):
    lengths = [3, 60, 17]
    qkv, gradient = draw(name, lengths, 32, spare=16)
    expected = run(name, lengths, qkv[:80], gradient[:80])
    qkv[80:], gradient[80:] = float("nan"), float("nan")
    for mine, without in zip(run(name, lengths, qkv, gradient), expected, strict=True):
        assert torch.equal(mine[:80], without) and not mine[80:].any()


@EVERY_KERNEL
def test_writes_no_byte_beside_its_result_and_reads_none_beside_its_texts(name):
    """Everything lies in the middle of larger memory, of NaN around what is read."""
    for lengths in ([1], [16, 31], [33, 8, 100]):
        for size in (16, 48, 64):
            qkv, gradient = draw(name, lengths, size)
            expected = run(name, lengths, qkv, gradient)
            framed = [torch.full((len(x) + 64, x.shape[1]), float("nan"), dtype=x.dtype) for x in (qkv, gradient)]
            for frame, x in zip(framed, (qkv, gradient), strict=True):
                frame[32:-32] = x
            texts = describe(name, lengths)
            for given, width in ((None, HEADS * size), (framed[1], 3 * HEADS * size)):
                result = torch.full((len(qkv) + 64, width), 7.0, dtype=qkv.dtype)
                assert load_kernels().attend(
                    name,
                    framed[0][32:].data_ptr(),
                    0 if given is None else given[32:].data_ptr(),
                    result[32:].data_ptr(),
                    texts.bounds.data_ptr(),
                    len(qkv),
                    len(lengths),
                    max(lengths),
                    HEADS,
                    size,
                    1,
                )
                whole = expected[0] if given is None else torch.cat(expected[1:], dim=1)
                assert torch.equal(result[32:-32], whole)
                assert (result[:32] == 7).all() and (result[-32:] == 7).all()


@EVERY_KERNEL
def test_keeps_nothing_of_the_size_of_length_by_length(name):
    qkv, _ = draw(name, [512], 32)
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor):
        mix_flat(qkv.requires_grad_(), describe(name, [512]), HEADS)
    assert sorted(kept) == [2, qkv.numel()]


@EVERY_KERNEL
def test_numbers_that_are_not_side_by_side_are_read_right(name):
    """A gradient that torch has expanded from one number, and a projection that is a part of a wider one."""
    lengths = [30, 11]
    qkv, _ = draw(name, lengths, 16)
    wide = torch.cat([qkv, qkv], dim=1)
    one = torch.ones((), dtype=qkv.dtype).expand(41, HEADS * 16)
    expected = run(name, lengths, qkv, one.contiguous())
    assert all(map(torch.equal, run(name, lengths, wide[:, : qkv.shape[1]], one), expected))


# ---- GELU


def activate(name, x):
    x = x.detach().requires_grad_()
    y = CompiledGelu.apply(x.clone(), CompiledKernel(name))
    return y.detach(), torch.autograd.grad(y, x, torch.ones_like(y))[0]


@EVERY_KERNEL
def test_gelu_and_its_slope_are_those_of_torch_in_float64(name):
    whole = torch.linspace(-14, 14, 20011)
    x = torch.cat([whole, whole / 100, whole * 1e-6, torch.tensor([0.0, -0.0, 1e30, -1e30, 3e38])]).to(find_type(name))
    y, slope = activate(name, x)
    wide = x.double().requires_grad_()
    true = torch.nn.functional.gelu(wide)
    (steep,) = torch.autograd.grad(true.sum(), wide)
    true = true.detach()
    if find_type(name) == torch.float32:
        assert ((y - true).abs() <= 3e-7 * x.double().abs() + 1e-30).all() and (slope - steep).abs().max() < 1e-6
    else:  # as near as rounding to 8 bits leaves it, tails included; a slope to half a step of a 200th
        assert ((y - true).abs() <= 2**-8 * true.abs() + 1e-7 * x.double().abs().clamp(max=14) + 1e-30).all()
        kept = slope.double()
        assert ((kept - steep).abs() <= 0.0025 + 2**-8 * kept.abs() + 1e-6).all()
        assert (kept[steep.abs() < 1e-3] == 0).all() and (kept[(steep - 1).abs() < 1e-3] == 1).all()
        assert abs((kept - steep)[(x > -4) & (x < 4)].mean()) < 1e-4  # no bias


@EVERY_KERNEL
@pytest.mark.parametrize("count", [0, 1, 7, 16, 33, 4096, 4097, 9000])
def test_gelu_of_any_number_of_numbers_and_threads(name, count):
    x = torch.randn(count + 40).to(find_type(name))[3 : count + 3]  # not at a cache line
    threads, single = torch.get_num_threads(), activate(name, x)
    try:
        torch.set_num_threads(2)
        assert all(map(torch.equal, activate(name, x), single))
    finally:
        torch.set_num_threads(threads)
    step = 1e-5 if find_type(name) == torch.float32 else 0.02
    assert torch.allclose(single[0].float(), torch.nn.functional.gelu(x.float()), atol=step)


@EVERY_KERNEL
def test_gelu_passes_on_what_is_no_number_and_touches_nothing_beside_it(name):
    x = torch.tensor([1.0, float("nan"), float("inf"), 2.0]).to(find_type(name))
    y, slope = activate(name, x)
    assert torch.isnan(y[1]) and torch.isnan(slope[1]) and y[2] == float("inf")
    assert torch.isfinite(y[[0, 3]]).all() and torch.isfinite(slope[[0, 3]]).all()
    kernel, threads = load_kernels(), 1
    frames = [torch.full((64,), 7.0).to(x.dtype) for _ in range(3)]
    slopes = torch.full((64,), 7, dtype=torch.uint8)
    values, gradients, results = (frame[20:].data_ptr() for frame in frames)
    frames[0][20:24], frames[1][20:24] = x, 3
    kernel.activate(name, values, values, slopes[20:].data_ptr(), 4, threads)
    kernel.descend(name, gradients, results, slopes[20:].data_ptr(), 4, threads)
    end = 20 + 4 * CompiledKernel(name).slope_bytes
    assert (slopes[:20] == 7).all() and (slopes[end:] == 7).all()
    bits = torch.full((48,), 7, dtype=torch.uint8)
    kernel.draw(name, 0, 0, bits[16:].data_ptr(), 4, threads, 5, 60000)
    kernel.drop(name, values, gradients, bits[16:].data_ptr(), 4, threads, 0, 0, 2.0)
    for frame in frames:
        assert (frame[:20] == 7).all() and (frame[24:] == 7).all() and not (frame[20:24] == 7).any()
    assert (bits[:16] == 7).all() and (bits[32:] == 7).all()


@EVERY_KERNEL
def test_gelu_raises_where_what_it_overwrites_is_needed_for_a_gradient(name):
    x = torch.randn(32).to(find_type(name)).requires_grad_()
    squared = x * x
    saved = squared.exp()  # saves its result, not squared
    y = CompiledGelu.apply(squared, CompiledKernel(name)) + saved
    assert torch.isfinite(torch.autograd.grad(y.float().sum(), x)[0].float()).all()
    squared = x * x
    needed = squared * squared
    y = CompiledGelu.apply(squared, CompiledKernel(name)) + needed
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.float().sum(), x)


@EVERY_KERNEL
@pytest.mark.parametrize(("activation", "compiled_one"), [("gelu", True), ("gelu_new", False), ("relu", False)])
def test_other_activations_are_left_to_torch(name, activation, compiled_one, monkeypatch):
    monkeypatch.setattr(attention, "find_compiled", lambda *_: CompiledKernel(name))
    torch.manual_seed(0)
    module = BertModel(BertConfig(**{**SHAPE, "hidden_size": 64, "hidden_act": activation})).eval()
    calls, apply = [], CompiledGelu.apply
    monkeypatch.setattr(CompiledGelu, "apply", lambda *given: calls.append(1) or apply(*given))
    ids = draw_ids([5, 30])
    vectors = packed.PackedEncoder(module, "mean", find_type(name)).forward(ids)
    assert bool(calls) == compiled_one
    with torch.no_grad():
        assert torch.cosine_similarity(vectors.double(), pool_padded(module.double(), ids), dim=1).min() > 0.999


# ---- dropout


def draw_plainly(seed: int, count: int) -> list[int]:
    """The draws of 16 bits of so many places, from Philox4x32-10 as its paper writes it."""
    blocks: dict[int, list[int]] = {}

    def run(block: int) -> list[int]:
        x, key = [block % 2**32, block >> 32, 0, 0], [seed % 2**32, seed >> 32]
        for _ in range(10):
            first, third = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
            x = [third >> 32 ^ x[1] ^ key[0], third % 2**32, first >> 32 ^ x[3] ^ key[1], first % 2**32]
            key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
        return x

    assert [f"{word:08x}" for word in run(0)] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"] or seed
    draws = []
    for place in range(count):
        block = place // 128 * 16 + place % 16
        words = blocks.setdefault(block, run(block) if block not in blocks else [])
        draws.append(words[place % 128 // 32] >> (16 * (place % 32 // 16)) & 0xFFFF)
    return draws


@EVERY_KERNEL
@pytest.mark.parametrize("seed", [0, 0x0123456789ABCDEF, 2**64 - 1])
def test_dropout_draws_the_papers_numbers_whatever_the_kernel(name, seed):
    """Its own known answer for zeros is in ``draw_plainly``; more than one piece of a thread, and a rest."""
    count = 4096 + 300
    draws = torch.tensor(draw_plainly(seed, count))
    for least in (1, 6554, 65535):
        x, kernel = torch.randn(count).to(find_type(name)), CompiledKernel(name)
        kept = torch.empty(compiled.count_bit_bytes(count), dtype=torch.uint8)
        y = compiled.drop(x, compiled.draw_kept(kept, least / 65536, kernel, seed), 0.2, kernel)
        assert torch.equal(y, torch.where(draws >= least, x * 1.25, 0.0))
        assert np.array_equal(np.unpackbits(kept.numpy(), bitorder="little")[:count], draws >= least)


@EVERY_KERNEL
@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 1 - 1e-9])
def test_dropout_scales_values_and_gradients_by_one_mask(name, p):
    torch.manual_seed(3)
    x = torch.randn(137, 53).to(find_type(name)).requires_grad_()
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        found = drop_fast(x, p, CompiledKernel(name))
    aim = torch.randn_like(found)
    (gradient,) = torch.autograd.grad(found, x, aim)
    stays, factor = found != 0, 1 / (1 - p)
    assert [part.nbytes for part in kept] == [-(-137 * 53 // 128) * 16]  # a bit a number
    assert torch.equal(found, torch.where(stays, x * factor, 0.0))
    assert torch.equal(gradient, torch.where(stays, aim * factor, 0.0))
    assert abs(stays.double().mean().item() - (1 - p)) < 0.03  # five standard deviations


@EVERY_KERNEL
def test_dropout_repeats_with_the_generator_and_with_any_number_of_threads(name):
    kernel, ones = CompiledKernel(name), torch.ones(400_003).to(find_type(name))
    torch.manual_seed(3)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    first, second = drop_fast(ones, 0.1, kernel), drop_fast(ones, 0.1, kernel)
    torch.set_rng_state(state)
    try:
        torch.set_num_threads(2)
        assert torch.equal(first, drop_fast(ones, 0.1, kernel))
    finally:
        torch.set_num_threads(threads)
    assert abs((first != 0).double().mean().item() - 0.9) < 0.003  # five standard deviations are 0.0024
    both = ((first == 0) & (second == 0)).double().mean().item()
    assert abs(both - 0.01) < 0.001  # two draws know nothing of each other


# ---- norms


@EVERY_KERNEL
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (5, 48), (40, 384)])
def test_a_norm_of_a_sum_and_its_gradient_are_those_of_torch_in_float64(name, rows, width):
    torch.manual_seed(0)
    kernel, dtype = CompiledKernel(name), find_type(name)
    x, other, *aims = (torch.randn(rows, width).mul(3).add(1).to(dtype) for _ in range(5))
    norm = torch.randn(width), torch.randn(width)
    total, statistics = torch.empty_like(x), torch.empty(rows, compiled.STATISTICS)
    y = compiled.normalize(x, norm, 1e-5, statistics, kernel, other, total)
    step = 1e-5 if dtype == torch.float32 else 2**-8
    assert torch.equal(total, x + other)
    wide = total.double().requires_grad_()
    true = torch.nn.functional.layer_norm(wide, (width,), *(part.double() for part in norm), 1e-5)
    assert torch.allclose(y.double(), true.detach(), rtol=step, atol=1e-5)
    assert torch.equal(compiled.normalize(total, norm, 1e-5, torch.empty_like(statistics), kernel), y)
    assert torch.equal(compiled.normalize(total, norm, None, statistics, kernel), y)  # taken again
    for added in ((None, None), (aims[1], None), (None, aims[2]), (aims[1], aims[2])):
        given = sum(aim.double() for aim in (aims[0], *added) if aim is not None)
        (expected,) = torch.autograd.grad(true, wide, given, retain_graph=True)
        gradient = aims[0].clone()
        found = compiled.descend_norm(gradient, norm, total, statistics, kernel, added)
        assert found is gradient and (found - expected).norm() <= step * expected.norm() + 1e-5
        plain = compiled.descend_norm(aims[0].clone(), None, None, None, kernel, added)
        assert torch.allclose(plain.double(), given, rtol=step, atol=1e-6)


@EVERY_KERNEL
def test_a_norm_passes_on_what_is_no_number_row_by_row_on_any_number_of_threads(name):
    kernel, x = CompiledKernel(name), torch.randn(70, 32).to(find_type(name))
    x[3, 7], x[69, 0] = float("nan"), float("inf")
    norm, statistics, threads = (torch.ones(32), torch.zeros(32)), torch.empty(70, 2), torch.get_num_threads()
    one = compiled.normalize(x, norm, 1e-5, statistics, kernel)
    try:
        torch.set_num_threads(2)
        two = compiled.normalize(x, norm, 1e-5, statistics, kernel)
    finally:
        torch.set_num_threads(threads)
    lost = ~torch.isfinite(one).all(dim=1)
    assert lost.nonzero().flatten().tolist() == [3, 69] and torch.equal(one[~lost], two[~lost])


@EVERY_KERNEL
def test_rows_that_do_not_go_together_are_refused(name):
    kernel, x = CompiledKernel(name), torch.randn(6, 32).to(find_type(name))
    norm, statistics = (torch.ones(32), torch.zeros(32)), torch.empty(6, 2)
    for wrong in (
        {"norm": (torch.ones(16), torch.zeros(32))},
        {"statistics": torch.empty(6)},
        {"other": x[:5], "total": x.clone()},
        {"other": torch.stack([x, x], dim=-1)[..., 0], "total": x.clone()},
    ):
        with pytest.raises(ValueError, match="does not go with 6 rows of 32 numbers"):
            compiled.normalize(
                **{"x": x, "norm": norm, "epsilon": 1e-5, "statistics": statistics, "kernel": kernel, **wrong}
            )
    with pytest.raises(TypeError, match="the kernel takes torch"):
        compiled.normalize(x, (torch.ones(32).double(), torch.zeros(32)), 1e-5, statistics, kernel)
    with pytest.raises(ValueError, match="bits are drawn 128 at a time: 15 bytes"):
        compiled.draw_kept(torch.empty(15, dtype=torch.uint8), 0.1, kernel)
    with pytest.raises(ValueError, match="16 bytes are not the bits of 192 numbers"):
        compiled.drop(x, torch.empty(16, dtype=torch.uint8), 0.1, kernel)
    with pytest.raises(ValueError, match="16 bytes are not those of the slopes of 192 numbers"):
        compiled.activate(x.clone(), torch.empty(16, dtype=torch.uint8), kernel)


# ---- the encoder on it


def choose_autograd(monkeypatch, chosen: bool):
    """Layers by torch's autograd, where some are written out by hand."""
    run = _RUNS_BY_HAND if not chosen else lambda encoder, layers=None: False
    monkeypatch.setattr(packed.PackedEncoder, "runs_by_hand", run)


_RUNS_BY_HAND = packed.PackedEncoder.runs_by_hand


def build(family: str):
    """As test_packed's, with heads of 16 numbers."""
    torch.manual_seed(0)
    config, model = FAMILIES[family]
    extra = {"embedding_size": 24} if family == "electra" else {}
    module = model(config(**{**SHAPE, "hidden_size": 64}, **extra)).eval()
    for parameter in module.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    settings = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["query", "key", "value", "dense"])
    module = get_peft_model(module, settings)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return module.double()


@EVERY_KERNEL
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("pooling", "recompute"),
    [("mean", 0), ("mean", 1), ("cls", 2), ("cls", "layers")],
)
@pytest.mark.parametrize("most", [packed.SLICE, 100], ids=["one slice", "slices"])
@pytest.mark.parametrize("by_hand", [True, False], ids=["by hand", "by autograd"])
def test_the_encoder_gives_the_padded_float64_vectors_and_gradients(
    name, family, pooling, recompute, most, by_hand, monkeypatch
):
    choose_autograd(monkeypatch, not by_hand)
    monkeypatch.setattr(attention, "find_compiled", lambda *_: CompiledKernel(name))
    monkeypatch.setattr(packed, "SLICE", most)
    module, ids = build(family), draw_ids(ODD_LENGTHS)
    trained = [p for n, p in module.named_parameters() if p.requires_grad and "pooler" not in n]
    weights = torch.randn(len(ids), 64, dtype=torch.float64)
    exact = pool_padded(module, ids, pooling)
    expected = torch.autograd.grad((exact * weights).sum(), trained)
    encoder = packed.PackedEncoder(module.float(), pooling, find_type(name), recompute)
    assert encoder.path.kernel == CompiledKernel(name) and encoder.path.words.endswith(f"({name.split(', ')[1]})")
    vectors = encoder.forward(ids)
    trained = [p for n, p in module.named_parameters() if p.requires_grad and "pooler" not in n]
    found = torch.autograd.grad((vectors.double() * weights).sum(), trained)
    if find_type(name) == torch.float32:
        assert (vectors - exact).abs().max() < 1e-5
        for mine, reference in zip(found, expected, strict=True):
            assert (mine - reference).abs().max() < 1e-4 * reference.abs().max()
    else:
        assert torch.cosine_similarity(vectors.double(), exact, dim=1).min() > 0.998
        for mine, reference in zip(found, expected, strict=True):
            assert torch.cosine_similarity(mine.double().flatten(), reference.flatten(), dim=0) > 0.99


@EVERY_KERNEL
@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("most", [packed.SLICE, 100], ids=["one slice", "slices"])
@pytest.mark.parametrize("by_hand", [True, False], ids=["by hand", "by autograd"])
def test_what_is_computed_again_has_the_same_bits(name, pooling, most, by_hand, monkeypatch):
    """With dropout: the backward pass has the mask of the forward pass."""
    choose_autograd(monkeypatch, not by_hand)
    monkeypatch.setattr(attention, "find_compiled", lambda *_: CompiledKernel(name))
    monkeypatch.setattr(packed, "SLICE", most)
    module, ids = build("roberta").float().train(), draw_ids(ODD_LENGTHS)
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.3
    trained = [p for n, p in module.named_parameters() if p.requires_grad and "pooler" not in n]
    found = {}
    for recompute in (0, 1, 2, "layers"):
        encoder = packed.PackedEncoder(module, pooling, find_type(name), recompute)
        for _ in range(2):  # the second time on memory that held something
            torch.manual_seed(1)
            vectors = encoder.forward(ids)
            found[recompute] = [vectors.detach(), *torch.autograd.grad(vectors.sin().sum(), trained)]
            torch.rand(1)
        assert encoder.runs_by_hand() == by_hand
    assert found[0][1].abs().sum() > 0
    for recompute in (1, 2, "layers"):
        assert all(map(torch.equal, found[recompute], found[0])), recompute


@EVERY_KERNEL
def test_by_hand_and_by_autograd_draw_one_mask_and_agree(name, monkeypatch):
    monkeypatch.setattr(attention, "find_compiled", lambda *_: CompiledKernel(name))
    module, ids, found = build("bert").float().train(), draw_ids(ODD_LENGTHS), []
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.3
    trained = [p for n, p in module.named_parameters() if p.requires_grad and "pooler" not in n]
    for by_autograd in (False, True):
        choose_autograd(monkeypatch, by_autograd)
        torch.manual_seed(1)
        vectors = packed.PackedEncoder(module, "mean", find_type(name)).forward(ids)
        parts = [vectors.detach(), *torch.autograd.grad(vectors.sin().sum(), trained)]
        found.append(torch.cat([part.flatten() for part in parts]))
    step = 1e-5 if find_type(name) == torch.float32 else 0.05
    assert (found[0] - found[1]).norm() < step * found[1].norm()


@EVERY_KERNEL
def test_memory_comes_back_with_the_backward_pass_and_gradients_have_none(name, monkeypatch):
    monkeypatch.setattr(attention, "find_compiled", lambda *_: CompiledKernel(name))
    module = build("bert").requires_grad_(False).float()
    trained = [p.requires_grad_() for n, p in module.named_parameters() if "lora" in n and "pooler" not in n]
    encoder = packed.PackedEncoder(module, "mean", find_type(name))
    vectors = encoder.forward(draw_ids([5, 9]))
    assert not encoder.shelves._free
    (gradient,) = torch.autograd.grad(vectors.sum(), trained[:1], create_graph=True)
    assert len(encoder.shelves._free) == 0  # a graph that may be asked again keeps it
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    del gradient
    vectors.sum().backward()
    assert len(encoder.shelves._free) == 1  # while the vectors are still there


@EVERY_KERNEL
@pytest.mark.parametrize("change", ["a norm trains", "DoRA", "another activation", "norms of half precision"])
def test_what_has_no_kernels_is_left_to_autograd(name, change, monkeypatch):
    monkeypatch.setattr(attention, "find_compiled", lambda *_: CompiledKernel(name))
    config = BertConfig(**{**SHAPE, "hidden_size": 64, "hidden_act": "relu" if "activation" in change else "gelu"})
    module = BertModel(config).requires_grad_(False)
    if "half" in change:
        module.to(torch.bfloat16)
    module = get_peft_model(module, LoraConfig(r=4, target_modules=["query"], use_dora=change == "DoRA"))
    if "trains" in change:
        packed.find_core(module).encoder.layer[1].output.LayerNorm.bias.requires_grad_(True)
    assert not packed.PackedEncoder(module, "mean", find_type(name)).runs_by_hand()
    module = get_peft_model(BertModel(BertConfig(**{**SHAPE, "hidden_size": 64})), LoraConfig(target_modules=["query"]))
    encoder = packed.PackedEncoder(module, "mean", find_type(name))
    assert encoder.runs_by_hand()
    encoder.forward(draw_ids([5, 9])).sum().backward()
    assert all(p.grad is not None for n, p in module.named_parameters() if "lora" in n and "pooler" not in n)


@pytest.mark.parametrize("name", [name for name in KERNELS if name.startswith("bfloat16")] or ["none"])
def test_a_byte_for_a_slope_costs_no_exactness(name, monkeypatch):
    """Of all gradients together, beside those with torch's GELU, which keeps its input in bfloat16."""
    if name == "none":
        pytest.skip("this processor multiplies no pairs of bfloat16")
    monkeypatch.setattr(attention, "find_compiled", lambda *_: CompiledKernel(name))
    module, ids = build("bert"), draw_ids([20] * 30)

    def differentiate(vectors):
        trained = [p for n, p in module.named_parameters() if p.requires_grad and "pooler" not in n]
        return torch.cat([g.double().flatten() for g in torch.autograd.grad(vectors.double().sin().sum(), trained)])

    exact = differentiate(pool_padded(module, ids))
    module.float()
    choose_autograd(monkeypatch, True)
    encoder = packed.PackedEncoder(module, "mean", torch.bfloat16)
    with_bytes = differentiate(encoder.forward(ids))
    encoder.has_gelu = False
    with_torch = differentiate(encoder.forward(ids))
    assert not torch.equal(with_bytes, with_torch)
    assert (with_bytes - exact).norm() < 1.1 * (with_torch - exact).norm() < 0.1 * exact.norm()


# ---- memory


@pytest.mark.slow
def test_the_compilers_sanitizers_find_nothing(tmp_path):
    compiler = shutil.which("cc") or pytest.skip("there is no C compiler")
    if not KERNELS:
        pytest.skip("no compiled kernel for this processor")
    folder, program = Path(compiled.__file__).parent / "csrc", tmp_path / "sanitized"
    sources = [Path(__file__).with_name("sanitized.c"), *folder.glob("*_avx*.c")]
    flags = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{folder}"]
    built = subprocess.run([compiler, *flags, *map(str, sources), "-o", str(program)], text=True, capture_output=True)
    if "asan" in built.stderr or "ubsan" in built.stderr:
        pytest.skip(f"the compiler has no sanitizers: {built.stderr[-200:]}")
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([program], text=True, capture_output=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.splitlines() == KERNELS


# ---- which kernel


@EVERY_KERNEL
def test_every_kernel_passes_the_check_of_its_first_use(name, caplog):
    for size in (16, 32, 64, 256):
        assert attention.check_kernel(name, CompiledKernel(name), CPU, find_type(name), size)
    assert not caplog.records


def test_a_kernel_that_computes_something_else_is_not_used(monkeypatch, caplog):
    """The formula in torch with another scale, in place of the compiled call."""

    def run_wrongly(qkv, gradient, bounds, longest, heads, kernel):
        lengths = bounds.diff().tolist()
        return mix_plainly(1.1 * qkv.float(), lengths, heads) if gradient is None else torch.zeros_like(qkv)

    monkeypatch.setattr(compiled, "attend", run_wrongly)
    monkeypatch.setattr(attention, "find_compiled", lambda *_: CompiledKernel("wrong"))
    path = attention.choose_path(CPU, torch.float32, 64)
    assert (path.layout, path.kernel, path.takes_slices) == ("blocks", None, True)
    assert "the variable-length attention of wrong is not used on cpu (its output is off by" in caplog.text


@pytest.mark.parametrize("held", [False, True])
def test_the_kernel_follows_type_head_size_and_what_torch_is_held_to(held, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2" if held else "AVX512")
    for dtype in (torch.float16, torch.float64):
        assert find_compiled(dtype, 64) is None
    for dtype in (torch.bfloat16, torch.float32):
        assert find_compiled(dtype, 8) is find_compiled(dtype, 20) is find_compiled(dtype, 272) is None
        wanted = [name for name in KERNELS if find_type(name) == dtype and not (held and "512" in name)]
        assert find_compiled(dtype, 64) == (CompiledKernel(wanted[0]) if wanted else None)
        path = attention.choose_path(CPU, dtype, 64)
        assert path.layout == ("flat" if wanted else "blocks") and path.takes_slices


def test_the_list_is_that_of_the_processor():
    """As torch reads the processor's features, by another library."""
    if load_kernels() is None:
        pytest.skip("koret.retrieval._kernels is not built, or switched off")
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else None
    if has is None or "avx2" not in has:
        pytest.skip("this torch does not say what the processor has")
    assert ("float32, AVX2" in KERNELS) == has["avx2"]
    assert ("float32, AVX-512" in KERNELS) == has["avx512_f"]
    assert ("bfloat16, AVX-512" in KERNELS) == has["avx512_bf16"]


def test_a_name_that_is_no_kernel_is_refused():
    if load_kernels() is None:
        pytest.skip("koret.retrieval._kernels is not built, or switched off")
    with pytest.raises(ValueError, match="this processor has no kernel 'float16, SSE'"):
        load_kernels().attend("float16, SSE", 0, 0, 0, 0, 0, 0, 0, 1, 16, 1)


@EVERY_KERNEL
def test_what_does_not_fit_is_refused_before_its_memory_is_read(name):
    qkv, _ = draw(name, [5, 9], 16)
    bounds, kernel = torch.tensor([0, 5, 14], dtype=torch.int32), CompiledKernel(name)
    apply = CompiledAttention.apply
    other = torch.float32 if kernel.dtype == torch.bfloat16 else torch.bfloat16
    for given in ((qkv.to(other), bounds), (qkv, bounds.long()), (qkv.to("meta"), bounds)):
        with pytest.raises(TypeError, match="the kernel takes torch"):
            apply(*given, 9, HEADS, kernel)
    with pytest.raises(TypeError, match="the kernel takes torch"):
        CompiledGelu.apply(qkv.to(other), kernel)
    for cut in ([0, 5, 15], [0, 9, 5], [-1, 5, 14]):  # behind the last token, backwards, before the first
        with pytest.raises(ValueError, match="are not those of 2 texts of at most 9 tokens"):
            apply(qkv, torch.tensor(cut, dtype=torch.int32), 9, HEADS, kernel)
    for longest, heads in ((8, HEADS), (9, 3), (9, 4)):  # a longer text; no whole head; heads of 8
        with pytest.raises(ValueError, match="are not those of 2 texts"):
            apply(qkv, bounds, longest, heads, kernel)


def test_the_variable_chooses_torch(monkeypatch):
    monkeypatch.setenv("KORET_PURE_PYTHON", "1")
    assert attention.choose_path(CPU, torch.float32, 64).words == "padding-free"
