"""The panel on the trainer's node in ComfyUI's real page: it finds its node, survives a reload, and leaves no trace."""

import asyncio
import json

import pytest

pytestmark = pytest.mark.comfy

APP = "(window.comfyAPI?.app?.app ?? window.app)"
API = "(window.comfyAPI?.api?.api ?? window.app.api)"
KNOWN = "window.LiteGraph?.registered_node_types"  # the server's nodes, and later the page's own
READY = f"{APP}?.graph && {KNOWN}?.StyleFriendlySNRTrainer && {KNOWN}?.MarkdownNote"
TRAINER = 5
SECOND = 50  # id of another one
STEPS = 4
SEEN = """(() => {
    const panels = [...document.querySelectorAll('.stylewright')]
    return panels.map(panel => ({
        phase: panel.dataset.phase,
        words: panel.innerText,
        curves: panel.querySelectorAll('.curve polyline.smooth').length,
        bars: panel.querySelectorAll('.levels rect.bar').length,
        labels: [...panel.querySelectorAll('.film > div')].map(column => column.firstChild.innerText),
        pictures: [...panel.querySelectorAll('.film img')].map(image => image.naturalWidth),
    }))
})()"""


def message(node, workflow, **changes):
    """What the server would send."""
    return {
        "node": node, "workflow": workflow, "phase": "training", "text": "", "plan": "", "notes": [], "window": -6.5,
        "step": 20, "steps": 40, "samples": 80, "loss": 0.25, "learning_rate": 1e-4, "seconds": 20, "left": 20,
        "peak_bytes": 2**30, "previous": 0, "points": [[10, 0.5], [20, 0.25]], "bins": [[-8, -6, 0.5, 9]],
        "pictures": {}, **changes,
    }  # fmt: skip


class Graph:
    """ComfyUI's page with a workflow."""

    def __init__(self, page, workflow):
        self.page, self.workflow = page, workflow

    async def load(self):
        await self.page.until(READY)
        await asyncio.sleep(2)  # the page loads a workflow of its own
        await self.page.evaluate(f"{APP}.loadGraphData({json.dumps(self.workflow)})")
        await self.page.until(f"{APP}.graph.getNodeById({TRAINER})")
        await self.page.evaluate(
            f"""(() => {{
                const {{canvas, graph}} = {APP}, {{pos}} = graph.getNodeById({TRAINER})
                canvas.ds.scale = 0.6
                canvas.ds.offset = [300 - pos[0], 100 - pos[1]]
                canvas.setDirty(true, true)
            }})()"""
        )

    async def tell(self, content):
        """A message, as if it came over the websocket."""
        event = f"new CustomEvent('stylewright.training', {{detail: {json.dumps(content)}}})"
        await self.page.evaluate(f"{API}.dispatchEvent({event})")
        await asyncio.sleep(1)

    async def saved(self):
        """The trainer as it is saved, and its size."""
        node = f"{APP}.graph.serialize().nodes.find(node => node.id == {TRAINER})"
        return json.loads(await self.page.evaluate(f"JSON.stringify({node})"))

    async def panels(self):
        """How many nodes of the graph have a panel, by id."""
        has = "(node.widgets ?? []).some(widget => widget.name === 'stylewright_training')"
        return await self.page.evaluate(f"{APP}.graph.nodes.filter(node => {has}).map(node => Number(node.id))")


@pytest.fixture(scope="module")
def observed(server, repository, shipped_weights):
    """What a page showed, of made-up messages and of a real training."""
    import browser

    if browser.CHROMIUM is None:
        pytest.skip("no Chromium")
    workflow = json.loads((repository / "workflows" / "quick_start.json").read_text(encoding="utf-8"))
    for node in workflow["nodes"]:
        if node["id"] == TRAINER:
            widgets = [spec for spec in server.info[node["type"]]["input_order"]["required"] if spec not in SOCKETS]
            node["widgets_values"][widgets.index("steps")] = STEPS
            node["widgets_values"][widgets.index("sample_every")] = 2
            node["widgets_values"][widgets.index("file_name")] = "panel"
    return asyncio.run(look(browser, server, workflow))


SOCKETS = ("model", "clip", "vae", "dataset")


def with_a_second_trainer(workflow):
    (trainer,) = (node for node in workflow["nodes"] if node["id"] == TRAINER)
    alone = {
        "inputs": [{**each, "link": None} for each in trainer["inputs"]],
        "outputs": [{**each, "links": []} for each in trainer["outputs"]],
        "pos": [trainer["pos"][0] + 2000, trainer["pos"][1]],
    }
    return {**workflow, "nodes": [*workflow["nodes"], {**trainer, **alone, "id": SECOND}]}


