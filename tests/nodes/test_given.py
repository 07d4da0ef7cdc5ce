"""The trainer on what a user has encoded, on several concepts, and with regularisation."""

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.comfy

SIDE = 64  # pixels


@pytest.fixture
def loras(tmp_path, monkeypatch):
    """models/loras of ComfyUI, empty; its output folder is beside it."""
    import folder_paths

    (tmp_path / "loras").mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path / "loras")], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    return tmp_path / "loras"


def train(embedded, *, clip=None, vae=None, as_lists=True, **changes):
    """The trainer's outputs, executed as ComfyUI's executor does: every input is a list."""
    from stylewright.nodes.trainer import StyleFriendlySNRTrainer

    class Node(StyleFriendlySNRTrainer):
        """With the hidden inputs that an executor would set."""

    Node.hidden = type("Hidden", (), {"unique_id": None, "prompt": None, "extra_pnginfo": None})
    widgets = {each.id: each.default for each in Node.define_schema().inputs if hasattr(each, "default")}
    widgets = {name: value for name, value in widgets.items() if value is not None}
    short = {"steps": 2, "rank": 2, "accumulation": 2, "precision": "float32", "gradient_checkpointing": False}
    inputs = {**widgets, **short, "file_name": "test", "model": embedded.model, "clip": clip, "vae": vae}
    lists = {name: changes.pop(name) for name in ("latents", "conditioning") if name in changes}
    inputs = {name: value for name, value in {**inputs, **changes}.items() if value is not None}
    with torch.inference_mode():
        return Node.execute(**{name: [value] for name, value in inputs.items()}, **lists).args


def encoded(embedded, images, texts):
    """What VAE Encode and CLIP Text Encode make of pictures, one by one, and of words."""
    import nodes

    # In the memory layout of the core's pictures, for a convolution rounds differently in another one.
    images = images.movedim(-1, 1).contiguous().movedim(1, -1)
    with torch.inference_mode():
        latents = [nodes.VAEEncode().encode(embedded.vae, image[None])[0]["samples"] for image in images]
        return {"samples": torch.cat(latents)}, [
            nodes.CLIPTextEncode().encode(embedded.clip, text)[0] for text in texts
        ]


def pictures(count=2, height=SIDE, width=SIDE):
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(2))


def dataset(images, captions="star\nhouse", **changes):
    from stylewright.nodes.dataset import StyleDatasetNode

    plain = {"captions": [captions], "style_phrase": ["<v0>"], "resolution": [SIDE], "caption_mode": ["content"]}
    folder = ["[from the images input]"]
    with torch.inference_mode():
        return StyleDatasetNode.execute(images=[images], folder=folder, **{**plain, **changes}).args[0]


def combine(*datasets, **changes):
    from stylewright.nodes.combine import CombineDatasetsNode

    widgets = {each.id: each.default for each in CombineDatasetsNode.define_schema().inputs if hasattr(each, "default")}
    widgets = {name: value for name, value in widgets.items() if value is not None}
    given = {f"dataset_{n}": each for n, each in enumerate(datasets, start=1)}
    return CombineDatasetsNode.execute(**{**widgets, **given, **changes}).args[0]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_latents_and_conditioning_train_what_pictures_and_captions_train(embedded, loras):
    """Bit for bit: the sockets skip the encoding, and change nothing else."""
    images, texts = pictures(), ["star in <v0> style", "house in <v0> style"]
    by_words = train(embedded, clip=embedded.clip, vae=embedded.vae, dataset=dataset(images))[0]
    latents, conditioning = encoded(embedded, images, texts)
    given = train(embedded, latents=[latents], conditioning=conditioning, file_name="given")[0]
    assert same(by_words, given)
    half = dataset(images, "", conditioning=conditioning)
    assert same(by_words, train(embedded, vae=embedded.vae, dataset=half, file_name="half")[0])
    from stylewright.training.formats.contents import read_adapter

    assert read_adapter(next(loras.glob("given*"))).about.resolution == SIDE


