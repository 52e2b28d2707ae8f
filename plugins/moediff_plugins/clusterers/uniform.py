"""Split the timesteps evenly (MoEDM)."""

from __future__ import annotations

import attrs

from moediff.subject import Subject
from moediff.task import Task
from moediff.timesteps import Intervals
from moediff.workdir import Run


@attrs.frozen
class Uniform:
    """Split [0, T) into intervals of equal length, up to one timestep (MoEDM, Sec. 3.2)."""

    def cluster(self, subject: Subject, task: Task, run: Run) -> Intervals:
        return Intervals.uniform(subject.total, run.experts)
