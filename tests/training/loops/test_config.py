"""The configuration: the paper's defaults, refusals by name, and the same names as a table."""

import dataclasses

import pytest

from stylewright.training.adapters.methods import AdapterConfig
from stylewright.training.density_presets import DensityConfig
from stylewright.training.loops.config import TrainConfig, config_from_table, config_to_table


def test_the_defaults_are_the_papers_recipe():
    config = TrainConfig()
    assert (config.steps, config.batch_size, config.accumulation) == (300, 1, 4)
    assert (config.optimizer, config.learning_rate, config.weight_decay) == ("adam", 1e-4, 0.0)
    assert (config.loss, config.weighting, config.scheduler, config.warm_up) == ("mse", "none", "constant", 0)
    assert (config.adapter.rank, config.adapter.scale_alpha, config.adapter.init) == (32, 32, "gaussian")
    assert config.samples_a_step == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, ["steps=0", "at least 1"]),
        ({"batch_size": 0}, ["batch_size=0"]),
        ({"accumulation": -1}, ["accumulation=-1"]),
        ({"learning_rate": 0.0}, ["learning_rate=0.0", "1e-4"]),
        ({"learning_rate": -1e-4}, ["learning_rate=-0.0001"]),
        ({"learning_rate": float("nan")}, ["learning_rate=nan"]),
        ({"optimizer": "sgd"}, ["'sgd'", "adam", "schedule-free"]),
        ({"scheduler": "step"}, ["'step'", "constant, linear, cosine"]),
        ({"weighting": "min-snr"}, ["'min-snr'", "min-snr-5"]),
        ({"loss": "l2"}, ["'l2'", "mse"]),
        ({"precision": "fp16"}, ["'fp16'", "bfloat16"]),
        ({"warm_up": 300}, ["warm_up=300", "steps=300"]),
        ({"ema_decay": 1.0}, ["ema_decay=1.0"]),
        ({"caption_dropout": 1.5}, ["caption_dropout=1.5"]),
        ({"clip_norm": -1.0}, ["clip_norm=-1.0"]),
        ({"offset_noise": -0.1}, ["offset_noise=-0.1"]),
        ({"resolution": 0}, ["resolution=0"]),
        ({"save_every": -1}, ["save_every=-1"]),
        ({"optimizer": "prodigy"}, ["learning_rate=0.0001", "'prodigy'", "about 1"]),
        ({"optimizer": "schedule-free", "scheduler": "cosine"}, ["'cosine'", "'schedule-free'"]),
        ({"optimizer": "schedule-free", "ema_decay": 0.9}, ["ema_decay=0.9"]),
        ({"density": DensityConfig(preset="sd4")}, ["'sd4'"]),
    ],
)
def test_what_means_nothing_is_refused_by_name(changes, words):
    with pytest.raises(ValueError) as error:
        TrainConfig(**changes)
    assert all(word in str(error.value) for word in words), error.value


def test_a_table_and_back():
    config = TrainConfig(
        steps=7,
        sample_prompts=("a cat", "a dog"),
        resolution=512,
        adapter=AdapterConfig(method="dora", rank=4, targets=("to_q", "to_k")),
        density=DensityConfig(mu=-3.0, reference_tokens=4096),
    )
    table = config_to_table(config)
    assert table["adapter"]["targets"] == ["to_q", "to_k"]
    assert table["density"]["mu"] == -3.0
    assert config_from_table(table) == config
    assert config_from_table(config_to_table(TrainConfig())) == TrainConfig()


def test_tables_may_leave_out_what_is_none():
    """TOML has no null, so that an optional field needs None as its default."""
    for kind in (TrainConfig, AdapterConfig, DensityConfig):
        for field in dataclasses.fields(kind):
            if "None" in str(field.type):
                assert field.default is None, f"{kind.__name__}.{field.name}"


def test_a_misspelt_key_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=r"Unknown option adapter\.rnk: did you mean adapter\.rank\?"):
        config_from_table({"adapter": {"rnk": 4}})
    with pytest.raises(ValueError, match=r"Unknown option learningrate: did you mean learning_rate\?"):
        config_from_table({"learningrate": 1e-4})
