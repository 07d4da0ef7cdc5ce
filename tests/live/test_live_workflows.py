"""The shipped workflows: every one fits the schemas, and the quick start runs as it is shipped."""

import copy
import json

import pytest
from safetensors import safe_open

from stylewright.training.adapters.keys_values import rows_of
from stylewright.training.formats.contents import read_adapter

pytestmark = pytest.mark.comfy


def workflows(repository):
    found = {path.name: json.loads(path.read_text()) for path in (repository / "workflows").rglob("*.json")}
    assert found, "no workflows were found"
    return found


def test_every_workflow_fits_the_schemas(server, repository):
    from workflow_api import problems

    found = workflows(repository)
    assert "quick_start.json" in found
    for name, workflow in found.items():
        assert problems(workflow, server.info) == [], name


def test_the_checker_sees_what_is_wrong(server, repository):
    from workflow_api import problems

    workflow = workflows(repository)["quick_start.json"]
    trainer = next(i for i, node in enumerate(workflow["nodes"]) if node["type"] == "StyleFriendlySNRTrainer")

    def broken(change):
        altered = copy.deepcopy(workflow)
        change(altered, altered["nodes"][trainer])
        return problems(altered, server.info)

    assert broken(lambda graph, node: node.update(type="NoSuchNode"))
    assert broken(lambda graph, node: node["widgets_values"].pop())
    assert broken(lambda graph, node: node["widgets_values"].__setitem__(0, -1))
    assert broken(lambda graph, node: node["widgets_values"].__setitem__(0, "many"))
    assert broken(lambda graph, node: node["inputs"].pop(0))
    assert broken(lambda graph, node: node["inputs"][0].update(name="no_such_input"))
    assert broken(lambda graph, node: node["inputs"][0].update(link=None))
    assert broken(lambda graph, node: node["outputs"][0].update(type="IMAGE"))
    assert broken(lambda graph, node: graph["links"][0].__setitem__(2, 2))
    models = {"name": "x.safetensors", "url": "https://huggingface.co/a/b/x.safetensors", "directory": "vae"}
    assert broken(lambda graph, node: node["properties"].update(models=[models]))
    inner = {"id": "inner", "nodes": [{"id": 1, "type": "NoSuchNode"}], "links": []}
    assert broken(lambda graph, node: graph.update(definitions={"subgraphs": [inner]}))


def test_files_to_download_are_said(server, repository):
    from workflow_api import problems

    workflow = workflows(repository)["one_step_sdxl_dmd2.json"]
    nodes = [node for node in workflow["nodes"] if "models" in node["properties"]]
    assert [node["type"] for node in nodes] == ["CheckpointLoaderSimple", "LoraLoaderModelOnly"]
    for node in nodes:
        (model,) = node["properties"]["models"]
        for change in ({"name": "other.safetensors"}, {"url": "https://example.com/x"}, {"directory": "folder"}):
            node["properties"]["models"] = [model | change]
            assert problems(workflow, server.info), change
        node["properties"] = {}
        assert problems(workflow, server.info), "a file that nobody has is a problem"
        node["properties"]["models"] = [model]
    assert problems(workflow, server.info) == []


def test_the_one_step_workflow_runs_as_shipped(server, repository, shipped_weights):
    from workflow_api import to_prompt

    prompt = to_prompt(workflows(repository)["one_step.json"], server.info)
    result = server.run(prompt)
    assert result["status"]["status_str"] == "success", json.dumps(result["status"], indent=1)
    pictures = [image for output in result["outputs"].values() for image in output.get("images", [])]
    assert len(pictures) == 8
    samplers = {id: node["inputs"]["steps"] for id, node in prompt.items() if node["class_type"] == "OneStepSampler"}
    for id, steps in samplers.items():
        seen = [m["data"] for m in result["messages"] if m["type"] == "progress" and m["data"]["node"] == id]
        assert (seen[-1]["value"], seen[-1]["max"]) == (steps, steps)
    told = b"".join(message["data"] for message in result["messages"] if message["type"] == "binary")
    for preset in (b"custom", b"as the student's file says"):
        assert told.count(preset + b": time 1 (sigma 1, log_snr -inf)") == 1, "the level is shown on both nodes"


