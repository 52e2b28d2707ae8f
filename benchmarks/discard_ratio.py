"""MoEDM's Appendix E: quality and speed when more and more of the parameters are discarded.

python -m benchmarks.discard_ratio --on digits
"""

from __future__ import annotations

import statistics
from typing import Any

import attrs
from matplotlib.figure import Figure

from benchmarks.recipes import BASE_TUNED, TAUGHT, base_rows, moedm
from benchmarks.rows import Figures, Row, collect, metric_run, slug, trained
from benchmarks.settings import Setting, load, parse_args
from benchmarks.tables import describe, distances, summarise, write_picture, write_plot, write_table
from moediff import Budget, ExpertMixture
from moediff_plugins.counters.params import Params
from moediff_plugins.metrics.features import generate_images
from moediff_plugins.reports import document, plots

RATIOS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

SHOWN = 16
"""Images of a model in the picture."""


def rows(on: Setting) -> dict[str, Row]:
    """The base rows, then one per ratio."""
    found = base_rows(on)
    for ratio in RATIOS:
        recipe = attrs.evolve(moedm(on), budget=Budget(1 - ratio, Params()))
        found[f"{ratio:.0%}"] = trained(recipe, on, f"{ratio:.0%}")
    return found


def plot(figures: Figures) -> Figure:
    """Distance and time per call by the share that was really discarded."""
    figure = Figure(figsize=(6, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    key = distances(figures)[0]
    mixtures = {name: found for name, found in figures.items() if name.endswith("%")}
    shares = [1 - statistics.mean(one["live"] for one in found) for found in mixtures.values()]
    for axis, name in ((upper, key), (lower, "latency")):
        values = [[one[name] for one in found] for found in mixtures.values()]
        axis.plot(shares, [statistics.mean(value) for value in values], color="C0", marker="o")
        for share, value in zip(shares, values, strict=True):
            axis.plot([share] * len(value), value, ".", color="C0", alpha=0.5)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(bottom=0)
    for name, style in (("base", ":"), (BASE_TUNED, "--")):
        value = statistics.mean(one[key] for one in figures[name])
        upper.axhline(value, color="C7", linestyle=style, label=name)
    lower.axhline(1, color="C7", linestyle=":")
    upper.set_ylabel(key)
    lower.set_ylabel("time per call / base")
    lower.set_xlabel("share of the parameters that a call does not use")
    upper.legend(frameon=False)
    return figure


def samples(on: Setting) -> document.Figure:
    """Images of the first seed's models from the same noise (Figure 7)."""
    models: dict[str, Any] = {"base": on.subject.denoiser}
    for name in (BASE_TUNED, *(f"{ratio:.0%}" for ratio in RATIOS)):
        folder = on.folder / slug(name, on.seeds[0]) / "mixture"
        models[name] = ExpertMixture.from_pretrained(folder).to(on.subject.device)
    run = metric_run(on, on.seeds[0])
    images = {
        name: generate_images(model, on.subject, on.reference, run, SHOWN, SHOWN).cpu()
        for name, model in models.items()
    }
    return plots.sample_grid("Samples", "", images)


def main() -> None:
    """Make the table and the plot."""
    options = parse_args(__doc__.splitlines()[0])
    on = load(options, "discard_ratio")
    figures = collect(rows(on), on)
    about = (
        "MoEDM with 2x expansion; the first column is the asked discard ratio, `live` what is "
        f"left of the parameters in one call. {TAUGHT} " + describe(on)
    )
    lines = summarise(figures, BASE_TUNED)
    write_table("discard_ratio", "Discard ratios (MoEDM Appendix E)", about, lines, on)
    write_plot("discard_ratio", plot(figures), on)
    write_picture("discard_ratio-samples", samples(on), on)


if __name__ == "__main__":
    main()
