"""Everything a bit-exact resume needs, written whole or not at all, and checked before it is believed.

    checkpoints/
      step-00000400/  weights.safetensors  optimizer.safetensors  random.safetensors  progress.json  manifest.json
      best-00000200/  weights.safetensors  manifest.json

A checkpoint is filled under another name, brought to the device, and published by one rename; its manifest holds
the size and sha256 of every file. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors

from koret.files import remove_folder, remove_leftovers, stage_folder

Parameters = Mapping[str, torch.nn.Parameter]


class DamagedCheckpoint(RuntimeError):
    """A checkpoint's files are not what was written."""


@dataclass
class Snapshot:
    """One moment of a training: tensors on the CPU and plain JSON values."""

    weights: dict[str, torch.Tensor]  # every trained parameter
    optimizer: dict[str, torch.Tensor]  # "<parameter>|<state>"
    random: dict[str, torch.Tensor]  # generator states of torch by process and device: "0/cpu", "0/cuda0", "1/cpu", ...
    progress: dict[str, Any]  # step, best so far, positions, scaler, settings; generator states of Python and NumPy

    def restore(self, parameters: Parameters, optimizer: torch.optim.Optimizer, rank: int = 0) -> None:
        """Put weights, optimizer state and every random state of process ``rank`` back.

        A process the snapshot does not know keeps torch's random state as it is.
        """
        copy_weights(self.weights, parameters)
        optimizer.state.clear()
        for name, parameter in parameters.items():
            state = {k.rpartition("|")[2]: v for k, v in self.optimizer.items() if k.rpartition("|")[0] == name}
            if state:
                optimizer.state[parameter] = {k: v.to(parameter.device, copy=True) for k, v in state.items()}
        _set_random_states(self.random, self.progress["random"], rank)


def take_snapshot(
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
    random_states: Sequence[Mapping[str, torch.Tensor]] | None = None,
) -> Snapshot:
    """Copy the present state. ``progress`` must be plain JSON values.

    ``random_states``: what ``read_random_states`` says in every process that shares the training.
    """
    states = [read_random_states()] if random_states is None else random_states
    name, keys, position, has_gauss, cached = np.random.get_state()
    version, values, gauss = random.getstate()
    plain = {"python": [version, list(values), gauss], "numpy": [name, keys.tolist(), position, has_gauss, cached]}
    return Snapshot(
        weights=copy_to_cpu(parameters),
        optimizer={
            f"{name}|{key}": value.detach().cpu().clone()
            for name, parameter in parameters.items()
            for key, value in optimizer.state.get(parameter, {}).items()
        },
        random={f"{rank}/{device}": state for rank, own in enumerate(states) for device, state in own.items()},
        progress={**progress, "random": plain},
    )


