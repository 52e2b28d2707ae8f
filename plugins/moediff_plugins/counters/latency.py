"""Time a call, and every layer by itself, on the user's device (DiffPruning Sec. 3.5: T_d)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import attrs
import torch
from attrs.validators import ge, instance_of, optional
from huggingface_hub import cached_assets_path
from torch import nn

from moediff.anatomy import Layer
from moediff.cost import Cost, CostModel
from moediff.errors import ArtefactError
from moediff.plan import Blueprint
from moediff.storage import fingerprint, settings, write_json
from moediff.subject import Subject
from moediff.surgery import cut_layer
from moediff_plugins.counters.timing import batch_of, captured, device_name, fastest, shared_copy

Table = dict[str, Any]

TABLES: dict[str, Table] = {}
"""What this process has measured or read, by what it depends on: prices must not change between
the gate that spends a budget and the engine that checks it."""


@attrs.frozen
class Latency:
    """Time one call on the denoiser's own device, in milliseconds, and what each layer adds to it.

    The table is measured once: every layer by itself, on the inputs that it gets in a call; then
    really cut to half of each width and to one unit, and dropped. A unit's price is the slope of
    the straight line through the whole layer's time that fits those cuts best. All variants are
    timed in turns and the fastest of all rounds counts, because other work can only add to a time.

    What no straight line can say: kernels prefer some widths over others (`Structural.round_to`
    keeps to them), very narrow layers cost what it takes to start them, and cache effects reach
    across layers. Layers that are faster alone than the call as a whole leave the rest "outside";
    if they are slower, they are scaled to add up to the call. So a prediction is worth a check:
    `prediction.predicted_and_measured` puts it beside a measurement.

    A table is measured once for a device, a number of threads, a model and a batch size, and kept
    where Hugging Face's libraries keep such files (`HF_ASSETS_CACHE`). Delete it after the machine
    has changed.

    Attributes:
        batch: B, rows of a call; the metric `latency` has the same default.
        rounds: how often every variant is timed.
        folder: where tables are kept instead, one JSON file each.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"prices"})

    batch: int = attrs.field(default=4, validator=[instance_of(int), ge(1)])
    rounds: int = attrs.field(default=9, validator=[instance_of(int), ge(3)])
    folder: str | None = attrs.field(default=None, validator=optional(instance_of(str)))

    def count(self, denoiser: nn.Module, shape: Sequence[int] | None = None) -> Cost:
        """The least milliseconds of a call on a batch of B samples.

        Raises:
            CountError: the denoiser holds no weights ("meta"), or its inputs are not known.
        """
        model, inputs = batch_of(denoiser, shape, self.batch)
        device = inputs["sample"].device
        return Cost(fastest([lambda: model(**inputs)], device, self.rounds)[0], "ms")

    def price(self, subject: Subject) -> CostModel:
        table = self._table(subject)
        anatomy = subject.anatomy
        units = torch.zeros(len(anatomy.units), dtype=torch.float64)
        for name, span in anatomy.spans.items():
            units[span] = table["widths"][name]
        fixed, bypass = (
            torch.tensor([table[part][layer.name] for layer in anatomy.layers], dtype=torch.float64)
            for part in ("fixed", "bypass")
        )
        return CostModel(anatomy, subject.scheduler, "ms", table["outside"], fixed, bypass, units)

    def _table(self, subject: Subject) -> Table:
        device = device_name(subject.device)
        shapes = {k: (v.dtype, tuple(v.shape)) for k, v in subject.denoiser.state_dict().items()}
        config = settings(getattr(subject.denoiser, "config", {}))
        key = fingerprint(
            version("moediff"), device, torch.__version__, torch.get_num_threads(), self.batch,
            self.rounds, shapes, config, subject.anatomy,
        )[:16]  # fmt: skip
        slug = "".join(c if c.isalnum() else "-" for c in device)
        folder = self.folder or cached_assets_path("moediff", "latency")
        path = Path(folder, f"{slug}-{key}.json")
        if path.exists():
            try:
                TABLES[key] = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ArtefactError(
                    f"{path}: cannot be read ({error}). Delete it, and it is measured again."
                ) from error
        elif key not in TABLES:
            TABLES[key] = {"device": device, **self._measure(subject)}
        if not path.exists():
            write_json(path, TABLES[key])
        return TABLES[key]

    def _measure(self, subject: Subject) -> Table:
        model, inputs = batch_of(subject.denoiser, None, self.batch)
        anatomy = subject.anatomy
        layers = {layer.name: layer for layer in anatomy.layers}
        seen = captured(model, [p for layer in anatomy.layers for p in layer.modules], inputs)

        def small(layer: Layer, blueprint: Blueprint) -> Callable[[], Any]:
            net = shared_copy(model)
            cut_layer(net, layer, blueprint)
            parts = [(net.get_submodule(path), *seen[path]) for path in layer.modules]
            return lambda: [part(*args, **kwargs) for part, args, kwargs in parts]

        variants: dict[tuple[str, str, int], Callable[[], Any]] = {}
        for name, layer in layers.items():
            variants[name, "whole", 0] = small(layer, Blueprint())
            for width in layer.widths:
                for left in sorted({1, width.count // 2} - {0, width.count}):
                    cut = Blueprint((), {width.name: range(left)})
                    variants[name, width.name, left] = small(layer, cut)
            if layer.droppable:
                variants[name, "dropped", 0] = small(layer, Blueprint((name,)))
        total, *found = fastest(
            [lambda: model(**inputs), *variants.values()], subject.device, self.rounds
        )
        times = dict(zip(variants, found, strict=True))
        scale = min(1.0, total / sum(times[name, "whole", 0] for name in layers))
        table: Table = {"batch": self.batch, "unit": "ms", "total": total}
        table |= {"outside": 0.0, "fixed": {}, "bypass": {}, "widths": {}}
        for name, layer in layers.items():
            whole = times[name, "whole", 0]
            slopes = {w.name: _slope(times, name, w.name, w.count) for w in layer.widths}
            carried = sum(slopes[w.name] * w.count for w in layer.widths)
            share = min(1.0, whole / carried) if carried else 1.0  # nothing costs less than nothing
            table["widths"] |= {w: slope * share * scale for w, slope in slopes.items()}
            table["fixed"][name] = (whole - carried * share) * scale
            # A bypass that seems dearer than its layer is noise.
            table["bypass"][name] = min(times.get((name, "dropped", 0), 0.0), whole) * scale
        table["outside"] = total - scale * sum(times[name, "whole", 0] for name in layers)
        return table


def _slope(times: dict[tuple[str, str, int], float], layer: str, width: str, count: int) -> float:
    """Milliseconds per unit: least squares for a line through the whole layer's time; not negative.

    Widths of one unit have none, their layer is all or nothing.
    """
    whole = times[layer, "whole", 0]
    fewer = {count - left: whole - t for (_, w, left), t in times.items() if w == width}
    squares = sum(n * n for n in fewer)
    return max(0.0, sum(n * saved for n, saved in fewer.items()) / squares) if fewer else 0.0
