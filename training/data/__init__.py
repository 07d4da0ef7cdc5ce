"""Pictures and captions on their way to batches of latents: read, checked, cut to size, encoded once."""

from .dataset import Batch, Dataset, Example
from .encoding import encode
from .items import Item, items_from_memory, read_folder

__all__ = ["Batch", "Dataset", "Example", "Item", "encode", "items_from_memory", "read_folder"]