def test_a_model_that_is_none_of_the_presets_is_refused_in_words(server, repository, shipped_weights):
    from workflow_api import to_prompt

    prompt = to_prompt(workflows(repository)["one_step.json"], server.info)
    for node in prompt.values():
        if node["class_type"] == "OneStepSampler":
            node["inputs"] |= {"preset": "SDXL-Turbo", "steps": 0}
    result = server.run(prompt)
    (error,) = (message["data"] for message in result["messages"] if message["type"] == "execution_error")
    expected = "SDXL-Turbo is sdxl, and this model is FluxSchnell. Presets for it: FLUX.1-schnell"
    assert expected in error["exception_message"]


def test_the_prompt_switch_runs_as_shipped_and_says_where_it_switches(server, repository, shipped_weights):
    from workflow_api import to_prompt

    prompt = to_prompt(workflows(repository)["prompt_switch.json"], server.info)
    result = server.run(prompt)
    assert result["status"]["status_str"] == "success", json.dumps(result["status"], indent=1)
    first, last = (output["images"] for output in result["outputs"].values() if "images" in output)
    assert len(first) == len(last) == 4


def test_the_negative_prompt_runs_as_shipped(server, repository, shipped_weights):
    from workflow_api import to_prompt

    result = server.run(to_prompt(workflows(repository)["negative_prompt.json"], server.info))
    assert result["status"]["status_str"] == "success", json.dumps(result["status"], indent=1)
    assert sum(len(output.get("images", [])) for output in result["outputs"].values()) >= 2


def test_a_threshold_that_a_model_never_reaches_is_refused_in_words(server, repository, shipped_weights):
    from workflow_api import to_prompt

    prompt = to_prompt(workflows(repository)["prompt_switch.json"], server.info)
    for node in prompt.values():
        if node["class_type"] == "PromptSwitchByLogSNR":
            node["inputs"] |= {"unit": "time", "thresholds": "2000"}
    result = server.run(prompt)
    error = next(message["data"] for message in result["messages"] if message["type"] == "execution_error")
    assert error["node_type"] == "PromptSwitchByLogSNR"
    assert "so that one part would never act: time 2000 is not one of this model's levels" in error["exception_message"]


@pytest.fixture(scope="module")
def quick_start(server, repository, shipped_weights):
    """The quick start's prompt and what came of it."""
    from workflow_api import to_prompt

    prompt = to_prompt(workflows(repository)["quick_start.json"], server.info)
    return prompt, server.run(prompt)


def test_the_quick_start_runs_as_shipped(quick_start, server):
    _, result = quick_start
    assert result["status"]["status_str"] == "success", json.dumps(result["status"], indent=1)
    pictures = [image for output in result["outputs"].values() for image in output.get("images", [])]
    assert len(pictures) >= 4
    for image in pictures:
        folder = server.base / image["type"] / image["subfolder"]
        assert (folder / image["filename"]).stat().st_size > 500
    saved = (server.base / "models" / "loras" / "stylewright").iterdir()
    assert [path.name for path in saved] == ["quick_start_00001_.safetensors"]


def test_the_progress_comes_over_the_websocket_and_stays_in_the_history(quick_start, server):
    prompt, result = quick_start
    (trainer,) = (id for id, node in prompt.items() if node["class_type"] == "StyleFriendlySNRTrainer")
    inputs = prompt[trainer]["inputs"]
    steps = [m["data"] for m in result["messages"] if m["type"] == "progress" and m["data"]["node"] == trainer]
    assert steps[-1]["value"] == steps[-1]["max"] == inputs["steps"]
    told = [m["data"] for m in result["messages"] if m["type"] == "stylewright.training"]
    assert {each["node"] for each in told} == {trainer}
    assert [each["phase"] for each in told][::-1].index("finished") == 0
    assert {"preparing", "training", "drawing"} <= {each["phase"] for each in told}
    points = [point for each in told for point in each["points"]]
    assert [step for step, _ in points] == sorted({step for step, _ in points}) and points[-1][0] == inputs["steps"]

    (kept,) = result["outputs"][trainer]["stylewright_training"]
    assert kept["points"] == points and kept["bins"] and kept["window"] > -6.52  # carried to small pictures
    runs = server.json("stylewright/runs")  # of other tests' workflows too
    assert [run for run in runs if (run["node"], run["workflow"]) == (trainer, kept["workflow"])] == [kept]
    pictures = kept["pictures"]
    expected = [step for step in range(inputs["steps"] + 1) if step % inputs["sample_every"] == 0]
    assert [step for step, _, _ in pictures["steps"]] == expected
    for _, _, names in pictures["steps"]:
        for name in names:
            query = f"view?filename={name}&subfolder={pictures['subfolder']}&type=output"
            assert server.get(query).startswith(b"\x89PNG")


