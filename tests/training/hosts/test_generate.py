"""Drawing with a host whose model and encoders are known exactly."""

from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest
import torch
from gaussian import GaussianDenoiser

from stylewright.training.clocks import flow_schedule
from stylewright.training.guidance import cfg, finestyle, styledrop
from stylewright.training.hosts.generate import generate, with_extras
from stylewright.training.hosts.host import Host

CHANNELS = 2


@dataclass
class World:
    """A host that draws N(mean, std^2), where a prompt states the mean; and what it was asked."""

    std: float = 0.3
    scale: float = 1.0
    extras: dict = field(default_factory=dict)
    asked: list = field(default_factory=list)

    def host(self):
        return Host(
            name="the world",
            denoiser=self.denoiser,
            encode_images=lambda images: images,
            decode_latents=lambda latents: latents.repeat_interleave(2, -1).repeat_interleave(2, -2),
            encode_prompts=self.encode,
            pixels_per_latent=2,
            pixels_per_token=4,
            resolution=24,
            device="cpu",
            training_conditioning={"guidance": torch.tensor([9.0])},
            sampling_conditioning=self.extras,
            latent_channels=CHANNELS,
            schedule=self.schedule,
            guidance_scale=self.scale,
        )

    def denoiser(self, x_t, log_snr, conditioning):
        self.asked.append(("conditions", {name: tuple(value.shape) for name, value in conditioning.items()}))
        return GaussianDenoiser(torch.zeros(()), torch.tensor(self.std))(x_t, log_snr, conditioning)

    denoiser.process = denoiser.prediction = "flow"

    def encode(self, prompts):
        self.asked.append(("prompts", prompts))
        return {"mean": torch.tensor([float(prompt or 0) for prompt in prompts]).view(-1, 1, 1, 1)}

    def schedule(self, steps, tokens):
        self.asked.append(("schedule", (steps, tokens)))
        return flow_schedule(steps)

    def saw(self, kind):
        return [what for name, what in self.asked if name == kind]


def test_a_picture_is_of_its_prompt_and_size():
    world = World()
    pictures = generate(world.host(), ["3", "-4", "0"], seed=0, steps=30, size=(32, 20))
    assert pictures.shape == (3, CHANNELS, 32, 20)
    assert pictures.mean((1, 2, 3)).tolist() == pytest.approx([3, -4, 0], abs=0.15)
    assert pictures.std() > 2 and pictures[0].std() == pytest.approx(0.3, abs=0.1)
    assert world.saw("schedule") == [(30, 8 * 5)]
    assert generate(world.host(), ["3"], seed=0, steps=2).shape == (1, CHANNELS, 24, 24)


def test_a_picture_depends_on_seed_and_number_alone():
    host = World().host()
    together = generate(host, ["1", "2", "3", "4"], seed=5, steps=3)
    assert torch.equal(generate(host, ["1"], seed=5, steps=3)[0], together[0])
    assert torch.equal(generate(host, ["9", "2"], seed=5, steps=3)[1], together[1])
    assert torch.equal(generate(host, ["3", "4"], seed=5, first=2, steps=3), together[2:])
    twice = generate(host, ["1", "1"], seed=5, steps=3)
    assert not torch.allclose(twice[0], twice[1], atol=0.1)
    assert not torch.allclose(generate(host, ["1"], seed=6, steps=3)[0], together[0], atol=0.1)


