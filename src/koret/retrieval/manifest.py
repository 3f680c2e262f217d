"""What a folder index consists of, in one file replaced in one step; the writer's lock; damage named.

The manifest names the segments that count, the size and hash of each of their files, and what is deleted in them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from koret import files

SEAL = "seal"  # key of the digest of everything else in a JSON file


class Damaged(ValueError):
    """Files of an index are missing or not as they were written."""


def take_lock(path: Path) -> int:
    """Hold the lock file for as long as the returned descriptor is open; RuntimeError where another process does."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise RuntimeError(f"another process is writing to {path.parent}: wait until it is done") from None
    return descriptor


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Replace the manifest of the index ``path`` in one step."""
    body = json.dumps(manifest, sort_keys=True)
    whole = json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "manifest": manifest}, sort_keys=True)
    files.write_file(path / "manifest.json", whole.encode())


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest as it was written; raises Damaged."""
    file = path / "manifest.json"
    try:
        whole = json.loads(file.read_bytes())
        manifest = whole["manifest"]
        digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    except FileNotFoundError:
        raise explain_damage(file, "it is missing") from None
    except (ValueError, KeyError, TypeError) as error:
        raise explain_damage(file, str(error)) from None
    if digest != whole.get("sha256"):
        raise explain_damage(file, "its content changed")
    return manifest


def hash_file(path: Path) -> str:
    """SHA-256 of a file, as hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _hash_all(file)


def _hash_all(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def seal(info: dict[str, Any]) -> dict[str, Any]:
    """``info`` with the digest of what it says, to be written as JSON."""
    return {**info, SEAL: _hash_json(info)}


def is_sealed(written: dict[str, Any]) -> bool | None:
    """Whether what was read says what was sealed; None where it was written before there were seals."""
    return written[SEAL] == _hash_json({k: v for k, v in written.items() if k != SEAL}) if SEAL in written else None


def verify_files(path: Path, manifest: dict[str, Any]) -> list[str]:
    """Read every file of the index ``path`` once; returns those that cannot be checked. Raises Damaged."""
    for record in manifest["segments"]:
        noted = [(name, digest) for name, (_, digest) in record["files"].items()]
        for name, digest in [*noted, *([record["deleted"]] if record["deleted"] else [])]:
            file = path / "segments" / record["name"] / name
            if hash_file(file) != digest:
                raise explain_damage(file, "its content changed")
    sealed = is_sealed(json.loads((path / "index.json").read_bytes()))
    if sealed is False:
        raise explain_damage(path / "index.json", "its content changed")
    return [] if sealed else ["index.json"]


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def explain_damage(file: Path, what: str) -> Damaged:
    """The error that names a damaged file and what to do."""
    return Damaged(
        f"the index is damaged: {file}: {what}. Restore it from a copy, or delete the index and build it again"
    )
