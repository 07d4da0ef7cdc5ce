"""The trainer node on a small FLUX: what it gives, what it leaves behind, and how it stops."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.comfy

SIDE = 64  # pixels


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
def dataset():
    from stylewright.nodes.dataset import StyleDatasetNode

    images = torch.rand(2, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(2))
    node = StyleDatasetNode.execute(
        captions=["star\nhouse"],
        style_phrase=["<v0>"],
        resolution=[SIDE],
        folder=["[from the images input]"],
        caption_mode=["content"],
        images=[images],
    )
    assert node.args[1] == "star in <v0> style\nhouse in <v0> style"
    return node.args[0]


def options(**changes):
    """Widgets of a short run."""
    plain = {
        "steps": 4, "learning_rate": 1e-3, "rank": 4, "alpha": 0.0, "batch_size": 2, "accumulation": 1,
        "method": "lora", "optimizer": "adam", "targets": "style", "seed": 3, "precision": "float32",
        "gradient_checkpointing": False, "file_name": "styles/test", "sample_prompt": "", "sample_every": 0,
        "sample_steps": 2, "sample_cfg": 1.0, "scheduler": "constant", "warm_up": 0, "weight_decay": 0.0,
        "clip_norm": 1.0, "ema_decay": 0.0, "caption_dropout": 0.0, "dropout": 0.0, "loss": "mse",
        "weighting": "none", "offset_noise": 0.0, "save_every": 0, "target_patterns": "",
        "resume": "automatic", "save_intermediate": False, "keep_checkpoints": 3,
        "sample_sampler": "euler", "sample_scheduler": "simple", "sample_seed": 0, "sample_negative": "",
        "sample_width": 0, "sample_height": 0, "memory": "automatic", "init_lora": None,
        "text_encoder_learning_rate": 0.0, "text_encoder_targets": "attention", "dco_beta": 0.0,
    }  # fmt: skip
    assert not changes.keys() - plain.keys()
    return plain | changes


def run(embedded, dataset, **changes):
    """The node's outputs but for the sample pictures, executed as ComfyUI's executor does."""
    from stylewright.nodes.trainer import StyleFriendlySNRTrainer

    class Node(StyleFriendlySNRTrainer):
        """With the hidden inputs that an executor would set."""

    Node.hidden = type("Hidden", (), {"unique_id": None})
    with torch.inference_mode():
        return Node.execute(embedded.model, embedded.clip, embedded.vae, dataset, **options(**changes)).args[:3]


def predict(model, clip):
    """One prediction of the model with whatever patches it has, (1, 16, 8, 8)."""
    from stylewright.nodes.bridge.session import training_session

    with torch.inference_mode(), training_session(model), torch.no_grad():
        return _predict(model, clip)


def _predict(model, clip):
    from stylewright.nodes.bridge.denoiser import ComfyDenoiser
    from stylewright.nodes.bridge.prompts import PromptTable

    x_t = torch.randn(1, 16, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(9))
    prompts = PromptTable(clip)
    return ComfyDenoiser(model, prompts)(x_t, torch.tensor([-2.0]), prompts.encode(["star in <v0> style"]))


def predict_as_trained(embedded, path):
    """The prediction with the adapter of a file attached as in training, by peft."""
    from stylewright.nodes.bridge.adapters import weights_of
    from stylewright.nodes.bridge.session import training_session
    from stylewright.training.adapters.attach import attached
    from stylewright.training.adapters.methods import AdapterConfig
    from stylewright.training.formats.adapters import load_adapter

    with torch.inference_mode(), training_session(embedded.model), torch.no_grad():
        loaded = load_adapter(path, "native", weights=weights_of(embedded.model))
        config = AdapterConfig(method=loaded.method, rank=loaded.rank, alpha=loaded.alpha)
        with attached(embedded.model.model.diffusion_model, config, family="flux", seed=0) as adapter:
            adapter.load_state_dict(loaded.state)
            return _predict(embedded.model, embedded.clip)


def relative(a, b):
    return float((a - b).norm() / b.norm())


def test_a_run_gives_an_adapter_that_stock_nodes_take(embedded, dataset, folders):
    from comfy_extras.nodes_train import LoraModelLoader, SaveLoRA

    before = predict(embedded.model, embedded.clip)
    names = list(dict(embedded.model.model.named_modules()))
    memory = [parameter.data_ptr() for parameter in embedded.model.model.parameters()]
    lora, losses, path = run(embedded, dataset)
    assert torch.equal(predict(embedded.model, embedded.clip), before)
    assert list(dict(embedded.model.model.named_modules())) == names
    assert [parameter.data_ptr() for parameter in embedded.model.model.parameters()] == memory, "weights were copied"
    assert not any(parameter.requires_grad for parameter in embedded.model.model.parameters())

    loras, output = folders
    assert path == str(loras / "styles" / "test_00001_.safetensors")
    assert {key: value.tolist() for key, value in load_file(path).items()} == {k: v.tolist() for k, v in lora.items()}
    assert len(losses["loss"]) == 4 and all(loss > 0 for loss in losses["loss"])
    (run_folder,) = (output / "stylewright").iterdir()
    assert (run_folder / "config.json").exists() and (run_folder / "events.jsonl").exists()
    assert run_folder.name == "styles-test_00001"

    with torch.inference_mode():
        stock = LoraModelLoader.execute(embedded.model, lora, 1.0).args[0]
    adapted = predict(stock, embedded.clip)
    assert relative(adapted, before) > 1e-3
    assert relative(adapted, predict_as_trained(embedded, path)) < 1e-3

    with torch.inference_mode():
        SaveLoRA.execute(lora, "loras/saved")
    assert load_file(output / "loras" / "saved_00001_.safetensors").keys() == lora.keys()


def test_our_loader_equals_the_stock_one(embedded, dataset, folders):
    from comfy_extras.nodes_train import LoraModelLoader

    from stylewright.nodes.bridge.adapters import Strengths, apply_adapter, read_tensors

    lora, _, path = run(embedded, dataset)
    with torch.inference_mode():
        stock = LoraModelLoader.execute(embedded.model, lora, 0.7).args[0]
    adapter = read_tensors(Path(path))
    applied = apply_adapter(embedded.model, None, adapter, Strengths(model=0.7), warn=pytest.fail)
    assert applied.homeless == ()
    assert torch.equal(predict(applied.model, embedded.clip), predict(stock, embedded.clip))


def test_a_run_begins_with_another_adapter(embedded, dataset, folders):
    from stylewright.training.errors import IncompatibleCheckpoint

    lora, _, _ = run(embedded, dataset)
    short = {"init_lora": lora, "steps": 1, "learning_rate": 1e-30, "file_name": "styles/more"}
    still, _, path = run(embedded, dataset, **short)
    assert all(torch.equal(still[key], tensor) for key, tensor in lora.items())
    assert "test_00001_.safetensors" in read_header(path)["stylewright.started_from"]
    larger, _, _ = run(embedded, dataset, **short, rank=6)
    for name in {key.rpartition(".lora_")[0] for key in lora}:
        before, after = (each[f"{name}.lora_B.weight"] @ each[f"{name}.lora_A.weight"] for each in (lora, larger))
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="is a lora adapter, and this run trains lokr"):
        run(embedded, dataset, **short, method="lokr")
    with pytest.raises(IncompatibleCheckpoint, match="the adapter or model to begin with is another"):
        run(embedded, dataset, **{**short, "init_lora": larger, "steps": 2}, rank=6, resume="continue")


def read_header(path):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_the_same_seed_gives_the_same_adapter(embedded, dataset, folders):
    torch.manual_seed(1)
    first, _, path = run(embedded, dataset)
    torch.manual_seed(2)
    second, _, other = run(embedded, dataset, resume="begin anew")
    different, _, _ = run(embedded, dataset, seed=4)
    assert path != other
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], different[key]) for key in first)


@pytest.fixture
def interrupt_at():
    """Presses ComfyUI's cancel when the progress bar arrives at a step."""
    import comfy.model_management
    import comfy.utils

    def press(step):
        def hook(value, total, preview, node_id=None):
            if value == step:
                comfy.model_management.interrupt_current_processing()

        comfy.utils.set_progress_bar_global_hook(hook)

    yield press
    comfy.utils.set_progress_bar_global_hook(None)
    comfy.model_management.interrupt_current_processing(False)


