from __future__ import annotations
from dataclasses import dataclass
from typing import Any
class BadDataError(ValueError): ...
@dataclass(frozen=True)
class Record:
    instruction: str = ""
    think_content: str = ""
    answer: str = ""
    input_images: tuple[Any, ...] = ()
    output_image: Any = None
    gt_prompt: str = ""
    reply: str = ""
    source: str = ""
    written: str = ""
class WS:
    def __init__(self, name, seed):
        from .world.sources import WorldSource
        self.s = WorldSource.parse(name, seed); self.at = 0
    def next_batch(self, n):
        out = [self.s.record(self.at + i) for i in range(n)]; self.at += n; return out
    def state_dict(self): return {"at": self.at}
    def load_state_dict(self, s): self.at = s["at"]
def open_stream(config, stage, seed):
    return WS(config.split or stage, seed)
