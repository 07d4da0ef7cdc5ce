"""ComfyUI's real front end with the shipped workflows: they load whole, and it queues what our converter makes."""

import asyncio
import json

import pytest

pytestmark = pytest.mark.comfy

APP = "window.comfyAPI?.app?.app ?? window.app"


@pytest.fixture(scope="module")
def pages(server, repository):
    """What the front end makes of each workflow: its nodes, and the prompt that it would queue."""
    import browser

    if browser.CHROMIUM is None:
        pytest.skip("no Chromium")
    files = sorted((repository / "workflows").rglob("*.json"))
    assert files

    async def look() -> dict:
        found = {}
        async with browser.opened(f"http://127.0.0.1:{server.port}/") as page:
            known = "window.LiteGraph?.registered_node_types"  # the server's nodes, and later the page's own
            await page.until(f"({APP})?.graph && {known}?.StyleFriendlySNRTrainer && {known}?.MarkdownNote")
            for file in files:
                workflow = file.read_text(encoding="utf-8")
                await page.evaluate_again(f"({APP}).loadGraphData({workflow})")
                found[file.name] = json.loads(
                    await page.evaluate_again(
                        f"""(async () => {{
                            const app = {APP}
                            const prompt = await app.graphToPrompt()
                            const nodes = app.graph.nodes ?? app.graph._nodes
                            return JSON.stringify({{
                                prompt: prompt.output,
                                types: nodes.map(node => node.type),
                                missing: nodes.filter(node => node.has_errors).map(node => node.type),
                            }})
                        }})()"""
                    )
                )
        return found

    return asyncio.run(look())


def test_workflows_load_whole(pages, repository):
    for name, page in pages.items():
        workflow = json.loads((repository / "workflows" / name).read_text(encoding="utf-8"))
        assert sorted(page["types"]) == sorted(node["type"] for node in workflow["nodes"]), name
        to_download = [node["type"] for node in workflow["nodes"] if "models" in node["properties"]]
        assert set(page["missing"]) <= set(to_download), name  # files that the page offers to download


def test_the_front_end_queues_what_the_converter_makes(pages, repository, server):
    from workflow_api import to_prompt

    for name, page in pages.items():
        workflow = json.loads((repository / "workflows" / name).read_text(encoding="utf-8"))
        expected = to_prompt(workflow, server.info)
        assert page["prompt"].keys() == expected.keys(), name
        for id, node in expected.items():
            found = page["prompt"][id]
            assert found["class_type"] == node["class_type"]
            assert found["inputs"] == node["inputs"], f"{name}, {node['class_type']} {id}"
