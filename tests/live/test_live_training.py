"""A run through the live server: watched, cancelled, looked at, continued, cached, and its files listed at once."""

import json

import pytest

pytestmark = pytest.mark.comfy

TRAINER = "4"
STEPS = 16


def defaults(server, node):
    """A node's widgets at their defaults."""
    schema = server.info[node]["input"]
    specs = {**schema.get("required", {}), **schema.get("optional", {})}
    return {name: spec[1]["default"] for name, spec in specs.items() if "default" in (spec[1:] or [{}])[0]}


@pytest.fixture
def prompt(server, shipped_weights):
    """``prompt(seed=1, …)``: a short training on the embedded model, as the front end would queue it."""

    def make(**widgets):
        short = {
            "steps": STEPS, "accumulation": 2, "rank": 4, "precision": "float32", "gradient_checkpointing": False,
            "file_name": "live/%style%", "save_every": 4, "save_intermediate": True,
        }  # fmt: skip
        links = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "dataset": ["3", 0]}
        data = {"images": ["2", 0], "captions": ["2", 1], "style_phrase": ["2", 2], "resolution": 64}
        nodes = {
            "1": ("StylewrightEmbeddedModel", {}),
            "2": ("StylewrightReference", {}),
            "3": ("StyleDataset", data),
            TRAINER: ("StyleFriendlySNRTrainer", {**short, **links, **widgets}),
        }
        return {
            id: {"class_type": kind, "inputs": defaults(server, kind) | inputs} for id, (kind, inputs) in nodes.items()
        }

    return make


def progress(result):
    return [m["data"]["value"] for m in result["messages"] if m["type"] == "progress" and m["data"]["node"] == TRAINER]


def cached(result):
    return [node for m in result["messages"] if m["type"] == "execution_cached" for node in m["data"]["nodes"]]


def listed(server, loader="LoraLoader"):
    """What the front end's list shows after its refresh."""
    (spec,) = server.json(f"object_info/{loader}").values()
    kind, *rest = spec["input"]["required"]["lora_name"]
    names = kind if isinstance(kind, list) else rest[0]["options"]
    return {name.replace("\\", "/") for name in names if name.startswith("live")}


def test_a_run_is_cancelled_looked_at_continued_and_cached(server, prompt):
    assert not listed(server)
    stopped = server.run(prompt(), interrupt_at=2)
    assert stopped["status"]["status_str"] == "error" and progress(stopped)
    assert [m["type"] for m in stopped["messages"]].count("execution_interrupted") == 1
    (partial,) = [name for name in listed(server) if int(name[-18:-12]) % 4] or [max(listed(server))]
    done = int(partial[-18:-12])
    assert partial == f"live/_v0__00001_step{done:06}.safetensors" and 2 <= done < STEPS
    assert partial in listed(server, "StyleLoRALoader")

    looked_at = server.run(prompt(resume="use as it is"))
    assert looked_at["status"]["status_str"] == "success", json.dumps(looked_at["status"])
    assert TRAINER not in cached(looked_at)

    whole = server.run(prompt())
    assert whole["status"]["status_str"] == "success", json.dumps(whole["status"])
    assert min(progress(whole)) >= done and max(progress(whole)) == STEPS
    assert {f"live/_v0__00001_{end}.safetensors" for end in ("", "step000004", "step000012")} <= listed(server)

    before = listed(server)
    again = server.run(prompt())
    assert TRAINER in cached(again) and not progress(again)
    further = server.run(prompt(steps=STEPS + 2))
    assert min(progress(further)) > STEPS and f"live/_v0__00001_step{STEPS + 2:06}.safetensors" in listed(server)
    other = server.run(prompt(seed=1, steps=1))
    assert TRAINER not in cached(other) and listed(server) - before >= {"live/_v0__00002_.safetensors"}


def test_what_forbids_to_continue_is_the_nodes_error(server, prompt):
    server.run(prompt(steps=1, file_name="live/other"))
    refused = server.run(prompt(steps=1, file_name="live/other", learning_rate=0.5, rank=2, resume="continue"))
    (error,) = [m["data"] for m in refused["messages"] if m["type"] == "execution_error"]
    assert error["node_id"] == TRAINER
    assert "learning_rate was 0.0001 and is 0.5" in error["exception_message"]
    assert "adapter.rank was 4 and is 2" in error["exception_message"]
