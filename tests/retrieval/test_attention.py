"""Variable-length attention: the encoder on it, the call of torch's op, the choice of a path, the check of a kernel.

The kernels themselves run on CUDA only. What surrounds them runs here: with a stand-in of the same signature, with
torch's own op around a stand-in of FlashAttention, and on the meta device, which knows shapes and types but no values.
"""

from __future__ import annotations

import inspect
import logging
import sys
from types import ModuleType

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_packed import FAMILIES, ODD_LENGTHS, SHAPE, build, draw_ids, pool_padded
from transformers import BertConfig, BertModel

from koret.retrieval import attention, packed
from koret.retrieval.attention import AttentionPath, FlatTexts, PaddedTexts, check_kernel, choose_path
from koret.retrieval.layout import plan_flat_layout, plan_padded_layout

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
HALF = [torch.bfloat16, torch.float16]


def cut(bounds):
    return [slice(a, b) for a, b in zip(bounds.tolist()[:-1], bounds.tolist()[1:], strict=True)]


def attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
           enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):  # fmt: skip
    """What varlen_attn computes, text by text; at least in float32, as its kernels add up."""
    assert query.shape == key.shape == value.shape and query.dtype == key.dtype == value.dtype
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and type(max_q) is type(max_k) is int
    assert max_q == max_k == int(cu_seq_q.diff().max()) and cu_seq_q[0] == 0 and cu_seq_q[-1] == len(query)
    assert query.stride(-1) == 1 and (return_aux, window_size, enable_gqa) == (None, (-1, -1), False)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(query.dtype, torch.float32)
    mixed = []
    for own in cut(cu_seq_q):
        q, k, v = (part[own].to(wide).transpose(0, 1) for part in (query, key, value))
        mixed.append((torch.softmax(scale * (q @ k.mT), -1) @ v).transpose(0, 1).to(query.dtype))
    return torch.cat(mixed)


def use_flat(monkeypatch, kernel=attend):
    monkeypatch.setattr(packed, "choose_path", lambda *_: AttentionPath("flat", kernel, "flat"))


def use_padded(monkeypatch):
    monkeypatch.setattr(packed, "choose_path", lambda *_: AttentionPath("padded", None, "padded"))


LAYOUTS = pytest.mark.parametrize("use", [use_flat, use_padded])


def adapt(module, targets=("query", "dense"), **options):
    module = get_peft_model(
        module, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=list(targets), **options)
    )
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return module


def find_trained(module):
    return [p for n, p in module.named_parameters() if p.requires_grad and "pooler" not in n]


# ---- the encoder on a stand-in


