"""Learning curves."""

from __future__ import annotations

from pathlib import Path


def draw_curves(metrics_path: str | Path, png_path: str | Path) -> None:
    return None
