"""Rebuilds the embedded model from nothing: oracle, autoencoder, latents, transformer, model card."""
