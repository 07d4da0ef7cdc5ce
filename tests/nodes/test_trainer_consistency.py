"""Direct Consistency Optimization in the trainer node: the base is the user's model, patches included."""

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_runs import three_steps

pytestmark = pytest.mark.comfy

spec = importlib.util.spec_from_file_location("trainer_steps", Path(__file__).with_name("test_trainer.py"))
steps = sys.modules["trainer_steps"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(steps)
folders, dataset = steps.folders, steps.dataset


@pytest.mark.parametrize(("family", "beta"), [("flux", 1.0), ("sd3", 1.0), ("sd15", 1000.0), ("sdxl", 1000.0)])
def test_every_family_starts_at_log_2_with_its_own_beta(family, beta, tiny, tiny_clip, tmp_path):
    model, clip = tiny(family), tiny_clip(family)
    found = three_steps(model, clip, tmp_path / "found", loss="dco")
    stated = three_steps(model, clip, tmp_path / "stated", loss="dco", dco_beta=beta)
    assert found.losses[0] == pytest.approx(math.log(2)) and found.losses[1] != found.losses[0]
    assert found.losses == stated.losses


def test_the_node_trains_it_with_and_without_checkpointing_and_goes_on(embedded, dataset, folders):
    options = {"loss": "dco", "dco_beta": 5.0, "sample_every": 0, "memory": "as set"}
    before = steps.predict(embedded.model, embedded.clip)
    lora, losses, _ = steps.run(embedded, dataset, **options)
    assert losses["loss"][0] == pytest.approx(math.log(2))
    assert torch.equal(steps.predict(embedded.model, embedded.clip), before)
    again, _, _ = steps.run(embedded, dataset, resume="begin anew", gradient_checkpointing=True, **options)
    assert all(torch.equal(lora[key], again[key]) for key in lora)
    run = {"resume": "begin anew", "file_name": "styles/on", **options}
    steps.run(embedded, dataset, **run, steps=2, save_every=1)
    continued, _, _ = steps.run(embedded, dataset, **run | {"resume": "continue", "steps": 4})
    assert all(torch.equal(lora[key], continued[key]) for key in lora)


def test_an_adapter_of_nodes_before_is_part_of_the_base(embedded, dataset, folders):
    from stylewright.nodes.lora_loader import StyleLoRALoader

    lora, _, _ = steps.run(embedded, dataset, learning_rate=1e-2)
    with torch.inference_mode():
        node = type("Node", (StyleLoRALoader,), {"hidden": type("Hidden", (), {"unique_id": None})})
        patched = node.execute(embedded.model, "[from the lora input]", 1.0, 1.0, lora=lora).args[0]
    _, losses, _ = steps.run(replace(embedded, model=patched), dataset, loss="dco", resume="begin anew")
    assert losses["loss"][0] == pytest.approx(math.log(2))
