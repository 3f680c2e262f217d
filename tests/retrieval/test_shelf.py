"""Memory that many tensors share: never lent twice, used again when nothing is left on it."""

import gc

import torch

from koret.retrieval.shelf import LINE, ShelfStore


def test_tensors_stand_side_by_side_and_apart():
    shelf = ShelfStore().open(1000 + 300 * 2 + 128 * 8, 3)
    taken = [shelf.take((10, 100), torch.uint8), shelf.take((300,), torch.bfloat16), shelf.take((8, 16), torch.float64)]
    assert all(x.data_ptr() % LINE == 0 and x.is_contiguous() for x in taken)
    assert len({x.untyped_storage().data_ptr() for x in taken}) == 1
    before = [x._version for x in taken]
    for value, x in enumerate(taken, 1):
        x.fill_(value)
    for value, (x, version) in enumerate(zip(taken, before, strict=True), 1):
        assert (x == value).all() and x._version == version + 1  # what is written to one is not told of the others


def test_a_full_shelf_gives_other_memory():
    shelf = ShelfStore().open(1000, 1)
    first, second = shelf.take((1000,), torch.uint8), shelf.take((1000,), torch.uint8)
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    assert second.shape == (1000,)


def test_memory_comes_back_when_its_last_tensor_is_gone():
    store = ShelfStore()
    shelf = store.open(4000, 1)
    place = shelf.take((1000,), torch.float32)
    where, kept = place.untyped_storage().data_ptr(), place[5:7]
    del shelf, place
    gc.collect()
    other = store.open(4000, 1)  # a view still stands on the first
    assert other.take((1,), torch.uint8).untyped_storage().data_ptr() != where
    kept.fill_(1)
    del kept
    gc.collect()
    assert store.open(3000, 1).take((1,), torch.uint8).untyped_storage().data_ptr() == where


def test_the_oldest_memory_is_lent_first():
    store = ShelfStore()
    shelves = [store.open(1000, 1) for _ in range(3)]
    where = [shelf._memory.data_ptr() for shelf in shelves]
    for at in (1, 2, 0):  # in whatever order it comes back
        shelves[at] = None
    gc.collect()
    again = [store.open(900, 1) for _ in range(3)]
    assert [shelf._memory.data_ptr() for shelf in again] == where


def test_memory_of_another_size_is_let_go():
    store = ShelfStore()
    store.open(10_000, 1)
    assert len(store._free) == 1
    small = store.open(1000, 1)
    assert not store._free  # ten times what was asked for
    del small
    store.open(2000, 1)
    assert [len(memory) for memory in store._free.values()] == [2000 + 2 * LINE]


class Double(torch.autograd.Function):
    """2 a, put on a shelf and read there for the gradient of its square."""

    @staticmethod
    def forward(ctx, a, shelf):
        twice = torch.add(a, a, out=shelf.take(tuple(a.shape), a.dtype))
        ctx.save_for_backward(twice)
        return twice.square()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 4 * ctx.saved_tensors[0], None


def test_a_graph_keeps_its_memory_until_it_is_gone():
    store = ShelfStore()
    a = torch.randn(64, 32, requires_grad=True)

    def run():
        return Double.apply(a, store.open(64 * 32 * 4, 1)).sum()

    first, second = run(), run()  # both wait for their backward pass
    for loss in (second, first):
        (found,) = torch.autograd.grad(loss, a)
        assert torch.allclose(found, 8 * a)
    del first, second, loss
    gc.collect()
    assert len(store._free) == 2
