"""The whole rebuild in a few steps of each stage, from nothing, twice, and with an interruption."""

from functools import partial

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file

from stylewright.training.embedded.pretrain import autoencoder, build, card, latents, oracle, transformer
from stylewright.training.embedded.pretrain.stage import run
from stylewright.training.embedded.text import WIDTH
from stylewright.training.embedded.weights import Weights
from stylewright.training.hosts.embedded import load_embedded

FILES = ("autoencoder", "oracle", "text_encoder", "transformer")


def smallest_transformer():
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=128,
        num_attention_heads=1,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(16, 56, 56),
    )


class Interrupt(BaseException):
    """What the tests stop a build with."""


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Every stage takes three steps on two pictures and saves after each."""
    for module in (autoencoder, oracle, transformer):
        monkeypatch.setattr(module, "BATCH", 2)
        monkeypatch.setattr(module, "run", partial(run, save_every=1, report_every=1))
    monkeypatch.setattr(autoencoder, "CROP", 32)
    monkeypatch.setattr(autoencoder, "psnr", lambda *_: 0.0)
    monkeypatch.setattr(oracle, "accuracy", lambda *_: {})
    monkeypatch.setattr(transformer, "new_transformer", smallest_transformer)
    monkeypatch.setattr(latents, "SHARD", 4)
    stages = {
        "autoencoder": lambda work, out, seed: autoencoder.train_autoencoder(work, out.autoencoder, seed=seed, steps=3),
        "oracle": lambda work, out, seed: oracle.train_oracle(work, out.oracle, seed=seed, cycles=((2, 1.0), (1, 0.5))),
        "transformer": lambda work, out, seed: transformer.train_transformer(
            work, out.folder, seed=seed, cycles=((2, 1.0), (1, 0.5))
        ),
        "decoder": lambda work, out, seed: autoencoder.refine_decoder(work, out.autoencoder, seed=seed, steps=3),
    }
    assert [*stages, "card"] == list(build.STAGES)
    monkeypatch.setattr(build, "STAGES", stages)
    with torch.random.fork_rng():  # a build seeds the global generator of its own process
        yield


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Where the build that is never interrupted goes."""
    return tmp_path_factory.mktemp("straight")


def weights_of(folder):
    return {name: load_file(folder / f"{name}.safetensors") for name in FILES}


def assert_same(one, other):
    for name in FILES:
        assert one[name].keys() == other[name].keys()
        assert all(torch.equal(one[name][key], other[name][key]) for key in one[name]), name


@pytest.fixture
def built(straight, tiny):
    build.build(straight / "work", straight / "out")  # the second time nothing is left to do
    return straight / "out"


def stop_at(monkeypatch, module, call, nth):
    """Lets the nth call of a module's function raise, once."""
    real, count = getattr(module, call), iter(range(1, 1000))

    def counted(*args, **options):
        if next(count) == nth:
            raise Interrupt
        return real(*args, **options)

    monkeypatch.setattr(module, call, counted)


def test_a_build_that_was_interrupted_in_every_stage_is_the_same(built, monkeypatch, tmp_path):
    """The straight build is the other run that it is compared with: the same seed gives the same weights."""
    stop_at(monkeypatch, autoencoder, "_crops", 3)
    stop_at(monkeypatch, oracle, "_disturbed", 2)
    stop_at(monkeypatch, transformer, "prompts", 3)
    for finished in ([], ["autoencoder"], ["autoencoder", "oracle"]):
        with pytest.raises(Interrupt):
            build.build(tmp_path / "work", tmp_path / "out")
        assert sorted(path.stem for path in (tmp_path / "work").glob("*.done")) == finished
    stop_at(monkeypatch, autoencoder, "_crops", 2)
    with pytest.raises(Interrupt):
        build.build(tmp_path / "work", tmp_path / "out")
    build.build(tmp_path / "work", tmp_path / "out")
    assert_same(weights_of(tmp_path / "out"), weights_of(built))


def test_what_is_built_can_be_opened_and_used(built):
    host = load_embedded(Weights(built))
    conditioning = host.encode_prompts(["star in jazz style", ""])
    assert host.denoiser(torch.randn(2, 16, 4, 6), torch.zeros(2), conditioning).isfinite().all()


def test_the_first_step_of_the_transformer_is_from_the_identity():
    """Blocks that add nothing and a last layer that is zero: the first prediction is zero."""
    model = transformer.TextToImage()
    context, pooled = model.text_encoder(torch.tensor([[1, 2, 0], [0, 0, 0]]))
    out = model.transformer(
        hidden_states=torch.randn(2, 6, 64),
        encoder_hidden_states=context,
        pooled_projections=pooled,
        timestep=torch.tensor([0.3, 0.9]),
        img_ids=torch.zeros(6, 3),
        txt_ids=torch.zeros(3, 3),
    )[0]
    assert not out.any()


def test_refining_the_decoder_leaves_the_latents_alone(straight, tmp_path):
    build.build(tmp_path / "work", tmp_path / "out", stages=("autoencoder",))
    before = load_file(tmp_path / "out" / "autoencoder.safetensors")
    build.build(tmp_path / "work", tmp_path / "out", stages=("decoder",))
    after = load_file(tmp_path / "out" / "autoencoder.safetensors")
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"taesd_decoder"}


def test_another_seed_needs_another_folder(tmp_path):
    build.build(tmp_path / "work", tmp_path / "out", stages=("oracle",))
    with pytest.raises(ValueError, match=r"work for seed 0.* seed 1"):
        build.build(tmp_path / "work", tmp_path / "out", seed=1, stages=("oracle",))
    build.build(tmp_path / "other", tmp_path / "more", seed=1, stages=("oracle",))
    files = [load_file(tmp_path / folder / "oracle.safetensors") for folder in ("out", "more")]
    assert not torch.equal(files[0]["heads.subject.weight"], files[1]["heads.subject.weight"])


def test_unknown_stages_are_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match=r"unknown stage 'tokenizer': expected some of autoencoder, oracle"):
        build.build(tmp_path / "work", tmp_path / "out", stages=("oracle", "tokenizer"))
    assert not list(tmp_path.iterdir())


def test_the_card_measures_the_weights_beside_it(built, monkeypatch):
    asked = []

    def judge(host, judging, prompts, *, seed, guidance_scale=None):
        from stylewright.training.embedded.oracle import Scores

        asked.append((len(prompts), guidance_scale))
        right = torch.ones(len(prompts), dtype=torch.bool)
        return Scores(right, dict.fromkeys(("palette", "ground", "fill", "edge"), right))

    monkeypatch.setattr(card, "judge", judge)
    monkeypatch.setattr(card, "judge_truth", judge)
    monkeypatch.setattr(card, "psnr", lambda *_: 31.25)
    monkeypatch.setattr(card, "accuracy", lambda *_: {"subject": 0.987})
    card.write_card(Weights(built), n=4)
    text = (built / "README.md").read_text(encoding="utf-8")
    assert asked == [(count, scale) for _ in range(3) for count, scale in ((4, 5.0), (1, 1.0), (1, 3.0), (1, None))]
    assert "PSNR 31.2 dB" in text and "subject 0.987" in text
    assert "| unseen combinations, guidance 5, n = 4 | 1.000 |" in text
    assert "| unseen combinations, the truth, n = 1 | 1.000 |" in text
    for name in FILES:
        assert f"| `{name}.safetensors` | {(built / f'{name}.safetensors').stat().st_size / 1e6:.1f} MB |" in text
