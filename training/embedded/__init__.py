"""A small FLUX of our own: the world it draws, its parts, and the command that rebuilds it from nothing."""