def test_the_global_generator_is_neither_read_nor_moved():
    before = torch.get_rng_state()
    first = generate(World().host(), ["1"], seed=5, steps=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(generate(World().host(), ["1"], seed=5, steps=1), first)


def test_guidance_is_the_hosts_unless_it_is_given():
    """Equal deviations make the guided mean scale * mean away from the null prompt's."""
    options = {"seed": 0, "steps": 40}
    world = World(scale=3.0)
    assert generate(world.host(), ["2"], **options).mean() == pytest.approx(6, abs=0.3)
    assert generate(world.host(), ["2"], guidance_scale=2.0, **options).mean() == pytest.approx(4, abs=0.3)
    assert generate(world.host(), ["2"], guidance_scale=1.0, **options).mean() == pytest.approx(2, abs=0.3)
    assert world.saw("prompts") == [["2"], [""], ["2"], [""], ["2"]]  # without guidance nothing is to keep away from
    away = generate(world.host(), ["2"], guidance_scale=2.0, negative="1", **options)
    assert away.mean() == pytest.approx(1 + 2 * (2 - 1), abs=0.3)


class Shift:
    """An adapter for the world, which moves every prompt's mean by 1."""

    def __init__(self, world):
        self.world, self.on = world, True

    @contextmanager
    def enabled(self, active):
        before, self.on = self.on, active
        yield
        self.on = before

    def host(self):
        denoiser = self.world.denoiser

        def shifted(x_t, log_snr, conditioning):
            return denoiser(x_t, log_snr, {"mean": conditioning["mean"] + self.on})

        shifted.process = shifted.prediction = "flow"
        shifted.family, shifted.module, shifted.log_snr_range = "world", None, (-20, 20)
        return replace(self.world.host(), denoiser=shifted)


@pytest.mark.parametrize(
    ("guidance", "mean", "asked"),
    [
        (finestyle(1.5, 2.0), (2 + 1) + 1.5 * 1 + 2.0 * (2 - 0.5), 3),  # the null prompt's mean is 0.5
        (finestyle(1.5, 0.0), (2 + 1) + 1.5 * 1, 2),
        (styledrop(1.5, 2.0), (2 + 1) + 1.5 * 1 + 2.0 * (2 - 0.5), 3),  # the same, since the shift is everywhere
        (cfg(3.0), (2 + 1) + 2.0 * (2 - 0.5), 2),
        (cfg(1.0), 2 + 1, 1),
        (finestyle(-1.0, 0.0), 2, 1),  # the base alone
    ],
)
def test_a_rule_tells_the_model_with_its_adapter_from_the_base(guidance, mean, asked):
    """Equal deviations make the guided mean the same weighted sum of the four means."""
    world = World(scale=3.0)
    adapter = Shift(world)
    pictures = generate(
        adapter.host(), ["2"], seed=0, steps=40, negative="0.5", guidance=guidance, adapter=adapter, size=(96, 96)
    )
    assert pictures.mean() == pytest.approx(mean, abs=0.1)
    assert len(world.saw("conditions")) == 40 * asked, "what has no weight is not predicted"


def test_a_rule_needs_an_adapter():
    with pytest.raises(ValueError, match="needs an adapter"):
        generate(World().host(), ["2"], seed=0, guidance=finestyle(1, 2))


def test_extra_conditions_are_those_of_sampling_for_every_row():
    world = World(scale=2.0, extras={"guidance": torch.tensor([3.5]), "size": torch.tensor([[1.0, 2.0]])})
    generate(world.host(), ["1", "2", "3"], seed=0, steps=1)
    assert world.saw("conditions") == [{"mean": (3, 1, 1, 1), "guidance": (3,), "size": (3, 2)}] * 2


def test_extras_leave_what_they_join_alone():
    conditioning, extras = {"context": torch.randn(2, 3, 4)}, {"guidance": torch.tensor([3.5])}
    joined = with_extras(conditioning, extras)
    assert joined["context"] is conditioning["context"] and joined["guidance"].tolist() == [3.5, 3.5]
    assert conditioning.keys() == {"context"} and extras["guidance"].shape == (1,)


def test_progress_is_told_after_each_step():
    told = []

    def callback(step, steps, x0):
        told.append((step, steps, tuple(x0.shape)))

    generate(World().host(), ["1"], seed=0, steps=3, callback=callback)
    assert told == [(step, 3, (1, CHANNELS, 12, 12)) for step in (1, 2, 3)]


def test_what_cannot_be_drawn():
    host = World().host()
    with pytest.raises(ValueError, match="there are no prompts"):
        generate(host, [], seed=0)
    for size in ((24, 26), (22, 24), (0, 24), (-4, 24)):
        with pytest.raises(ValueError, match=rf"the world draws .* multiples of 4, got {size[1]}x{size[0]}"):
            generate(host, ["1"], seed=0, size=size)
    with pytest.raises(ValueError, match="0"):
        generate(host, ["1"], seed=0, steps=0)
