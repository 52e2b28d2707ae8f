"""Fine-tune the biases alone (BitFit; Zaken et al., 2021), a baseline of MoEDM's Table 1."""

from __future__ import annotations

import attrs
from attrs.validators import gt

from moediff.errors import OptionError
from moediff.mixture import ExpertMixture
from moediff.subject import Subject
from moediff.task import Task
from moediff.workdir import Run
from moediff_plugins.tuners.training import trainable
from moediff_plugins.tuners.turns import TurnSettings, train_in_turns


@attrs.frozen
class BitFit(TurnSettings):
    """Untie the mixture and train every bias with the denoising loss, the experts in turns.

    Biases are those of convolutions, linear modules and normalisations; all else is frozen. So
    few parameters bear, and need, a higher learning rate: ten times the other tuners' by default.
    The settings are those of `turns.TurnSettings`, the records those of `turns.train_in_turns`.
    """

    learning_rate: float = attrs.field(default=1e-3, validator=gt(0), kw_only=True)

    def recover(
        self, mixture: ExpertMixture, task: Task, teacher: Subject, run: Run
    ) -> ExpertMixture:
        mixture.untie()
        ours = {id(parameter) for parameter in trainable(mixture)}
        biases = [
            parameter
            for name, parameter in mixture.named_parameters()
            if name.rpartition(".")[2] == "bias" and id(parameter) in ours
        ]
        if not biases:
            raise OptionError(
                "bitfit: the denoiser has no biases that may be trained. Call "
                "`denoiser.requires_grad_(True)` before the mixture is built, or choose another "
                "tuner."
            )
        train_in_turns(self, "bitfit", mixture, biases, task, teacher, run)
        return mixture
