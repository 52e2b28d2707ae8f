"""Score units at random: what any other scorer has to beat."""

from __future__ import annotations

import attrs
import torch

from moediff.space import Scores
from moediff.subject import Subject
from moediff.task import Task
from moediff.workdir import Run


@attrs.frozen
class Random:
    """Score by uniform random numbers from the run's seed, the floor of any comparison."""

    def score(self, expert: Subject, task: Task, run: Run) -> Scores:
        values = torch.rand(
            len(expert.anatomy.units), generator=run.generator("random"), dtype=torch.float64
        )
        return Scores(values, comparable=True)
