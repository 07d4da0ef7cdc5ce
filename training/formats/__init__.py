"""Files: adapters, their metadata and key tables, checkpoints. Nothing here is ever unpickled."""
