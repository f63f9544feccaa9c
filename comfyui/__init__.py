"""ComfyUI nodes of MindOmni: this folder goes into `custom_nodes/`, `mindomni_rt` into ComfyUI's Python."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .nodes import NODES


class MindOmniExtension(ComfyExtension):
    """The nodes Load, Think, Generate, Edit and Understand."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The nodes that ComfyUI registers."""
        return NODES


async def comfy_entrypoint() -> MindOmniExtension:
    """Called by ComfyUI once, when it loads this folder."""
    return MindOmniExtension()
