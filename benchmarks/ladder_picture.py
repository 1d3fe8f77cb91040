"""The quality ladder as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ladder import Regime
from ladder_show import in_short, names


def _colour(label: str) -> str:
    """Grey for what fuses nothing, orange for what was published, blue for ours."""
    if label == "pivot" or label.startswith("labels"):
        return "#7f7f7f"
    return "#d9822b" if label.startswith("fuse") else "#1f77b4"


def picture(path: Path, regimes: Sequence[Regime], rows: Sequence[dict[str, Any]]) -> None:
    """The mean over domains with its spread over seeds, a line a rung and a panel a regime; a stroke at the pivot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [in_short(regime, rows) for regime in regimes]
    about = names(panels)
    at = {label: y for y, label in enumerate(about)}
    size = (3.2 * len(panels) + 2.4, 0.3 * len(about) + 1.4)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axis, regime, lines in zip(axes[0], regimes, panels, strict=True):
        for line in lines:  # points, and no bars: these would have to begin at 0
            (value, spread), y = line["bits"]["mean"], at[line["label"]]
            axis.errorbar(value, y, xerr=spread, fmt="o", markersize=5, capsize=3, color=_colour(line["label"]))
            white = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # over the pivot's stroke
            beside = {"textcoords": "offset points", "va": "center", "fontsize": 7, "bbox": white}
            axis.annotate(f"{value:.4f}", (value + spread, y), (6, 0), **beside)
        values = [line["bits"]["mean"][0] for line in lines]
        axis.axvline(values[0], color="#bbbbbb", linewidth=0.8, zorder=0)
        room = 0.12 * (max(values) - min(values)) or 0.01
        axis.set_xlim(min(values) - room, max(values) + 3 * room)
        axis.set_title(regime.about.replace(", ", ",\n", 2), fontsize=9)
        axis.set_xlabel("bits per byte", fontsize=8)
        axis.tick_params(axis="x", labelsize=7)
        axis.grid(axis="y", color="#eeeeee", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(about)), list(about.values()), fontsize=8)
    axes[0][0].invert_yaxis()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"picture in {path}")
