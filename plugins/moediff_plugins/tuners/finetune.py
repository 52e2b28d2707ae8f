"""Fine-tune every expert on its own interval (DiffPruning Sec. 3.6, with the loss of Eq. 5)."""

from __future__ import annotations

import attrs

from moediff.mixture import ExpertMixture
from moediff.subject import Subject
from moediff.task import Task
from moediff.workdir import Run
from moediff_plugins.tuners.training import trainable
from moediff_plugins.tuners.turns import TurnSettings, train_in_turns


@attrs.frozen
class Finetune(TurnSettings):
    """Untie the mixture and train it with the denoising loss, the experts in turns.

    What the experts share learns from every interval, and a copy from its own timesteps alone.
    The settings are those of `turns.TurnSettings`, the records those of `turns.train_in_turns`.
    """

    def recover(
        self, mixture: ExpertMixture, task: Task, teacher: Subject, run: Run
    ) -> ExpertMixture:
        mixture.untie()
        train_in_turns(self, "finetune", mixture, trainable(mixture), task, teacher, run)
        return mixture
