"""How gates train what they learn with: plain AdamW; what the papers do not mention is off."""

from __future__ import annotations

import math

import attrs

from moediff_plugins.tuners.training import Settings


@attrs.frozen(kw_only=True)
class Plain(Settings):
    """No schedule, warm-up, clipping or moving average."""

    schedule: str = "constant"
    warmup: float = 0.0
    clip: float = math.inf
    ema: float = 0.0
