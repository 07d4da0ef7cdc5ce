"""CLIPs trained beside the model: right gradients, complete files in the stock loader, and nothing left behind."""

import math
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.comfy

SIDE = 64  # pixels
LOG_SNR = torch.tensor([-2.0])
PROMPT = "a (red:1.4) star in <v0> style"
WIDTHS = {"sd15": (16, None), "sdxl": (8, 8), "flux": (24, None)}  # of clip_l and clip_g


def target_of(family):
    """ComfyUI's tokenizer and text encoder of a family, by small configurations."""
    import comfy.sd1_clip
    import comfy.sdxl_clip
    import comfy.supported_models_base
    import comfy.text_encoders.flux
    import comfy.text_encoders.sd2_clip

    pairs = {
        "sd15": (comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel),
        "sd21": (comfy.text_encoders.sd2_clip.SD2Tokenizer, comfy.text_encoders.sd2_clip.SD2ClipModel),
        "refiner": (comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLRefinerClipModel),
        "sdxl": (comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel),
        "flux": (comfy.text_encoders.flux.FluxTokenizer, comfy.text_encoders.flux.flux_clip(dtype_t5=torch.float32)),
    }
    return comfy.supported_models_base.ClipTarget(*pairs[family])


def tiny_text(family):
    """A CLIP like the family's, of random weights and made under inference mode, as loader nodes make it."""
    import comfy.sd

    clip_l, clip_g = WIDTHS.get(family, (16, 16))

    def small(width):
        return {"hidden_size": width, "num_hidden_layers": 3, "intermediate_size": 24, "num_attention_heads": 2}

    t5 = {"d_model": 32, "d_ff": 16, "d_kv": 4, "num_heads": 2, "num_layers": 1}
    options = {
        "dtype": torch.float32,
        "clip_l_model_config": small(clip_l),
        "clip_g_model_config": small(clip_g),
        "clip_h_model_config": small(clip_l),
        "t5xxl_model_config": t5,
    }
    with torch.inference_mode():
        clip = comfy.sd.CLIP(target_of(family), model_options=options)
        draw = torch.Generator().manual_seed(5)
        for parameter in clip.cond_stage_model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    assert next(clip.cond_stage_model.parameters()).is_inference()
    return clip


@pytest.fixture
def sockets(tiny):
    """sockets(family): MODEL, CLIP and VAE that fit together."""
    import comfy.sd
    import comfy.taesd.taesd

    def make(family):
        model = tiny(family)
        for name, parameter in model.model.diffusion_model.named_parameters():
            if any(part in name for part in ("attn2", "vector_in", "label_emb")):
                parameter.mul_(8)  # so that the words matter to weights as small as these
        if family == "sdxl":  # a pooled vector as small as the tiny clip_g's
            first = model.model.diffusion_model.label_emb[0][0]
            first.weight = torch.nn.Parameter(first.weight[:, : 8 + 6 * 256].clone(), requires_grad=False)
        with torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(3)
            channels = 16 if family == "flux" else 4
            state = comfy.taesd.taesd.TAESD(latent_channels=channels).state_dict()
            vae = comfy.sd.VAE(sd={name: torch.randn_like(value) * 0.05 for name, value in state.items()})
        return SimpleNamespace(model=model, clip=tiny_text(family), vae=vae)

    return make


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("sd15", ["text_encoder.text_model."]),
        ("sd21", ["text_encoder.text_model."]),
        ("refiner", ["text_encoder.text_model."]),
        ("sdxl", ["text_encoder.text_model.", "text_encoder_2.text_model."]),
        ("flux", ["text_encoder.text_model."]),
    ],
)
def test_encoders_have_the_names_of_files(family, names):
    """Every layer is found by ComfyUI's own loader under the name that we write."""
    import comfy.lora

    from stylewright.nodes.bridge.text_encoders import activation_bytes, describe, trainable_text_encoders

    clip = tiny_text(family)
    encoders = trainable_text_encoders(clip)
    assert list(encoders) == names
    known = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    for prefix, module in encoders.items():
        for name, layer in module.named_modules():
            if isinstance(layer, torch.nn.Linear):
                assert known[prefix + name].endswith(f"text_model.{name}.weight")
    assert describe(clip).count("clip_") == len(names)
    assert activation_bytes(clip, True) < activation_bytes(clip, False) < 10e6


