"""How gates train what they learn with: plain AdamW; what the papers do not mention is off."""

from __future__ import annotations

import attrs


@attrs.frozen
class Plain:
    """The settings that `training.train` reads: no schedule, warm-up, clipping or average."""

    learning_rate: float
    weight_decay: float
    save_every: int
    schedule: str = "constant"
    warmup: float = 0.0
    clip: float = float("inf")
    ema: float = 0.0
