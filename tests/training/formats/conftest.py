"""Makes the module trees beside this file importable as ``adapter_models``, without a folder on ``sys.path``."""

import importlib.util
import sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("adapter_models", Path(__file__).with_name("adapter_models.py"))
sys.modules["adapter_models"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["adapter_models"])
