"""The compiled parts of koret: each has Python code beside it that does the same, slower."""

from __future__ import annotations

import importlib
import os
from types import ModuleType


def load_extension(name: str, version: int) -> ModuleType | None:
    """The extension module ``name`` if it is there, of this version of calls and results, and not switched off.

    KORET_PURE_PYTHON=1 switches all of them off. A file built from older source is not used.
    """
    if os.environ.get("KORET_PURE_PYTHON", "0") not in ("", "0"):
        return None
    try:
        module = importlib.import_module(name)
    except ImportError:
        return None
    return module if module.VERSION == version else None
