"""Tables of trained models: train every row for every seed, measure it, write what was found."""

from __future__ import annotations

import base64
import json
import math
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import attrs
import diffusers
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import nn

import moediff
from benchmarks.settings import Setting
from moediff import Plan, Recipe, Run
from moediff.errors import WorkdirError
from moediff.roles import Metric
from moediff.storage import fingerprint, write_atomic, write_json
from moediff_plugins import report
from moediff_plugins.counters.macs import MACs
from moediff_plugins.counters.params import Params
from moediff_plugins.metrics.frechet import Frechet
from moediff_plugins.metrics.kernel import Kernel
from moediff_plugins.metrics.latency import Latency


@attrs.frozen(eq=False)
class Trained:
    """A model with its plan and what training it took.

    Attributes:
        model: a denoiser.
        plan: of a mixture, or of the whole model.
        batches: optimiser batches, summed over experts and stages.
        images: all that passed through a denoiser.
    """

    model: Any
    plan: Plan
    batches: int = 0
    images: int = 0


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
        cache=on.folder / "stages",
        verbose=True,
    )
    ledger = json.loads((folder / "ledger.json").read_text(encoding="utf-8"))
    # A step of a gate that learns masks is one batch for every expert.
    learning = [ledger.get(stage, {"samples": 0}) for stage in ("prepare", "plan", "recover")]
    batches = round(sum(spent["samples"] for spent in learning) / on.batch)
    images = sum(spent["samples"] for spent in ledger.values())
    return Trained(mixture, mixture.plan, batches, images)


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
        "trained": changed(row.model, on) / params.full,
        "live": held["live"] / params.full,
        "stored": held["stored"] / params.full,
        "MACs": row.plan.cost(macs, on.sampling)["live"] / macs.full,
        "batches": float(row.batches),
        "images": float(row.images),
    }
    run = metric_run(on, seed)
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
        cache=on.folder / "features",
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
    for seed in on.seeds:
        for name, row in rows.items():
            path = on.folder / f"{slug(name, seed)}.json"
            key = fingerprint(on.key, row.depends)
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


def distances(figures: Figures) -> list[str]:
    """The names of the figures that are distances between sets of images."""
    first = next(iter(figures.values()))[0]
    return [key for key in first if key.split("[")[0] in ("FD", "KD", "FID", "KID")]


def summarise(figures: Figures, against: str | Mapping[str, str]) -> list[dict[str, str]]:
    """A line per row: means over seeds, and what changed from another row, paired by seed.

    Args:
        figures: a table's.
        against: the row that all are compared with, or one for every row that is.
    """
    title = against if isinstance(against, str) else "the row it builds on"
    lines = []
    for name, found in figures.items():
        other = against if isinstance(against, str) else against.get(name, name)
        line = {"model": name}
        line |= {
            key: plain(statistics.median(one[key] for one in found))
            for key in found[0]
            if key not in distances(figures)
        }
        for key in distances(figures):
            line[key] = spread([one[key] for one in found])
            pairs = zip(found, figures[other], strict=True)
            gaps = [one[key] - before[key] for one, before in pairs]
            line[f"{key} less {title}"] = "" if name == other else difference(gaps)
        lines.append(line)
    return lines


def plain(value: float, digits: int = 3, sign: str = "") -> str:
    """So many significant digits, or all of those before the point, without an exponent."""
    rounded = float(f"{value:.{digits}g}") if abs(value) < 10**digits else round(value)
    return f"{rounded:{sign}.10f}".rstrip("0").rstrip(".")


def spread(values: Sequence[float]) -> str:
    """The mean, and the standard deviation if there are several."""
    mean = plain(statistics.mean(values))
    return f"{mean} ± {plain(statistics.stdev(values), 2)}" if len(values) > 1 else mean


def difference(gaps: Sequence[float]) -> str:
    """The mean of some differences, and its 95 % confidence interval if there are several.

    The interval is Student's, so that of three seeds is 2.5 standard deviations to either side.
    """
    mean = statistics.mean(gaps)
    if len(gaps) < 2:
        return plain(mean, 2, "+")
    error = statistics.stdev(gaps) / math.sqrt(len(gaps))
    half = float(stats.t.ppf(0.975, len(gaps) - 1)) * error
    return f"{plain(mean, 2, '+')} [{plain(mean - half, 2, '+')}, {plain(mean + half, 2, '+')}]"


def write_table(
    name: str, title: str, about: str, lines: Sequence[Mapping[str, str]], on: Setting
) -> None:
    """Write the table of an experiment."""
    path = on.options.results / f"{name}-{on.name}.md"
    write_markdown(path, title, about, lines, command(name, on), on.subject.device)


def write_markdown(
    path: Path,
    title: str,
    about: str,
    lines: Sequence[Mapping[str, str]],
    made_by: str,
    device: torch.device,
) -> None:
    """Write and print a table, with the command and the machine that made it."""
    columns = list(lines[0])
    rows = [columns, ["---"] * len(columns), *([line[key] for key in columns] for line in lines)]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    made = f"Command: `{made_by}`\n\nMade with {machine(device)}."
    text = f"# {title}\n\n{about}\n\n{table}\n\n{made}\n"
    write_atomic(path, lambda target: target.write_text(text, encoding="utf-8"))
    print(text)


def write_plot(name: str, figure: Figure, on: Setting) -> None:
    """Write a plot beside its table."""
    path = on.options.results / f"{name}-{on.name}.png"
    write_atomic(path, lambda target: figure.savefig(target, format="png", dpi=110))


def write_picture(name: str, figure: report.Figure, on: Setting) -> None:
    """Write a figure of the report beside its table."""
    path = on.options.results / f"{name}-{on.name}.png"
    write_atomic(path, lambda target: target.write_bytes(base64.b64decode(figure.png)))


def describe(on: Setting) -> str:
    """What the columns mean, and from how much."""
    seen = ", most of which were trained on" if on.name == "digits" else ""
    return (
        "Trained, live and stored are shares of the base model's parameters, MACs those of one "
        f"call. `batches` are optimiser batches of {on.batch} images, summed over experts and "
        "stages; `images` counts all that passed through a denoiser, those for scores and for a "
        "teacher's images as well. "
        f"Distances compare {on.samples} images ({on.sampling.scheduler}, {on.sampling.steps} "
        f"steps) with {len(on.reference)} real ones{seen}; they are not FID or KID. Latency is the "
        "time of a denoiser call at batch 4 beside the base's, in pairs. Distances are means over "
        f"the seeds {', '.join(map(str, on.seeds))} with their standard deviation, other columns "
        "medians; differences are paired by seed, with a 95 % confidence interval."
    )


def command(name: str, on: Setting) -> str:
    """The command that makes a table, without this machine's folders."""
    words = [f"python -m benchmarks.{name} --on {on.name}"]
    words += ["--data FOLDER"] if on.name == "cifar" else []
    words += [f"--device {on.options.device}"] if on.options.device != "cpu" else []
    words += ["--quick"] if on.options.quick else []
    return " ".join(words)


def machine(device: torch.device) -> str:
    """The machine and the versions, in words."""
    threads = torch.get_num_threads()
    where = f"{os.cpu_count()} CPU cores, {threads} thread{'s' if threads > 1 else ''}"
    if device.type == "cuda":
        where = f"one {torch.cuda.get_device_name(device)}"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{where}; {versions}, diffusers {diffusers.__version__}, moediff {version('moediff')}"


def slug(name: str, seed: int) -> str:
    """A file name for a row and a seed."""
    kept = "".join(letter if letter.isalnum() else "-" for letter in name.lower())
    return f"{kept}-{seed}"
