"""Figures of a run: sample grids, curves, alignment, the experts' shapes."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moediff.anatomy import Anatomy
from moediff.errors import OptionError
from moediff.plan import Plan
from moediff.timesteps import Intervals
from moediff_plugins.reports.document import INSTALL, Figure


def _canvas(width: float, height: float) -> Any:
    """An empty figure, in inches.

    Raises:
        OptionError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise OptionError(f"report: {error}. {INSTALL}") from error
    return Canvas(figsize=(width, height), layout="constrained")


def _axes(width: float, height: float, rows: int = 1) -> tuple[Any, Any]:
    canvas = _canvas(width, height)
    return canvas, canvas.subplots(rows, 1, squeeze=False)[:, 0]


def _png(canvas: Any) -> str:
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=110, bbox_inches="tight")  # long labels, too
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def sample_grid(title: str, note: str, images: Mapping[str, torch.Tensor]) -> Figure:
    """One row per model of images (n, C, H, W) in [-1, 1]; equal columns share their noise."""
    count = max(len(batch) for batch in images.values())
    canvas, axes = _axes(2.6 + 0.42 * count, 0.5 * len(images), len(images))
    for axis, (name, batch) in zip(axes, images.items(), strict=True):
        pixels = (batch.permute(0, 2, 3, 1).clamp(-1, 1) + 1) / 2  # (n, H, W, C)
        padded = torch.nn.functional.pad(pixels, (0, 0, 1, 1), value=1.0)
        strip = torch.cat(list(padded), dim=1)
        axis.imshow(strip.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        axis.set(xticks=[], yticks=[], frame_on=False)
    return Figure(title, note, _png(canvas))


def alignment_plot(
    title: str,
    note: str,
    similarity: torch.Tensor,
    cuts: Sequence[int],
    objective: torch.Tensor | None = None,
    held_out: torch.Tensor | None = None,
    reliability: torch.Tensor | None = None,
    measure: str = "cosine similarity of gradients",
) -> Figure:
    """The similarity matrix (G, G) of a grid on [0, T) with its cut points (DiffPruning Fig. 3).

    Args:
        title: of the figure.
        note: under the title.
        similarity: (G, G).
        cuts: the boundaries 0 to T of the intervals.
        objective: J (G - 1,) by the place of a single cut (Supp. Fig. 2-5), beside the matrix.
        held_out: the fit (N,) of one half of the samples by the other, for 1 to N experts.
        reliability: cosine (G,) of the gradients of two halves of the samples; near 0 the matrix
            is noise.
        measure: what the matrix has.
    """
    total, size = cuts[-1], len(similarity)
    curves = [curve for curve in (objective, held_out, reliability) if curve is not None]
    canvas, axes = _beside(len(curves))
    beside = iter(axes[1:])
    image = axes[0].imshow(
        similarity.numpy(), origin="lower", extent=(0, total, 0, total), vmin=-1, vmax=1,
        cmap="RdBu_r",
    )  # fmt: skip
    for cut in cuts[1:-1]:
        axes[0].axvline(cut, color="black", linestyle="--", linewidth=1)
        axes[0].axhline(cut, color="black", linestyle="--", linewidth=1)
    axes[0].set(xlabel="timestep", ylabel="timestep")
    canvas.colorbar(image, ax=axes[0], label=measure)
    if objective is not None:
        axis = next(beside)
        axis.plot(Intervals.uniform(total, size).cuts[1:-1], objective.numpy())
        axis.set(xlabel="single cut at timestep", ylabel="objective J", xlim=(0, total))
    if held_out is not None:
        axis = next(beside)
        axis.plot(range(1, len(held_out) + 1), held_out.numpy(), marker="o")
        axis.set(xlabel="experts", ylabel="held-out fit")
    if reliability is not None:
        axis = next(beside)
        axis.plot([(k + 0.5) * total / size for k in range(size)], reliability.numpy())
        axis.set(xlabel="timestep", ylabel="halves agree", xlim=(0, total), ylim=(-1.05, 1.05))
    return Figure(title, note, _png(canvas))


def _beside(rows: int) -> tuple[Any, list[Any]]:
    """A canvas with one large panel, and a column of `rows` small ones to its right."""
    canvas = _canvas(10 if rows else 6, 5)
    grid = canvas.add_gridspec(max(rows, 1), 5)
    large = canvas.add_subplot(grid[:, :3] if rows else grid[:, :])
    return canvas, [large, *(canvas.add_subplot(grid[row, 3:]) for row in range(rows))]


def curves_plot(title: str, note: str, curves: Mapping[str, torch.Tensor]) -> Figure:
    """Small panels side by side of curves (steps,), for example of losses."""
    rows = -(-len(curves) // 3)
    canvas = _canvas(10, 2.1 * rows)
    axes = canvas.subplots(rows, 3, squeeze=False).flatten()
    for axis, (name, curve) in zip(axes, curves.items(), strict=False):
        axis.plot(range(1, len(curve) + 1), curve.numpy(), linewidth=0.8)
        axis.set_title(name, fontsize=9, loc="left")
        axis.set_xlabel("step", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(curves) :]:
        axis.set_visible(False)
    return Figure(title, note, _png(canvas))


def plan_plot(title: str, note: str, anatomy: Anatomy, plan: Plan) -> Figure:
    """The share of units that each expert keeps of every width; dropped layers are crosses.

    The legend has each expert's depth: how many of its layers are left.
    """
    names = [width.name for layer in anatomy.layers for width in layer.widths]
    canvas, (axis,) = _axes(max(10, 0.22 * len(names)), 3.4)
    spans = [anatomy.spans[name] for name in names]
    owners = [layer.name for layer in anatomy.layers for _ in layer.widths]
    count = len(plan.blueprints)
    bar = 0.8 / count
    pairs = zip(plan.blueprints, plan.intervals, strict=True)
    for index, (blueprint, (start, stop)) in enumerate(pairs):
        mask = blueprint.mask(anatomy)
        dropped = [owner in blueprint.drop for owner in owners]
        kept = [
            0.0 if gone else float(mask[s].mean()) for s, gone in zip(spans, dropped, strict=True)
        ]
        places = [k + index * bar for k in range(len(names))]
        layers = len(anatomy.layers)
        label = f"expert {index}: [{start}, {stop}), {layers - len(blueprint.drop)}/{layers} layers"
        bars = axis.bar(places, kept, bar, align="edge", label=label)
        crosses = [place + bar / 2 for place, gone in zip(places, dropped, strict=True) if gone]
        color = bars.patches[0].get_facecolor()
        axis.scatter(crosses, [0.03] * len(crosses), marker="x", s=22, color=color)
    axis.set_xticks([k + 0.4 for k in range(len(names))])
    axis.set_xticklabels([_short(name) for name in names], rotation=90, fontsize=7)
    axis.set(ylabel="share kept", ylim=(0, 1.05), xlim=(0, len(names)))
    axis.legend(fontsize=8, loc="lower center", ncols=min(count, 4), bbox_to_anchor=(0.5, 1.0))
    return Figure(title, note, _png(canvas))


def _short(name: str) -> str:
    words = {"_blocks": "", "mid_block": "mid", "resnets": "res", "attentions": "attn"}
    for long, short in words.items():
        name = name.replace(long, short)
    return name
