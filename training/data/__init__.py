"""Pictures and captions on their way to batches of latents: read, checked, cut to size, encoded once."""
