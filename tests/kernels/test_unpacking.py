"""Weights that are unpacked for many rows: no more at once than plans count, and only where no kernel takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from stand_in.memory import Allocator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mindomni_rt.kernels import int4_linear as four
from mindomni_rt.kernels import int8_linear as eight
from mindomni_rt.kernels.int4_linear import Int4Weight
from mindomni_rt.kernels.quantize import Rows
from mindomni_rt.memory import footprint

WIDTHS = [(37888, 3584), (3584, 18944), (152064, 3584), (16384, 3072)]
"""Outputs and inputs: gate_up, down and head of the language model, gate_up of the decoder."""
ROWS = 300


class Tracked(TorchDispatchMode):
    """Counts what operations allocate beside what is there."""

    def __init__(self, *there: Tensor) -> None:
        super().__init__()
        self.memory = Allocator(1)
        self._before = sum(self.memory.track(tensor.untyped_storage(), 0) for tensor in there)

    @property
    def top(self) -> int:
        return self.memory.devices[0].top - self._before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self.memory.track(tensor.untyped_storage(), 0)
        return found


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def int4(n: int, k: int) -> Int4Weight:
    return Int4Weight(empty(n, k // 2, dtype=torch.uint8), empty(n, k // 128), empty(n, k // 128))


def int8(n: int, k: int) -> Rows:
    return Rows(empty(n, k, dtype=torch.int8), empty(n, 1, dtype=torch.float32))


@pytest.mark.parametrize(("n", "k"), WIDTHS)
@pytest.mark.parametrize(("weight", "run"), [(int4, four.int4_linear), (int8, eight.int8_linear)], ids=["int4", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_is_unpacked_at_once(
    weight: Callable[[int, int], Any], run: Callable[..., Tensor], dtype: torch.dtype, n: int, k: int
) -> None:
    x, packed = empty(ROWS, k, dtype=dtype), weight(n, k)
    with Tracked(x, *vars(packed).values()) as seen:
        out = run(x, packed, impl="torch")
    rows = -(-out.nbytes // 512) * 512
    slices = rows if n > 64_000_000 // (2 * k) else 0  # the result of one part, before it is put into its place
    assert seen.top <= rows + min(slices, footprint.UNPACKED) + footprint.UNPACKED


@pytest.mark.parametrize(("cores", "rows", "asked"), [(True, 65, "auto"), (True, 4000, "auto"), (False, 64, "auto")])
def test_kernels_take_many_rows(monkeypatch: pytest.MonkeyPatch, cores: bool, rows: int, asked: str) -> None:
    """On a device with tensor cores that Triton uses; Turing's prompts are unpacked."""
    told: list[tuple[str, bool]] = []

    def use(impl: str, x: Tensor, good: bool = True, why: str = "") -> bool:
        told.append((impl, good))
        return False

    for module in (four, eight):
        monkeypatch.setattr(module, "tensor_cores", lambda device: cores)
        monkeypatch.setattr(module, "use_triton", use)
    monkeypatch.setattr(eight, "interpreting", lambda: False)
    four.int4_linear(empty(rows, 3072), int4(8, 3072))
    assert told.pop() == (asked, True)
    eight.int8_linear(empty(rows, 3072), int8(8, 3072))
    assert told.pop() == (asked, cores)


def test_turing_unpacks_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(four, "tensor_cores", lambda device: False)
    monkeypatch.setattr(four, "use_triton", lambda impl, *_: bool(told.append(impl)))
    four.int4_linear(empty(65, 3072), int4(8, 3072))
    assert told == ["torch"]
