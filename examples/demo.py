"""Both papers on real images: build, fine-tune, measure, print a table and write a page.

The user's task is the digits 3 and 8 of scikit-learn's handwritten digits; the base model knows
all ten. Everything is written to runs/demo; a run that was killed goes on there. Run it with
`make demo`, or `make demo QUICK=1` for the same code with fewer steps.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import attrs
from diffusers import DDPMScheduler, UNet2DModel

import moediff
from moediff import Blueprint, Budget, Intervals, Plan, Recipe, Run, Sampling, Task
from moediff.storage import read_packed
from moediff_plugins import digits
from moediff_plugins.clusterers.alignment import Alignment
from moediff_plugins.counters.macs import MACs
from moediff_plugins.counters.params import Params
from moediff_plugins.gates.era import ERA
from moediff_plugins.metrics.features import generate_images
from moediff_plugins.metrics.frechet import Frechet
from moediff_plugins.metrics.latency import Latency
from moediff_plugins.reports.document import Table, write_page
from moediff_plugins.reports.plots import alignment_plot, plan_plot, sample_grid
from moediff_plugins.scorers.ablation_l1 import AblationL1
from moediff_plugins.tuners.distill import Distill
from moediff_plugins.tuners.elastic import Elastic
from moediff_plugins.tuners.finetune import Finetune

CLASSES = (3, 8)
SAMPLERS = {"DDIM-20": Sampling("ddim", 20), "DPM++-10": Sampling("dpmsolver++", 10)}
RATE = 5e-4


@attrs.frozen
class Size:
    """How much work the demo does; quick and full differ in these numbers alone."""

    steps: int
    era_steps: int
    noises: int
    scoring_steps: int
    aligned: int
    stride: int
    teacher: int
    samples: int
    pairs: int


FULL = Size(800, 300, 4, 10, 1024, 50, 400, 500, 7)
QUICK = Size(60, 25, 1, 3, 16, 100, 60, 120, 3)


@attrs.frozen(eq=False)
class Row:
    """One line of the table: a model, its plan, and what making it has used."""

    name: str
    model: Any
    plan: Plan
    ledger: dict[str, dict[str, float]]


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps, at most three minutes")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    options = parser.parse_args()
    size = QUICK if options.quick else FULL
    out: Path = options.out / ("quick" if options.quick else "full")
    started = time.perf_counter()

    base, scheduler = digits.load_base()
    images, labels = digits.load_images("train")
    task = Task.from_arrays(images, labels, null_label=digits.NULL_LABEL).subset(CLASSES)
    images, labels = digits.load_images("all")
    reference = Task.from_arrays(images, labels, null_label=digits.NULL_LABEL).subset(CLASSES)

    rows = build(base, scheduler, task, size, out)
    table = measure(rows, base, scheduler, reference, size)
    page(out / "index.html", rows, table, base, scheduler, reference, size)
    show(table)
    (out / "table.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    print(f"\n{time.perf_counter() - started:.0f} s; page: {out / 'index.html'}")


def build(
    base: UNet2DModel, scheduler: DDPMScheduler, task: Task, size: Size, out: Path
) -> list[Row]:
    """Make every model of the table; equal stages are computed once."""

    def make(name: str, recipe: Recipe, given: dict[str, Any] | None = None) -> Row:
        print(f"- {name}", flush=True)
        folder = out / name.replace(" ", "-").replace("%", "").replace(",", "")
        mixture = moediff.build_experts(
            base, scheduler, task, recipe, folder, given, cache=out / "stages", verbose=True
        )
        ledger = json.loads((folder / "ledger.json").read_text(encoding="utf-8"))
        return Row(name, mixture, mixture.plan, ledger)

    def pair(name: str, recipe: Recipe) -> list[Row]:
        pruned = make(f"{name}, pruned only", attrs.evolve(recipe, recover=None))
        return [pruned, make(name, recipe)]

    whole = Plan(Intervals.uniform(1000, 1), (Blueprint(),))
    rows = [Row("base", base, whole, {})]

    moedm = moediff.load_recipe(
        "moedm",
        scorer=AblationL1(images=size.noises),
        recover=Distill(steps=size.steps, images=size.teacher, learning_rate=RATE),
        sampling=Sampling("ddim", size.scoring_steps),
    )
    tune = Finetune(steps=size.steps, learning_rate=RATE)
    same_steps = attrs.evolve(moedm, experts=1, recover=tune)
    rows.append(make("base, fine-tuned", same_steps, {"plan": whole}))
    rows += pair("MoEDM", moedm)
    rows.append(make("MoEDM, one expert", attrs.evolve(moedm, experts=1)))

    quarter = size.steps // 4
    diffpruning = moediff.load_recipe(
        "diffpruning",
        clusterer=Alignment(stride=size.stride, images=size.aligned),
        prepare=Elastic(depth_steps=quarter, width_steps=quarter, learning_rate=RATE),
        gate=ERA(steps=size.era_steps),
        recover=Finetune(steps=size.steps - 2 * quarter, learning_rate=RATE),
        sampling=SAMPLERS["DDIM-20"],
    )
    for share in (0.7, 0.5, 0.3):
        recipe = attrs.evolve(diffpruning, budget=Budget(share, MACs()))
        rows += pair(f"DiffPruning {share:.0%}", recipe)
    return rows


def measure(
    rows: list[Row],
    base: UNet2DModel,
    scheduler: DDPMScheduler,
    reference: Task,
    size: Size,
) -> list[dict[str, str]]:
    """Measure every row with both samplers."""
    subject = moediff.installed().dissect(base, scheduler)
    params, macs = Params().price(subject), MACs().price(subject)
    table = []
    for row in rows:
        print(f"- measure {row.name}", flush=True)
        sampling = SAMPLERS["DDIM-20"]
        held = row.plan.cost(params, sampling)
        cell = {
            "model": row.name,
            "params live": f"{held['live'] / 1e6:.2f} M",
            "stored": f"{held['stored'] / 1e6:.2f} M",
        }
        for name, sampling in SAMPLERS.items():
            calls = sum(sampling.calls(scheduler, row.plan.intervals))
            live = row.plan.cost(macs, sampling)["live"]
            cell[f"MACs/image {name}"] = f"{live * calls / 1e9:.3f} G"
        run = Run(sampling=SAMPLERS["DDIM-20"], verbose=True)
        ratio = Latency(batch=64, pairs=size.pairs).measure(row.model, subject, reference, run)
        cell["latency / base"] = f"{ratio.value:.2f} ± {(ratio.spread or 0) / 2:.2f}"
        for name, sampling in SAMPLERS.items():
            run = Run(sampling=sampling, verbose=True)
            figure = Frechet("digits", size.samples).measure(row.model, subject, reference, run)
            cell[f"{figure.name} {name}"] = f"{figure.value:.2f}"
        cell["samples"] = str(size.samples)
        cell["optimiser steps"] = str(int(sum(spent["steps"] for spent in row.ledger.values())))
        cell["seconds"] = f"{sum(spent['seconds'] for spent in row.ledger.values()):.0f}"
        table.append(cell)
    return table


def show(table: list[dict[str, str]]) -> None:
    """Print the table in columns."""
    widths = {name: max(len(name), *(len(row[name]) for row in table)) for name in table[0]}
    print()
    print("  ".join(name.ljust(width) for name, width in widths.items()))
    for row in table:
        print("  ".join(row[name].ljust(width) for name, width in widths.items()))


def page(
    path: Path,
    rows: list[Row],
    table: list[dict[str, str]],
    base: UNet2DModel,
    scheduler: DDPMScheduler,
    reference: Task,
    size: Size,
) -> None:
    """Write the page with the table, the samples, the alignment and the experts' shapes."""
    subject = moediff.installed().dissect(base, scheduler)
    figures = []
    note = "Every row starts from the same noise; asked for are 3 (left half) and 8."
    for name, sampling in SAMPLERS.items():
        run = Run(sampling=sampling)
        grid = {
            row.name: generate_images(row.model, subject, reference, run, 16, 16) for row in rows
        }
        figures.append(sample_grid(f"Samples, {name}", note, grid))
    pruned = [row for row in rows if row.name.startswith("DiffPruning")]
    records, _ = read_packed(path.parent / "DiffPruning-50" / "records.safetensors")
    figures.append(
        alignment_plot(
            "Alignment of timesteps",
            f"Cosine similarity of the gradients at pairs of timesteps, from {size.aligned} images "
            f"each; cut at {pruned[0].plan.intervals.cuts[1]}. Two halves of the images agree to "
            f"{records['intervals/reliability'].median():.2f} (median cosine); near 0 the matrix "
            "is noise.",
            records["intervals/similarity"],
            pruned[0].plan.intervals.cuts,
            objective=records["intervals/objective"],
            held_out=records["intervals/held-out-fit"],
            reliability=records["intervals/reliability"],
        )
    )
    note = "Share of groups and heads that each expert keeps; a cross is a dropped layer."
    for row in pruned[1::2]:
        title = f"{row.name}: what the experts keep"
        figures.append(plan_plot(title, note, subject.anatomy, row.plan))
    summary = (
        f"Task: the digits {CLASSES[0]} and {CLASSES[1]}. Trained on the training split; the "
        f"Frechet distance FD[digits] compares {size.samples} generated images with all "
        f"{len(reference)} real ones of these classes, on the features of a small digits "
        "classifier (this is not FID). "
        "Optimiser steps are summed over stages and experts, those of the ERA included. Latency: "
        "median ratio of paired samplings at batch 64, with half the interquartile range."
    )
    cells = Table(list(table[0]), [list(row.values()) for row in table])
    write_page(path, "moediff: two papers, one engine", summary, [cells], figures)


if __name__ == "__main__":
    main()
