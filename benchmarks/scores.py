"""MoEDM's Table 4 and Figure 6: zero the channels that a score calls unimportant, do not train.

Channels are closed in the order of their scores until 5, 10 or 20 % of the model's parameters are
gone, as in the paper, so a score may close many cheap channels or few dear ones. The better the
score, the less the images suffer.

    python -m benchmarks.scores --on digits
"""

from __future__ import annotations

import copy
import statistics
from typing import Any

import attrs
import torch
from matplotlib.figure import Figure
from torch import nn

from benchmarks.rows import Figures, Row, collect, image_metrics, metric_run
from benchmarks.settings import Setting, load, parse_args
from benchmarks.tables import summarise, write_plot, write_table
from moediff import Anatomy, Run, Sampling, Subject
from moediff.cost import CostModel
from moediff_plugins.counters.params import Params
from moediff_plugins.scorers.ablation_l1 import AblationL1
from moediff_plugins.scorers.ablation_l1_sketch import AblationL1Sketch
from moediff_plugins.scorers.diff_pruning import DiffPruning
from moediff_plugins.scorers.gradient import Gradient
from moediff_plugins.scorers.magnitude import Magnitude
from moediff_plugins.scorers.random import Random
from moediff_plugins.scorers.taylor import Taylor

SHARES = (0.05, 0.1, 0.2)
LAYER = "layer "
"""Begins the name of a figure that says which share of what was removed is one layer's."""


def by_channel(subject: Subject) -> Subject:
    """The same model with every inner channel a unit, and no layer one: what Eq. 1 scores."""
    layers = tuple(
        attrs.evolve(
            layer,
            droppable=False,
            widths=tuple(
                attrs.evolve(width, count=width.count * width.size, size=1)
                for width in layer.widths
            ),
        )
        for layer in subject.anatomy.layers
    )
    return attrs.evolve(subject, anatomy=Anatomy(layers))


def scorers(on: Setting) -> dict[str, Any]:
    """Every scorer, by its name."""
    return {
        "ablation-l1": AblationL1(images=on.noises),
        "ablation-l1-sketch": AblationL1Sketch(images=2 * on.noises),
        "taylor": Taylor(),
        "diff-pruning": DiffPruning(stride=on.stride),
        "gradient": Gradient(),
        "magnitude": Magnitude(),
        "random": Random(),
    }


def zeroed(subject: Subject, masks: torch.Tensor) -> nn.Module:
    """A copy of the denoiser with the weights set to zero that read a closed channel."""
    denoiser = copy.deepcopy(subject.denoiser)
    for name, width in subject.anatomy.widths.items():
        for place in width.slices:
            if place.side == "in":
                weight = denoiser.get_submodule(place.module).weight  # (out, in, ...)
                mask = masks[subject.anatomy.spans[name]].repeat(place.blocks).to(weight)
                weight.data.mul_(mask.view(-1, *[1] * (weight.ndim - 2)))
    return denoiser


