"""The conformance kit: the promises of every role, executable. Needs no test framework.

Call `check_strategy("scorers", Mine())` from a test of your own, or the check of one role. A
check builds its own tiny models and data, and raises `ConformanceError` with the promise that
was broken and what was found.
"""

from moediff.testing.anatomies import check_anatomy
from moediff.testing.building import check_counter, check_pruner
from moediff.testing.checks import CHECKS, check_strategy
from moediff.testing.planning import check_clusterer, check_gate, check_scorer
from moediff.testing.promises import ConformanceError, check_value, untouched
from moediff.testing.reporting import check_report
from moediff.testing.tiny import tiny_run, tiny_subject, tiny_task, tiny_unet
from moediff.testing.training import check_expert_tuner, check_metric, check_mixture_tuner

__all__ = [
    "CHECKS",
    "ConformanceError",
    "check_anatomy",
    "check_clusterer",
    "check_counter",
    "check_expert_tuner",
    "check_gate",
    "check_metric",
    "check_mixture_tuner",
    "check_pruner",
    "check_report",
    "check_scorer",
    "check_strategy",
    "check_value",
    "tiny_run",
    "tiny_subject",
    "tiny_task",
    "tiny_unet",
    "untouched",
]
