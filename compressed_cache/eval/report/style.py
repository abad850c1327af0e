"""How pictures look: one palette, legible to the colour-blind, on paper as on a dark screen."""

from typing import Any

INK, MUTED, GRID = "#1f2328", "#6b7178", "#dde1e6"
SERIES = ("#0072b2", "#c94f00", "#00805e", "#a63d8f", "#8a6d00", "#2b8ca3")
MARKERS = "osD^vP"
LINES = ("-", "--", ":")
HELD, EVICTED, LOST = "#2f7fc1", "#8a8f96", "#d95f0e"
"""In pictures made of pixels, which are the same on any background."""

DARK = dict(
    zip(
        (INK, MUTED, GRID, *SERIES),
        (
            *("#e6e9ed", "#9aa3ad", "#343a41"),
            *("#5ab4f0", "#ff9a5c", "#3ccfa0", "#e690cf", "#dcbc4a", "#7fd4e6"),
        ),
        strict=True,
    )
)
"""What takes a colour's place on a dark screen."""

WIDTH, HEIGHT = 352, 250  # pixels of the page: as wide as a phone shows without scaling
RC: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.formatter.use_mathtext": False,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 12,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "font.size": 12,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.fontsize": 12,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    # Names are the user's, and a dollar in one is no formula.
    "text.parse_math": False,
    "text.color": INK,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    # Words stay words: they can be read aloud, and follow the page's colours.
    "svg.fonttype": "none",
    "svg.hashsalt": "compressed_cache",
}
"""Settings of matplotlib. A point is a pixel of the page, so 12 is 12 pixels."""
