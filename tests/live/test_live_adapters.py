"""The nodes that take an adapter's file say what it is when it is picked, in both of ComfyUI's canvases."""

import asyncio
import json
import urllib.parse

import pytest
import torch
from safetensors.torch import save_file

pytestmark = pytest.mark.comfy

APP = "(window.comfyAPI?.app?.app ?? window.app)"
KNOWN = "window.LiteGraph?.registered_node_types"
READY = f"{APP}?.graph && {KNOWN}?.StyleLoRALoader && {KNOWN}?.MarkdownNote"
NODES = {1: "StyleLoRALoader", 2: "StyleLoRAResize"}
NONE = "[from the lora input]"
SHOWN = """[...document.querySelectorAll('.stylewright.facts')]
    .filter(panel => panel.offsetHeight > 0)
    .sort((a, b) => a.getBoundingClientRect().left - b.getBoundingClientRect().left)
    .map(panel => ({ words: panel.innerText, failed: panel.querySelectorAll('.failed').length,
        cut: panel.scrollHeight > panel.clientHeight + 1 }))"""


@pytest.fixture(scope="module")
def files(server):
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    for rank in (4, 8):
        weights = {f"{name}.lora_down.weight": torch.rand(rank, 16), f"{name}.lora_up.weight": torch.rand(48, rank)}
        about = {"ss_steps": "1200", "ss_sd_model_name": "a base model of a rather long name.safetensors"}
        save_file(weights, server.base / "models" / "loras" / f"rank {rank} ü.safetensors", about)
    (server.base / "models" / "loras" / "cut.safetensors").write_bytes(b"\x00")


def workflow():
    places = [{"id": id, "type": kind, "pos": [100 + 500 * id, 200], "size": [400, 300]} for id, kind in NODES.items()]
    nodes = [{**node, "flags": {}, "order": 0, "mode": 0, "inputs": [], "outputs": []} for node in places]
    return {"version": 0.4, "nodes": nodes, "links": [], "groups": [], "last_node_id": 2, "last_link_id": 0}


async def pick(page, id, name):
    """What choosing an entry of the list does: the value, and the widget's callback."""
    await page.evaluate(
        f"""(() => {{
            const node = {APP}.graph.getNodeById({id})
            const widget = node.widgets.find(({{name}}) => name === 'lora_name')
            widget.value = {json.dumps(name)}
            widget.callback?.(widget.value, {APP}.canvas, node)
        }})()"""
    )
    await asyncio.sleep(1.5)


async def saved(page):
    """The first node as it is saved; it may be higher afterwards."""
    node = json.loads(await page.evaluate(f"JSON.stringify({APP}.graph.serialize().nodes.find(({{id}}) => id == 1))"))
    # Vue's layout hands places back a little rounded.
    return {**node, "size": round(node["size"][0]), "pos": [round(each) for each in node["pos"]], "order": None}


async def look(browser, server, modern):
    seen = {}
    async with browser.opened(f"http://127.0.0.1:{server.port}/") as page:
        await page.until(READY)
        await asyncio.sleep(2)
        await page.evaluate(f"{APP}.extensionManager.setting.set('Comfy.VueNodes.Enabled', {json.dumps(modern)})")
        await page.evaluate(f"{APP}.loadGraphData({json.dumps(workflow())})")
        await page.until(f"{APP}.graph.getNodeById(2)")
        await page.evaluate(f"(({{ds}}) => {{ ds.scale = 0.8; ds.offset = [-400, 0] }})({APP}.canvas)")
        await asyncio.sleep(2)
        seen["untouched"], seen["before"] = await page.evaluate(SHOWN), await saved(page)
        await pick(page, 1, "rank 4 ü.safetensors")
        seen["picked"] = await page.evaluate(SHOWN)
        await pick(page, 1, "rank 8 ü.safetensors")
        await pick(page, 2, "cut.safetensors")
        seen["two"] = await page.evaluate(SHOWN)
        graph = await page.evaluate(f"JSON.stringify({APP}.graph.serialize())")
        await page.evaluate(f"{APP}.loadGraphData({graph})")
        await asyncio.sleep(3)
        seen["loaded"] = await page.evaluate(SHOWN)
        await pick(page, 1, NONE)
        seen["none"], seen["after"] = await page.evaluate(SHOWN), await saved(page)
    return seen


@pytest.fixture(scope="module", params=[False, True], ids=["classic", "vue"])
def observed(server, files, request):
    import browser

    if browser.CHROMIUM is None:
        pytest.skip("no Chromium")
    return asyncio.run(look(browser, server, request.param))


def test_a_file_is_described_as_soon_as_it_is_picked(observed):
    assert observed["untouched"] == []
    (panel,) = observed["picked"]
    assert "rank 4" in panel["words"] and "for flux" in panel["words"] and "1200 steps" in panel["words"]
    assert not panel["failed"] and not panel["cut"]


def test_each_node_says_what_its_own_file_is_and_what_is_wrong_with_it(observed):
    loader, resizer = observed["two"]
    assert "rank 8" in loader["words"] and "rank 4" not in loader["words"]
    assert resizer["failed"] == 1 and "cut off" in resizer["words"]
    assert not loader["cut"] and not resizer["cut"]


def test_a_loaded_workflow_says_it_and_saves_nothing_of_it(observed):
    assert [panel["words"] for panel in observed["loaded"]] == [panel["words"] for panel in observed["two"]]
    assert len(observed["none"]) == 1 and "cut off" in observed["none"][0]["words"]
    assert observed["after"] == observed["before"]


@pytest.mark.parametrize("name", ["../../extra.safetensors", "/etc/passwd", ""])
def test_the_route_opens_only_what_is_listed(name, server, files):
    save_file({"secret.lora_A.weight": torch.rand(2, 2)}, server.base / "extra.safetensors")
    assert server.json(f"stylewright/adapter?{urllib.parse.urlencode({'name': name})}")["text"] == ""