def test_an_interrupted_training_keeps_its_adapter_and_continues(quick_start, server):
    prompt = copy.deepcopy(quick_start[0])
    (trainer,) = (id for id, node in prompt.items() if node["class_type"] == "StyleFriendlySNRTrainer")
    inputs = prompt[trainer]["inputs"] | {"steps": 400, "file_name": "interrupted", "sample_every": 0, "seed": 5}
    prompt[trainer]["inputs"] = inputs
    loras = server.base / "models" / "loras"
    result = server.run(prompt, interrupt_at=10)
    assert result["messages"][-1]["type"] == "execution_interrupted"
    runs = list((server.base / "output" / "stylewright").glob("interrupted*"))
    assert [run.name for run in runs] == ["interrupted_00001"] and (runs[0] / "checkpoint.safetensors").exists()
    done = json.loads((runs[0] / "events.jsonl").read_text().splitlines()[-1])["step"]
    assert [path.name for path in loras.glob("interrupted*")] == [f"interrupted_00001_step{done:06}.safetensors"]
    result = server.run(prompt, interrupt_at=done + 10)
    first = next(
        m["data"]["value"] for m in result["messages"] if m["type"] == "progress" and m["data"]["node"] == trainer
    )
    assert first > done
    assert list((server.base / "output" / "stylewright").glob("interrupted*")) == runs


def test_an_error_names_the_words_that_are_not_known(server, shipped_weights):
    prompt = {
        "1": {"class_type": "StylewrightEmbeddedModel", "inputs": {}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "an astronaut in ocean style"}},
        "3": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}},
        "4": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1", 0], "positive": ["2", 0], "negative": ["2", 0], "latent_image": ["3", 0], "seed": 0,
                "steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
            },
        },
        "5": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 0], "vae": ["1", 2]}},
        "6": {"class_type": "PreviewImage", "inputs": {"images": ["5", 0]}},
    }  # fmt: skip
    result = server.run(prompt)
    (error,) = (message["data"] for message in result["messages"] if message["type"] == "execution_error")
    assert "'astronaut'" in error["exception_message"] and "ocean" in error["exception_message"]


def test_finestyle_runs_as_shipped_on_keys_and_values(server, repository, shipped_weights):
    from workflow_api import to_prompt

    prompt = to_prompt(workflows(repository)["finestyle.json"], server.info)
    trainer = next(node for node in prompt.values() if node["class_type"] == "StyleFriendlySNRTrainer")
    trainer["inputs"] |= {"steps": 10, "sample_every": 0}  # the rest is as it is
    result = server.run(prompt)
    assert result["status"]["status_str"] == "success", json.dumps(result["status"], indent=1)
    (saved,) = (server.base / "models" / "loras" / "stylewright").glob("finestyle_*.safetensors")
    file = read_adapter(saved)
    assert file.about.targets == ("kv_both",) and file.about.style_phrase == "<v0>"
    for name, layer in file.layers.items():  # whether stacked with others or by themselves
        b = layer.tensors["B"]
        rows = rows_of(name, layer.inputs, len(b))
        queries = b[: rows[0].start] if rows else b if name.endswith(("to_q", "add_q_proj")) else b[:0]
        assert b.any() and not queries.any(), name