def denoiser_of(sockets):
    from stylewright.nodes.bridge.denoiser import ComfyDenoiser
    from stylewright.nodes.bridge.prompts import PromptTable

    prompts = PromptTable(sockets.clip)
    return ComfyDenoiser(sockets.model, prompts), prompts


def x_of(sockets):
    channels = sockets.model.model.latent_format.latent_channels
    return torch.randn(1, channels, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(9))


def out_of_place(layer, x, mask=None, optimized_attention=None):
    """A layer of CLIP, written as autograd likes it."""
    x = x + layer.self_attn(layer.layer_norm1(x), mask, optimized_attention)
    return x + layer.mlp(layer.layer_norm2(x))


@pytest.mark.parametrize(
    ("family", "skip", "checkpoint"),
    [("sd15", -2, True), ("sdxl", None, False), ("flux", None, True)],
)
def test_gradients_are_those_of_the_changed_weights(family, skip, checkpoint, sockets, monkeypatch):
    """B's gradient is the scale times that of the weight, of a CLIP written without in-place additions, times A^T."""
    import comfy.clip_model

    from stylewright.nodes.bridge.session import training_session
    from stylewright.nodes.bridge.text_encoders import trainable_text_encoders
    from stylewright.training.adapters.attach import attached_to_parts
    from stylewright.training.gradients import differentiable
    from stylewright.training.loops.subject import parts_of

    made = sockets(family)
    made.clip.clip_layer(skip)
    denoiser, prompts = denoiser_of(made)
    config = config_of(text_encoder_targets="all")
    row = prompts.encode([PROMPT])
    encoders = trainable_text_encoders(made.clip)
    with torch.inference_mode(), training_session(made.model, beside=[made.clip.patcher]):
        before = denoiser(x_of(made), LOG_SNR, row).detach()
        parts = parts_of(denoiser, config, encoders)
        names = {f"{part.prefix}{name}": part for part in parts[1:] for name in part.layers(config.adapter)}
        weights = {n: part.module.get_submodule(n.removeprefix(part.prefix)).weight for n, part in names.items()}
        with monkeypatch.context() as patch, prompts.asked_anew(), differentiable(denoiser.module):
            patch.setattr(comfy.clip_model.CLIPLayer, "forward", out_of_place)
            for weight in weights.values():
                weight.requires_grad_()
            denoiser(x_of(made), LOG_SNR, row).square().sum().backward()
        expected = {name: weight.grad for name, weight in weights.items()}
        for weight in weights.values():
            weight.requires_grad_(False).grad = None
        with ExitStack() as stack:
            stack.enter_context(prompts.asked_anew())
            adapter = stack.enter_context(attached_to_parts(parts, config.adapter, seed=0))
            for part in parts:
                stack.enter_context(differentiable(part.module, checkpoint=checkpoint))
            output = denoiser(x_of(made), LOG_SNR, row)
            assert torch.equal(output, before), "a fresh adapter is a no-op"
            output.square().sum().backward()
            named = dict(zip(adapter.state_dict(), adapter.parameters(), strict=True))
        for name, gradient in expected.items():
            a, b = (named[f"{name}.lora_{side}.weight"] for side in "AB")
            assert (b.grad is None) == (gradient is None)
            if gradient is not None:
                assert relative(b.grad, 2.0 * gradient @ a.T) < 1e-3 and gradient.any()
        assert sum(gradient is not None for gradient in expected.values()) >= 12 * len(encoders)
        assert all(weight.grad is None for weight in weights.values())


def config_of(**changes):
    from stylewright.training.adapters.methods import AdapterConfig
    from stylewright.training.loops.config import TrainConfig

    plain = {"adapter": AdapterConfig(rank=2, alpha=4.0), "text_encoder_learning_rate": 1e-2}
    return TrainConfig(**{**plain, **changes})


@pytest.fixture
def folders(tmp_path, monkeypatch):
    import folder_paths

    (tmp_path / "loras").mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path / "loras")], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    return tmp_path


@pytest.fixture
def dataset():
    from stylewright.nodes.dataset import StyleDatasetNode

    images = torch.rand(2, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(2))
    node = StyleDatasetNode.execute(
        captions=["a (red:1.4) star\nhouse"], style_phrase=["<v0>"], resolution=[SIDE],
        folder=["[from the images input]"], caption_mode=["content"], images=[images],
    )  # fmt: skip
    return node.args[0]


