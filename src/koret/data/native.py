"""The compiled passes over texts (``csrc``), or None where they were not built or are not wanted.

Whoever uses ``scan`` has the same in Python beside it, with the same results. KORET_PURE_PYTHON=1 chooses that.
"""

from __future__ import annotations

from koret.native import load_extension

VERSION = 1  # of the results
scan = load_extension("koret.data._scan", VERSION)