def test_style_inject_runs_as_shipped_and_says_what_its_routers_do(server, repository, shipped_weights):
    from workflow_api import to_prompt

    prompt = to_prompt(workflows(repository)["style_inject.json"], server.info)
    trainer = next(node for node in prompt.values() if node["class_type"] == "StyleFriendlySNRTrainer")
    trainer["inputs"] |= {"steps": 10, "sample_every": 0}  # the rest is as it is
    result = server.run(prompt)
    assert result["status"]["status_str"] == "success", json.dumps(result["status"], indent=1)
    loras = server.base / "models" / "loras" / "stylewright"
    (saved,) = loras.glob("style_inject_[0-9]*.safetensors")  # not what StyleInject to LoRA made of it
    with safe_open(saved, framework="pt") as file:
        header = file.metadata()
    assert header["stylewright.mergeable"] == "false"
    layers = json.loads(header["stylewright.routing"])["layers"]
    assert len(layers) > 10 and f"{saved.name}: {len(layers)} layers\n" in server.text


def test_style_guidance_runs_as_shipped_and_says_what_it_weighs(server, repository, shipped_weights):
    from workflow_api import to_prompt

    prompt = to_prompt(workflows(repository)["style_guidance.json"], server.info)
    for node in prompt.values():  # the rest is as it is
        node["inputs"] |= {"steps": 4} if node["class_type"] in ("StyleFriendlySNRTrainer", "BasicScheduler") else {}
    result = server.run(prompt)
    assert result["status"]["status_str"] == "success", json.dumps(result["status"], indent=1)
    guided, plain = (output["images"] for output in result["outputs"].values() if len(output.get("images", [])) == 4)
    assert guided[0]["type"] != plain[0]["type"]
    assert "FineStyle: 4 adapted(positive) -2 adapted(negative) -1 base(positive); 3 predictions a call" in server.text


def test_a_student_is_distilled_and_drawn_in_one_step(server, repository, shipped_weights):
    from workflow_api import to_prompt

    prompt = to_prompt(workflows(repository)["distil_embedded.json"], server.info)
    distiller = next(id for id, node in prompt.items() if node["class_type"] == "PGSBDistiller")
    prompt[distiller]["inputs"] |= {"steps": 4, "sample_every": 4, "sample_steps": 4}  # the rest is as it is
    result = server.run(prompt)
    assert result["status"]["status_str"] == "success", json.dumps(result["status"], indent=1)
    pictures = (len(output["images"]) for output in result["outputs"].values() if "images" in output)
    assert sorted(pictures) == [2, 4, 4], "two strips, and the student's pictures with and without the negative prompt"
    (run,) = result["outputs"][distiller]["stylewright_training"]
    assert run["phase"] == "finished" and run["pictures"]["first"] == "teacher"
    assert any("begins with the linked student" in note for note in run["notes"])
    (saved,) = (server.base / "models" / "loras" / "stylewright").glob("student_*.safetensors")
    assert read_adapter(saved).about.one_step["level"] == 1.0
    told = b"".join(message["data"] for message in result["messages"] if message["type"] == "binary")
    assert told.count(b"as the student's file says: time 1 (sigma 1, log_snr -inf)") >= 2


def test_a_fine_tune_is_distilled_as_shipped_with_no_images(server, repository, shipped_weights):
    from workflow_api import to_prompt

    prompt = to_prompt(workflows(repository)["distil_fine_tune.json"], server.info)
    for node in prompt.values():  # the rest is as it is
        if node["class_type"] == "StyleFriendlySNRTrainer":
            node["inputs"] |= {"steps": 4, "sample_every": 0}
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 4
    result = server.run(prompt)
    assert result["status"]["status_str"] == "success", json.dumps(result["status"], indent=1)
    loras = server.base / "models" / "loras" / "stylewright"
    (teacher,), (student,) = (list(loras.glob(f"{name}_*.safetensors")) for name in ("fine_tune", "distilled"))
    assert [read_adapter(file).about.method for file in (teacher, student)] == ["styleinject", "lora"]
    pictures = [output["images"] for output in result["outputs"].values() if len(output.get("images", [])) == 4]
    assert len(pictures) == 3, "of the base, the fine-tune and what was learned"