def run(sockets, dataset, **changes):
    from stylewright.nodes.trainer import StyleFriendlySNRTrainer

    class Node(StyleFriendlySNRTrainer):
        hidden = SimpleNamespace(unique_id=None)

    widgets = {
        "steps": 2, "learning_rate": 5e-3, "rank": 2, "alpha": 4.0, "batch_size": 2, "accumulation": 1,
        "method": "lora", "optimizer": "adam", "targets": "style", "seed": 3, "precision": "float32",
        "gradient_checkpointing": True, "file_name": "text", "sample_prompt": "", "sample_every": 0,
        "sample_steps": 2, "sample_cfg": 1.0, "scheduler": "constant", "warm_up": 0, "weight_decay": 0.0,
        "clip_norm": 1.0, "ema_decay": 0.0, "caption_dropout": 0.3, "dropout": 0.0, "loss": "mse",
        "weighting": "none", "offset_noise": 0.0, "save_every": 0, "target_patterns": "", "resume": "begin anew",
        "text_encoder_learning_rate": 5e-2, "text_encoder_targets": "all",
    }  # fmt: skip
    assert not changes.keys() - widgets.keys()
    with torch.inference_mode():
        return Node.execute(sockets.model, sockets.clip, sockets.vae, dataset, **widgets | changes).args


def predict(model, clip):
    """ComfyUI's own way from the words to one prediction."""
    from stylewright.nodes.bridge.session import training_session

    made = SimpleNamespace(model=model, clip=clip)
    denoiser, prompts = denoiser_of(made)
    row = prompts.encode([PROMPT])
    with torch.inference_mode(), training_session(model), torch.no_grad():
        return denoiser(x_of(made), LOG_SNR, row)


def predict_as_trained(made, path):
    """The prediction with the file's adapter in place as in training, by peft."""
    from stylewright.nodes.bridge.adapters import weights_of
    from stylewright.nodes.bridge.session import training_session
    from stylewright.nodes.bridge.text_encoders import trainable_text_encoders
    from stylewright.training.adapters.attach import attached_to_parts, parts_named
    from stylewright.training.adapters.methods import AdapterConfig
    from stylewright.training.formats.adapters import load_adapter

    denoiser, prompts = denoiser_of(made)
    row = prompts.encode([PROMPT])
    with torch.inference_mode(), training_session(made.model, beside=[made.clip.patcher]), torch.no_grad():
        loaded = load_adapter(path, "native", weights=weights_of(made.model, made.clip), text_encoders=True)
        config = AdapterConfig(method=loaded.method, rank=loaded.rank, alpha=loaded.alpha)
        trees = {"": denoiser.module, **trainable_text_encoders(made.clip)}
        parts = parts_named(trees, loaded.names, "other")
        with attached_to_parts(parts, config, seed=0) as adapter, prompts.asked_anew():
            adapter.load_state_dict(loaded.state)
            return denoiser(x_of(made), LOG_SNR, row)


def snapshot(made):
    return [tensor.clone() for tensor in (*made.model.model.parameters(), *made.clip.cond_stage_model.parameters())]


def relative(a, b):
    return float((a - b).detach().norm() / b.detach().norm())


@pytest.mark.parametrize(("family", "method"), [("sd15", "lokr"), ("sdxl", "dora")])
def test_the_stock_loader_gives_what_was_trained(family, method, sockets, dataset, folders):
    import comfy.lora
    import comfy.sd
    from nodes import LoraLoader
    from safetensors.torch import load_file

    from stylewright.nodes.bridge.adapters import Strengths, apply_adapter, read_tensors
    from stylewright.nodes.bridge.fitting import fit

    made = sockets(family)
    before, weights = predict(made.model, made.clip), snapshot(made)
    names = list(dict(made.clip.cond_stage_model.named_modules()))
    path = run(made, dataset, method=method)[2]
    assert all(torch.equal(a, b) for a, b in zip(snapshot(made), weights, strict=True))
    assert torch.equal(predict(made.model, made.clip), before)
    assert list(dict(made.clip.cond_stage_model.named_modules())) == names
    assert not any(parameter.requires_grad for parameter in made.clip.cond_stage_model.parameters())

    known = comfy.lora.model_lora_keys_unet(made.model.model, {})
    known = comfy.lora.model_lora_keys_clip(made.clip.cond_stage_model, known)
    fitted = fit(load_file(path), known, with_text=True)
    assert fitted.homeless == ()
    layers = sum("encoder.layers" in str(name) for name in fitted.patches)
    assert layers == {"sd15": 1, "sdxl": 2}[family] * 3 * 6

    with torch.inference_mode():
        model, clip = LoraLoader().load_lora(made.model, made.clip, path.split("/")[-1], 1.0, 1.0)
        without, _ = LoraLoader().load_lora(made.model, made.clip, path.split("/")[-1], 1.0, 0.0)
    adapted, trained = predict(model, clip), predict_as_trained(made, path)
    assert relative(adapted, trained) < 1e-3 < relative(before, trained)
    assert relative(predict(without, made.clip), trained) > 1e-3, "the text encoder's part does nothing"
    file = read_tensors(folders / "loras" / path.split("/")[-1])
    ours = apply_adapter(made.model, made.clip, file, Strengths(), warn=pytest.fail)
    assert ours.homeless == () and ours.missized == ()
    assert torch.equal(predict(ours.model, ours.clip), adapted)
    assert apply_adapter(made.model, None, file, Strengths(), warn=pytest.fail).left_out == layers


