"""The distiller node on the embedded model: its student, its file, and what it leaves as it was."""

import pytest
import torch
from training_runs import memory

pytestmark = pytest.mark.comfy

PROMPTS = "{tree|star} in {ocean|jazz} style\n# a remark\nhouse"


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """models/loras and output of ComfyUI, empty."""
    import folder_paths

    loras, output = tmp_path / "loras", tmp_path / "output"
    loras.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(loras)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "output_directory", str(output))
    return loras, output / "stylewright"


@pytest.fixture
def distil(embedded, folders):
    """``distil(steps=2, …)`` queues the node: its outputs. ``on``: sockets other than the embedded model's."""
    from stylewright.nodes.distiller import PGSBDistiller

    class Node(PGSBDistiller):
        """With the hidden inputs that an executor would set."""

    Node.hidden = type("Hidden", (), {"unique_id": None})
    inputs = PGSBDistiller.define_schema().inputs
    defaults = {each.id: each.default for each in inputs if getattr(each, "default", None) is not None}
    small = {
        "prompts": PROMPTS, "steps": 4, "batch_size": 2, "rank": 4, "fake_rank": 3, "resolution": 32, "save_every": 2,
        "learning_rate": 1e-3, "sample_steps": 2, "file_name": "mine",
    }  # fmt: skip

    def run(**changes):
        sockets = {"teacher": embedded.model, "clip": embedded.clip, "vae": embedded.vae}
        with torch.inference_mode():
            return Node.execute(**sockets | defaults | small | changes).args

    return run


def test_a_student_comes_out_and_sets_the_sampler_up(distil, embedded):
    from stylewright.nodes.bridge.adapters import Strengths, apply_adapter
    from stylewright.nodes.bridge.students import preset_of

    places, before = memory(embedded.model)
    lora, losses, path, samples = distil(sample_prompt="tree", sample_every=2)
    assert lora.file.about.one_step == {"level": 1.0, "unit": "sigma", "prediction": "flow", "start": "unit"}
    assert len(losses["loss"]) == 4 and path.endswith("mine_00001_.safetensors")
    assert samples.shape[0] == 1 and samples.shape[2] > 3 * 32  # the teacher's, and the student's after 2 and 4 steps
    student = apply_adapter(embedded.model, None, lora, Strengths(), warn=print)
    assert not student.homeless and preset_of(student.model).levels(1) == (1.0,)
    after = memory(embedded.model)
    assert after[0] == places and all(torch.equal(after[1][name], value) for name, value in before.items())
