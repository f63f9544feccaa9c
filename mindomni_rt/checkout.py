"""What results, run logs and `doctor` name: the commit, and versions of packages."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def commit() -> str | None:
    """The commit of this checkout, 12 digits, with a plus if tracked files were changed. None outside of a checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # installed: a repository above would be the user's own
        return None

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    found = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no")
    return f"{found}{'+' if changed else ''}" if found else None


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those that are here."""
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