def test_a_stopped_run_continues_and_leaves_no_trace(sockets, dataset, folders, monkeypatch):
    import comfy.model_management as management
    from safetensors.torch import load_file

    from stylewright.nodes.bridge import previews

    made = sockets("sd15")
    weights = snapshot(made)
    straight = run(made, dataset, file_name="straight")
    report = previews.TrainingProgress.report

    def stop(self, event):
        report(self, event)
        if event.step == 1:
            raise management.InterruptProcessingException

    with monkeypatch.context() as patch, pytest.raises(management.InterruptProcessingException):
        patch.setattr(previews.TrainingProgress, "report", stop)
        run(made, dataset, file_name="stopped", sample_prompt="star", sample_every=1)
    assert all(torch.equal(a, b) for a, b in zip(snapshot(made), weights, strict=True))
    assert not any(parameter.requires_grad for parameter in made.clip.cond_stage_model.parameters())
    continued = run(made, dataset, file_name="stopped", resume="continue")
    first, second = load_file(straight[2]), load_file(continued[2])
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert straight[1]["loss"] == pytest.approx(continued[1]["loss"])


def test_the_base_of_dco_has_text_encoders_without_an_adapter(sockets, dataset, folders, monkeypatch):
    from stylewright.training.loops import passes

    made, asked, ask = sockets("sd15"), [], passes._without

    def note(adapter, denoiser, x_t, batch):
        with torch.no_grad():
            adapted = denoiser(x_t, batch.log_snr, batch.conditioning)
        base = ask(adapter, denoiser, x_t, batch)
        asked.append(relative(adapted, base))
        return base

    monkeypatch.setattr(passes, "_without", note)
    losses = run(made, dataset, loss="dco", learning_rate=1e-12)[1]["loss"]  # only the text encoder learns
    assert losses[0] == pytest.approx(math.log(2)) != losses[1]
    assert asked[-2] == 0 < 1e-6 < asked[-1]  # those before are of the plan


def test_a_stock_lora_below_counts_and_another_clip_is_another_run(sockets):
    """Training asks the CLIP as it is patched, and puts it back."""
    from stylewright.nodes.bridge.identity import digest_of_model
    from stylewright.nodes.bridge.session import training_session

    made = sockets("sd15")
    plain, weights = predict(made.model, made.clip), snapshot(made)
    patched = made.clip.clone()
    key = "clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"
    patched.add_patches({key: ("diff", (torch.randn(16, 16, generator=torch.Generator().manual_seed(1)),))})
    expected = predict(made.model, patched)
    denoiser, prompts = denoiser_of(SimpleNamespace(model=made.model, clip=patched))
    row = prompts.encode([PROMPT])
    with torch.inference_mode(), training_session(made.model, beside=[patched.patcher]), prompts.asked_anew():
        got = denoiser(x_of(made), LOG_SNR, row).detach()
    assert relative(got, expected) < 1e-5 and relative(plain, expected) > 1e-4
    assert torch.equal(predict(made.model, made.clip), plain)
    assert digest_of_model(made.clip.patcher) != digest_of_model(patched.patcher)
    patched.patcher.unpatch_model()
    assert all(torch.equal(a, b) for a, b in zip(snapshot(made), weights, strict=True))


def test_families_without_a_clip_are_refused(embedded, dataset, folders):
    with pytest.raises(
        ValueError, match=r"is no CLIP, and no other kind can be trained: set text_encoder_learning_rate"
    ):
        run(embedded, dataset)
    assert not list((folders / "loras").iterdir())
