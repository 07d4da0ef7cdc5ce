"""Sample pictures: what a KSampler draws with the saved file, without a load, and never worth a training."""

from dataclasses import replace

import pytest
import torch

pytestmark = pytest.mark.comfy

SIDE = 64  # pixels
PROMPT = "tree in <v0> style"
NEGATIVE = "house"


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """models/loras and output of ComfyUI, empty."""
    import folder_paths

    loras, output = tmp_path / "loras", tmp_path / "output"
    loras.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(loras)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "output_directory", str(output))
    return loras, output


@pytest.fixture
def job():
    """A short run that draws before its first step, after its second, and after its last."""
    from stylewright.nodes.bridge.sampling import Brush
    from stylewright.nodes.bridge.training import Job
    from stylewright.training.adapters.methods import AdapterConfig
    from stylewright.training.data.items import items_from_memory
    from stylewright.training.loops.config import TrainConfig

    pictures = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    config = TrainConfig(
        steps=3,
        learning_rate=5e-2,
        accumulation=1,
        seed=3,
        style_phrase="<v0>",
        resolution=SIDE,
        sample_every=2,
        sample_prompts=("tree",),
        adapter=AdapterConfig(rank=4),
    )
    items = items_from_memory(list(pictures), ["star", "house"])
    return Job(items, "content", config, "styles/test", Brush(steps=3, seed=7), "")


def sockets_of(family, tiny, tiny_clip):
    """MODEL, CLIP and VAE of a small model."""
    import comfy.sd
    from comfy.taesd.taesd import TAESD

    from stylewright.nodes.bridge.training import Sockets

    with torch.inference_mode():
        model, generator = tiny(family), torch.Generator().manual_seed(5)
        weights = TAESD(latent_channels=model.model.latent_format.latent_channels).state_dict()
        for tensor in weights.values():
            if tensor.ndim:  # spread so that the signal neither dies nor explodes
                fan_in = max(1, tensor[0].numel())
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * (1.4 / fan_in**0.5))
        return Sockets(model, tiny_clip(family), comfy.sd.VAE(sd=weights))


@pytest.fixture
def flux(tiny, tiny_clip):
    return sockets_of("flux", tiny, tiny_clip)


@pytest.fixture
def sdxl(tiny, tiny_clip):
    return sockets_of("sdxl", tiny, tiny_clip)


@pytest.fixture
def drawn(monkeypatch):
    """The pictures of each step as they were drawn, before they are rounded to files."""
    from stylewright.nodes.bridge.sampling import Painter

    pictures, call = {}, Painter.__call__
    monkeypatch.setattr(Painter, "__call__", lambda self, step: pictures.setdefault(step, call(self, step)))
    return pictures


@pytest.fixture
def latents(monkeypatch):
    """What the pictures were decoded from, in the order in which they were drawn."""
    from stylewright.nodes.bridge import sampling

    kept, draw = [], sampling.draw_latent
    monkeypatch.setattr(sampling, "draw_latent", lambda *args: (kept.append(draw(*args)), kept[-1])[1])
    return kept


def train(sockets, job, **changes):
    from stylewright.nodes.bridge.training import train_adapter

    with torch.inference_mode():
        return train_adapter(sockets, replace(job, **changes))


def without_samples(sockets, job):
    """The same training in a run of its own, with nothing drawn."""
    return train(sockets, job, config=replace(job.config, sample_every=0), file_name="styles/quiet")


