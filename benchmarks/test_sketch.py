"""Sketched ablation scores against the exact ones: the same ranking, how much sooner."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

import moediff
from benchmarks.one_by_one import one_channel_at_a_time
from benchmarks.pairs import paired_ratio
from moediff import Anatomy, Run, Sampling
from moediff_plugins.digits import NULL_LABEL, load_base, load_images
from moediff_plugins.scorers.ablation_l1 import AblationL1
from moediff_plugins.scorers.ablation_l1_sketch import AblationL1Sketch
from moediff_plugins.scorers.channels import channel_counts, spearman
from moediff_plugins.scorers.gradient import Gradient
from moediff_plugins.scorers.magnitude import Magnitude
from moediff_plugins.scorers.taylor import Taylor

SAMPLING = Sampling("ddim", 10)
TASK = moediff.Task.from_arrays(*load_images("train"), null_label=NULL_LABEL).subset([3, 8])
SUBJECT = moediff.installed().dissect(*load_base())
CHANNELS = sum(channel_counts(SUBJECT.anatomy))


@pytest.fixture(scope="module")
def exact() -> tuple[moediff.Scores, Run]:
    run = Run(sampling=SAMPLING)
    return AblationL1(images=8).score(SUBJECT, TASK, run), run


def test_the_sketch_ranks_all_channels_as_the_exact_scores_do(
    benchmark: Any, exact: tuple[moediff.Scores, Run]
) -> None:
    run = Run(sampling=SAMPLING)
    benchmark.pedantic(lambda: AblationL1Sketch().score(SUBJECT, TASK, run), rounds=3)
    agreement = spearman(exact[1].records["free/channels"], run.records["free/channels"])
    benchmark.extra_info["spearman"] = agreement
    print(f"{CHANNELS} channels: Spearman {agreement:.3f}")
    assert agreement >= 0.95


def test_the_sketch_takes_a_fiftieth_of_the_time_of_one_channel_at_a_time(benchmark: Any) -> None:
    # A channel takes the same whole generation wherever it is: time those of the smallest layer.
    layer = min(SUBJECT.anatomy.layers, key=lambda layer: sum(channel_counts(Anatomy((layer,)))))
    part = attrs.evolve(SUBJECT, anatomy=Anatomy((layer,)))
    timed = sum(channel_counts(part.anatomy)) + 1  # the intact images are made as well

    def sketch() -> None:
        AblationL1Sketch().score(SUBJECT, TASK, Run(sampling=SAMPLING))

    def one_by_one() -> None:
        one_channel_at_a_time(part, TASK, SAMPLING, images=8)

    benchmark.pedantic(sketch, rounds=3, warmup_rounds=1)
    ratio, low, high = (
        value * (CHANNELS + 1) / timed for value in paired_ratio(one_by_one, sketch, pairs=9)
    )
    benchmark.extra_info |= {"ratio": ratio, "quartiles": (low, high)}
    print(f"{ratio:.0f}x less time than one by one, quartiles {low:.0f} to {high:.0f}")
    assert ratio >= 50


def test_how_the_cheaper_scores_rank_the_units(exact: tuple[moediff.Scores, Run]) -> None:
    found = {
        type(scorer).__name__: spearman(
            exact[0].values, scorer.score(SUBJECT, TASK, Run(sampling=SAMPLING)).values
        )
        for scorer in (AblationL1Sketch(), Taylor(), Gradient(), Magnitude())
    }
    print("units, Spearman with ablation-l1:", {name: round(v, 3) for name, v in found.items()})
    assert max(found, key=lambda name: found[name]) == "AblationL1Sketch"
