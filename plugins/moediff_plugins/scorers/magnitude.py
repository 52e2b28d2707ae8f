"""Score units by the norm of the weights that produce them (DiffPruning's elastic order)."""

from __future__ import annotations

import math

import attrs
from attrs.validators import gt, lt

from moediff.space import Scores
from moediff.subject import Subject
from moediff.task import Task
from moediff.workdir import Run
from moediff_plugins.scorers.weights import norm_per_weight


@attrs.frozen
class Magnitude:
    """Score by the L1 norm of the weights (Li et al., 2017; DiffPruning, Sec. 3.4).

    A unit of ResBlock channels has the convolution rows that produce them, an attention head
    the rows of its query, key and value projections, a layer all weights of its convolutions and
    linear modules. A score is the norm per weight, (mean |w|^p)^(1/p); the units of a width have
    equally many weights, so their order is that of the plain norm. Biases and normalisation do
    not count. Scores rank units inside one layer only.

    Attributes:
        p: the norm; 1 in both papers.
    """

    p: float = attrs.field(default=1.0, converter=float, validator=[gt(0), lt(math.inf)])

    def score(self, expert: Subject, task: Task, run: Run) -> Scores:
        return Scores(norm_per_weight(expert, lambda weight: weight, self.p), comparable=False)
