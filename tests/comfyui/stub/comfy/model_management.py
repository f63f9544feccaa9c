"""ComfyUI's stop button and memory, as far as nodes use them."""

from __future__ import annotations

state = {"interrupted": False, "unloaded": 0}


class InterruptProcessingException(Exception): ...


def processing_interrupted() -> bool:
    return state["interrupted"]


def throw_exception_if_processing_interrupted() -> None:
    if state["interrupted"]:
        state["interrupted"] = False
        raise InterruptProcessingException


def unload_all_models() -> None:
    state["unloaded"] += 1


def soft_empty_cache(force: bool = False) -> None: ...
