"""The page's plots, as SVG; the same records give the same files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams.update({"svg.hashsalt": "rechub_dist", "svg.fonttype": "none", "font.size": 9})

from matplotlib import pyplot as plt  # noqa: E402 - after its settings

from speed.record import Figure, Record  # noqa: E402

_OURS, _OTHERS, _MISSED = "#3f51b5", "#9e9e9e", "#c62828"


def draw(records: Sequence[Record], folder: Path) -> dict[str, str]:
    """Draw what there are figures for; the titles by file name."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, str] = {}
    by_part = {record.part: record for record in records}
    aimed = [(record.part, one) for record in records for one in record.figures if one.target is not None]
    ratios = [(part, one) for part, one in aimed if one.unit == "ratio" and one.values and not one.at_most]
    if ratios:
        drawn["performance-targets.svg"] = "Ratios as shares of their targets"
        _targets(ratios, folder / "performance-targets.svg")
    for part, title in (("a", "DeepFM end to end"), ("c", "Samples/s as tables grow"), ("b", "Models beside loops")):
        rates = [one for one in by_part[part].figures if one.unit == "samples/s"] if part in by_part else []
        if rates:
            drawn[f"performance-{part}.svg"] = title
            _rates(rates, title, folder / f"performance-{part}.svg")
    return drawn


def _targets(ratios: Sequence[tuple[str, Figure]], path: Path) -> None:
    """A bar for each ratio, whose target is the line at 1, with its lowest and highest round."""
    figure, axes = plt.subplots(figsize=(8, 0.8 + 0.3 * len(ratios)))
    for place, (_, one) in enumerate(reversed(ratios)):
        assert one.target is not None
        low, high = one.spread
        shares = [value / one.target for value in (one.median, low, high)]
        axes.barh(place, shares[0], color=_OURS if one.met else _MISSED, height=0.6)
        axes.plot(shares[1:], [place, place], color="black", linewidth=1)
    names = [f"{part}  {one.group}: {one.name}" if one.group else f"{part}  {one.name}" for part, one in ratios]
    axes.set_yticks(range(len(ratios)), [name if len(name) < 100 else name[:97] + "..." for name in reversed(names)])
    axes.axvline(1, color="black", linestyle=":")
    axes.set_xlabel("median / target; the line from the lowest to the highest round")
    _save(figure, path)


def _rates(rates: Sequence[Figure], title: str, path: Path) -> None:
    """Samples/s of each contestant."""
    figure, axes = plt.subplots(figsize=(8, 0.8 + 0.3 * len(rates)))
    for place, one in enumerate(reversed(rates)):
        ours = one.name.startswith("rechub_dist") or not any(x.name.startswith("rechub_dist") for x in rates)
        axes.barh(place, one.median, color=_OURS if ours else _OTHERS, height=0.6)
        axes.plot(one.spread, [place, place], color="black", linewidth=1)
    names = [f"{one.group}: {one.name}" if one.group else one.name for one in rates]
    axes.set_yticks(range(len(rates)), list(reversed(names)))
    axes.set_xlabel("samples/s")
    axes.set_title(title, loc="left")
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
