"""Pages of mapped files given back to the system, so that a build's memory is what it computes on."""

from __future__ import annotations

import ctypes
import sys

from torch import Tensor

_PAGEOUT = 21  # MADV_PAGEOUT: pages of a file leave memory, other memory keeps its contents
_PAGE = 4096


def give_back(tensor: Tensor) -> None:
    """Tells the system that a tensor's memory will not be read soon. Without effect where there is no madvise."""
    if sys.platform != "linux" or tensor.is_meta:
        return
    first = -(-tensor.data_ptr() // _PAGE) * _PAGE
    size = tensor.data_ptr() + tensor.numel() * tensor.element_size() - first
    if size >= _PAGE:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size // _PAGE * _PAGE), _PAGEOUT)
