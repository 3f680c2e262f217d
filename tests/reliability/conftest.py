"""The toy model, toy data and settings of the training tests, for the reliability tests too."""

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location("toys", Path(__file__).parents[1] / "training" / "conftest.py")
_toys = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_toys)

make_config, one_thread, silent = _toys.make_config, _toys.one_thread, _toys.silent
tiny_model, toy_data = _toys.tiny_model, _toys.toy_data
