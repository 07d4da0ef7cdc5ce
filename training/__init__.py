"""Stylewright's training core: noise, densities, adapters, hosts and loops, with no ComfyUI in sight."""
