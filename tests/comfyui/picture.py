"""docs/comfyui.png: runs the example workflow in a ComfyUI that is started, and takes a picture of all its nodes.

python tests/comfyui/picture.py http://127.0.0.1:8188 docs/comfyui.png [path of a Chromium]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright
from workflow import read_workflow

_SCALE = 0.72
_BARS = ".comfyui-body-top, .comfyui-body-left, .side-tool-bar-container, .graph-canvas-panel, .p-toast, .p-button"
# Moves the graph below the page's bars and returns the rectangle of its nodes on the page.
_FRAME = """scale => {
    const nodes = app.graph.nodes, canvas = app.canvas, left = 80, top = 120;
    const x0 = Math.min(...nodes.map(n => n.pos[0])) - 24, y0 = Math.min(...nodes.map(n => n.pos[1])) - 62;
    const x1 = Math.max(...nodes.map(n => n.pos[0] + n.size[0])) + 30;
    const y1 = Math.max(...nodes.map(n => n.pos[1] + n.size[1])) + 24;
    canvas.show_info = false;
    canvas.ds.scale = scale;
    canvas.ds.offset = [left - x0, top - y0];
    canvas.setDirty(true, true);
    const box = canvas.canvas.getBoundingClientRect();
    const width = (x1 - x0) * scale, height = (y1 - y0) * scale;
    return {x: box.x + left * scale, y: box.y + top * scale, width, height};
}"""
_FORGET = """() => fetch('/free', {method: 'POST', headers: {'content-type': 'application/json'},
    body: JSON.stringify({unload_models: true, free_memory: true})})"""
_WAITING = """async () => {
    const queue = await (await fetch('/queue')).json();
    return queue.queue_running.length + queue.queue_pending.length;
}"""


def draw(page: Page, address: str, workflow: dict[str, Any], out: Path) -> None:
    page.goto(address, wait_until="domcontentloaded")
    page.wait_for_function("window.app && window.app.graph && window.app.canvas", timeout=120_000)
    page.wait_for_timeout(4000)
    page.evaluate(_FORGET)  # else nodes are taken from the cache, and show neither texts nor previews
    page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
    page.wait_for_timeout(3000)
    page.evaluate("() => app.queuePrompt(0, 1)")
    page.wait_for_timeout(2000)
    while page.evaluate(_WAITING):
        page.wait_for_timeout(1000)
    page.wait_for_timeout(4000)
    page.add_style_tag(content=f"{_BARS} {{visibility: hidden !important}}")
    box = page.evaluate(_FRAME, _SCALE)
    page.wait_for_timeout(3000)
    page.screenshot(path=out, clip=box)


if __name__ == "__main__":
    with sync_playwright() as player:
        browser = player.chromium.launch(args=["--no-sandbox"], executable_path=next(iter(sys.argv[3:]), None))
        draw(
            browser.new_page(viewport={"width": 1500, "height": 1000}), sys.argv[1], read_workflow(), Path(sys.argv[2])
        )
        browser.close()