def test_an_interrupted_run_keeps_its_adapter_and_continues(embedded, dataset, folders, interrupt_at):
    import comfy.model_management
    import comfy.utils

    sampled = {"sample_prompt": "tree", "sample_every": 2}  # a report after step 2
    loras, output = folders
    before = predict(embedded.model, embedded.clip)
    interrupt_at(2)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(embedded, dataset, **sampled)
    comfy.utils.set_progress_bar_global_hook(None)
    assert not comfy.model_management.in_training
    assert torch.equal(predict(embedded.model, embedded.clip), before)
    partial = loras / "styles" / "test_00001_step000002.safetensors"
    assert [file.name for file in (loras / "styles").iterdir()] == [partial.name]
    assert any(float(tensor.abs().max()) > 0 for key, tensor in load_file(partial).items() if "lora_B" in key)

    continued, losses, path = run(embedded, dataset)
    assert path == str(loras / "styles" / "test_00001_.safetensors")
    assert len(list((output / "stylewright").iterdir())) == 1
    straight, expected, _ = run(embedded, dataset, resume="begin anew")
    assert losses["loss"] == pytest.approx(expected["loss"])
    assert all(torch.equal(continued[key], straight[key]) for key in straight)


@pytest.mark.parametrize("method", ["dora", "rslora", "lokr", "loha", "oft"])
def test_every_method_lands_complete_in_the_stock_loader(method, embedded, dataset, folders):
    import comfy.lora
    import comfy.sd

    from stylewright.nodes.bridge.fitting import fit

    lora, _, path = run(embedded, dataset, method=method, learning_rate=5e-3)
    names = comfy.lora.model_lora_keys_unet(embedded.model.model, {})
    assert fit(lora, names, with_text=False).homeless == ()
    with torch.inference_mode():
        stock, _ = comfy.sd.load_lora_for_models(embedded.model, None, lora, 1.0, 0.0)
    adapted, before = predict(stock, embedded.clip), predict(embedded.model, embedded.clip)
    assert relative(adapted, before) > 1e-3
    assert relative(adapted, predict_as_trained(embedded, path)) < 1e-3


