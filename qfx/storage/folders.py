"""Where qfx keeps on disk what it made on this machine and can make again."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def default_folder() -> Path | None:
    """QFX_CACHE_DIR where it is set (None where it is empty), else the platform's place for caches.

    None, too, where nobody knows the user's home, such as in a container under a number without a name.
    """
    try:
        return _default()
    except RuntimeError:  # of Path.home and expanduser
        return None


def _default() -> Path | None:
    given = os.environ.get("QFX_CACHE_DIR")
    if given is not None:
        return Path(given).expanduser() if given else None
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "qfx" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "qfx"
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "qfx"
