"""The example workflow: from the file that ComfyUI opens to the prompt that its server runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "comfyui"
WORKFLOW = FOLDER / "example_workflows" / "think_paint_edit_ask.json"

Widgets = Sequence[tuple[str, bool]]
"""Names of a node's widgets in order, and whether one for the next seed follows."""


def read_workflow() -> dict[str, Any]:
    return json.loads(WORKFLOW.read_text(encoding="utf-8"))


def as_prompt(workflow: Mapping[str, Any], widgets: Mapping[str, Widgets]) -> dict[str, Any]:
    """Each node's id → its class and its inputs: values of widgets, or (id, output) of the node that gives them."""
    source = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        values = list(node["widgets_values"])
        inputs = {i["name"]: source[i["link"]] for i in node["inputs"] if i["link"] is not None}
        for name, has_control in widgets[node["type"]]:
            inputs[name] = values.pop(0)
            if has_control:
                assert values.pop(0) in ("fixed", "increment", "decrement", "randomize")
        assert not values, f"{node['type']} has more values than widgets: {values}"
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt
