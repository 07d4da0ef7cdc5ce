"""Everything that knows ComfyUI's internals. A change in ComfyUI touches this folder and no other."""
