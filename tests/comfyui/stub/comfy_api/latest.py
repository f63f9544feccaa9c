"""The part of ComfyUI's published V3 API that our nodes use, written for these tests: signatures and return types.

`test_comfyui.py` compares it with a real ComfyUI where one is given.
"""

# ruff: noqa: A002 (`id` is the name in the API)

from __future__ import annotations

import types
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class ComfyExtension(ABC):
    @abstractmethod
    async def get_node_list(self) -> list[type[ComfyNode]]: ...


class Hidden(StrEnum):
    unique_id = "UNIQUE_ID"


@dataclass
class Schema:
    node_id: str
    display_name: str | None = None
    category: str = "sd"
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    hidden: list[Hidden] = field(default_factory=list)
    description: str = ""
    search_aliases: list[str] = field(default_factory=list)
    is_input_list: bool = False
    is_output_node: bool = False


class ComfyNode:
    hidden: Any = None

    @classmethod
    def define_schema(cls) -> Schema:
        raise NotImplementedError


class NodeOutput:
    def __init__(self, *args: Any, ui: Any = None, expand: Any = None, block_execution: str | None = None) -> None:
        self.args, self.ui = args, ui


class _Slot:
    def __init__(self, id: str, display_name: str | None, optional: bool, **more: Any) -> None:
        self.id, self.display_name, self.optional = id, display_name, optional
        self.__dict__.update(more)


class _Output:
    def __init__(
        self,
        id: str | None = None,
        display_name: str | None = None,
        tooltip: str | None = None,
        is_output_list: bool = False,
    ) -> None:
        self.id, self.display_name, self.is_output_list = id, display_name, is_output_list


def _type(name: str, accepted: tuple[str, ...] | None) -> Any:
    """A type. accepted: what its input takes beside id, display_name, optional and tooltip; None for no widget."""

    class Input(_Slot):
        io_type, widget = name, accepted is not None

        def __init__(
            self, id: str, *, display_name: str | None = None, optional: bool = False, tooltip: str | None = None,
            **more: Any,
        ) -> None:  # fmt: skip
            unknown = set(more) - set(accepted or ())
            if unknown:
                raise TypeError(f"{name}.Input has no {', '.join(sorted(unknown))}")
            super().__init__(id, display_name, optional, **{"default": None, "control_after_generate": None, **more})

    class Output(_Output):
        io_type = name

    return types.SimpleNamespace(Input=Input, Output=Output, io_type=name, accepted=accepted)


WIDGETS = {
    "Boolean": ("BOOLEAN", ("default",)),
    "Int": ("INT", ("default", "min", "max", "step", "control_after_generate")),
    "Float": ("FLOAT", ("default", "min", "max", "step")),
    "String": ("STRING", ("default", "multiline")),
    "Combo": ("COMBO", ("default", "options")),
}
io: Any = types.SimpleNamespace(
    ComfyNode=ComfyNode, Schema=Schema, NodeOutput=NodeOutput, Hidden=Hidden, Input=_Slot, Output=_Output,
    Image=_type("IMAGE", None), Custom=lambda name: _type(name, None),
    **{name: _type(*rest) for name, rest in WIDGETS.items()},
)  # fmt: skip
