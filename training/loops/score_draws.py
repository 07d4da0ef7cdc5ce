"""What an iteration of distillation draws: a function of (seed, step), drawn for a whole step.

A continued run so repeats exactly, and a step is the same whether its samples come in one batch, in several, or on
several processes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..clocks import Clock, log_snr_at
from ..data.prompts import Encode, Prompts
from ..denoiser import Conditioning
from ..densities import stratified_uniform
from ..distillation import DMD, guidance_scales
from ..noise import gaussian
from ..randomness import generator
from .distil_config import DistilConfig
from .score_passes import Judged


class Texts:
    """Prompts as the network is told them, on the device."""

    def __init__(self, encode: Encode, more: Conditioning, device: torch.device) -> None:
        self._encode, self._more, self.device = encode, more, device
        self._null = encode([""])

    def of(self, prompts: list[str]) -> Conditioning:
        return self._whole(self._encode(prompts), len(prompts))

    def null(self, rows: int) -> Conditioning:
        return self._whole(self._null, rows)

    def _whole(self, conditioning: Conditioning, rows: int) -> Conditioning:
        whole = {**conditioning, **self._more}
        return {name: value.expand(rows, *value.shape[1:]).to(self.device) for name, value in whole.items()}


@dataclass(frozen=True)
class Draws:
    """What is drawn in a step, for those of its samples that are asked for. On the device."""

    config: DistilConfig
    size: tuple[int, int, int]
    clock: Clock
    texts: Texts

    def judged(self, step: int, rows: slice, prompts: list[str]) -> Judged:
        config, whole, device = self.config, self.config.samples_a_step, self.texts.device
        times = stratified_uniform(whole, generator(config.seed, "time", step)).float()
        times = config.lowest_time + (config.highest_time - config.lowest_time) * times
        u = torch.rand(whole if config.guidance_by_sample else 1, generator=generator(config.seed, "guidance", step))
        scales = guidance_scales(config.guidance_low, config.guidance_high, u).expand(whole)
        null = self.texts.null(len(prompts))
        return Judged(
            log_snr=log_snr_at(self.clock, times[rows]).to(device),
            eps=self.noise(step, "judge", rows),
            scales=scales[rows].to(device),
            conditioning=self.texts.of(prompts),
            null=null,
            away=self.texts.of(self.negatives(step)[rows]) if config.negative_prompts else null,
            nasa=self._nasa(step) if config.negative_prompts else 0.0,
        )

    def negatives(self, step: int) -> list[str]:
        """A negative prompt for each sample of a step; none where there are none."""
        if not self.config.negative_prompts:
            return []
        return Prompts(self.config.negative_prompts).drawn(
            self.config.seed, step, self.config.samples_a_step, "negative prompts"
        )

    def _nasa(self, step: int) -> float:
        u = torch.rand(1, generator=generator(self.config.seed, "nasa", step))
        return float(guidance_scales(self.config.nasa_low, self.config.nasa_high, u))

    def lesson(self, step: int, update: int, rows: slice, prompts: list[str]) -> tuple[Tensor, Tensor, Conditioning]:
        """Noise, log_snr and conditioning of an update of the fake, some of whose prompts are empty."""
        config, whole = self.config, self.config.samples_a_step
        draw = generator(config.seed, "lesson", step, update)
        share = 0.0 if config.convention == DMD else config.null_share  # the fake is not guided there
        dropped = (torch.rand(whole, generator=draw) < share)[rows]
        told = ["" if drop else prompt for prompt, drop in zip(prompts, dropped.tolist(), strict=True)]
        log_snr = log_snr_at(self.clock, stratified_uniform(whole, draw).float()[rows])
        noise = self.noise(step, f"lesson {update}", rows)
        return noise, log_snr.to(self.texts.device), self.texts.of(told)

    def noise(self, step: int, use: str, rows: slice) -> Tensor:
        """Unit noise (b, c, h, w) in float32, drawn on the CPU: the same on every device."""
        shape = (self.config.samples_a_step, *self.size)
        return gaussian(shape, generator(self.config.seed, use, step))[rows].to(self.texts.device)
