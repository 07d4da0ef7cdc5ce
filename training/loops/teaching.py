"""What a teacher answers to the batches of a run, for an adapter that learns to answer so: distillation without images.

|eps_S(x_t, c) - eps_T(x_t, c)|^2, in the prediction of the model that learns (StyleInject, arXiv 2401.13942, calls it
base model distillation). x_t has to be where the teacher's pictures come by: it is made from pictures that the teacher
has drawn, once, with the noise and the noise levels of the run. All answers are taken before training and kept on
disk, so that teacher and pupil are never in memory together, and may be one network with other patches.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..data.dataset import Dataset
from ..denoiser import Conditioning, Denoiser
from ..densities import stratified_uniform
from ..formats.state import write_atomically
from ..noise import add_noise
from ..predictions import convert
from ..processes import ALONE
from ..randomness import generator
from .config import TrainConfig
from .noising import Place, law_of, noised_batch
from .share import share_of


class Answers:
    """A teacher's answers in a folder, a file for each step. ``key`` tells those of one run from another's."""

    def __init__(self, folder: Path, key: str = "") -> None:
        self.folder, self.key = folder, key

    def path(self, step: int) -> Path:
        return self.folder / f"{self.key}{step:07d}.safetensors"

    def __call__(self, place: Place) -> Tensor:
        """(b, c, h, w) for the batch at a place of the run."""
        rows = load_file(self.path(place.step))[str(place.micro)]
        return rows[place.share.rows]

    def __len__(self) -> int:
        """Of how many steps they are there."""
        return sum(1 for _ in self.folder.glob(f"{self.key}*.safetensors"))

    def forget(self) -> None:
        """Deletes them."""
        for file in self.folder.glob("*.safetensors"):
            file.unlink(missing_ok=True)


@torch.no_grad()
def ask(
    teacher: Denoiser,
    pupil: Denoiser,
    dataset: Dataset,
    config: TrainConfig,
    answers: Answers,
    *,
    first: int = 0,  # step
    latents_per_token: int = 4,
    conditioning: Conditioning | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,  # steps asked for, of how many
) -> None:
    """Takes the teacher's answers to every batch of the run from the step ``first`` on that are not there yet.

    ``pupil`` says whose noise levels the run draws and in which prediction it learns; it is not run. ValueError for a
    teacher of another family or process.
    """
    require_kin(teacher, pupil)
    law, share = law_of(pupil, config), share_of(config, ALONE)
    for step in range(first, config.steps):
        if answers.path(step).exists():
            continue
        uniforms, found = stratified_uniform(config.samples_a_step, generator(config.seed, "log_snr", step)), {}
        for micro in share.passes:
            place = Place(step, micro, uniforms, share)
            batch = dataset.batch(config.seed, step, micro, config.batch_size, config.accumulation, share.rows)
            noised, _ = noised_batch(
                batch, place, config, law, latents_per_token, conditioning or {}, torch.device(device)
            )
            x_t = add_noise(pupil.process, noised.x0, noised.eps, noised.log_snr)
            answer = teacher(x_t, noised.log_snr, noised.conditioning)
            if teacher.prediction != pupil.prediction:
                answer = convert(answer, teacher.prediction, pupil.prediction, pupil.process, x_t, noised.log_snr)
            found[str(micro)] = answer.float().cpu().contiguous()
        write_atomically(answers.path(step), lambda temporary, found=found: save_file(found, temporary))
        if progress is not None:
            progress(step + 1 - first, config.steps - first)


def require_kin(teacher: Denoiser, pupil: Denoiser) -> None:
    """ValueError where their latents or their noise have other meanings."""
    if (teacher.family, teacher.process) != (pupil.family, pupil.process):
        raise ValueError(
            f"the teacher is a {teacher.family} model of the process {teacher.process}, and the model that learns is "
            f"{pupil.family} of {pupil.process}: link a teacher of the same family"
        )
