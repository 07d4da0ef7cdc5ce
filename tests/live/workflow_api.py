"""Workflow files as the front end saves them, checked against a server's schemas and turned into prompts for it.

A saved node has its links under ``inputs`` and the values of its widgets in a list, in the order of the schema. A
prompt has both by name. What the front end knows beyond the schema is written down here: which inputs are widgets,
and that a seed's widget may be followed by one that says how it changes. A dynamic combo is a widget with further ones
behind it, which depend on its value and are called ``combo.widget``. An input that grows has sockets called
``input.name0`` and so on, one more than are linked; what is linked to them, and what comes out, may be of any type.
"""

from dataclasses import dataclass
from typing import Any

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
DYNAMIC, GROWING, OF_ANY_TYPE = "COMFY_DYNAMICCOMBO_V3", "COMFY_AUTOGROW_V3", "COMFY_MATCHTYPE_V3"
AFTER_SEED = {"fixed", "increment", "decrement", "randomize"}
FRONT_END_ONLY = {"Note", "MarkdownNote", "Reroute", "PrimitiveNode"}
NEVER, BYPASS = 2, 4  # modes of a node
MODEL_FOLDERS = ("checkpoints", "clip_vision", "controlnet", "diffusion_models", "loras", "text_encoders", "vae")


@dataclass(frozen=True)
class Input:
    """One input of a node's schema."""

    name: str
    kind: str  # a socket's or widget's type; "COMBO" for a list of options
    options: dict
    choices: list | None  # of a COMBO
    required: bool

    @property
    def is_widget(self) -> bool:
        return self.kind in WIDGETS and not self.options.get("forceInput")


def inputs_of(schema: dict) -> list[Input]:
    """The inputs of an entry of /object_info, in order."""
    found = []
    for group in ("required", "optional"):
        for name in schema["input_order"].get(group, []):
            kind, *rest = schema["input"][group][name]
            options = rest[0] if rest else {}
            choices = kind if isinstance(kind, list) else options.get("options")
            kind = "COMBO" if isinstance(kind, list) else kind
            found.append(Input(name, kind, options, choices if kind == "COMBO" else None, group == "required"))
    return found


def inputs_for(node: dict, schema: dict) -> list[Input]:
    """The inputs of a saved node: those of its dynamic combos are the ones of the options that it has."""
    found, values = [], list(node.get("widgets_values") or [])
    for spec in inputs_of(schema):
        place = sum(each.is_widget for each in found)
        if spec.kind == GROWING:
            template = spec.options["template"]
            names = [f"{spec.name}.{template['prefix']}{number}" for number in range(template["max"])]
            found += [Input(name, "*", {}, None, number < template["min"]) for number, name in enumerate(names)]
            continue
        if spec.kind != DYNAMIC:
            found.append(spec)
            continue
        options = {option["key"]: option["inputs"] for option in spec.options["options"]}
        found.append(Input(spec.name, "COMBO", {}, list(options), spec.required))
        chosen = options.get(values[place] if place < len(values) else None, {})
        for group, inputs in chosen.items():
            for name, (kind, *rest) in inputs.items():
                found.append(Input(f"{spec.name}.{name}", kind, rest[0] if rest else {}, None, group == "required"))
    return found


def widget_values(node: dict, schema: dict) -> dict[str, Any]:
    """The values of a saved node's widgets by name. AssertionError where there are too many or too few."""
    values, found = list(node.get("widgets_values") or []), {}
    for spec in inputs_for(node, schema):
        if not spec.is_widget:
            continue
        assert values, f"{node['type']} {node['id']}: no value for {spec.name}"
        found[spec.name] = values.pop(0)
        changes = spec.options.get("control_after_generate", spec.name in ("seed", "noise_seed"))
        if spec.kind == "INT" and changes and values and values[0] in AFTER_SEED:
            values.pop(0)
    uploads = any(spec.options.get("image_upload") for spec in inputs_of(schema))
    assert not values or (uploads and values == ["image"]), f"{node['type']} {node['id']}: values left over: {values}"
    return found


def all_graphs(workflow: dict) -> list[dict]:
    """The workflow's graph and those of its subgraphs, however deep."""
    return [workflow, *workflow.get("definitions", {}).get("subgraphs", [])]


def problems(workflow: dict, object_info: dict) -> list[str]:
    """What in a workflow does not fit the schemas; empty = nothing."""
    subgraphs = {graph["id"] for graph in all_graphs(workflow)[1:]}
    found = []
    for graph in all_graphs(workflow):
        nodes = {node["id"]: node for node in graph["nodes"]}
        for node in graph["nodes"]:
            if node["type"] in FRONT_END_ONLY | subgraphs:
                continue
            if node["type"] not in object_info:
                found.append(f"there is no node {node['type']}")
                continue
            found += _node_problems(node, object_info[node["type"]])
        found += [problem for link in graph["links"] for problem in _link_problems(_link(link), nodes, object_info)]
    return found


