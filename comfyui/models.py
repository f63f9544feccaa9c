"""Models that the node Load offers: folders in `models/mindomni`, and the small one that comes with the package."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from mindomni_rt.demo import DEMO_MODELS

FOLDER = "mindomni"
ELSEWHERE = "(path_or_hub_id below)"
_MARKS = ("manifest.json", "mllm")  # of a bundle, of a checkpoint

folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))


def found() -> dict[str, Path]:
    """Name → folder. A folder of the user's comes before the package's of the same name."""
    models = {folder.name: folder for folder, _ in DEMO_MODELS[:1] if folder.is_dir()}
    for place in reversed(folder_paths.get_folder_paths(FOLDER)):
        folders = Path(place).iterdir() if Path(place).is_dir() else ()
        models |= {f.name: f for f in folders if any((f / mark).exists() for mark in _MARKS)}
    return dict(sorted(models.items()))


def path_of(model: str, path_or_hub_id: str) -> str:
    """What `mindomni_rt.load` takes for the two widgets of the node. Raises ValueError."""
    if model == ELSEWHERE:
        if not path_or_hub_id.strip():
            raise ValueError("path_or_hub_id is empty; write a folder or a hub id, or choose a model above")
        return path_or_hub_id.strip()
    if model not in (models := found()):
        raise ValueError(f"model {model!r} is in none of {', '.join(folder_paths.get_folder_paths(FOLDER))}")
    return str(models[model])
