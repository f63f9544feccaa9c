"""What is done with a mutant, in its own process: describe, load, one small request, a digest of the result."""

from __future__ import annotations

import hashlib
import json
import os
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from mindomni_rt.errors import MindOmniError, OutOfMemoryError

PROMPT = "draw (1 + 2) things of the colour of a lemon"
REQUEST: dict[str, Any] = dict(
    height=32,
    width=32,
    num_inference_steps=2,
    guidance_scale=2.0,
    seed=1,
    max_new_tokens=3,
    output="numpy",
    negative_prompt="blurry",
)


def attempt(call: Any, *arguments: Any) -> dict[str, Any]:
    """Runs a probe. Returns how it ended: "result" with a digest, "named" or "bare" with the error."""
    try:
        return {"ended": "result", "digest": call(*arguments)}
    except MindOmniError as error:
        if isinstance(error, OutOfMemoryError) and _ran_out(error):
            return {"ended": "memory", "error": _line(error)}
        return {"ended": "named", "error": _line(error)}
    except BaseException as error:  # noqa: BLE001 whatever it is, it is what is looked for
        return {
            "ended": "memory" if _ran_out(error) else "bare",
            "error": _line(error),
            "trace": traceback.format_exc()[-3000:],
        }


def _line(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    except Exception:  # noqa: BLE001
        return type(error).__name__


def _ran_out(error: BaseException | None) -> bool:
    """Whether memory really ran out, against a refusal in advance."""
    while error is not None:
        if (type(error) is MemoryError or "allocate" in _line(error)) and not isinstance(error, MindOmniError):
            return True
        error = error.__cause__ or error.__context__
    return False


def model(folder: Path, with_image: bool) -> str:
    """`info` and one request on a folder."""
    import mindomni_rt
    from mindomni_rt.describe import describe

    data, lines = describe(folder)
    json.dumps(data)
    "\n".join(lines).encode("utf-8")
    pipe = mindomni_rt.load(folder, device="cpu")
    image = np.full((56, 56, 3), 90, np.uint8) if with_image else None
    return digest(pipe.generate(PROMPT, image=image, **REQUEST))


def digest(result: Any) -> str:
    """A hash of everything in a result."""
    state = hashlib.sha256()
    for image in result.images if result.images is not None else ():
        state.update(np.ascontiguousarray(np.asarray(image)).tobytes())
    state.update(json.dumps([result.text, list(result.token_ids), result.finish_reason]).encode("utf-8"))
    return state.hexdigest()[:16]


class Prepared:
    """A pipeline that the parent loads once, for options and pictures; each child works on its own copy."""

    def __init__(self, sources: dict[str, Path]) -> None:
        import mindomni_rt

        self.sources = sources
        self._pipe = mindomni_rt.load(sources["checkpoint"], device="cpu")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)


def write(folder: Path, source: Any, files: dict[str, Any], outside: Path) -> None:
    """A copy of a model's folder by hard links, with the changed files in place."""
    from .change import Special

    for name in source.files:
        if name not in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(source.folder / name, folder / name)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, Special) and content.kind == "folder":
            path.mkdir()
        elif isinstance(content, Special) and content.kind == "pipe":
            os.mkfifo(path)
        elif isinstance(content, Special):
            path.symlink_to(content.target.replace("{outside}", str(outside)))