def test_what_comfyui_s_own_dataset_nodes_make_is_taken(embedded, loras):
    from comfy_extras.nodes_dataset import MakeTrainingDataset, ResolutionBucket

    from stylewright.nodes.bridge.given import given_items

    images = [pictures(1), pictures(1, 48, 80), pictures(1)]
    with torch.inference_mode():
        latents, conditioning = MakeTrainingDataset.execute(
            images, [embedded.vae], [embedded.clip], ["star", "house", "tree"]
        ).args
        buckets, conditions = ResolutionBucket.execute(latents, conditioning).args
    assert [len(bucket["samples"]) for bucket in buckets] == [2, 1]
    one, other = given_items(latents, conditioning)[0], given_items(buckets, conditions)[0]
    assert {item.caption: item.image.latent.sum() for item in one} == {i.caption: i.image.latent.sum() for i in other}
    _, losses, path = train(embedded, latents=buckets, conditioning=conditions)[:3]
    assert len(losses["loss"]) == 2 and load_file(path)


def test_conditioning_joined_in_one_is_one_a_latent_and_a_noise_mask_is_where_it_is_learned(embedded):
    import nodes

    from stylewright.nodes.bridge.given import given_items

    latents, conditioning = encoded(embedded, pictures(), ["star", "house"])
    joined = [[entry for one in conditioning for entry in one]]
    mask = torch.zeros(SIDE, SIDE)
    mask[:, : SIDE // 2] = 1
    masked = nodes.SetLatentNoiseMask().set_mask(latents, mask)[0]
    items, answers = given_items([masked], joined)
    listed, _ = given_items([masked], conditioning)
    assert [item.caption for item in items] == [item.caption for item in listed]
    for item, one in zip(items, conditioning, strict=True):
        assert torch.equal(item.mask, mask) and torch.equal(answers[item.caption]["cross_attn"], one[0][0])


@pytest.mark.parametrize(
    ("missing", "changes", "message"),
    [
        ("clip", {}, "link the model's CLIP to 'clip': it is needed to encode the captions"),
        ("vae", {}, "link the model's VAE to 'vae': it is needed to encode the pictures"),
        ("dataset", {}, "a dataset is missing"),
        (None, {"latents": [{"samples": torch.rand(1, 16, 8, 8)}]}, "latents would be ignored"),
        (None, {"conditioning": [[[torch.rand(1, 2, 3), {}]]]}, "conditioning would be ignored"),
        ("clip", {"text_encoder_learning_rate": 1e-5}, "and to be trained"),
    ],
)
def test_what_is_missing_or_too_much_is_named(missing, changes, message, embedded, loras):
    inputs = {"clip": embedded.clip, "vae": embedded.vae, "dataset": dataset(pictures()), **changes}
    inputs.pop(missing, None)
    with pytest.raises(ValueError, match=message):
        train(embedded, **inputs)
    assert not list(loras.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("latent", "changes", "message"),
    [
        ({"samples": torch.rand(2, 4, 8, 8)}, {}, "4 channels, and the model works on 16"),
        ({"samples": torch.rand(1, 16, 3, 8, 8)}, {}, "films of 3 frames"),
        ({"samples": torch.rand(16, 8)}, {}, "no pictures"),
        ({"samples": torch.rand(0, 16, 8, 8)}, {}, "no latents"),
        ({"samples": torch.full((2, 16, 8, 8), torch.nan)}, {}, "NaN"),
        ({"samples": torch.rand(3, 16, 8, 8)}, {}, "3 latents and 2 conditionings"),
        ({"samples": torch.rand(2, 16, 8, 8), "noise_mask": torch.rand(3, 1, 8, 8)}, {}, "3 noise masks"),
        ({"samples": torch.rand(2, 16, 8, 8), "noise_mask": torch.zeros(1, 1, 8, 8)}, {}, "black all over"),
        ({"samples": torch.rand(2, 16, 8, 8)}, {"caption_dropout": 0.1}, "needed for caption_dropout"),
        ({"samples": torch.rand(2, 16, 8, 8)}, {"sample_prompt": "star"}, "to draw sample pictures"),
        ({"samples": torch.rand(2, 16, 8, 8)}, {"text_encoder_learning_rate": 1e-5}, "teach no text encoder"),
    ],
)
def test_latents_that_cannot_be_trained_on_are_named(latent, changes, message, embedded, loras):
    conditioning = [encoded(embedded, pictures(1), [text])[1][0] for text in ("star", "house")]
    with pytest.raises(ValueError, match=message):
        train(embedded, latents=[latent], conditioning=conditioning, **changes)
    assert not list(loras.rglob("*.safetensors"))


def test_training_takes_one_value_of_each_input(embedded):
    from stylewright.nodes.trainer import StyleFriendlySNRTrainer

    with pytest.raises(ValueError, match="seed got a list of 2 values"):
        StyleFriendlySNRTrainer.execute(model=[embedded.model], seed=[1, 2])


def test_the_base_s_answer_asks_for_nothing_in_the_first_step(embedded, loras):
    ink = dataset(pictures())
    sockets = {"clip": embedded.clip, "vae": embedded.vae, "steps": 1}
    adapters = [
        train(embedded, dataset=combine(ink, prior_target="base model", prior_weight=w), file_name=f"w{w}", **sockets)[
            0
        ]
        for w in (0.01, 100.0)
    ]
    assert same(*adapters)
    learned = combine(ink, regularisation=dataset(pictures(1), "tree", caption_mode=["plain"]), prior_weight=100.0)
    assert not same(adapters[0], train(embedded, dataset=learned, file_name="other", **sockets)[0])


def test_concepts_of_several_sizes_train_and_are_told_apart(embedded, loras):
    first = dataset(pictures(), more_resolutions=["96"], caption_orders=[2])
    second = dataset(pictures(1), "tree", style_phrase=["<v1>"], repeats=[2])
    sockets = {"clip": embedded.clip, "vae": embedded.vae}
    made = train(embedded, dataset=combine(first, second), **sockets)
    assert len(made[1]["loss"]) == 2
    # The same options with another share of repeats are another run.
    other = train(embedded, dataset=combine(first, second, repeats_2=3), **sockets)
    assert other[2] != made[2]


def test_what_is_said_of_a_dataset_is_on_the_trainer_s_panel(embedded, loras, monkeypatch):
    from stylewright.nodes.bridge.previews import TrainingProgress

    noted = []
    monkeypatch.setattr(TrainingProgress, "noted", lambda self, note: noted.append(note))
    train(embedded, clip=embedded.clip, vae=embedded.vae, dataset=combine(dataset(pictures()), prior_weight=0.5))
    assert "prior_weight = 0.5 changes nothing" in noted[0]


def test_a_sample_prompt_that_names_one_of_several_styles_is_left_alone(embedded):
    from stylewright.nodes.bridge.training import Job, sample_prompts
    from stylewright.training.loops.config import TrainConfig

    both = combine(dataset(pictures()), dataset(pictures(1), "tree", style_phrase=["<v1>"]))
    config = TrainConfig(style_phrase="<v0>", sample_prompts=("star", "tree in <v1> style"))
    job = Job(both.items, both.caption_mode, config, "name", 2, 1.0)
    assert sample_prompts(job) == ["star in <v0> style", "tree in <v1> style"]


@pytest.fixture
def teacher(embedded):
    """The embedded model with a LoRA on it, as a stock loader puts it there."""
    import comfy.sd

    network, lora = embedded.model.model.diffusion_model, {}
    for seed, name in enumerate(
        ("double_blocks.0.img_attn.qkv", "double_blocks.1.img_mlp.0", "single_blocks.0.linear1")
    ):
        source = torch.Generator().manual_seed(seed)
        weight = network.get_submodule(name).weight
        lora[f"diffusion_model.{name}.lora_down.weight"] = 0.3 * torch.randn(2, weight.shape[1], generator=source)
        lora[f"diffusion_model.{name}.lora_up.weight"] = 0.3 * torch.randn(len(weight), 2, generator=source)
    with torch.inference_mode():
        return comfy.sd.load_lora_for_models(embedded.model, None, lora, 1.0, 0.0)[0]


def drawn_by(teacher, embedded, texts):
    """Latents that a KSampler draws with the teacher, and their conditioning."""
    import nodes

    with torch.inference_mode():
        conditioning = [nodes.CLIPTextEncode().encode(embedded.clip, text)[0] for text in texts]
        negative = nodes.CLIPTextEncode().encode(embedded.clip, "")[0]
        empty = {"samples": torch.zeros(1, embedded.model.model.latent_format.latent_channels, 8, 8)}
        return [
            nodes.common_ksampler(teacher, 1, 3, 1.0, "euler", "simple", positive, negative, empty)[0]
            for positive in conditioning
        ], conditioning


def test_what_a_teacher_answers_is_learned_with_no_images(embedded, teacher, loras):
    import comfy.sd
    from training_runs import predict

    latents, conditioning = drawn_by(teacher, embedded, ["a star", "a house"])
    base, wanted = (predict(model, embedded.clip) for model in (embedded.model, teacher))
    *_, path, _ = train(
        embedded, clip=embedded.clip, latents=latents, conditioning=conditioning, teacher=teacher,
        steps=40, rank=4, accumulation=1, batch_size=1, learning_rate=0.01, file_name="taught",
    )  # fmt: skip
    learned = comfy.sd.load_lora_for_models(embedded.model, None, load_file(path), 1.0, 0.0)[0]
    assert (predict(learned, embedded.clip) - wanted).norm() < 0.95 * (base - wanted).norm()  # of no noise of the run
    assert torch.equal(predict(embedded.model, embedded.clip), base)
    assert torch.equal(predict(teacher, embedded.clip), wanted)
    assert not list(loras.parent.rglob("answers/*.safetensors"))


def test_what_a_teacher_has_answered_is_kept_where_the_run_is_cancelled(embedded, teacher, loras, monkeypatch):
    import comfy.model_management as management

    from stylewright.nodes.bridge.previews import TrainingProgress

    latents, conditioning = drawn_by(teacher, embedded, ["a star"])
    asked = []

    def taught(self, done, steps):
        asked.append(done)
        if len(asked) == 3:
            raise management.InterruptProcessingException

    monkeypatch.setattr(TrainingProgress, "taught", taught)
    given = {"clip": embedded.clip, "latents": latents, "conditioning": conditioning, "teacher": teacher, "steps": 5}
    with pytest.raises(management.InterruptProcessingException):
        train(embedded, **given, file_name="stopped")
    assert len(list(loras.parent.rglob("answers/*.safetensors"))) == 3
    *_, other, _ = train(embedded, **given, file_name="stopped", seed=1)  # of other options: neither used nor lost
    assert len(asked) == 3 + 5 and len(list(loras.parent.rglob("answers/*.safetensors"))) == 3
    *_, path, _ = train(embedded, **given, file_name="stopped", resume="continue")
    assert len(asked) == 3 + 5 + 2 and path != other
    assert not list(loras.parent.rglob("answers/*.safetensors"))
    *_, straight, _ = train(embedded, **given, file_name="straight")
    found, expected = load_file(path), load_file(straight)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_note_on_a_teacher_is_true_of_latents_too(embedded, teacher, loras, monkeypatch):
    from stylewright.nodes.bridge.previews import TrainingProgress

    noted = []
    monkeypatch.setattr(TrainingProgress, "noted", lambda self, note: noted.append(note))
    latents, conditioning = drawn_by(teacher, embedded, ["a star"])
    train(embedded, clip=embedded.clip, latents=latents, conditioning=conditioning, teacher=teacher, steps=1)
    assert noted == ["learns what the teacher answers, where the pictures or latents that are linked are noised"]


def test_a_teacher_that_teaches_nothing_or_in_another_language_is_refused(embedded, teacher, tiny, loras):
    latents, conditioning = drawn_by(teacher, embedded, ["a star"])
    given = {"clip": embedded.clip, "latents": latents, "conditioning": conditioning}
    with pytest.raises(ValueError, match="the teacher is the very model that learns"):
        train(embedded, **given, teacher=embedded.model.clone())
    with pytest.raises(ValueError, match="the teacher is a sd3 model of the process flow"):
        train(embedded, **given, teacher=tiny("sd3"))