def test_the_stand_in_has_the_signature_of_torchs_own():
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    ours, theirs = (inspect.signature(f).parameters for f in (attend, varlen.varlen_attn))
    shared = [name for name in theirs if name in ours]
    assert shared[:7] == list(ours)[:7]
    assert set(theirs) <= set(ours) or "is_causal" in theirs  # torch 2.10 had fewer and another keyword
    assert ours["scale"].default is None and ours["window_size"].default == (-1, -1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
@LAYOUTS
def test_equals_the_padded_forward_at_odd_lengths(use, family, pooling, monkeypatch):
    use(monkeypatch)
    module, ids = build(family), draw_ids(ODD_LENGTHS)
    with torch.no_grad():
        ours = packed.PackedEncoder(module, pooling, torch.float64).forward(ids)
        theirs = pool_padded(module, ids, pooling)
    assert torch.allclose(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("recompute", [0, 2, "layers"])
@LAYOUTS
def test_gives_the_gradients_of_the_padded_forward(use, family, pooling, recompute, monkeypatch):
    use(monkeypatch)
    module, ids = adapt(build(family)).double(), draw_ids(ODD_LENGTHS)
    weights = torch.randn(len(ids), 32, dtype=torch.float64)
    forward = packed.PackedEncoder(module, pooling, torch.float64, recompute).forward
    vectors = forward(ids), pool_padded(module, ids, pooling)
    grads = [torch.autograd.grad((v * weights).sum(), find_trained(module)) for v in vectors]
    for mine, reference in zip(*grads, strict=True):
        assert reference.abs().max() > 0
        assert torch.allclose(mine, reference, atol=1e-10, rtol=1e-9)


@LAYOUTS
def test_full_training_gives_the_gradients_of_the_padded_forward(use, monkeypatch):
    use(monkeypatch)
    module, ids = build("roberta"), draw_ids([3, 50, 1, 90, 64])
    weights = torch.randn(len(ids), 32, dtype=torch.float64)
    vectors = packed.PackedEncoder(module, "mean", torch.float64).forward(ids), pool_padded(module, ids)
    grads = [torch.autograd.grad((v * weights).sum(), find_trained(module)) for v in vectors]
    for mine, reference in zip(*grads, strict=True):
        assert torch.allclose(mine, reference, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("dtype", HALF)
@LAYOUTS
def test_half_precision_stays_close_to_float64(use, dtype, monkeypatch):
    use(monkeypatch)
    module, ids = adapt(build("xlm-roberta"), ["query", "value"]).double(), draw_ids(ODD_LENGTHS * 3)
    weights = torch.randn(len(ids), 32, dtype=torch.float64)
    exact = pool_padded(module, ids)
    expected = torch.autograd.grad((exact * weights).sum(), find_trained(module))
    half = packed.PackedEncoder(module.float(), "mean", dtype).forward(ids)
    assert torch.cosine_similarity(half.double(), exact, dim=1).min() > 0.999
    found = torch.autograd.grad((half * weights).sum(), find_trained(module))
    for mine, reference in zip(found, expected, strict=True):
        assert torch.cosine_similarity(mine.double().flatten(), reference.flatten(), dim=0) > 0.995


@pytest.mark.parametrize("lengths", [[1], [1, 1], [129], [7, 7, 7]], ids=str)
@LAYOUTS
def test_few_and_equal_texts_are_no_exception(use, lengths, monkeypatch):
    use(monkeypatch)
    module, ids = build("bert"), draw_ids(lengths)
    with torch.no_grad():
        ours = packed.PackedEncoder(module, "mean", torch.float64).forward(ids)
    assert torch.allclose(ours, pool_padded(module, ids), atol=1e-12, rtol=0)


def test_a_flat_layout_holds_the_texts_and_nothing_else():
    layout = plan_flat_layout(ODD_LENGTHS)
    assert layout.tokens == sum(ODD_LENGTHS) and layout.lengths == ODD_LENGTHS
    assert [b - a for a, b in zip(layout.starts, [*layout.starts[1:], layout.tokens], strict=True)] == ODD_LENGTHS
    assert layout.groups == [(at, 1, n, None) for at, n in zip(layout.starts, ODD_LENGTHS, strict=True)]


def test_all_layers_share_the_bounds_and_the_kernel_reads_the_projection_where_it_stands(monkeypatch):
    calls, projected = [], []

    def record(q, k, v, *rest):
        calls.append((q, k, v, *rest))
        return attend(q, k, v, *rest)

    def note(qkv, *rest):
        projected.append(qkv)
        return attention.mix_tokens(qkv, *rest)

    use_flat(monkeypatch, record)
    monkeypatch.setattr(packed, "mix_tokens", note)
    packed.PackedEncoder(build("bert"), "mean", torch.float64).forward(draw_ids(ODD_LENGTHS))
    assert len(calls) == SHAPE["num_hidden_layers"]
    tokens, heads, size = sum(ODD_LENGTHS), 4, 8
    for qkv, (q, k, v, *rest) in zip(projected, calls, strict=True):
        steps = [(part.data_ptr() - qkv.data_ptr()) // qkv.element_size() for part in (q, k, v)]
        assert steps == [0, heads * size, 2 * heads * size]
        assert all(part.shape == (tokens, heads, size) and part.stride() == (96, 8, 1) for part in (q, k, v))
        assert rest[0] is rest[1] is calls[0][3] and rest[2:] == [max(ODD_LENGTHS)] * 2


# ---- torch's own op


def run_on_meta(kernel, dtype=torch.bfloat16):
    """Forward and backward of a whole encoder where there are no values: whatever asked for one would raise."""
    module = adapt(BertModel(BertConfig(**SHAPE)), ["query", "key", "value"]).to("meta").train()
    forward = packed.PackedEncoder(module, "mean", dtype)
    vectors = forward.forward(draw_ids(ODD_LENGTHS))
    return vectors, torch.autograd.grad(vectors.sum(), find_trained(module))


def test_torchs_op_takes_the_call_and_no_layer_waits_for_a_value(monkeypatch):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    use_flat(monkeypatch, varlen.varlen_attn)
    vectors, grads = run_on_meta(varlen.varlen_attn)
    assert vectors.shape == (len(ODD_LENGTHS), 32) and vectors.dtype == torch.float32
    assert len(grads) > 0 and all(grad.device.type == "meta" for grad in grads)


def test_no_layer_waits_for_a_value_where_texts_are_padded(monkeypatch):
    use_padded(monkeypatch)
    vectors, grads = run_on_meta(None)
    assert vectors.shape == (len(ODD_LENGTHS), 32)
    assert len(grads) > 0 and all(grad.device.type == "meta" for grad in grads)


def test_padded_attention_keeps_no_probabilities():
    """What the fused kernel keeps grows with the tokens, not with their square."""
    heads, kept = 2, {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    qkv = torch.randn(4 * 256, 3 * heads * 32, requires_grad=True)
    layout = plan_padded_layout([256, 250, 249, 255], most=1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mixed = attention.mix_padded(qkv, PaddedTexts(layout.groups), heads)
    for start, length in zip(layout.starts, layout.lengths, strict=True):
        own = slice(start, start + length)
        torch.testing.assert_close(mixed[own], attention.mix_plainly(qkv[own], [length], heads))
    assert max(kept.values()) < 4 * heads * 256 * 256


def test_waiting_for_a_value_would_be_noticed(monkeypatch):
    use_flat(monkeypatch)  # reads the bounds
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        run_on_meta(attend)


def test_torchs_op_differentiates_with_its_own_backward():
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    qkv = torch.randn(20, 96, device="meta", dtype=torch.bfloat16, requires_grad=True)
    bounds = torch.empty(3, dtype=torch.int32, device="meta")
    mixed = attention.mix_flat(qkv, FlatTexts(bounds, 15, varlen.varlen_attn), 4)
    assert mixed.shape == (20, 32) and mixed.dtype == torch.bfloat16
    assert "varlen_attn" in type(mixed.grad_fn.next_functions[0][0]).__name__
    (gradient,) = torch.autograd.grad(mixed, qkv, torch.empty_like(mixed))
    assert gradient.shape == qkv.shape and gradient.dtype == qkv.dtype


def check_with_meta(op, answer, arguments, named):
    """The real operator takes these arguments and gives tensors of these shapes, as far as its meta kernel knows."""

    def lower(x):
        return x.to("meta") if isinstance(x, torch.Tensor) else x

    expected = op(*map(lower, arguments), **{name: lower(x) for name, x in named.items()})
    for mine, real in zip(answer, expected, strict=False):
        assert mine.shape == real.shape


def test_the_encoder_on_torchs_op_around_a_stand_in_of_flash_attention(monkeypatch):
    """Everything of torch but the two compiled kernels: custom op, saved tensors, backward, scale."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    forward, backward = torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward
    scales = []

    def flash(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, *rest, scale=None, **named):
        out, lse = torch.empty_like(query, memory_format=torch.contiguous_format), query.new_empty(query.shape[1::-1])
        scales.append(scale)
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        for own in cut(cum_seq_q):
            scores = factor * query[own].transpose(0, 1) @ key[own].permute(1, 2, 0)
            out[own] = (torch.softmax(scores, -1) @ value[own].transpose(0, 1)).transpose(0, 1)
            lse[:, own] = scores.logsumexp(-1)
        empty = query.new_empty(0)
        answer = out, lse, empty, empty, empty
        check_with_meta(
            forward,
            answer[:2],
            (query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, *rest),
            {"scale": scale, **named},
        )
        return answer

    def flash_backward(grad_out, query, key, value, out, lse, cum_seq_q, cum_seq_k, max_q, max_k, *rest, scale=None,
                       **named):  # fmt: skip
        answer = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in (query, key, value)]
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        for own in cut(cum_seq_q):
            g, q, k, v, o = (part[own].transpose(0, 1) for part in (grad_out, query, key, value, out))
            p = torch.exp(factor * q @ k.mT - lse[:, own, None])
            ds = p * (g @ v.mT - (g * o).sum(-1, keepdim=True)) * factor
            for part, values in zip(answer, (ds @ k, ds.mT @ q, p.mT @ g), strict=True):
                part[own] = values.transpose(0, 1)
        check_with_meta(
            backward, answer, (grad_out, query, key, value, out, lse, cum_seq_q, cum_seq_k, max_q, max_k, *rest),
            {"scale": scale, **named},
        )  # fmt: skip
        return tuple(answer)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", flash_backward)
    use_flat(monkeypatch, varlen.varlen_attn)
    module, ids = adapt(build("bert"), ["query", "key", "value"]).double(), draw_ids(ODD_LENGTHS)
    weights = torch.randn(len(ids), 32, dtype=torch.float64)
    vectors = packed.PackedEncoder(module, "mean", torch.float64).forward(ids), pool_padded(module, ids)
    assert torch.allclose(*vectors, atol=1e-12, rtol=0)
    grads = [torch.autograd.grad((v * weights).sum(), find_trained(module)) for v in vectors]
    for mine, reference in zip(*grads, strict=True):
        assert torch.allclose(mine, reference, atol=1e-10, rtol=1e-9)
    assert scales == [None] * SHAPE["num_hidden_layers"]  # the kernel's own, once
    assert check_kernel("torch", varlen.varlen_attn, CPU, torch.float32, 16)


# ---- which path


def provide(monkeypatch, torch_has: bool, flash_has: bool):
    """The two libraries there or not, with a kernel each."""
    for name, attribute, there in (
        ("torch.nn.attention.varlen", "varlen_attn", torch_has),
        ("flash_attn", "flash_attn_varlen_func", flash_has),
    ):
        module = ModuleType(name)
        setattr(module, attribute, lambda *inputs: attend(*inputs))
        monkeypatch.setitem(sys.modules, name, module if there else None)


@pytest.mark.parametrize(
    ("dtype", "capability", "head_size", "torch_has", "flash_has", "layout", "words"),
    [
        (torch.bfloat16, (8, 0), 64, True, False, "flat", "padding-free, variable-length attention (torch)"),
        (torch.bfloat16, (9, 0), 32, True, True, "flat", "padding-free, variable-length attention (torch)"),
        (torch.float16, (8, 6), 256, True, False, "flat", "padding-free, variable-length attention (torch)"),
        (torch.float16, (12, 0), 8, False, True, "flat", "padding-free, variable-length attention (flash-attn)"),
        (torch.float32, (9, 0), 64, True, True, "padded", "float32 has no variable-length kernel"),
        (torch.float64, (9, 0), 64, True, True, "padded", "float64 has no variable-length kernel"),
        (torch.float16, (7, 5), 64, True, True, "padded", "a device of compute capability 7.5 has no"),
        (torch.bfloat16, (8, 0), 264, True, True, "padded", "heads of 264 numbers have no variable-length kernel"),
        (torch.bfloat16, (8, 0), 20, True, True, "padded", "heads of 20 numbers have no variable-length kernel"),
        (torch.bfloat16, (8, 0), 64, False, False, "padded", "has no variable-length attention, and flash-attn is not"),
    ],
)
def test_the_path_follows_type_device_heads_and_libraries(
    dtype, capability, head_size, torch_has, flash_has, layout, words, monkeypatch
):
    provide(monkeypatch, torch_has, flash_has)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention, "check_kernel", lambda *_: True)
    path = choose_path(CUDA, dtype, head_size)
    assert path.layout == layout and words in path.words and (path.kernel is not None) == (layout == "flat")
    assert layout == "flat" or path.words.startswith("texts of like length padded together (")


def test_a_cpu_takes_blocks_where_no_kernel_was_compiled_and_another_device_pads(monkeypatch):
    monkeypatch.setenv("KORET_PURE_PYTHON", "1")
    assert choose_path(CPU, torch.bfloat16, 64) == AttentionPath("blocks", None, "padding-free")
    words = "texts of like length padded together (a device of type mps has no variable-length kernel)"
    assert choose_path(torch.device("mps"), torch.float32, 64) == AttentionPath("padded", None, words)


def test_what_is_installed_is_found():
    kernels = attention.find_kernels()
    if hasattr(torch.nn.attention, "varlen"):
        assert kernels["torch"] is torch.nn.attention.varlen.varlen_attn
    assert set(kernels) <= {"torch", "flash-attn"}


def test_a_kernel_that_fails_its_check_gives_way_to_the_next_and_then_to_padding(monkeypatch):
    provide(monkeypatch, True, True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    failed = []

    def check(name, *_):
        return name not in failed

    monkeypatch.setattr(attention, "check_kernel", check)
    failed.append("torch")
    assert choose_path(CUDA, torch.bfloat16, 64).words == "padding-free, variable-length attention (flash-attn)"
    failed.append("flash-attn")
    path = choose_path(CUDA, torch.bfloat16, 64)
    assert path.layout == "padded" and path.kernel is None
    failed_check = "the variable-length attention of flash-attn failed its check"
    assert path.words == f"texts of like length padded together ({failed_check})"


def test_the_path_is_decided_once_for_a_device(monkeypatch):
    decided = []
    monkeypatch.setattr(packed, "choose_path", lambda *asked: decided.append(asked) or choose_path(*asked))
    forward = packed.PackedEncoder(build("bert"), "mean", torch.bfloat16)
    for _ in range(3):
        forward.forward(draw_ids([4, 9]))
    assert decided == [(CPU, torch.bfloat16, 8)]


# ---- the check of a kernel


class RoundedAway(torch.autograd.Function):
    """Right forward; a gradient of q and k that is scaled once too often."""

    @staticmethod
    def forward(ctx, q, k, v, bounds, longest):
        ctx.save_for_backward(q, k, v)
        ctx.rest = bounds, longest
        return attend(q, k, v, bounds, bounds, longest, longest)

    @staticmethod
    def backward(ctx, gradient):
        bounds, longest = ctx.rest
        with torch.enable_grad():
            own = [part.detach().requires_grad_() for part in ctx.saved_tensors]
            dq, dk, dv = torch.autograd.grad(attend(*own, bounds, bounds, longest, longest), own, gradient)
        return dq * own[0].shape[-1] ** -0.5, dk, dv, None, None


def across_texts(q, k, v, bounds, _, longest, __):
    together = torch.tensor([0, len(q)], dtype=torch.int32)
    return attend(q, k, v, together, together, len(q), len(q))


def last_token_lost(q, k, v, *rest):
    mixed = attend(q, k, v, *rest)
    return torch.cat([mixed[:-1], torch.zeros_like(mixed[-1:])])


def no_kernel(*_):
    raise RuntimeError("no kernel image is available for execution on the device\nCUDA kernel errors might be reported")


WRONG = {
    "scaled twice": (lambda q, *rest: attend(q * q.shape[-1] ** -0.5, *rest), "its output is off by"),
    "not scaled": (lambda *inputs: attend(*inputs, scale=1.0), "its output is off by"),
    "scaled by a tenth more": (lambda q, *rest: attend(q, *rest, scale=1.1 * q.shape[-1] ** -0.5), "its output is off"),
    "scaled by a twentieth more": (lambda q, *rest: attend(q, *rest, scale=1.05 * q.shape[-1] ** -0.5), "is off by"),
    "one softmax over all texts": (across_texts, "its output is off by"),
    "a token lost": (last_token_lost, "its output is off by"),
    "not a number": (lambda *inputs: attend(*inputs) * float("nan"), "its output is off by nan"),
    "a wrong gradient": (lambda q, k, v, b, _, n, __: RoundedAway.apply(q, k, v, b, n), "gradient of q is off by"),
    "no gradient": (lambda *inputs: attend(*inputs).detach(), "RuntimeError: element 0 of tensors does not require"),
    "raises": (no_kernel, "RuntimeError: no kernel image is available for execution on the device)"),
}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_kernel_is_not_used_and_a_warning_says_what_it_did(wrong, dtype, caplog):
    kernel, words = WRONG[wrong]
    with caplog.at_level(logging.WARNING, logger="koret"):
        assert not check_kernel("torch", kernel, CPU, dtype, 64)
    (record,) = caplog.records
    assert words in record.getMessage() and "of torch is not used on cpu" in record.getMessage()
    assert "\n" not in record.getMessage()


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("head_size", [8, 32, 64, 128, 256])
def test_a_right_kernel_passes(head_size, dtype, caplog):
    assert check_kernel("torch", attend, CPU, dtype, head_size)
    assert not caplog.records


def test_the_check_draws_nothing_and_is_no_matter_of_the_callers_modes():
    state, kept = torch.get_rng_state(), []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16),
                 torch.autograd.graph.saved_tensors_hooks(keep, keep)):  # fmt: skip
        with mode:
            assert check_kernel("torch", lambda *inputs: attend(*inputs), CPU, torch.float16, 32)  # checked each time
    assert not kept and torch.equal(torch.get_rng_state(), state)


def test_memory_that_runs_out_is_not_held_against_the_kernel():
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        check_kernel("torch", full, CPU, torch.bfloat16, 64)


# ---- on a device


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", HALF)
def test_on_cuda_flat_and_padded_texts_give_the_same(dtype, monkeypatch):
    module = BertModel(BertConfig(**{**SHAPE, "hidden_size": 256, "intermediate_size": 512})).eval()
    module, ids = adapt(module, ["query", "key", "value"]), draw_ids(ODD_LENGTHS * 3)
    weights = torch.randn(len(ids), 256, dtype=torch.float64)
    exact = pool_padded(module.double(), ids)
    expected = torch.autograd.grad((exact * weights).sum(), find_trained(module))
    module = module.float().cuda()
    device = next(module.parameters()).device
    chosen = choose_path(device, dtype, 64)
    if torch.cuda.get_device_capability(device) >= (8, 0) and attention.find_kernels():
        assert chosen.layout == "flat", chosen.words
    run_slice = packed.PackedEncoder._run_slice

    def run_without_waiting(*inputs):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run_slice(*inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    for path in (chosen, AttentionPath("padded", None, "padded")):
        monkeypatch.setattr(packed, "choose_path", lambda *_, path=path: path)
        forward = packed.PackedEncoder(module, "mean", dtype)
        forward.forward(ids)  # frozen weights are prepared once
        monkeypatch.setattr(packed.PackedEncoder, "_run_slice", run_without_waiting)
        vectors = forward.forward(ids)
        monkeypatch.setattr(packed.PackedEncoder, "_run_slice", run_slice)
        assert torch.cosine_similarity(vectors.double().cpu(), exact, dim=1).min() > 0.999
        found = torch.autograd.grad((vectors * weights.to(device)).sum(), find_trained(module))
        for mine, reference in zip(found, expected, strict=True):
            assert torch.cosine_similarity(mine.double().cpu().flatten(), reference.flatten(), dim=0) > 0.99
