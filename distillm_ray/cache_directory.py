"""Where a node keeps what it fetched."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "DISTILLM_RAY_CACHE"


def cache_directory() -> Path:
    """`$DISTILLM_RAY_CACHE`, else `distillm-ray` in the user's cache directory."""
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "distillm-ray"