def _node_problems(node: dict, schema: dict) -> list[str]:
    name, specs = f"{node['type']} {node['id']}", {spec.name: spec for spec in inputs_for(node, schema)}
    linked = {each["name"] for each in node.get("inputs", []) if each.get("link") is not None}
    found = [f"{name}: no input {each['name']}" for each in node.get("inputs", []) if each["name"] not in specs]
    outputs = [each["type"] for each in node.get("outputs", [])]
    wanted = schema["output"][: len(outputs)]  # a node may have gained some since
    if len(outputs) != len(wanted) or any(b not in (a, OF_ANY_TYPE) for a, b in zip(outputs, wanted, strict=True)):
        found.append(f"{name}: outputs {outputs}, the schema has {schema['output']}")
    try:
        values = widget_values(node, schema)
    except AssertionError as error:
        return [*found, str(error)]
    models = node.get("properties", {}).get("models", [])
    found += [f"{name}: {problem}" for model in models for problem in _model_problems(model, values)]
    to_download = {model.get("name") for model in models}
    for spec in specs.values():
        if spec.is_widget:
            if spec.name not in linked and not (spec.choices is not None and values[spec.name] in to_download):
                found += [f"{name}: {problem}" for problem in _value_problems(spec, values[spec.name])]
        elif spec.required and spec.name not in linked:
            found.append(f"{name}: {spec.name} is not linked")
    return found


def _value_problems(spec: Input, value: Any) -> list[str]:
    if spec.choices is not None:
        return [] if value in spec.choices else [f"{spec.name}={value!r} is none of {spec.choices}"]
    kinds = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}
    if not isinstance(value, kinds[spec.kind]) or (spec.kind != "BOOLEAN" and isinstance(value, bool)):
        return [f"{spec.name}={value!r} is no {spec.kind}"]
    low, high = spec.options.get("min"), spec.options.get("max")
    if (low is not None and value < low) or (high is not None and value > high):
        return [f"{spec.name}={value!r} is not within {low} to {high}"]
    return []


def _model_problems(model: dict, values: dict[str, Any]) -> list[str]:
    """Of a file that the front end offers to download for a node."""
    name, url = model.get("name", ""), model.get("url", "")
    found = [f"the model {name!r} is none of its values"] if name not in values.values() else []
    if not (url.startswith("https://huggingface.co/") and url.endswith(f"/{name}")):
        found.append(f"the model {name!r} has no address on huggingface.co: {url!r}")
    if model.get("directory") not in MODEL_FOLDERS:
        found.append(f"the model {name!r} belongs in {model.get('directory')!r}, which is none of {MODEL_FOLDERS}")
    return found


@dataclass(frozen=True)
class Link:
    id: int
    origin: int
    slot: int
    target: int
    input: int
    kind: str


def _link(link: list | dict) -> Link:
    """Links are lists in a workflow's own graph and objects in its subgraphs."""
    if isinstance(link, dict):
        names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
        return Link(*(link[name] for name in names))
    return Link(*link)


def _link_problems(link: Link, nodes: dict, object_info: dict) -> list[str]:
    if not {link.origin, link.target} <= nodes.keys():  # a subgraph's own inputs and outputs
        return []
    origin, target = nodes[link.origin], nodes[link.target]
    if origin["type"] not in object_info or target["type"] not in object_info:
        return []
    given = origin["outputs"][link.slot]["type"]
    name = target["inputs"][link.input]["name"]
    found = []
    if target["inputs"][link.input]["link"] != link.id:
        found.append(f"{target['type']} {link.target}: its {name} does not know of link {link.id}")
    if link.id not in (origin["outputs"][link.slot]["links"] or []):
        found.append(f"{origin['type']} {link.origin}: its output {link.slot} does not know of link {link.id}")
    wanted = {spec.name: spec.kind for spec in inputs_of(object_info[target["type"]])}.get(name, "*")
    if "*" not in (given, wanted) and not set(str(given).split(",")) & set(str(wanted).split(",")):
        found.append(f"{origin['type']}'s {given} is linked to {name} of {target['type']}, a {wanted}")
    return found


def to_prompt(workflow: dict, object_info: dict) -> dict:
    """The prompt that the front end would queue. AssertionError for what this converter does not know."""
    assert not workflow.get("definitions", {}).get("subgraphs"), "subgraphs are not converted"
    links = {link.id: link for link in map(_link, workflow["links"])}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in ("Note", "MarkdownNote") or node.get("mode") == NEVER:
            continue
        assert node["type"] not in FRONT_END_ONLY and node.get("mode") != BYPASS, f"{node['type']} is not converted"
        inputs = widget_values(node, object_info[node["type"]])
        for each in node.get("inputs", []):
            if each.get("link") is not None:
                link = links[each["link"]]
                inputs[each["name"]] = [str(link.origin), link.slot]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt
