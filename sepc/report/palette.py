"""Colours of all pictures, by what a region's time is spent on; Okabe and Ito's, which colour-blind readers tell apart.

Each has a tint, to write on, and a strong one, for lines and bars.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Colour:
    """What something is coloured in, and what that says."""

    tint: str
    strong: str
    words: str


COLOURS: Final[Mapping[str, Colour]] = {
    "compute": Colour("#BFE8DA", "#009E73", "bound by arithmetic"),
    "L1": Colour("#D9E3F2", "#7A9CC6", "bound by L1"),
    "L2": Colour("#CFE8F7", "#56B4E9", "bound by L2"),
    "L3": Colour("#B7CFE8", "#0072B2", "bound by L3"),
    "DRAM": Colour("#F3D6E4", "#CC79A7", "bound by memory"),
    "tvm": Colour("#F6F0B4", "#B8A800", "lowered by TVM"),
    "torch": Colour("#FADFB0", "#E69F00", "run by PyTorch"),
}
OTHER: Final = Colour("#EEEEEE", "#777777", "not predicted")
NEW: Final = Colour("#FFFFFF", "#009E73", "new")
REMOVED: Final = Colour("#FFFFFF", "#D55E00", "removed")
CHANGED: Final = Colour("#FFFFFF", "#0072B2", "changed")
MARKS: Final[Mapping[str, Colour]] = {"new": NEW, "removed": REMOVED, "changed": CHANGED}


def colour_of(name: str) -> Colour:
    """The colour of what bounds a region, or who runs it; `OTHER` for anything else."""
    return COLOURS.get(name) or (Colour(OTHER.tint, OTHER.strong, f"bound by {name}") if name else OTHER)
