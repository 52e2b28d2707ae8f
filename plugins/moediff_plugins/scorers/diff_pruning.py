"""Score units by Taylor terms of the timesteps whose loss is large (SP: Fang et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from attrs.validators import ge, instance_of, lt
from torch import nn

from moediff.anatomy import Layer, Slice, Width
from moediff.space import Scores
from moediff.subject import Subject
from moediff.task import Task
from moediff.workdir import Run
from moediff_plugins.scorers.losses import trained_weights, weight_slopes
from moediff_plugins.scorers.weights import weighted_modules


@attrs.frozen
class DiffPruning:
    """Score by sum_k |w_k sum_t dL_t/dw_k|, over the t with L_t / L_max > `threshold`.

    This is "SP", Structural Pruning for Diffusion Models (Fang et al., 2023), to which the paper
    DiffPruning compares in Table 1. The timesteps are walked from the interval's first one
    up, with the same images and the same noise at each. L_t is their denoising loss, L_max the
    largest so far; the walk ends at the first timestep that is not above the share of it, and
    that one does not count. The published script for DDPMs has its gradient in the sum, and every
    choice of scorer but one there ignores the threshold.

    The weights k of a width's unit are the rows that produce it and the columns that read it, of
    convolutions and linear modules; those of a layer are all that go with it. Biases and
    normalisation do not count. A score is to first order the most that the summed loss can change,
    so scores compare across layers, but a layer, with all its weights, is dear. The records
    `losses` and `timesteps` (K,) hold the walk, with the timestep that ended it.

    Attributes:
        threshold: the share of the largest loss under which timesteps say nothing; 0 is none.
        samples: how many images.
        batch: B, images per pass.
        stride: walk to every timestep, as in the paper, or to every `stride`-th.
        redraw: draw new images and noise at every timestep, which averages their chance away.
        by_interval: score every expert on its own interval instead of all on [0, T).
        save_every: timesteps between two checkpoints.
    """

    threshold: float = attrs.field(default=0.05, converter=float, validator=[ge(0), lt(1)])
    samples: int = attrs.field(default=64, validator=[instance_of(int), ge(1)])
    batch: int = attrs.field(default=64, validator=[instance_of(int), ge(1)])
    stride: int = attrs.field(default=1, validator=[instance_of(int), ge(1)])
    redraw: bool = attrs.field(default=False, validator=instance_of(bool))
    by_interval: bool = attrs.field(default=False, validator=instance_of(bool))
    save_every: int = attrs.field(default=50, validator=[instance_of(int), ge(1)])

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"intervals"} if self.by_interval else ())

    def score(self, expert: Subject, task: Task, run: Run) -> Scores:
        weights = trained_weights(expert)
        sums, losses = [torch.zeros_like(weight) for weight in weights], list[float]()
        checkpoint = run.checkpoint("walk")
        if found := checkpoint.load():
            sums = [found[0][str(i)].to(like) for i, like in enumerate(weights)]
            losses = found[1]["losses"]
            run.spend(samples=self.samples * len(losses))
        timesteps = range(*expert.interval, self.stride)
        for t in run.progress(timesteps[len(losses) :], "diff-pruning"):
            loss, slopes = self._slopes(expert, weights, t, task, run)
            losses.append(loss)
            if loss <= self.threshold * max(losses):  # {t : L_t / L_max > T}
                break
            for total, slope in zip(sums, slopes, strict=True):
                total += slope
            if len(losses) % self.save_every == 0:
                tensors = {str(i): total for i, total in enumerate(sums)}
                checkpoint.save(tensors, {"losses": losses})
        walked = timesteps[: len(losses)]
        run.say(f"diff-pruning: walked {len(walked)} timesteps, to t = {walked[-1]}")
        run.record("losses", torch.tensor(losses))
        run.record("timesteps", torch.tensor(walked))
        terms = {id(w): (w.detach() * s).abs() for w, s in zip(weights, sums, strict=True)}
        return Scores(_sums(expert, terms))

    def _slopes(
        self, expert: Subject, weights: Sequence[torch.Tensor], t: int, task: Task, run: Run
    ) -> tuple[float, list[torch.Tensor]]:
        """L_t and its gradient on every weight."""

        def generator(start: int) -> torch.Generator:
            return run.generator(f"batch-{start}-{t}" if self.redraw else f"batch-{start}")

        at = attrs.evolve(expert, interval=(t, t + 1))
        return weight_slopes(at, weights, task, self.samples, self.batch, generator, run)


def _sums(expert: Subject, terms: dict[int, torch.Tensor]) -> torch.Tensor:
    """The scores (U,) in float64: sums of terms, each tensor shaped as the weight of that id."""
    anatomy, denoiser = expert.anatomy, expert.denoiser
    values = torch.zeros(len(anatomy.units), dtype=torch.float64)
    for layer in anatomy.layers:
        for width in layer.widths:
            for place in width.slices:
                module = denoiser.get_submodule(place.module)
                if isinstance(module, (nn.Conv2d, nn.Linear)) and id(module.weight) in terms:
                    found = _by_unit(terms[id(module.weight)], width, place)
                    values[anatomy.spans[width.name]] += found.cpu().double()
        if layer.droppable:
            own = [terms[i] for i in _weights(denoiser, layer) if i in terms]
            values[anatomy.layer_units[layer.name]] = sum(term.sum().item() for term in own)
    return values


def _by_unit(term: torch.Tensor, width: Width, place: Slice) -> torch.Tensor:
    """Sums (count,) over each unit's rows or columns of one weight."""
    rows = term if place.side == "out" else term.transpose(0, 1)
    return rows.reshape(place.blocks, width.count, -1).sum((0, 2))


def _weights(denoiser: nn.Module, layer: Layer) -> list[int]:
    """Ids of the weights that go when a layer is dropped; a shortcut in its place stays."""
    stays = denoiser.get_submodule(layer.shortcut) if layer.shortcut else None
    return [id(m.weight) for m in weighted_modules(denoiser, layer) if m is not stays]