@pytest.mark.parametrize(("optimizer", "rate"), [("prodigy", 1.0), ("schedule-free", 1e-2)])
def test_optimizers_without_a_schedule_train(optimizer, rate, embedded, dataset, folders):
    """With warm-up, to the end: every layer learns, and the file is complete."""
    import math

    import comfy.lora

    from stylewright.nodes.bridge.fitting import fit

    lora, losses, path = run(embedded, dataset, optimizer=optimizer, learning_rate=rate, warm_up=1, accumulation=2)
    assert len(losses["loss"]) == 4 and all(map(math.isfinite, losses["loss"]))
    assert all(tensor.isfinite().all() for tensor in lora.values())
    ups = [tensor for name, tensor in lora.items() if "lora_up" in name or "lora_B" in name]
    assert ups and all(up.any() for up in ups)
    names = comfy.lora.model_lora_keys_unet(embedded.model.model, {})
    assert fit(lora, names, with_text=False).homeless == () and load_file(path).keys() == lora.keys()
    again = run(
        embedded, dataset, optimizer=optimizer, learning_rate=rate, warm_up=1, accumulation=2, file_name="again"
    )
    assert all(torch.equal(tensor, again[0][name]) for name, tensor in lora.items())


def test_density_reaches_the_run(embedded, dataset, folders):
    import json

    from stylewright.nodes.sockets import StyleDensity
    from stylewright.training.density_presets import DensityConfig

    _, output = folders
    from stylewright.nodes.trainer import StyleFriendlySNRTrainer

    class Node(StyleFriendlySNRTrainer):
        pass

    Node.hidden = type("Hidden", (), {"unique_id": None})
    density = StyleDensity(DensityConfig(preset="style-friendly", mu=-6.0, sigma=2.0, reference_tokens=4096))
    with torch.inference_mode():
        Node.execute(embedded.model, embedded.clip, embedded.vae, dataset, **options(steps=1), density=density)
    (folder,) = (output / "stylewright").iterdir()
    assert json.loads((folder / "config.json").read_text())["density"]["reference_tokens"] == 4096


