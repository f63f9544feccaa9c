"""ComfyUI's register of model folders."""

from __future__ import annotations

models_dir = "models"
_paths: dict[str, list[str]] = {}


def add_model_folder_path(folder_name: str, full_folder_path: str, is_default: bool = False) -> None:
    _paths.setdefault(folder_name, []).append(full_folder_path)


def get_folder_paths(folder_name: str) -> list[str]:
    return _paths[folder_name][:]
