"""The compiled passes over texts (``csrc``), or None where they were not built or are not wanted.

Whoever uses ``scan`` has the same in Python beside it, with the same results. KORET_PURE_PYTHON=1 chooses that.
"""

from __future__ import annotations

import os
from types import ModuleType

_VERSION = 1  # of the results; a file built from older source is not used


def load_scan() -> ModuleType | None:
    """The extension module if it is there, of this version and not switched off."""
    if os.environ.get("KORET_PURE_PYTHON", "0") not in ("", "0"):
        return None
    try:
        from koret.data import _scan
    except ImportError:
        return None
    return _scan if _scan.VERSION == _VERSION else None


scan = load_scan()