@attrs.frozen(eq=False)
class Channels:
    """The base model channel by channel, with what each of its M channels weighs."""

    on: Setting
    subject: Subject
    prices: CostModel
    known: dict[tuple[str, int], tuple[torch.Tensor, int]] = attrs.field(factory=dict)

    @classmethod
    def of(cls, on: Setting) -> Channels:
        """Take the base model of a setting apart."""
        subject = by_channel(on.subject)
        return cls(on, subject, Params().price(subject))

    @property
    def middle(self) -> set[str]:
        """The mid-layers: those with the most channels."""
        most = max(layer.channels for layer in self.subject.anatomy.layers)
        return {layer.name for layer in self.subject.anatomy.layers if layer.channels == most}

    def by_layer(self, amounts: torch.Tensor) -> dict[str, float]:
        """Sums over each layer of amounts (M,)."""
        spans = self.subject.anatomy.spans
        return {
            layer.name: sum(float(amounts[spans[width.name]].sum()) for width in layer.widths)
            for layer in self.subject.anatomy.layers
        }

    def scores(self, name: str, seed: int) -> tuple[torch.Tensor, int]:
        """A scorer's scores (M,), and how many images it passed through the denoiser for them."""
        if (name, seed) not in self.known:
            sampling = Sampling("ddim", min(self.on.sampling.steps, 10), seed=seed)
            run = Run(sampling=sampling, seed=seed, cache=self.on.cache, verbose=True)
            scorer = scorers(self.on)[name]
            values = run.stage(
                "scores",
                (self.subject.denoiser, sampling, self.on.task, scorer),
                lambda: scorer.score(self.subject, self.on.task, run).values,
                pack=lambda result: ({"values": result}, None),
                unpack=lambda tensors, _: tensors["values"],
            )
            self.known[name, seed] = values, run.ledger["scores"].samples
        return self.known[name, seed]

    def closed(self, name: str, share: float) -> Row:
        """The row of a scorer: the lowest-scored channels closed, up to a share of all weights."""
        return Row(
            lambda seed: self._figures(*self.scores(name, seed), share, seed),
            (scorers(self.on)[name], share),
        )

    def intact(self) -> Row:
        """The row of the whole model."""
        nothing = torch.zeros(len(self.prices.units))
        return Row(lambda seed: self._figures(nothing, 0, 0.0, seed))

    def _figures(
        self, scores: torch.Tensor, images: int, share: float, seed: int
    ) -> dict[str, float]:
        order = scores.argsort()
        fits = self.prices.units[order].cumsum(0) <= share * self.prices.full
        masks = torch.ones(len(scores))
        masks[order[fits]] = 0
        removed = self.by_layer(self.prices.units * (1 - masks))
        whole = sum(removed.values())
        found = {
            "removed": whole / self.prices.full,
            "mid-layers": sum(removed[name] for name in self.middle) / max(whole, 1),
            "images": float(images),
        }
        model, run = zeroed(self.subject, masks), metric_run(self.on, seed)
        for metric in image_metrics(self.on):
            figure = metric.measure(model, self.on.subject, self.on.reference, run)
            found[figure.name] = figure.value
        return found | {LAYER + name: value / max(whole, 1) for name, value in removed.items()}


def histogram(channels: Channels, figures: Figures) -> Figure:
    """Figure 6: where the removed parameters lie, layer by layer, at the middle share."""
    names = list(scorers(channels.on))
    figure = Figure(figsize=(11, 1.6 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), 1, sharex=True, sharey=True)
    layers = [layer.name for layer in channels.subject.anatomy.layers]
    colours = ["C0" if layer in channels.middle else "C7" for layer in layers]
    for axis, name in zip(axes, names, strict=True):
        found = figures[f"{name}, {SHARES[1]:.0%}"]
        heights = [statistics.mean(one[LAYER + layer] for one in found) for layer in layers]
        axis.bar(layers, heights, color=colours)
        axis.set_title(name, fontsize="medium", loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].tick_params(axis="x", rotation=90)
    figure.supylabel(f"share of the removed parameters ({SHARES[1]:.0%} of all); blue: mid-layers")
    return figure


def main() -> None:
    """Make the table and the figure."""
    options = parse_args(__doc__.splitlines()[0])
    on = load(options, "scores")
    channels = Channels.of(on)
    rows = {"full model": channels.intact()}
    for share in SHARES:
        rows |= {f"{name}, {share:.0%}": channels.closed(name, share) for name in scorers(on)}
    figures = collect(rows, on)
    shown = {
        name: [{k: v for k, v in one.items() if not k.startswith(LAYER)} for one in found]
        for name, found in figures.items()
    }
    held = channels.by_layer(channels.prices.units)
    share = sum(held[name] for name in channels.middle) / sum(held.values())
    about = (
        f"Channels of the {on.name} base model are zeroed in the order of their scores, the lowest "
        "first, without any training. `removed` is their share of all parameters, `mid-layers` the "
        "share of what was removed that lay in the layers with the most channels; those hold "
        f"{share:.0%} of what channels hold. `images` counts those that the scorer passed through "
        "the denoiser; where it takes gradients (`ablation-l1-sketch`, `taylor`, `diff-pruning`, "
        "`gradient`) each of them also goes back, at two to three times the cost of the way there. "
        f"Distances compare {on.samples} images "
        f"({on.sampling.scheduler}, {on.sampling.steps} steps) with {len(on.reference)} real ones; "
        f"they are not FID or KID. Means over the seeds {', '.join(map(str, on.seeds))} with their "
        "standard deviation; differences are paired by seed, with a 95 % confidence interval."
    )
    title = "Zeroing channels by each score (MoEDM Table 4)"
    write_table("scores", title, about, summarise(shown, "full model"), on)
    write_plot("scores", histogram(channels, figures), on)


if __name__ == "__main__":
    main()
