"""What the encoders answered, kept in a run's folder, so that a run sees the same bits when it goes on.

A VAE that works in tiles where memory is short, or a text encoder that is on the CPU this time, answers a little
differently from the time before.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...training.data.cache import digest
from ...training.formats.state import load_state, save_state

logger = logging.getLogger(__name__)


class Encodings:
    """Answers by what was asked. With the folder None nothing is kept."""

    def __init__(self) -> None:
        self.folder: Path | None = None

    def recall(self, kind: str, asked: Tensor | str, make: Callable[[], Any]) -> Any:
        """The answer that is kept, or else what ``make`` answers now: tensors in dicts and lists, on the CPU."""
        if self.folder is None:
            return make()
        path = self.folder / f"{kind}-{digest(asked)}.safetensors"
        if path.exists():
            try:
                with torch.inference_mode(False):  # tensors that autograd accepts
                    return load_state(path)
            except (ValueError, OSError) as error:
                logger.warning("%s is made again: %s", path, error)
        answer = make()
        try:
            save_state(path, answer)
        except TypeError:  # an encoder of another pack answers with objects of its own: encoded again each time
            logger.debug("the answer of the %s encoder cannot be kept", kind)
        except OSError as error:
            logger.warning("the answer of the %s encoder cannot be kept: %s", kind, error)
        return answer
