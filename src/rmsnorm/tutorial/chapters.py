"""The only file that knows the order: the tutorial's own outline first, and then what it left open."""

from __future__ import annotations

from . import cost, depth, dial, gradient, invariance, layer, precision, ruler, zero
from .panel import Panel

CHAPTERS: dict[str, tuple[Panel, ...]] = {
    "principle": (ruler.PANEL,),
    "formula": (dial.PANEL,),
    "implementation": (layer.PANEL,),
    "beyond": (zero.PANEL, invariance.PANEL, gradient.PANEL, precision.PANEL, depth.PANEL, cost.PANEL),
}
PANELS = {panel.name: panel for panels in CHAPTERS.values() for panel in panels}
"""By name, in order."""
