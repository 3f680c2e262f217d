"""The toy model, toy data and settings of the training tests, for the reliability tests too."""

import importlib.util
import sys
from pathlib import Path

TRAINING = Path(__file__).parents[1] / "training"
sys.path.append(str(TRAINING))  # where toys.py lies, which that conftest imports

_spec = importlib.util.spec_from_file_location("training_conftest", TRAINING / "conftest.py")
_shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_shared)

make_config, one_thread, silent = _shared.make_config, _shared.one_thread, _shared.silent
tiny_model, toy_data = _shared.tiny_model, _shared.toy_data
