"""Where the shipped weights are."""

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class Weights:
    """The files of one embedded model."""

    folder: Path = FOLDER

    @property
    def transformer(self) -> Path:
        return self.folder / "transformer.safetensors"

    @property
    def text_encoder(self) -> Path:
        return self.folder / "text_encoder.safetensors"

    @property
    def autoencoder(self) -> Path:
        return self.folder / "autoencoder.safetensors"

    @property
    def student(self) -> Path:
        """An adapter of the transformer, with which it draws in one step."""
        return self.folder / "student.safetensors"

    @property
    def oracle(self) -> Path:
        return self.folder / "oracle.safetensors"
