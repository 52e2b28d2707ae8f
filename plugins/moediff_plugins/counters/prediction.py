"""What a budget's prices say of a finished mixture, beside what a metric measures of it."""

from __future__ import annotations

import torch

from moediff.cost import CostModel
from moediff.mixture import ExpertMixture
from moediff.roles import Measurement, Metric
from moediff.subject import Subject
from moediff.task import Task
from moediff.workdir import Run


def predicted_and_measured(
    mixture: ExpertMixture,
    prices: CostModel,
    metric: Metric,
    subject: Subject,
    task: Task,
    run: Run,
) -> tuple[float, Measurement]:
    """The mean cost of a call as a share of the base's, and the metric's figure.

    Both weigh experts by the calls of the run's sampling. The records `predicted` and `measured`
    () hold the two.

    Args:
        mixture: finished.
        prices: for example `Latency().price(subject)`.
        metric: measures a ratio to the base, for example the metric `latency`, at the same batch.
        subject: the base model.
        task: for the metric.
        run: whose sampling counts.
    """
    predicted = mixture.plan.cost(prices, run.sampling)["live"] / prices.full
    measured = metric.measure(mixture, subject, task, run)
    run.record("predicted", torch.tensor(predicted))
    run.record("measured", torch.tensor(measured.value))
    return predicted, measured
