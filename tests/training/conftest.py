"""Makes the closed-form Gaussian beside this file importable as ``gaussian``, without a folder on ``sys.path``."""

import importlib.util
import sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("gaussian", Path(__file__).with_name("gaussian.py"))
sys.modules["gaussian"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["gaussian"])
