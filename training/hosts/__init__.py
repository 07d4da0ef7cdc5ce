"""Models that the core can train without ComfyUI."""
