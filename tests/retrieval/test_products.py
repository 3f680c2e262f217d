"""Ways to multiply on a CPU: the same numbers, and the faster way by a clock that tests can set."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from koret.retrieval import products
from koret.retrieval.encoder import choose_precision

WEIGHTS = [torch.ones(3, 32)]


@pytest.fixture
def clock(monkeypatch):
    """Seconds of a product by type and way, and what was multiplied: nothing else takes time."""
    seconds: dict[tuple[torch.dtype, str], float] = {}
    taken: list[tuple[torch.dtype, str]] = []
    now = [0.0]

    def take(way, x):
        taken.append((x.dtype, way))
        now[0] += seconds[x.dtype, way]

    monkeypatch.setattr(products.F, "linear", lambda x, weight: take("plain", x))
    monkeypatch.setattr(products, "multiply_ordered", lambda x, weight: take("ordered", x))
    monkeypatch.setattr(products.time, "perf_counter", lambda: now[0])
    products.prefers_order.cache_clear()
    yield seconds, taken
    products.prefers_order.cache_clear()


def hold_to(monkeypatch, capability: str, ordered: bool = True) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(products, "can_order", lambda dtype, weights: ordered)
    monkeypatch.setattr(products, "order_weight", lambda weight: weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_ordered_weight_gives_the_same_product(dtype):
    if not products.can_order(dtype, [torch.ones(3, 32, dtype=dtype)]):
        pytest.skip("oneDNN does not multiply this type here")
    x, weight, bias = (torch.randn(shape, dtype=dtype) for shape in ((7, 32), (20, 32), (20,)))
    exact = F.linear(x.double(), weight.double(), bias.double())
    off = (products.multiply_ordered(x, products.order_weight(weight), bias).double() - exact).abs().max()
    assert off <= 4 * torch.finfo(dtype).eps * exact.abs().max()
    transposed = products.order_weight(weight.t())  # as the backward pass has it
    exact = F.linear(torch.ones(7, 20).double(), weight.t().double())
    off = (products.multiply_ordered(torch.ones(7, 20, dtype=dtype), transposed).double() - exact).abs().max()
    assert off <= 4 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize(
    ("capability", "seconds", "prefers"),
    [
        ("AVX512", None, True),  # known
        ("AVX2", (0.9, 1.0), True),
        ("AVX2", (0.97, 1.0), False),  # not worth a second copy of the weights
        ("AVX2", (1.2, 1.0), False),
        ("NO AVX", (0.5, 1.0), True),
    ],
)
def test_without_avx512_the_order_of_many_float32_tokens_is_measured_once(
    clock, capability, seconds, prefers, monkeypatch
):
    times, taken = clock
    hold_to(monkeypatch, capability)
    times.update({(torch.float32, way): t for way, t in zip(("ordered", "plain"), seconds or (), strict=False)})
    assert products.prefers_order() == products.gains_from_order(torch.float32, WEIGHTS, products.FEW + 1) == prefers
    assert len(taken) == (0 if seconds is None else 2 * products.ROUNDS)


def test_what_is_known_is_not_measured(clock, monkeypatch):
    _, taken = clock
    hold_to(monkeypatch, "AVX2")
    many = products.FEW + 1
    assert products.gains_from_order(torch.float32, WEIGHTS, products.FEW)
    assert products.gains_from_order(torch.bfloat16, WEIGHTS, many)
    assert products.gains_from_order(torch.float32, WEIGHTS, many, prefers=True)
    assert not products.gains_from_order(torch.float32, WEIGHTS, many, prefers=False)
    monkeypatch.setattr(products, "can_order", lambda dtype, weights: False)
    assert not products.gains_from_order(torch.float32, WEIGHTS, many, prefers=True) and not products.prefers_order()
    assert taken == []


def test_only_frozen_weights_of_known_types_are_ordered():
    assert products.can_order(torch.float32, WEIGHTS)
    assert not products.can_order(torch.float64, WEIGHTS)
    assert not products.can_order(torch.float32, [torch.ones(3, 32, requires_grad=True)])
    assert not products.can_order(torch.float32, [torch.ones(3, 32, device="meta")])


def test_measuring_draws_nothing_from_the_generator_of_others(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    products.prefers_order.cache_clear()
    before = torch.get_rng_state()
    assert products.prefers_order() in (False, True) and choose_precision("cpu") in ("fp32", "bf16")
    assert torch.equal(torch.get_rng_state(), before)
    products.prefers_order.cache_clear()


# ------------------------------------------------------------ precision


def test_the_first_product_finds_how_many_onednn_may_keep(monkeypatch):
    """It reads that once; a training chooses its precision before it loads its encoder."""
    name, found = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", []
    monkeypatch.setenv(name, "")  # so that what is set below is taken back
    monkeypatch.delenv(name)
    for product in ("linear", "multiply_ordered"):
        home = products.F if product == "linear" else products
        monkeypatch.setattr(home, product, lambda x, weight: found.append(products.os.environ.get(name)))
    choose_precision("cpu")
    assert set(found) == {products.PRODUCTS_KEPT}


@pytest.mark.parametrize(("slower", "chosen", "rounds"), [(torch.bfloat16, "fp32", 3), (torch.float32, "bf16", 40)])
def test_a_type_without_hardware_for_it_is_given_up_after_three_products(clock, slower, chosen, rounds, monkeypatch):
    times, taken = clock
    hold_to(monkeypatch, "AVX2", ordered=False)
    times.update({(dtype, "plain"): 0.05 if dtype == slower else 0.01 for dtype in (torch.bfloat16, torch.float32)})
    assert choose_precision("cpu") == chosen
    assert [dtype for dtype, _ in taken].count(slower) == rounds == len(taken) / 2


def test_types_are_compared_the_way_they_would_be_multiplied(clock, monkeypatch):
    """bfloat16 that is twice as fast as MKL's float32, but not as oneDNN's, gains nothing."""
    times, _ = clock
    hold_to(monkeypatch, "AVX512")
    times.update({(torch.float32, "plain"): 2.0, (torch.float32, "ordered"): 1.0, (torch.bfloat16, "ordered"): 0.9})
    assert choose_precision("cpu") == "fp32"
    times[torch.bfloat16, "ordered"] = 0.5
    assert choose_precision("cpu") == "bf16"