def test_the_embedded_model_carries_the_law_to_its_own_size(embedded, dataset, folders):
    import json

    from stylewright.nodes.trainer import StyleFriendlySNRTrainer

    class Node(StyleFriendlySNRTrainer):
        pass

    Node.hidden = type("Hidden", (), {"unique_id": None})
    with torch.inference_mode():
        Node.execute(embedded.model.clone(), embedded.clip, embedded.vae, dataset, **options(steps=1))
    (folder,) = (folders[1] / "stylewright").iterdir()
    assert json.loads((folder / "config.json").read_text())["density"]["reference_tokens"] == 4096


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 512}, "rank 512 is larger"),
        ({"targets": "cross-attention"}, "cross-attention"),
        ({"target_patterns": "no_such_layer"}, "no_such_layer"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"file_name": "../outside"}, "models/loras"),
        ({"file_name": ""}, "models/loras"),
        ({"file_name": "  "}, "models/loras"),
        ({"file_name": "a\nb"}, "some systems"),
        ({"file_name": "what?"}, "some systems"),
        ({"file_name": "/tmp/elsewhere"}, "models/loras"),
        ({"optimizer": "prodigy"}, "prodigy"),
        ({"sample_prompt": "an astronaut", "sample_every": 1}, "astronaut"),
    ],
)
def test_bad_input_is_an_error_before_work(changes, message, embedded, dataset, folders):
    before = predict(embedded.model, embedded.clip)
    with pytest.raises(ValueError, match=message):
        run(embedded, dataset, **changes)
    assert torch.equal(predict(embedded.model, embedded.clip), before)
    assert not list(folders[0].rglob("*.safetensors"))


def test_a_foreign_vae_is_refused(embedded, dataset, folders):
    import comfy.sd
    import comfy.taesd.taesd

    with torch.inference_mode():
        four = comfy.sd.VAE(sd=comfy.taesd.taesd.TAESD(latent_channels=4).state_dict())
    with pytest.raises(ValueError, match="4 channels"):
        run(replace(embedded, vae=four), dataset)


def test_a_file_name_may_have_its_ending(embedded, dataset, folders):
    assert run(embedded, dataset, steps=1, file_name="styles/mine.safetensors")[2].endswith("mine_00001_.safetensors")


def test_a_foreign_clip_is_refused_before_a_run_begins(embedded, dataset, folders, tiny_clip):
    before = predict(embedded.model, embedded.clip)
    with pytest.raises(ValueError, match=r"cannot be run on what this text encoder and VAE give.*connect the CLIP"):
        run(replace(embedded, clip=tiny_clip("sd15")), dataset)
    assert torch.equal(predict(embedded.model, embedded.clip), before)
    assert not list(folders[0].rglob("*.safetensors")) and not list((folders[1] / "stylewright").iterdir())


def test_a_trained_adapter_is_kept_where_it_cannot_be_copied(embedded, dataset, folders, monkeypatch):
    import errno

    from stylewright.nodes.bridge import publishing

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(Exception, match="is trained and could not be saved"):
        patch.setattr(publishing, "copy", full)
        run(embedded, dataset)
    assert len(list(folders[1].rglob("adapter.safetensors"))) == 1
    assert run(embedded, dataset)[2].endswith("test_00001_.safetensors")


@pytest.mark.parametrize("which", ["loras", "output"])
def test_a_folder_that_takes_nothing_is_named(which, embedded, dataset, folders, monkeypatch, tmp_path):
    import folder_paths

    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a folder is wanted")
    if which == "loras":
        monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(blocked)], {".safetensors"}))
    else:
        monkeypatch.setattr(folder_paths, "output_directory", str(blocked))
    with pytest.raises(ValueError, match=r"nothing can be written to .*blocked"):
        run(embedded, dataset)
    assert not list(folders[0].rglob("*.safetensors"))


def test_a_vae_that_makes_nan_is_named(embedded, dataset, folders, monkeypatch):
    nan = lambda pixels: torch.full((len(pixels), 16, SIDE // 8, SIDE // 8), torch.nan)  # noqa: E731
    monkeypatch.setattr(embedded.vae.first_stage_model, "encode", nan)
    with pytest.raises(ValueError, match="picture 1 contain NaN"):
        run(embedded, dataset)
