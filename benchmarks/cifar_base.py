"""How good the colour base is: its distance to images that it has not seen, beside the floor.

The floor is the distance of as many training images to the same test images: a model that knows
nothing but the training images cannot be expected to be nearer.

    python -m benchmarks.cifar_base --on cifar --data FOLDER
"""

from __future__ import annotations

import json
import statistics

import attrs
import torch

from benchmarks.cifar import ASSETS, CLASSES
from benchmarks.rows import Figures, Row, collect, metric_run
from benchmarks.settings import Setting, load, parse_args
from benchmarks.tables import command, summarise, write_table
from moediff.storage import write_json
from moediff_plugins.metrics.extractors import figure_name, load_extractor
from moediff_plugins.metrics.features import Features
from moediff_plugins.metrics.frechet import Frechet, frechet_distance

FLOOR = "training images"


def generated(on: Setting, guidance: float) -> Row:
    """The distance of the base's images, as many of each class."""
    guided = attrs.evolve(on, sampling=attrs.evolve(on.sampling, guidance=guidance))

    def row(seed: int) -> dict[str, float]:
        metric = Frechet(on.extractor, on.samples, data=str(on.options.data))
        run = metric_run(guided, seed)
        figure = metric.measure(on.subject.denoiser, on.subject, on.reference, run)
        return {figure.name: figure.value}

    return Row(row, (guidance,))


def training_images(on: Setting) -> Row:
    """The distance of training images, drawn anew for every seed."""

    def row(seed: int) -> dict[str, float]:
        order = torch.randperm(len(on.task), generator=torch.Generator().manual_seed(seed))
        drawn = _features(on, on.task.samples[order[: on.samples]])
        value = frechet_distance(drawn, _features(on, on.reference.samples))
        return {figure_name("FD", on.extractor): value}

    return Row(row)


def _features(on: Setting, images: torch.Tensor) -> Features:
    network = load_extractor(on.extractor, str(on.options.data)).to(on.subject.device)
    with torch.inference_mode():
        parts = [network(part.to(on.subject.device)).cpu() for part in images.split(100)]
    features: Features = torch.cat(parts).double().numpy()
    return features


def main() -> None:
    """Make the table."""
    options = parse_args(__doc__.splitlines()[0], bases=("cifar",))
    on = load(options, "cifar_base", range(len(CLASSES)))
    on = attrs.evolve(on, samples=2 * on.samples)
    rows = {f"base, guidance {value:g}": generated(on, value) for value in (1.0, 2.0)}
    figures = collect(rows | {FLOOR: training_images(on)}, on)
    about = (
        f"{on.samples} images of all classes ({on.sampling.scheduler}, {on.sampling.steps} steps) "
        f"are compared with {len(on.reference)} test images; the distance is not FID. Means over "
        f"the seeds {', '.join(map(str, on.seeds))} with their standard deviation."
    )
    lines = summarise(figures, FLOOR)
    write_table("cifar_base", "The colour base of the benchmarks", about, lines, on)
    if not options.quick:
        write_card(figures, on)


def write_card(figures: Figures, on: Setting) -> None:
    """Enter the distances into the base's card."""
    path = ASSETS / "card.json"
    card = json.loads(path.read_text(encoding="utf-8"))
    name = figure_name("FD", on.extractor)
    card["distance"] = {
        "metric": f"{name}, not FID",
        "samples": on.samples,
        "sampler": f"{on.sampling.scheduler}, {on.sampling.steps} steps",
        "compared_with": f"{len(on.reference):,} test images",
        **{
            row: round(statistics.mean(one[name] for one in found))
            for row, found in figures.items()
        },
        "seeds": len(on.seeds),
        "command": command("cifar_base", on),
    }
    write_json(path, card)


if __name__ == "__main__":
    main()
