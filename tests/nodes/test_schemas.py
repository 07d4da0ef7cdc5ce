"""The nodes' schemas against their stored record: what a shared workflow relies on never changes by accident.

After a change that is meant, ``STYLEWRIGHT_WRITE_SCHEMAS=1 pytest tests/nodes/test_schemas.py`` writes the record
and the locale anew. Inputs and outputs may be added at the end; nothing else may change.
"""

import json
import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.comfy

RECORD = Path(__file__).with_name("schemas.json")
LOCALE = Path(__file__).resolve().parents[2] / "locales" / "en" / "nodeDefs.json"
# Options that are files, or what ComfyUI's version knows.
OPEN = {
    ("StyleDataset", "folder"),
    ("StyleLoRALoader", "lora_name"),
    ("StyleLoRAResize", "lora_name"),
    ("StyleFriendlySNRTrainer", "sample_sampler"),
    ("StyleFriendlySNRTrainer", "sample_scheduler"),
}


def nodes():
    from stylewright.nodes import NODES

    return {node.define_schema().node_id: node.GET_NODE_INFO_V1() for node in NODES}


def record_of(name, info):
    """What workflows depend on."""
    inputs = {}
    for group in ("required", "optional"):
        for id in info["input_order"].get(group, []):
            kind, *rest = info["input"][group][id]
            options = {key: value for key, value in (rest[0] if rest else {}).items() if key != "tooltip"}
            if (name, id) in OPEN:
                options["options"] = options["options"][:1]
            inputs[id] = {"group": group, "type": kind, **options}
    return {
        "category": info["category"],
        "inputs": inputs,
        "outputs": [list(pair) for pair in zip(info["output_name"], info["output"], strict=True)],
        "output_node": info["output_node"],
        "input_list": info.get("is_input_list", False),
    }


def locale_of(info):
    ids = [id for group in ("required", "optional") for id in info["input_order"].get(group, [])]
    specs = {id: spec for group in ("required", "optional") for id, spec in info["input"].get(group, {}).items()}
    inputs = {id: {"name": id.replace("_", " "), "tooltip": specs[id][1]["tooltip"]} for id in ids}
    outputs = {
        str(slot): {"name": name.replace("_", " "), "tooltip": tooltip}
        for slot, (name, tooltip) in enumerate(zip(info["output_name"], info["output_tooltips"], strict=True))
    }
    entry = {"display_name": info["display_name"], "description": info["description"]}
    return {**entry, **({"inputs": inputs} if inputs else {}), "outputs": outputs}


def as_json(value):
    return json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"


def test_schemas_are_as_recorded():
    found = {name: record_of(name, info) for name, info in nodes().items()}
    if os.environ.get("STYLEWRIGHT_WRITE_SCHEMAS"):
        RECORD.write_text(as_json(found), encoding="utf-8")
    assert json.loads(as_json(found)) == json.loads(RECORD.read_text(encoding="utf-8"))


def test_the_locale_says_what_the_schemas_say():
    found = {name: locale_of(info) for name, info in nodes().items()}
    if os.environ.get("STYLEWRIGHT_WRITE_SCHEMAS"):
        LOCALE.parent.mkdir(parents=True, exist_ok=True)
        LOCALE.write_text(as_json(found), encoding="utf-8")
    assert json.loads(LOCALE.read_text(encoding="utf-8")) == found


def test_no_word_of_the_locale_is_a_message_format():
    """The page compiles these texts with vue-i18n, where braces, bars and at signs mean something and may fail."""

    def texts(value):
        return [value] if isinstance(value, str) else [text for each in value.values() for text in texts(each)]

    found = texts(json.loads(LOCALE.read_text(encoding="utf-8")))
    assert len(found) > 100
    assert [text for text in found if set(text) & set("{}|@")] == []


def test_ids_are_literals():
    """ComfyUI-Manager finds nodes by reading the source."""
    import ast

    folder = Path(__file__).resolve().parents[2] / "nodes"
    literals = set()
    for file in folder.glob("*.py"):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "io.Schema":
                literals |= {
                    k.value.value for k in call.keywords if k.arg == "node_id" and isinstance(k.value, ast.Constant)
                }
    assert literals == nodes().keys()


def test_the_trainer_takes_exactly_its_schema():
    """A widget without a parameter, or the other way round, would fail in the user's graph only."""
    import inspect

    from stylewright.nodes import NODES

    for node in NODES:
        ids = {each.id for each in node.define_schema().inputs}
        assert ids == set(inspect.signature(node.execute).parameters), node
