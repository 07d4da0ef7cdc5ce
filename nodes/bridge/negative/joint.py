"""Negative prompts where image and text share one attention."""

from typing import Any

# Class of a diffusion model -> attach(model, negatives, guidance, gate). A class counts for what derives from it.
JOINT: dict[str, Any] = {}
