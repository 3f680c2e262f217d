"""A device of torch that is not there: what runs on it is computed on the CPU, as strictly as a GPU would have it.

``DEVICE`` holds tensors that no tensor of the CPU may be mixed with (numbers, and indices as on CUDA, may), draws from
a generator of its own, and notes in ``waits`` whenever the program would have to wait for it: a value asked for, a
shape that depends on values, a copy that blocks, as one from memory that is not pinned may. Kernels and how much memory
there is are not what this is about.

Importing registers the device with torch for the whole process and for good: do it in a process of its own.
"""

from __future__ import annotations

import contextlib
import functools
import traceback
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import library
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from koret.retrieval.devices import PINNED

NAME = "pretend"
SOURCES = str(Path(__file__).resolve().parents[2] / "src")
aten = torch.ops.aten
# Operators whose results, or their shapes, have to be known to the program before it goes on.
ASKING = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero",
    "aten::_unique", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::allclose",
}  # fmt: skip


class Wait(NamedTuple):
    """What made the program wait, and the functions of koret it was in, outermost first."""

    what: str
    within: list[str]


waits: list[Wait] = []
_places: dict[int, int] = {}  # of storages on the device: where on the CPU their numbers are
_pinned: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()
_random = {"state": torch.Generator().manual_seed(0).get_state()}


class _Module(_DummyBackendModule):
    """torch.pretend: what torch asks of a device beside its operators."""

    def manual_seed_all(self, seed: int) -> None:
        _random["state"] = torch.Generator().manual_seed(seed).get_state()

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return _random["state"].clone()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        _random["state"] = state.clone()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def _pin(x: torch.Tensor) -> torch.Tensor:
    """x in memory that the device copies from on its own."""
    pinned = x.clone()
    _pinned[id(pinned)] = pinned
    return pinned


_setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
DEVICE = torch.device(NAME, 0)
# The generators of CUDA are what koret saves and puts back beside the CPU's: here they are this device's.
torch.cuda.is_initialized, torch.cuda.device_count = lambda: True, lambda: 1
torch.cuda.get_rng_state_all = lambda: [_random["state"].clone()]
torch.cuda.set_rng_state_all = lambda states: _random.update(state=states[0].clone())
torch.cuda.set_rng_state = lambda state, device=0: _random.update(state=state.clone())

PINNED.add(NAME)
torch.Tensor.pin_memory = _pin

_find_place = torch.UntypedStorage.data_ptr
torch.UntypedStorage.data_ptr = lambda self: _places[self._cdata] if self.device.type == NAME else _find_place(self)


class OnDevice(torch.Tensor):
    """A tensor of the device around one of the CPU."""

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> OnDevice:
        storage = raw.untyped_storage()
        made = torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=DEVICE,
            storage_size=storage.nbytes(),
        )  # fmt: skip
        made.raw = raw
        _places[made.untyped_storage()._cdata] = storage.data_ptr()
        return made

    def __repr__(self) -> str:
        return f"OnDevice({self.raw})"

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(op, args, kwargs or {})


def _run(op: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """One operator, on the CPU; raises RuntimeError where tensors of both sides are mixed."""
    if op is aten._fused_sdp_choice.default:
        return 0  # the formula, of plain operators
    if op is aten._to_copy.default or op is aten.copy_.default:
        return _copy(op, args, kwargs)
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    mine = [x for x in tensors if isinstance(x, OnDevice)]
    strange = [x for x in tensors if not isinstance(x, OnDevice) and x.dim()]
    name = op._schema.name
    if mine and strange:
        if name not in ("aten::index", "aten::index_put_", "aten::_index_put_impl_"):
            shapes = ", ".join(str(tuple(x.shape)) for x in strange)
            raise RuntimeError(f"expected all tensors on one device: {name} of {NAME} got {shapes} of the CPU")
        _note(f"{name}: indices from the CPU")
    masked = name == "aten::index" and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    if mine and (name in ASKING or masked):
        _note(name)
    target = kwargs.get("device")
    on_device = bool(mine) if target is None else torch.device(target).type == NAME
    named = {key: torch.device("cpu") if key == "device" else _lower(value) for key, value in kwargs.items()}
    with _own_generator() if torch.Tag.nondeterministic_seeded in op.tags and on_device else contextlib.nullcontext():
        result = op(*tree_map(_lower, args), **named)
    known = {id(x.raw): x for x in mine}  # what was written in place comes back as what it was
    for x in mine:
        assert x.shape == x.raw.shape, f"{name} has changed the shape of a tensor, which is not made out here"

    def lift(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not on_device:
            return x
        return known[id(x)] if id(x) in known else OnDevice(x)

    return tree_map(lift, result)


def _run_named(op: Any, *args: Any, **kwargs: Any) -> Any:
    return _run(op, args, kwargs)


def _copy(op: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A copy within the device or across; one across that is not told to go ahead is waited for."""
    named = dict(kwargs)
    into = args[0] if op is aten.copy_.default else None
    source = args[0] if into is None else args[1]
    ahead = named.pop("non_blocking", args[2] if into is not None and len(args) > 2 else False)
    target = into.device if into is not None else torch.device(named.pop("device", None) or source.device)
    if target.type != source.device.type and not (ahead and target.type == NAME and id(source) in _pinned):
        how = ", unpinned" if ahead else ""
        _note(f"copy of {tuple(source.shape)} from {source.device.type} to {target.type}{how}")
    if into is not None:
        _lower(into).copy_(_lower(source))
        return into
    named.pop("pin_memory", None)
    raw = op(_lower(source), **named)
    return OnDevice(raw) if target.type == NAME else raw


def _lower(x: Any) -> Any:
    if isinstance(x, (list, tuple)):
        return type(x)(map(_lower, x))
    return x.raw if isinstance(x, OnDevice) else x


@contextlib.contextmanager
def _own_generator() -> Iterator[None]:
    outside = torch.get_rng_state()
    torch.set_rng_state(_random["state"])
    try:
        yield
    finally:
        _random["state"] = torch.get_rng_state()
        torch.set_rng_state(outside)


def _note(what: str) -> None:
    frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(SOURCES)]
    waits.append(Wait(what, [frame.name for frame in frames]))


_every_operator, _own_operators = library.Library("_", "IMPL"), library.Library("aten", "IMPL")
_every_operator.fallback(_run_named, "PrivateUse1")
for _op in (aten.arange.default, aten.arange.start, aten.arange.start_step):  # else made empty and resized
    _own_operators.impl(_op, functools.partial(_run_named, _op), "PrivateUse1")
