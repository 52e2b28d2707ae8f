"""Tables: means and paired differences of the rows, in Markdown, and the figures beside them."""

from __future__ import annotations

import base64
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import diffusers
import torch
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from scipy import stats

from benchmarks.rows import Figures
from benchmarks.settings import Setting
from moediff.storage import write_atomic
from moediff_plugins.reports import document


def distances(figures: Figures) -> list[str]:
    """The names of the figures that are distances between sets of images."""
    first = next(iter(figures.values()))[0]
    return [key for key in first if key.split("[")[0] in ("FD", "KD", "FID", "KID")]


def summarise(
    figures: Figures, against: str | Mapping[str, str], compared: Sequence[str] = ()
) -> list[dict[str, str]]:
    """A line per row: means over seeds, and what changed from another row, paired by seed.

    Args:
        figures: a table's; a row may be without some of them.
        against: the row that all are compared with, or one for every row that is.
        compared: figures to compare besides the loss and the distances.
    """
    title = against if isinstance(against, str) else "the row it builds on"
    keys = dict.fromkeys(key for found in figures.values() for key in found[0])
    compared = [*compared, *({"loss"} & keys.keys()), *distances(figures)]
    lines = []
    for name, found in figures.items():
        other = against if isinstance(against, str) else against.get(name, name)
        line = {"model": name}
        line |= {
            key: plain(statistics.median(one[key] for one in found)) if key in found[0] else ""
            for key in keys
            if key not in compared
        }
        for key in compared:
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


def plain_ticks(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers, 1.5, 2, 3, 5, 7 and 10 times a power of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axis.set_minor_locator(NullLocator())


def write_plot(name: str, figure: Figure, on: Setting) -> None:
    """Write a plot beside its table."""
    path = on.options.results / f"{name}-{on.name}.png"
    write_atomic(path, lambda target: figure.savefig(target, format="png", dpi=110))


def write_picture(name: str, figure: document.Figure, on: Setting) -> None:
    """Write a figure of a page beside its table."""
    path = on.options.results / f"{name}-{on.name}.png"
    write_atomic(path, lambda target: target.write_bytes(base64.b64decode(figure.png)))


def describe(on: Setting, real: str = "") -> str:
    """What the columns mean, and from how much; `real` says which real images, if not how many."""
    before = f", after {on.pretraining} that the base took" if on.pretraining else ""
    unseen = "images that were not trained on"
    if on.unseen is on.task:
        unseen = "the task's own images, which were trained on"
    seen = ""
    if on.reference is on.task:
        seen = ", which were trained on"
    elif on.reference is not on.unseen:
        seen = ", most of which were trained on"
    return (
        "Trained, live and stored are shares of the base model's parameters, MACs those of one "
        f"call. `batches` are optimiser batches of {on.batch} images, summed over experts and "
        f"stages{before}; `images` counts all that passed "
        "through a denoiser, those for scores and for a teacher's images as well, and `seconds` "
        "all stages, also where rows shared them. "
        f"`loss` is the denoising loss on {unseen}, in the mean over all timesteps. "
        f"Distances compare {on.samples} images ({on.sampling.scheduler}, {on.sampling.steps} "
        f"steps) with {real or len(on.reference)} real ones{seen}; they are not FID or KID. "
        "Latency is the time of a denoiser call at batch 4 beside the base's, in pairs. Losses and "
        f"distances are means over the seeds {', '.join(map(str, on.seeds))} with their standard "
        "deviation, other columns medians; differences are paired by seed, with a 95 % confidence "
        "interval."
    )


def command(name: str, on: Setting) -> str:
    """The command that makes a table, without this machine's folders."""
    words = [f"python -m benchmarks.{name} --on {on.name}"]
    words += ["--data FOLDER"] if on.name == "cifar" else []
    if on.name == "own":
        words += [f"--model FOLDER --images FOLDER --extractor {on.extractor}"]
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
