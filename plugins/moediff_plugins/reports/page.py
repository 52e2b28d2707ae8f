"""The page of one run: what was built, how it was found, and what that took."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from attrs.validators import ge, instance_of

from moediff.artefact import base_shapes
from moediff.errors import WorkdirError
from moediff.mixture import ExpertMixture
from moediff.registry import installed
from moediff.sampling import Sampling, generate, initial_noise
from moediff.storage import Tensors, read_packed
from moediff.subject import Subject, takes_labels
from moediff_plugins.reports.document import Figure, Table, write_page
from moediff_plugins.reports.plots import alignment_plot, curves_plot, plan_plot, sample_grid


@attrs.frozen
class Page:
    """One HTML page that loads nothing from elsewhere: `report.html` in the run's folder.

    It has the recipe, what each expert and the whole cost, what every stage took, samples, the
    matrix that the intervals were cut from, what the experts keep, and curves of the training.
    It needs matplotlib and jinja2, the extra `report`.

    Attributes:
        samples: how many images to show, from the run's sampling without guidance; of a
            class-conditional model the task's classes in turn. None of a model whose labels are
            no class numbers.
    """

    samples: int = attrs.field(default=16, validator=[instance_of(int), ge(0)])

    def write(self, folder: Path) -> Path:
        about, ledger, data, records = _read(folder)
        mixture = ExpertMixture.from_pretrained(folder / "mixture")
        base = base_shapes(data, installed())
        recipe, figures = about["recipe"], []
        sampling = Sampling(**recipe["sampling"])
        if self.samples and (about.get("classes") or not takes_labels(base.denoiser)):
            figures.append(_samples(mixture, base, sampling, self.samples, about.get("classes")))
        if "intervals/similarity" in records:
            figures.append(_alignment(records, mixture))
        note = "Share of the units of every width; a cross is a dropped layer."
        figures.append(plan_plot("What the experts keep", note, base.anatomy, mixture.plan))
        curves = {name: values for name, values in records.items() if _is_curve(name, values)}
        if curves:
            note = "Losses, and of a gate that learns masks its cost (share of the base's) and R."
            figures.append(curves_plot("Training", note, curves))
        path, title = folder / "report.html", f"moediff run: {folder.resolve().name}"
        tables = [_experts(mixture, base, sampling), _ledger(ledger)]
        write_page(path, title, _words(recipe, records), tables, figures)
        return path


def _read(folder: Path) -> tuple[Any, Any, Any, Tensors]:
    """What a run has left: its identity, ledger, the mixture's data, and the records."""
    try:
        about, ledger, data = (
            json.loads((folder / name).read_text(encoding="utf-8"))
            for name in ("run.json", "ledger.json", "mixture/mixture.json")
        )
        records, _ = read_packed(folder / "records.safetensors")
    except (OSError, ValueError) as error:
        raise WorkdirError(
            f"{folder}: holds no finished run ({error}). Give the folder of a run that has ended, "
            "or go on with it first."
        ) from error
    return about, ledger, data, records


def _words(recipe: Mapping[str, Any], records: Tensors) -> str:
    """The recipe, and how near to its budget the masks came by themselves."""
    parts = [f"{role} {found['name']}" for role, found in recipe.items()
             if isinstance(found, dict) and "name" in found]  # fmt: skip
    budget = recipe["budget"]
    text = (
        f"Recipe: {', '.join(parts)}; {recipe['experts']} experts; budget {budget['value']:.4g} of "
        f"the base's {budget['counter']['name']} ({budget['of']}); seed {recipe['seed']}."
    )
    if "plan/gap" in records:
        gap = 100 * float(records["plan/gap"])
        text += f" Before binarisation the masks were {gap:+.1f} % from the budget."
    return text


def _experts(mixture: ExpertMixture, base: Subject, sampling: Sampling) -> Table:
    """What each expert costs, and the whole."""
    plan, layers = mixture.plan, len(base.anatomy.layers)
    params, macs = (
        installed().create("counters", name, {}).price(base) for name in ("params", "macs")
    )
    calls = sampling.calls(base.scheduler, plan.intervals)
    masks = plan.masks(base.anatomy)
    each = zip(
        plan.intervals, plan.blueprints, params.experts(masks), macs.experts(masks), calls,
        strict=True,
    )  # fmt: skip
    rows = [
        [f"expert {index}", f"{low} to {high - 1}", f"{layers - len(blueprint.drop)} / {layers}",
         f"{float(size) / 1e6:.2f} M", f"{float(work) / 1e9:.3f} G", str(count)]
        for index, ((low, high), blueprint, size, work, count) in enumerate(each)
    ]  # fmt: skip
    stored = plan.cost(params, sampling)["stored"]
    work = plan.cost(macs, sampling)["live"]
    whole = f"0 to {base.total - 1}"
    rows += [
        ["mixture", whole, "", f"{stored / 1e6:.2f} M stored", f"{work / 1e9:.3f} G on average",
         str(sum(calls))],
        ["base", whole, f"{layers} / {layers}", f"{params.full / 1e6:.2f} M",
         f"{macs.full / 1e9:.3f} G", str(sum(calls))],
    ]  # fmt: skip
    columns = ["", "timesteps", "layers", "parameters", "MACs of a call", "calls per image"]
    return Table(columns, rows)


def _ledger(ledger: Mapping[str, Mapping[str, float]]) -> Table:
    """What every stage took."""
    rows = [
        [stage, f"{spent['samples']:,}", f"{spent['steps']:,}", f"{spent['seconds']:.0f}"]
        for stage, spent in ledger.items()
    ]
    columns = ["stage", "images through a denoiser", "optimiser steps", "seconds"]
    return Table(columns, rows, "What it took")


def _samples(
    mixture: ExpertMixture,
    base: Subject,
    sampling: Sampling,
    count: int,
    classes: Sequence[int] | None,
) -> Figure:
    """Images of the mixture, of the task's classes in turn if it has any."""
    sampling = Sampling(sampling.scheduler, sampling.steps, seed=sampling.seed)
    seeds, conditioning = sampling.seeds(count), {}
    note = f"{sampling.scheduler}, {sampling.steps} steps, no guidance."
    if classes:
        conditioning["class_labels"] = torch.tensor(classes)[torch.arange(count) % len(classes)]
        note += f" The task's classes in turn: {', '.join(map(str, classes))}."
    with torch.no_grad():
        noise = initial_noise(seeds, base.shape)
        made = generate(mixture, base.scheduler, sampling, noise, conditioning, {}, seeds)
    return sample_grid("Samples", note, {"mixture": made[:, :3].float()})


def _alignment(records: Tensors, mixture: ExpertMixture) -> Figure:
    """The matrix that the intervals were cut from, of gradients or of losses."""
    found = {
        name: records.get(f"intervals/{key}")
        for name, key in (
            ("objective", "objective"), ("held_out", "held-out-fit"), ("reliability", "reliability")
        )
    }  # fmt: skip
    note = "Where the halves do not agree, the matrix is noise: take more images."
    losses = "intervals/losses" in records
    return alignment_plot(
        "Similarity of timesteps' losses" if losses else "Alignment of timesteps",
        note if found["reliability"] is not None else "",
        records["intervals/similarity"],
        mixture.intervals.cuts,
        **found,
        measure="1 - difference of losses" if losses else "cosine similarity of gradients",
    )


def _is_curve(name: str, values: torch.Tensor) -> bool:
    last = name.split("/")[-1]
    learned = name in ("plan/cost", "plan/penalty")
    return values.ndim == 1 and len(values) > 1 and (learned or last.startswith("loss-"))
