"""A path or hub id → a local folder."""

from __future__ import annotations

import re
from pathlib import Path

from ..checks import shown
from ..demo import DEMO_NAME, demo_checkpoint, demo_folder
from ..errors import BadCheckpointError, MissingExtraError


def resolve(
    path_or_repo_id: str | Path,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    only: str | None = None,
    checkpoint: bool = False,
) -> Path:
    """The local folder of a checkpoint or bundle; a hub id ("owner/name") is downloaded into huggingface_hub's cache.
    "demo" is the small model of the package, unless a folder has that name.

    only: download the files of this pattern alone, such as "*.json"; the folder is not a whole model then.
    checkpoint: "demo" is the small model's checkpoint, even where its bundle can run.
    Honours HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE and HF_TOKEN. Raises BadCheckpointError.
    """
    if not isinstance(path_or_repo_id, (str, Path)):
        raise BadCheckpointError(
            f"model {shown(path_or_repo_id)}: expected a folder or a hub id of the form owner/name"
        )
    text = str(path_or_repo_id)
    if not text.strip():
        raise BadCheckpointError("the model's name is empty; expected a folder, a hub id, or demo (the small model)")
    try:
        path = Path(text).expanduser() if text.startswith("~") else Path(text)
        if path.is_dir():
            return path
        if text == DEMO_NAME:
            return demo_checkpoint() if checkpoint else demo_folder()
        exists = path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL inside, or ~ without a home
        reason = getattr(error, "strerror", None) or error
        raise BadCheckpointError(f"no folder at {shown(text, 200)}: {reason}") from error
    if exists:
        raise BadCheckpointError(f"{text} is a file; expected a checkpoint or bundle folder, or a hub id")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", text) or text.startswith((".", "/")):
        raise BadCheckpointError(f"no folder at {text[:200]}, and it is not a hub id of the form owner/name")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", "torch") from error
    try:
        return Path(
            snapshot_download(
                text, revision=revision, token=token, local_files_only=local_files_only, allow_patterns=only
            )
        )
    except Exception as error:  # noqa: BLE001 the hub raises a family of its own plus its HTTP library's; all mean "not available"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadCheckpointError(f"no folder at {text}, and the hub did not provide it: {reason}") from None
