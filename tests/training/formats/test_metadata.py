"""What files say of themselves: everything comes back, other tools find their keys, newer versions are refused."""

import json

import pytest

from stylewright.training.formats.metadata import (
    AdapterMetadata,
    build_metadata,
    read_metadata,
    stated_family,
    states_family,
)

FULL = AdapterMetadata(
    family="flux",
    method="rslora",
    rank=16,
    alpha=8.0,
    targets=("style",),
    base_model="flux1-dev",
    style_phrase="melting gölden 3d rendering",
    process="flow",
    prediction="flow",
    density={"kind": "normal", "mu": -6.0, "sigma": 3.0},
    seed=0,
    steps=300,
    images=1,
    resolution=512,
    learning_rate=1e-4,
    optimizer="adamw",
    date="2025-01-02",
    training={"batch_size": 2, "adapter": {"rank": 16}},
)


@pytest.mark.parametrize(
    "about", [FULL, AdapterMetadata("sd15", "oft", 4), AdapterMetadata("other", "lora", 1, seed=0)]
)
def test_comes_back(about):
    header = build_metadata(about)
    assert all(isinstance(value, str) and value for value in header.values())
    assert read_metadata(header, "x") == about


def test_scale():
    assert AdapterMetadata("flux", "lora", 16).scale == 1
    assert AdapterMetadata("flux", "dora", 16, alpha=8.0).scale == 0.5
    assert FULL.scale == 2  # 8 / sqrt(16)
    assert AdapterMetadata("flux", "oft", 16).scale == 1


def test_keys_of_other_tools():
    header = build_metadata(FULL)
    assert header["modelspec.sai_model_spec"] == "1.0.1"
    assert header["modelspec.architecture"] == "Flux.1-dev/lora"
    assert header["modelspec.trigger_phrase"] == header["modelspec.title"] == FULL.style_phrase
    assert header["modelspec.resolution"] == "512x512"
    assert header["ss_network_dim"] == "16"
    assert float(header["ss_network_alpha"]) / 16 == FULL.scale
    assert json.loads(header["ss_tag_frequency"]) == {"style": {FULL.style_phrase: 1}}
    # A1111 lists an adapter under SDXL by this name.
    assert "sdxl_" in build_metadata(AdapterMetadata("sdxl", "lora", 4))["ss_base_model_version"]
    assert json.loads(build_metadata(AdapterMetadata("sdxl", "loha", 4))["ss_network_args"]) == {"algo": "loha"}


def test_the_same_run_has_the_same_header():
    assert build_metadata(FULL) == build_metadata(FULL)
    assert "modelspec.date" not in build_metadata(AdapterMetadata("sdxl", "lora", 4))


@pytest.mark.parametrize("version", ["2", "0", "1.5", "x"])
def test_unknown_versions_are_refused(version):
    header = {**build_metadata(FULL), "stylewright.format_version": version}
    with pytest.raises(ValueError, match=rf"mine\.safetensors has the adapter format version {version}, .* up to 1"):
        read_metadata(header, "mine.safetensors")


def test_damaged_metadata():
    header = build_metadata(FULL)
    with pytest.raises(ValueError, match=r"mine\.safetensors has damaged metadata"):
        read_metadata({**header, "stylewright.density": "{"}, "mine.safetensors")
    del header["stylewright.rank"]
    with pytest.raises(ValueError, match=r"mine\.safetensors has damaged metadata .*rank"):
        read_metadata(header, "mine.safetensors")
    assert read_metadata({"format": "pt"}, "mine.safetensors") is None


def test_bad_values():
    with pytest.raises(ValueError, match="rank is 0"):
        build_metadata(AdapterMetadata("flux", "lora", 0))


@pytest.mark.parametrize(
    ("header", "family"),
    [
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl"),
        ({"ss_base_model_version": "sd_1.5"}, "sd15"),
        ({"ss_base_model_version": "flux1"}, "flux"),
        ({"modelspec.architecture": "flux-1-dev/lora"}, "flux"),
        ({"modelspec.architecture": "Flux.1-dev/lora"}, "flux"),
        ({"modelspec.architecture": "stable-diffusion-3.5-medium/lora"}, "sd3"),
        ({"ss_base_model_version": "flux2"}, None),
        ({"ss_base_model_version": "sd_v2_v"}, None),
    ],
)
def test_families_of_other_tools(header, family):
    assert states_family(header)
    assert stated_family(header) == family
    assert not states_family({"format": "pt"})


CALL = {"level": 0.4, "unit": "sigma", "prediction": "flow", "start": "unit"}


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {**CALL, "level": 1},
        {**CALL, "level": -0.2, "unit": "time"},
        {**CALL, "level": 399.0, "unit": "time"},
        {**CALL, "level": -8.764053, "unit": "log_snr"},
    ],
)
def test_the_call_of_a_student_comes_back(call):
    about = read_metadata(build_metadata(AdapterMetadata("flux", "lora", 4, one_step=call)), "a file")
    assert about is not None and about.one_step == call


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"level": 7}, "called at sigma 7: expected more than 0, up to 1"),
        ({"level": 0.0}, "called at sigma 0"),
        ({"level": float("nan")}, "called at sigma nan"),
        ({"level": 1400, "unit": "time"}, "called at time 1400: expected more than -1000, up to 1000"),
        ({"level": "late"}, "not how it is called"),
        ({"level": float("-inf"), "unit": "log_snr"}, "called at log_snr -inf"),
        ({"unit": "percent"}, "sigma, time, log_snr"),
        ({"start": None}, ""),
    ],
)
def test_a_student_at_no_level_of_noise_is_refused(change, words):
    call = {key: value for key, value in {**CALL, **change}.items() if value is not None}
    header = build_metadata(AdapterMetadata("flux", "lora", 4, one_step=call))
    with pytest.raises(ValueError, match=f"a file says .*{words}"):
        read_metadata(header, "a file")


def test_a_call_that_is_no_table_is_refused():
    header = build_metadata(AdapterMetadata("flux", "lora", 4, one_step=CALL))
    with pytest.raises(ValueError, match="not how it is called"):
        read_metadata({**header, "stylewright.one_step": "[7]"}, "a file")