class CheckpointFolder:
    """The ``checkpoints`` directory of a run: the last ``keep`` snapshots, and the best weights they refer to."""

    def __init__(self, path: Path, keep: int, announce: Callable[[str], None]) -> None:
        self.path, self.keep, self.announce = path, keep, announce

    def save(self, step: int, snapshot: Snapshot) -> None:
        """Publish ``snapshot`` as the newest checkpoint, then delete what is no longer needed. Raises DiskFull."""
        self._publish(
            f"step-{step:08d}",
            {
                "weights.safetensors": lambda: dump_tensors(snapshot.weights),
                "optimizer.safetensors": lambda: dump_tensors(snapshot.optimizer),
                "random.safetensors": lambda: dump_tensors(snapshot.random),
                "progress.json": lambda: json.dumps(snapshot.progress, ensure_ascii=False, allow_nan=False).encode(),
            },
        )
        self._prune()

    def save_best(self, step: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Keep ``weights`` as the best so far; the next checkpoint names ``step`` as its best. Raises DiskFull."""
        self._publish(f"best-{step:08d}", {"weights.safetensors": lambda: dump_tensors(dict(weights))})

    def load_newest(self) -> Snapshot | None:
        """The newest checkpoint that is what was written, or None where there is none.

        Damaged ones are announced and set aside as ``damaged-...``.
        """
        if not self.path.is_dir():
            return None
        remove_leftovers(self.path)
        names = self._names("step-")
        for name in reversed(names):
            try:
                files = _read_folder(self.path / name)
                progress = json.loads(files["progress.json"])
                best = progress["best"]["step"] if progress["best"] else None
                if best is not None:
                    self.load_best(best)
            except DamagedCheckpoint as error:
                self.announce(f"checkpoint {name} is damaged and set aside: {error}")
                self._set_aside(name)
                continue
            return Snapshot(
                weights=load_tensors(files["weights.safetensors"]),
                optimizer=load_tensors(files["optimizer.safetensors"]),
                random=load_tensors(files["random.safetensors"]),
                progress=progress,
            )
        if names:
            self.announce("no checkpoint is left: the run starts from the beginning, with the same result")
        return None

    def load_best(self, step: int) -> dict[str, torch.Tensor]:
        """The weights kept as best at ``step``. Raises DamagedCheckpoint."""
        return load_tensors(_read_folder(self.path / f"best-{step:08d}")["weights.safetensors"])

    def _publish(self, name: str, files: Mapping[str, Callable[[], bytes]]) -> None:
        """``files`` make their bytes when their turn comes: one file's at a time are held."""
        sizes = {}
        self.path.mkdir(exist_ok=True)
        with stage_folder(self.path / name) as staging:
            for file, make in files.items():
                data = make()
                sizes[file] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                (staging / file).write_bytes(data)
                del data
            (staging / "manifest.json").write_text(json.dumps({"name": name, "files": sizes}, indent=2) + "\n")

    def _prune(self) -> None:
        steps = self._names("step-")
        for name in steps[: -self.keep]:
            remove_folder(self.path / name)
        needed = {self._best_of(name) for name in steps[-self.keep :]}
        for name in self._names("best-"):
            if name not in needed:
                remove_folder(self.path / name)

    def _best_of(self, name: str) -> str | None:
        try:
            best = json.loads((self.path / name / "progress.json").read_bytes())["best"]
            return f"best-{best['step']:08d}" if best else None
        except (OSError, ValueError, KeyError, TypeError):
            return None  # damaged since it was written: it will never be used

    def _names(self, prefix: str) -> list[str]:
        return sorted(p.name for p in self.path.iterdir() if p.name.startswith(prefix))

    def _set_aside(self, name: str) -> None:
        target = self.path / f"damaged-{name}"
        if target.exists():
            remove_folder(target)
        (self.path / name).rename(target)


def _read_folder(folder: Path) -> dict[str, bytes]:
    """Every file of a published folder, checked against its manifest. Raises DamagedCheckpoint naming the file."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        if manifest["name"] != folder.name:
            raise DamagedCheckpoint(f"{folder.name}/manifest.json belongs to {manifest['name']}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{folder.name}/manifest.json cannot be read ({error})") from error
    files = {}
    for name, (size, digest) in expected.items():
        try:
            data = (folder / name).read_bytes()
        except OSError as error:
            raise DamagedCheckpoint(f"{folder.name}/{name} is missing ({error.strerror})") from error
        if len(data) != size or hashlib.sha256(data).hexdigest() != digest:
            raise DamagedCheckpoint(f"{folder.name}/{name} is not what was written (sha256 differs)")
        files[name] = data
    return files


# ---------------------------------------------------------------- weights and random states


def copy_to_cpu(parameters: Parameters) -> dict[str, torch.Tensor]:
    """Detached copies of parameters by name."""
    return {name: p.detach().cpu().clone().contiguous() for name, p in parameters.items()}


def copy_weights(weights: Mapping[str, torch.Tensor], parameters: Parameters) -> None:
    """Overwrite parameters in place. Raises ValueError when the names or shapes are not theirs."""
    found = {name: tuple(t.shape) for name, t in weights.items()}
    wanted = {name: tuple(p.shape) for name, p in parameters.items()}
    if found != wanted:
        odd = sorted(set(found.items()) ^ set(wanted.items()))[0][0]
        raise ValueError(f"the checkpoint's weights do not fit this model, first at {odd}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def hash_weights(weights: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names and bits of the weights."""
    digest = hashlib.sha256()
    for name, tensor in _sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sorted(items: Iterable[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
    return sorted(items, key=lambda item: item[0])


def read_random_states() -> dict[str, torch.Tensor]:
    """torch's generators in this process, by device."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return tensors


def _set_random_states(tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Any], rank: int) -> None:
    own = {name.partition("/")[2]: state for name, state in tensors.items() if name.startswith(f"{rank}/")}
    if own:
        torch.set_rng_state(own.pop("cpu"))
    for i in range(torch.cuda.device_count() if own else 0):
        if f"cuda{i}" in own:
            torch.cuda.set_rng_state(own[f"cuda{i}"], i)
    version, values, gauss = plain["python"]
    random.setstate((version, tuple(values), gauss))
    name, keys, *rest = plain["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
