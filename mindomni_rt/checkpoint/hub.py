"""A path or hub id → a local folder."""

from __future__ import annotations

import re
from pathlib import Path
from threading import Thread

from ..checks import shown
from ..demo import DEMO_NAME, demo_checkpoint, demo_folder
from ..errors import BadCheckpointError, MissingExtraError

_PATIENCE = 5.0  # seconds until the hub has answered something


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
    silent = None if local_files_only else _silence(text, revision, token)
    local = local_files_only or silent is not None
    try:
        return Path(
            snapshot_download(text, revision=revision, token=token, local_files_only=local, allow_patterns=only)
        )
    except Exception as error:  # noqa: BLE001 the hub raises a family of its own plus its HTTP library's; all mean "not available"
        if local_files_only:
            raise BadCheckpointError(
                f"no folder at {text}, and the hub's cache on this machine does not hold it; without --offline "
                "(local_files_only) it would be downloaded"
            ) from None
        reason = silent or _first_line(error)
        raise BadCheckpointError(f"no folder at {text}, and the hub did not provide it: {reason}") from None


def _silence(name: str, revision: str | None, token: str | bool | None) -> str | None:
    """Why the hub cannot be asked, or None where it answers: what it says of `name` is for the download to judge.

    The download asks without a time limit, and a look-up of the host's name has none of its own, hence the thread.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        return None
    failed: list[Exception | None] = []

    def ask() -> None:
        try:
            HfApi().model_info(name, revision=revision, token=token, timeout=_PATIENCE)
            failed.append(None)
        except Exception as error:  # noqa: BLE001 as above
            failed.append(None if isinstance(error, HfHubHTTPError) else error)

    asking = Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_PATIENCE + 1)
    if failed and failed[0] is None:
        return None
    why = f" ({_first_line(failed[0])})" if failed and failed[0] is not None else ""
    return f"{constants.ENDPOINT} does not answer{why}; check the network, or give a folder"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].removeprefix("Got: ") if str(error).strip() else type(error).__name__
