"""Rows of trained models: train one for a seed, measure it, keep what was found."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import nn

import moediff
from benchmarks.settings import Setting
from moediff import Plan, Recipe, Run
from moediff.errors import WorkdirError
from moediff.roles import Metric
from moediff.storage import fingerprint, read_packed, write_json
from moediff_plugins.counters.macs import MACs
from moediff_plugins.counters.params import Params
from moediff_plugins.metrics.frechet import Frechet
from moediff_plugins.metrics.kernel import Kernel
from moediff_plugins.metrics.latency import Latency
from moediff_plugins.metrics.loss import Loss


@attrs.frozen(eq=False)
class Trained:
    """A model with its plan and what training it took.

    Attributes:
        model: a denoiser.
        plan: of a mixture, or of the whole model.
        batches: optimiser batches, summed over experts and stages.
        images: all that passed through a denoiser.
        seconds: of all stages.
        gap: how far learned masks were from the budget before they were rounded to meet it, as a
            share of the budget; None where no masks were learned.
    """

    model: Any
    plan: Plan
    batches: int = 0
    images: int = 0
    seconds: float = 0.0
    gap: float | None = None


@attrs.frozen(eq=False)
class Row:
    """A row of a table.

    Attributes:
        make: seed -> figures, for example by training a model and measuring it.
        depends: all that the figures depend on besides the setting, for example a recipe.
    """

    make: Callable[[int], Mapping[str, float]]
    depends: tuple[Any, ...] = ()


Figures = Mapping[str, Sequence[Mapping[str, float]]]
"""A table's figures: for every row one mapping per seed."""


def train(
    recipe: Recipe, on: Setting, name: str, seed: int, given: Mapping[str, Any] | None = None
) -> Trained:
    """Build a recipe's mixture for one seed; stages that other rows share are computed once."""
    folder = on.folder / slug(name, seed)
    mixture = moediff.build_experts(
        on.subject.denoiser,
        on.subject.scheduler,
        on.task,
        attrs.evolve(recipe, seed=seed),
        folder,
        given,
        cache=on.cache,
        verbose=True,
    )
    ledger = json.loads((folder / "ledger.json").read_text(encoding="utf-8"))
    steps = sum(ledger[stage]["steps"] for stage in ("prepare", "recover") if stage in ledger)
    # A step of a gate that learns masks is one batch for every expert.
    masks = ledger["plan"]["samples"] / on.batch if "plan" in ledger else 0
    images = sum(spent["samples"] for spent in ledger.values())
    seconds = sum(spent["seconds"] for spent in ledger.values())
    records, _ = read_packed(folder / "records.safetensors")
    gap = float(records["plan/gap"]) if "plan/gap" in records else None
    return Trained(mixture, mixture.plan, round(steps + masks), images, seconds, gap)


def trained(recipe: Recipe, on: Setting, name: str, given: Mapping[str, Any] | None = None) -> Row:
    """The row of a recipe: train it, measure it."""
    return Row(
        lambda seed: measure(train(recipe, on, name, seed, given), on, seed), (recipe, given)
    )


def measure(row: Trained, on: Setting, seed: int) -> dict[str, float]:
    """The figures of one model; all rows of a seed generate from the same noise."""
    params, macs = Params().price(on.subject), MACs().price(on.subject)
    held = row.plan.cost(params, on.sampling)
    figures = {
        "trained": changed(row.model, on) / params.full if row.batches else 0.0,
        "live": held["live"] / params.full,
        "stored": held["stored"] / params.full,
        "MACs": row.plan.cost(macs, on.sampling)["live"] / macs.full,
        "batches": float(row.batches),
        "images": float(row.images),
        "seconds": row.seconds,
    }
    if row.gap is not None:
        figures["gap"] = row.gap
    run = metric_run(on, seed)
    loss = Loss().measure(row.model, on.subject, on.unseen, run)
    figures[loss.name] = loss.value
    latency = Latency(batch=4, pairs=3 if on.options.quick else 15)
    for metric in (*image_metrics(on), latency):
        figure = metric.measure(row.model, on.subject, on.reference, run)
        figures[figure.name] = figure.value
    return figures


def changed(model: nn.Module, on: Setting) -> int:
    """How many of a model's stored parameters are not the base model's, for a live path or not."""
    base = {id(p) for p in on.subject.denoiser.parameters()}
    known = dict(on.subject.denoiser.named_parameters())
    total = 0
    for name, parameter in model.named_parameters():
        own = known.get(name.split(".", 2)[2] if name.startswith("experts.") else name)
        same = own is not None and own.shape == parameter.shape and torch.equal(own, parameter)
        total += 0 if id(parameter) in base or same else parameter.numel()
    return total


def metric_run(on: Setting, seed: int) -> Run:
    """The run in which a seed's models are measured, from the same noise; it keeps features."""
    return Run(
        sampling=attrs.evolve(on.sampling, seed=seed),
        seed=seed,
        device=on.subject.device,
        cache=on.cache,
        verbose=True,
    )


def image_metrics(on: Setting) -> tuple[Metric, ...]:
    """The two distances of generated images to real ones."""
    data = None if on.options.data is None else str(on.options.data)
    return (
        Frechet(on.extractor, on.samples, data=data),
        Kernel(on.extractor, on.samples, data=data),
    )


def collect(rows: Mapping[str, Row], on: Setting) -> Figures:
    """Make every row for every seed; what is on disk is not made again.

    Raises:
        WorkdirError: what is on disk was made with other recipes or sizes.
    """
    figures: dict[str, list[Mapping[str, float]]] = {name: [] for name in rows}
    setting = on.key  # hashes all weights and images
    keys = {name: fingerprint(setting, row.depends) for name, row in rows.items()}
    for seed in on.seeds:
        for name, row in rows.items():
            path, key = on.folder / f"{slug(name, seed)}.json", keys[name]
            if not path.exists():
                print(f"- {name}, seed {seed}", flush=True)
                write_json(path, {"key": key, "figures": dict(row.make(seed))})
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored.get("key") != key:
                raise WorkdirError(
                    f"{path}: holds the figures of another recipe or size. Delete {on.folder}, or "
                    "give another folder with --runs."
                )
            figures[name].append(stored["figures"])
    return figures


def slug(name: str, seed: int) -> str:
    """A file name for a row and a seed."""
    kept = "".join(letter if letter.isalnum() else "-" for letter in name.lower())
    return f"{kept}-{seed}"
