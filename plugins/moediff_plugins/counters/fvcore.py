"""Count with fvcore on CPU tensors: a second opinion on the `macs` counter."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import attrs
import torch
from torch import nn

from moediff.cost import Cost, CostModel, cost_model
from moediff.errors import CountError
from moediff.subject import Subject
from moediff_plugins.counters.inputs import example, shares, twin

FREE = frozenset(
    f"aten::{name}"
    for name in (
        *("add", "add_", "avg_pool2d", "clone", "cos", "div", "div_", "embedding", "exp"),
        *("feature_dropout", "gelu", "mul", "mul_", "neg", "ones", "ones_like", "pad", "pow"),
        *("rsub", "sigmoid", "silu", "silu_", "sin", "softmax", "sub", "tanh"),
    )
)
"""Operators that fvcore reports as not counted and that hold no multiply-adds."""


@attrs.frozen
class FVCore:
    """Multiply-adds of one forward pass at batch 1 as fvcore counts them, normalisation included.

    fvcore cannot trace on `meta`, so zeros run through a twin on the CPU. It has no rule for
    `scaled_dot_product_attention`; one is given to it. It counts a norm as a few operations per
    element, which `macs` does not: without "group_norm" and "layer_norm" in `by_operator` the two
    agree exactly.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"prices"})

    def count(self, denoiser: nn.Module, shape: Sequence[int] | None = None) -> Cost:
        """Multiply-adds by fvcore's operator names ("conv", "linear") and by module.

        Raises:
            CountError: fvcore has no rule for an operator that is not known to be free.
        """
        inputs = example(denoiser, shape, "cpu")
        model = _Positional(twin(denoiser, "cpu"), tuple(inputs))
        logger = logging.getLogger("fvcore.nn.jit_analysis")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            with warnings.catch_warnings(), torch.no_grad():
                # importing fvcore compiles with torch.jit, and tracing warns of shapes it reads
                warnings.simplefilter("ignore")
                from fvcore.nn import FlopCountAnalysis

                analysis = FlopCountAnalysis(model, tuple(inputs.values()))
                analysis.set_op_handle("aten::scaled_dot_product_attention", _attention)
                # fvcore counts an element of resampling as one operation; it is a copy
                analysis.set_op_handle(
                    "aten::upsample_nearest2d", lambda inputs, outputs: Counter()
                )
                # uncalled modules are ordinary: a bypass has no use for its shortcut
                analysis.uncalled_modules_warnings(False).unsupported_ops_warnings(False)
                operators = {name: float(n) for name, n in analysis.by_operator().items() if n}
                modules = analysis.by_module()
                unsupported = set(analysis.unsupported_ops())
        finally:
            logger.setLevel(level)
        unknown = sorted(unsupported - FREE)
        if unknown:
            raise CountError(
                f"{', '.join(unknown)}: fvcore has no rule. Count with another counter, or give "
                "fvcore one."
            )
        return Cost(sum(operators.values()), "MACs", operators, _own(modules))

    def price(self, subject: Subject) -> CostModel:
        cost = self.count(subject.denoiser)
        widths = shares(subject.anatomy, cost.by_module)
        return cost_model(subject, cost.unit, cost.value, cost.by_module, widths)


class _Positional(nn.Module):
    """fvcore passes arguments by position; denoisers take some by name."""

    def __init__(self, denoiser: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.denoiser, self.names = denoiser, names

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        arguments = dict(zip(self.names, values, strict=True))
        output: torch.Tensor = self.denoiser(**arguments, return_dict=False)[0]
        return output


def _attention(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
    """Query-key and attention-value products; sizes (B, heads, S, D) and (B, heads, L, D)."""
    query, key, value = (item.type().sizes() for item in inputs[:3])
    rows = query[0] * query[1] * query[2] * key[2]
    return Counter({"scaled_dot_product_attention": rows * (query[3] + value[3])})


def _own(modules: Counter[str]) -> dict[str, float]:
    """From the counts of modules with all below them, what each one does by itself."""
    prefix = "denoiser"
    totals = {
        name.removeprefix(prefix).lstrip("."): float(value)
        for name, value in modules.items()
        if name.startswith(prefix)
    }
    own = dict(totals)
    for name, value in totals.items():
        if name:
            own[name.rpartition(".")[0]] -= value
    return {name: value for name, value in own.items() if value}
