"""VLMEvalKit's TSV files: rows, and the images in their cells.

Source: open-compass/VLMEvalKit (vlmeval/dataset/image_base.py: a cell of at most 64 characters names another row's
index; vlmeval/smp/misc.py: one that begins with a bracket is a list).
"""

from __future__ import annotations

import ast
import base64
import binascii
import csv
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from mindomni_rt.errors import BadRequestError
from mindomni_rt.inputs.images import load_image

from .suite import Suite

_FIELD = 2**31 - 1  # characters of one field: images are longer than csv's 131,072
_REFERENCE = 64  # characters up to which an image cell names another row


@contextmanager
def _long_fields() -> Iterator[None]:
    """csv's limit is one for the whole process: raised while a file is read, then put back."""
    before = csv.field_size_limit(_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def read_rows(path: Path, suite: Suite) -> list[tuple[str, dict[str, str]]]:
    """(place, cells by column) of every row. Raises BadRequestError."""
    out: list[tuple[str, dict[str, str]]] = []
    with _long_fields(), path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t", strict=True)
        try:
            header = next(reader, [])
            if lacking := [c for c in ("index", "question") if c not in header]:
                raise BadRequestError(
                    f"{path}, line 1: expected tab-separated columns index and question, found no "
                    f"{' and no '.join(lacking)}; {suite.wanted}"
                )
            if len(set(header)) != len(header):
                raise BadRequestError(f"{path}, line 1: a column's name is there twice")
            for number, cells in enumerate(reader, 1):
                where = f"{path}, row {number}"
                if len(cells) != len(header):
                    raise BadRequestError(f"{where}: expected {len(header)} columns, found {len(cells)}")
                out.append((where, dict(zip(header, cells, strict=True))))
        except csv.Error as error:
            raise BadRequestError(f"{path}, row {len(out) + 1}: not a row of a TSV file: {error}") from error
        except UnicodeDecodeError as error:
            raise BadRequestError(f"{path}, row {len(out) + 1} or after: not UTF-8 text: {error.reason}") from error
        except OSError as error:
            raise BadRequestError(f"{path} cannot be read: {error.strerror or error}") from error
    return out


def images_of(cells: Mapping[str, str], row: Mapping[str, str], where: str) -> list[str]:
    """Base64 of a row's images, one that another row holds looked up there. Raises BadRequestError."""
    cell = row.get("image", "").strip()
    if not cell:
        return []
    if len(cell) <= _REFERENCE:
        found = cells.get(cell, "").strip()
        if len(found) <= _REFERENCE:
            raise BadRequestError(f"{where}: image {cell!r} names no row that holds one; expected base64 or an index")
        cell = found
    if not cell.startswith("["):
        return [cell]
    try:
        found_list = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        found_list = None
    if not isinstance(found_list, list) or not found_list or not all(isinstance(x, str) for x in found_list):
        raise BadRequestError(f"{where}: image begins with '[': expected a list of base64 texts")
    return found_list


def decoded(text: str, where: str) -> Image.Image:
    """A picture from base64. Raises BadRequestError."""
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequestError(f"{where}: image is not base64: {error}") from error
    try:
        return load_image(data)
    except BadRequestError as error:
        raise BadRequestError(f"{where}: {error}") from error
