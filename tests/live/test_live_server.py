"""A live ComfyUI with the pack in custom_nodes: nodes, help, locales, templates, and start-up without complaints."""

import json

import pytest

pytestmark = pytest.mark.comfy

OURS = {
    "NASANegativeAttention", "OneStepSampler", "OneStepSamplerParts", "PGSBDistiller",
    "PromptSwitchByLogSNR", "CFGByLogSNR",
    "StyleDataset", "StyleDatasetCombine", "StyleDensity", "StyleFriendlySNRTrainer", "StyleGuider", "StyleLoRALoader",
    "StyleLoRAResize", "StyleInjectToLoRA", "ConceptCrops", "StylewrightEmbeddedModel", "StylewrightReference",
}  # fmt: skip
PACK = "any_name-v1.2"  # the folder in custom_nodes


def ours(server):
    return {name: schema for name, schema in server.info.items() if schema["python_module"].startswith("custom_nodes.")}


def test_all_nodes_are_registered_without_a_complaint(server):
    assert ours(server).keys() == OURS
    log = server.text
    for complaint in ("Cannot import", "IMPORT FAILED", "Error while calling comfy_entrypoint"):
        assert complaint not in log, log
    # 0.14 logs tracebacks of its own over a database in memory.
    assert not [line for line in log.splitlines() if line.lstrip().startswith("File ") and PACK in line], log


def test_schemas_are_complete(server):
    for name, schema in ours(server).items():
        assert schema["display_name"] and schema["description"] and schema["category"].startswith("stylewright/"), name
        assert schema["search_aliases"], name
        for group in schema["input"].values():
            for id, spec in group.items():
                if id not in schema["input"].get("hidden", {}):
                    assert spec[1].get("tooltip"), f"{name}: no tooltip on {id}"
        assert all(schema["output_tooltips"]), f"{name}: an output has no tooltip"


def test_every_node_has_a_help_page(server, repository):
    pages = {path.stem for path in (repository / "web" / "docs").glob("*.md")}
    assert pages == OURS
    for name in OURS:
        page = server.get(f"extensions/{PACK}/docs/{name}.md").decode()
        schema = ours(server)[name]
        assert page.startswith(f"# {schema['display_name']}"), name
        for id in schema["input_order"].get("required", []) + schema["input_order"].get("optional", []):
            assert f"`{id}`" in page, f"the help page of {name} does not mention {id}"
        for id in schema["output_name"]:
            assert f"`{id}`" in page, f"the help page of {name} does not mention the output {id}"


def test_locales_name_what_exists(server):
    served = server.json("i18n")["en"]["nodeDefs"]
    assert served.keys() >= OURS
    for name in OURS:
        schema, local = ours(server)[name], served[name]
        ids = schema["input_order"].get("required", []) + schema["input_order"].get("optional", [])
        assert local["display_name"] == schema["display_name"]
        assert local["description"] == schema["description"]
        assert list(local.get("inputs", {})) == ids, name
        assert list(local["outputs"]) == [str(slot) for slot in range(len(schema["output"]))], name
        for id in ids:
            group = "required" if id in schema["input"].get("required", {}) else "optional"
            assert local["inputs"][id]["tooltip"] == schema["input"][group][id][1]["tooltip"], f"{name}.{id}"


def test_workflows_are_offered_as_templates(server, repository):
    offered = server.json("workflow_templates")
    names = sorted(path.stem for path in (repository / "workflows").glob("*.json"))
    assert names and sorted(offered[PACK]) == names
    for name in names:
        served = server.json(f"api/workflow_templates/{PACK}/{name}.json")
        assert served == json.loads((repository / "workflows" / f"{name}.json").read_text())


def test_a_wrong_link_is_refused_before_anything_runs(server):
    prompt = {
        "1": {"class_type": "StylewrightEmbeddedModel", "inputs": {}},
        "2": {"class_type": "VAEDecode", "inputs": {"samples": ["1", 0], "vae": ["1", 2]}},
        "3": {"class_type": "PreviewImage", "inputs": {"images": ["2", 0]}},
    }
    answer = server.post("prompt", {"prompt": prompt})
    assert answer["error"]["type"] == "prompt_outputs_failed_validation"
    assert [error["type"] for error in answer["node_errors"]["2"]["errors"]] == ["return_type_mismatch"]