def by_stock_nodes(sockets, lora, brush, negative, side=SIDE):
    """What a user gets, latent and picture: LoraLoader, CLIPTextEncode, KSampler, VAEDecode."""
    import nodes

    with torch.inference_mode():
        model = sockets.model
        if lora is not None:
            (model,) = nodes.LoraLoaderModelOnly().load_lora_model_only(model, lora, 1.0)
        positive, uncond = (nodes.CLIPTextEncode().encode(sockets.clip, text)[0] for text in (PROMPT, negative))
        channels, cell = sockets.vae.latent_channels, sockets.vae.spacial_compression_encode()
        empty = {"samples": torch.zeros(1, channels, side // cell, side // cell)}
        (latent,) = nodes.KSampler().sample(
            model, brush.seed, brush.steps, brush.cfg, brush.sampler, brush.scheduler, positive, uncond, empty
        )
        (picture,) = nodes.VAEDecode().decode(sockets.vae, latent)
        return latent["samples"].clone(), picture.movedim(-1, 1).clone()


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.filterwarnings("ignore:Should have tb<=t1")  # torchsde's, of its own rounding
@pytest.mark.parametrize(
    ("family", "sampler", "scheduler", "cfg"),
    [
        ("flux", "euler", "simple", 1.0),
        ("flux", "dpmpp_2m", "beta", 3.0),
        ("sdxl", "euler_ancestral", "karras", 4.0),
        ("sdxl", "dpmpp_2m_sde", "normal", 1.0),
    ],
)
def test_the_last_sample_is_what_stock_nodes_draw_with_the_file(
    family, sampler, scheduler, cfg, job, folders, drawn, latents, request
):
    sockets = request.getfixturevalue(family)
    brush = replace(job.brush, sampler=sampler, scheduler=scheduler, cfg=cfg)
    trained = train(sockets, job, brush=brush, negative=NEGATIVE)
    assert list(drawn) == [0, 2, 3]
    for step, ours, lora in (
        (0, latents[0], None),
        (3, latents[2], trained.path.relative_to(folders[0]).as_posix()),
    ):
        latent, picture = by_stock_nodes(sockets, lora, brush, NEGATIVE)
        error = relative(ours, latent)
        assert error < 1e-4
        assert (drawn[step] - picture).abs().max() < 1e-2
    assert relative(latents[2], latents[0]) > max(1e-3, 20 * error), "the adapter is not seen"


def test_drawing_loads_nothing_and_changes_nothing_that_is_learned(flux, job, folders, monkeypatch):
    import comfy.model_management

    quiet = without_samples(flux, job)
    assert quiet.samples == {}
    requested, load = [], comfy.model_management.load_models_gpu

    def watch(models, *args, **kwargs):
        requested.extend(model for model in models if comfy.model_management.in_training is False)
        return load(models, *args, **kwargs)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", watch)
    seen = []
    from stylewright.nodes.bridge import sampling

    sample = sampling.comfy.sample.sample

    def sampled(*args, **kwargs):
        requested.clear()
        latent = sample(*args, **kwargs)
        seen.append(list(requested))
        return latent

    monkeypatch.setattr(sampling.comfy.sample, "sample", sampled)
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    loud = train(flux, job)
    assert torch.equal(torch.rand(3), expected), "the global generator was not put back"
    assert seen == [[], [], []]
    assert all(torch.equal(loud.tensors[key], quiet.tensors[key]) for key in quiet.tensors)
    assert list(loud.samples) == [0, 2, 3]


def test_several_prompts_have_the_same_noise_and_their_own_size(flux, job, folders, drawn):
    brush = replace(job.brush, width=96, height=48)
    config = replace(job.config, sample_prompts=("tree", "tree in <v0> style", "house"))
    trained = train(flux, job, config=config, brush=brush)
    assert drawn[3].shape == (3, 3, 48, 96)
    assert torch.equal(drawn[3][0], drawn[3][1]) and not torch.equal(drawn[3][0], drawn[3][2])
    assert [len(paths) for paths in trained.samples.values()] == [3, 3, 3]
    with pytest.raises(ValueError, match="multiples of 16"):
        train(flux, job, brush=replace(brush, width=100), file_name="styles/other")


@pytest.mark.parametrize("error", [RuntimeError("no such kernel"), torch.OutOfMemoryError("out of memory")])
def test_a_picture_that_cannot_be_drawn_does_not_stop_the_training(error, flux, job, folders, monkeypatch):
    from stylewright.nodes.bridge import previews, sampling

    notes = []
    monkeypatch.setattr(previews.TrainingProgress, "noted", lambda self, note: notes.append(note))
    quiet = without_samples(flux, job)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(sampling.comfy.sample, "sample", fail)
    trained = train(flux, job)
    assert trained.samples == {}
    (note,) = notes
    assert "Training goes on" in note and ("memory" in note or "no such kernel" in note)
    assert all(torch.equal(trained.tensors[key], quiet.tensors[key]) for key in quiet.tensors)


def test_a_vae_that_fails_leaves_approximations(flux, job, folders, drawn, monkeypatch):
    from stylewright.nodes.bridge import previews, sampling

    notes = []
    monkeypatch.setattr(previews.TrainingProgress, "noted", lambda self, note: notes.append(note))

    def fail(vae, latent):
        raise RuntimeError("the VAE is broken")

    monkeypatch.setattr(sampling, "decode", fail)
    trained = train(flux, job)
    assert [note for note in notes if "approximations" in note] == notes and len(notes) == 1
    assert list(trained.samples) == [0, 2, 3]
    assert drawn[3].shape == (1, 3, SIDE, SIDE) and 0 <= drawn[3].min() < drawn[3].max() <= 1


@pytest.mark.parametrize("step", [0, 2])
def test_an_interrupt_while_drawing_is_an_interrupt(step, flux, job, folders, monkeypatch):
    import comfy.model_management

    from stylewright.nodes.bridge import previews

    def press(self, at):
        if at == step:
            comfy.model_management.interrupt_current_processing()

    with monkeypatch.context() as patch:
        patch.setattr(previews.TrainingProgress, "drawing", press)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            train(flux, job)
    assert not comfy.model_management.in_training
    assert len(list(folders[0].rglob("*.safetensors"))) == (1 if step else 0)
    continued = train(flux, job)
    assert list(continued.samples) == [0, 2, 3], "the picture that the interrupt came before is made up for"
    straight = without_samples(flux, job)
    assert all(torch.equal(continued.tensors[key], straight.tensors[key]) for key in straight.tensors)


def test_without_room_for_the_vae_pictures_are_approximations(flux, monkeypatch):
    """On a GPU that the model fills, decoding by the VAE would push the model out while it is trained."""
    from stylewright.nodes.bridge import sampling

    latent = torch.randn(1, 16, 6, 8)
    assert sampling.has_room(flux.vae, latent)
    monkeypatch.setattr(sampling.comfy.model_management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(sampling.comfy.model_management, "get_free_memory", lambda device: 1e12)
    assert sampling.has_room(flux.vae, latent)
    monkeypatch.setattr(sampling.comfy.model_management, "get_free_memory", lambda device: 0)
    assert not sampling.has_room(flux.vae, latent)
    rough = sampling.approximation(flux.model, flux.vae, latent)
    assert rough.shape == (1, 3, 6, 8) and 0 <= rough.min() < rough.max() <= 1
