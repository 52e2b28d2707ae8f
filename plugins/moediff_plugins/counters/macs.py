"""Count multiply-adds on `meta`, DiffPruning's budget, and refuse what has no rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import attrs
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from moediff.cost import Cost, CostModel, cost_model
from moediff.errors import CountError
from moediff.subject import Subject
from moediff_plugins.counters.inputs import example, shares, twin

FREE = frozenset(
    f"aten.{name}"
    for name in (
        # normalisation, softmax, and the sums and means that they are made of
        *("_fused_rms_norm", "_native_batch_norm_legit_no_training", "native_batch_norm"),
        *("native_group_norm", "native_layer_norm", "_safe_softmax", "_softmax", "_log_softmax"),
        *("amax", "amin", "max", "mean", "min", "std", "sum", "var", "var_mean"),
        # copies, joins, padding, look-ups
        *("_to_copy", "_unsafe_index", "_unsafe_view", "cat", "clone", "constant_pad_nd", "copy_"),
        *("embedding", "flip", "gather", "index", "index_select", "lift_fresh", "repeat", "roll"),
        *("reflection_pad1d", "reflection_pad2d", "replication_pad2d", "stack"),
        # new tensors
        *("arange", "empty", "empty_like", "empty_strided", "fill_", "full", "full_like"),
        *("linspace", "new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros"),
        *("ones", "ones_like", "scalar_tensor", "zero_", "zeros", "zeros_like"),
        # resampling without weights
        *("_adaptive_avg_pool2d", "_upsample_nearest_exact2d", "avg_pool2d"),
        *("max_pool2d_with_indices", "upsample_nearest2d"),
    )
)
"""Operators that are neither views nor pointwise and still have no multiply-adds to count."""


@attrs.frozen
class MACs:
    """Count the multiply-adds of one forward pass at batch 1 (DiffPruning, Sec. 4 and Suppl. 3.3).

    The matrix products inside attention count; the supplement names papers that left them out.
    The denoiser is neither run nor allocated: a twin of it runs on `meta`.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"prices"})

    def count(self, denoiser: nn.Module, shape: Sequence[int] | None = None) -> Cost:
        """Multiply-adds by operator ("aten.convolution") and by module.

        Raises:
            CountError: an operator has no rule, or the model's inputs are not known.
        """
        return tally(twin(denoiser, "meta"), example(denoiser, shape, "meta"))

    def price(self, subject: Subject) -> CostModel:
        cost = self.count(subject.denoiser)
        widths = shares(subject.anatomy, cost.by_module)
        return cost_model(subject, cost.unit, cost.value, cost.by_module, widths)


def tally(denoiser: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Cost:
    """Run a denoiser on the device that it is on and count the multiply-adds of every module.

    Args:
        denoiser: in eval mode.
        inputs: what to call it with: `sample` (B, C, H, W), `timestep` and keyword tensors.
    """
    rest = {name: value for name, value in inputs.items() if name not in ("sample", "timestep")}
    mode = _Multiplications()
    handles = []
    for path, module in denoiser.named_modules():
        enter, leave = mode.around(path)
        handles.append(module.register_forward_pre_hook(enter, prepend=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        with torch.no_grad(), mode:
            denoiser(inputs["sample"], inputs["timestep"], **rest)
    finally:
        for handle in handles:
            handle.remove()
    # torch counts a multiplication and an addition, we count the two as one.
    operators = {name: flops / 2 for name, flops in mode.operators.items()}
    modules = {path: flops / 2 for path, flops in mode.modules.items()}
    return Cost(sum(operators.values()), "MACs", operators, modules)


class _Multiplications(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up torch's flop formulas per operator and per module, and fails closed."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: Counter[str] = Counter()
        self.modules: Counter[str] = Counter()
        self.entered: list[str] = []

    def around(self, path: str) -> tuple[Any, Any]:
        """Hooks that say when a module's own forward begins and ends."""

        def enter(module: nn.Module, args: Any) -> None:
            self.entered.append(path)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self.entered.pop()

        return enter, leave

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = getattr(func, "_overloadpacket", func)
        if packet not in flop_registry:
            if _free(func, str(packet)):
                return func(*args, **kwargs)
            if hasattr(func, "decompose"):
                with self:
                    output = func.decompose(*args, **kwargs)
                if output is not NotImplemented:
                    return output
            raise CountError(
                f"{packet}: no rule for this operator, used by module "
                f"{'.'.join(self.entered[-1:]) or '(the root)'}. Give it one with "
                "torch.utils.flop_counter.register_flop_formula (2 flops are 1 MAC; 0 if it "
                "is free), or count with another counter."
            )
        output = func(*args, **kwargs)
        flops = flop_registry[packet](*args, **kwargs, out_val=output)
        if flops:
            self.operators[str(packet)] += flops
            self.modules[self.entered[-1] if self.entered else ""] += flops
        return output


def _free(func: Any, name: str) -> bool:
    pointwise = torch.Tag.pointwise in getattr(func, "tags", ())
    return pointwise or getattr(func, "is_view", False) or name in FREE