async def look(browser, server, workflow):
    seen = {}
    async with browser.opened(f"http://127.0.0.1:{server.port}/") as page:
        graph = Graph(page, workflow)
        await graph.load()
        seen["before"] = await graph.saved()
        await graph.tell(message("5", "another workflow"))
        await graph.tell(message("1", workflow["id"]))  # a node that is no trainer
        seen["foreign"] = await graph.panels()
        await graph.tell(message("5", workflow["id"]))
        seen["told"], seen["after"] = await page.evaluate(SEEN), await graph.saved()
        await graph.tell(message("5", workflow["id"], previous=20, points=[[30, 0.2]], step=30))
        await graph.tell(
            message("5", workflow["id"], previous=35, points=[[40, 0.1]], phase="stopped", text="Stopped.")
        )
        seen["more"] = await page.evaluate(SEEN)

        graph.workflow = with_a_second_trainer(workflow)
        await graph.load()
        await graph.tell(message("5", workflow["id"]))
        await graph.tell(message(str(SECOND), workflow["id"], notes=["a second one"]))
        seen["two"] = await graph.panels()
        outer = await page.evaluate(
            f"{APP}.graph.convertToSubgraph(new Set([{APP}.graph.getNodeById({TRAINER})])).node.id"
        )
        inner = f"[...{APP}.graph.getNodeById({outer}).subgraph.nodes]"
        inner_id = await page.evaluate(f"{inner}[0].id")
        await graph.tell(message(f"{outer}:{inner_id}", workflow["id"]))
        seen["inside"] = await page.evaluate(f"{inner}[0].widgets.map(widget => widget.name)")

        graph.workflow = workflow
        await graph.load()
        await page.evaluate(QUEUE)
        await page.until("document.querySelector('.stylewright')?.dataset.phase === 'finished'", 300)
        await asyncio.sleep(2)
        seen["trained"] = await page.evaluate(SEEN)
        await page.send("Page.reload")
        await asyncio.sleep(1)
        await graph.load()
        await page.until("document.querySelector('.stylewright .film img')?.naturalWidth > 0")
        await asyncio.sleep(1)
        seen["reloaded"] = await page.evaluate(SEEN)
    return seen


QUEUE = f"""(async () => {{
    const {{output, workflow}} = await {APP}.graphToPrompt()
    const prompt = {{}}
    const take = id => {{
        prompt[id] = output[id]
        Object.values(output[id].inputs).filter(Array.isArray).forEach(([origin]) => origin in output && take(origin))
    }}
    take('{TRAINER}')
    const body = {{prompt, client_id: {API}.clientId, extra_data: {{extra_pnginfo: {{workflow}}}}}}
    const answer = await {API}.fetchApi('/prompt', {{
        method: 'POST', headers: {{'Content-Type': 'application/json'}}, body: JSON.stringify(body),
    }})
    if (!answer.ok) throw new Error(await answer.text())
}})()"""


def test_a_message_shows_on_its_node_only(observed):
    assert observed["foreign"] == []
    (panel,) = observed["told"]
    assert panel["phase"] == "training" and "step 20 of 40" in panel["words"] and "0:20 left" in panel["words"]
    assert panel["curves"] == 1 and panel["bars"] == 1


def test_the_panel_is_not_saved_and_the_node_is_only_higher(observed):
    before, after = observed["before"], observed["after"]
    assert after["widgets_values"] == before["widgets_values"]
    assert after["size"][0] == before["size"][0] and after["size"][1] >= before["size"][1]
    assert {**after, "size": None, "order": None} == {**before, "size": None, "order": None}


def test_what_was_missed_is_asked_for(observed):
    """The server knows of no such run here: what is on the page stays, and nothing breaks."""
    (panel,) = observed["more"]
    assert "step 30 of 40" in panel["words"]


def test_each_trainer_has_its_own_panel_also_inside_a_subgraph(observed):
    assert sorted(observed["two"]) == [TRAINER, SECOND]
    assert "stylewright_training" in observed["inside"]


def test_a_training_is_seen_and_still_there_after_a_reload(observed):
    (trained,), (reloaded,) = observed["trained"], observed["reloaded"]
    assert trained["labels"] == ["before", "step 2", "step 4"]
    assert trained["pictures"] == [128] * 6
    assert trained["curves"] == 1 and trained["bars"] >= 2
    assert f"step {STEPS} of {STEPS}" in trained["words"] and "saved panel_" in trained["words"]
    assert reloaded == trained
