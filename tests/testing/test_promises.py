"""The kit catches strategies that are no values, and every trace that a scorer can leave."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from torch import nn

from moediff import Run, Scores, Subject, Task
from moediff.testing import ConformanceError, check_scorer
from tests.core.toys import Draw
from tests.testing.catching import call, caught, leave_hook, units

Deed = Callable[[Subject, Task, Run], Any]


# What every role promises: a value


@attrs.frozen
class Hollow:
    """A scorer without a verb."""


@attrs.define
class Mutable:
    """A scorer whose fields may be assigned."""

    scale: float = 1.0

    def score(self, expert: Subject, task: Task, run: Run) -> Scores:
        return Draw().score(expert, task, run)


@attrs.frozen
class Bare(Draw):
    """A scorer with a field that has to be given."""

    more: float = attrs.field(kw_only=True)


@attrs.frozen(eq=False)
class Unequal:
    """A scorer that equals only itself."""

    def score(self, expert: Subject, task: Task, run: Run) -> Scores:
        return Draw().score(expert, task, run)


@attrs.frozen
class Unhashable(Draw):
    """A scorer with a list."""

    more: list[int] = attrs.field(factory=list)


@attrs.frozen
class Holding(Draw):
    """A scorer that holds a tensor."""

    more: Any = attrs.field(factory=lambda: torch.zeros(1))


@attrs.frozen
class Wordy(Draw):
    """A scorer whose words are a list."""

    needs = ["intervals"]  # noqa: RUF012


@attrs.frozen
class Silent(Draw):
    __doc__ = None


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (Draw, r"got the class; pass an instance, for example Draw\(\)"),
        (Hollow(), "promised: is a Scorer"),
        (Mutable(), "promised: is frozen. Found: that scale can be assigned"),
        (Bare(more=1.0), "every field has a default. Found: none for more"),
        (Unequal(), "equal fields make equal values"),
        (Unhashable(), "is hashable"),
        (Holding(), "no field holds a tensor. Found: one in more"),
        (Wordy(), "`needs` is a frozenset of words"),
        (Silent(), "says what it does. Found: no docstring"),
    ],
)
def test_strategies_that_are_no_values_are_caught(strategy: Any, message: str) -> None:
    caught(check_scorer, strategy, message)


class PlainClass:
    """A scorer that is no attrs class."""

    def score(self, expert: Subject, task: Task, run: Run) -> Scores:
        return Draw().score(expert, task, run)


def test_plain_classes_are_caught() -> None:
    caught(check_scorer, PlainClass(), "is an attrs class")


# Scorers: the traces that a strategy can leave


def good(expert: Subject, task: Task, run: Run) -> Scores:
    return Scores(torch.rand(units(expert), generator=run.generator("x")))


def leave_hook_on_failure(expert: Subject, task: Task, run: Run) -> None:
    handle = expert.denoiser.conv_in.register_forward_hook(lambda *_: None)
    call(expert, task)
    handle.remove()


def change_weight(expert: Subject, task: Task, run: Run) -> None:
    with torch.no_grad():
        expert.denoiser.conv_in.weight[0, 0, 0, 0] += 1e-7


def change_weight_on_failure(expert: Subject, task: Task, run: Run) -> None:
    weight = expert.denoiser.conv_in.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
    call(expert, task)
    with torch.no_grad():
        weight.copy_(kept)


def leave_gradient(expert: Subject, task: Task, run: Run) -> None:
    call(expert, task).sum().backward()


def leave_frozen(expert: Subject, task: Task, run: Run) -> None:
    expert.denoiser.requires_grad_(False)


def leave_training(expert: Subject, task: Task, run: Run) -> None:
    expert.denoiser.train()


def replace_module(expert: Subject, task: Task, run: Run) -> None:
    expert.denoiser.conv_act = nn.GELU()


def change_data(expert: Subject, task: Task, run: Run) -> None:
    task.samples[0].zero_()


def swallow(expert: Subject, task: Task, run: Run) -> None:
    try:
        call(expert, task)
    except Exception:
        return


@attrs.frozen
class Naughty:
    """A scorer that does something before it scores."""

    deed: Any = good

    def score(self, expert: Subject, task: Task, run: Run) -> Scores:
        self.deed(expert, task, run)
        return good(expert, task, run)


@pytest.mark.parametrize(
    ("deed", "message"),
    [
        (leave_hook, "leaves the hooks as found.*conv_in.forward_hooks"),
        (leave_hook_on_failure, "leaves the hooks as found after a failing run"),
        (change_weight, "leaves the weights as found.*conv_in.weight"),
        (change_weight_on_failure, "leaves the weights as found after a failing run"),
        (leave_gradient, "leaves the gradients as found"),
        (leave_frozen, "leaves requires_grad as found"),
        (leave_training, "leaves train and eval mode as found"),
        (replace_module, "leaves the modules as found.*conv_act"),
        (change_data, "leaves the data alone"),
        (swallow, "lets errors through"),
        (lambda *_: torch.rand(1), "leaves torch's global random state as found"),
        (lambda *_: torch.manual_seed(0), "leaves torch's global random state as found"),
        (lambda *_: np.random.rand(), "leaves NumPy's global random state as found"),
        (lambda *_: np.random.seed(0), "leaves NumPy's global random state as found"),
        (lambda *_: random.random(), "leaves random's global state as found"),
        (lambda *_: torch.set_default_dtype(torch.float64), "leaves the default dtype as found"),
        (lambda *_: 1 / 0, "runs on an ordinary subject. Found: ZeroDivisionError"),
    ],
)
def test_traces_are_caught(deed: Deed, message: str) -> None:
    try:
        caught(check_scorer, Naughty(deed), message)
    finally:
        torch.set_default_dtype(torch.float32)


def test_global_numbers_are_caught_even_if_the_state_is_restored() -> None:
    @attrs.frozen
    class Restoring:
        """Draws from the global state and puts it back."""

        def score(self, expert: Subject, task: Task, run: Run) -> Scores:
            state = torch.get_rng_state()
            values = torch.rand(units(expert))
            torch.set_rng_state(state)
            return Scores(values)

    caught(check_scorer, Restoring(), "the same seed gives the same result, whatever ran before")


@attrs.frozen
class Returning:
    """A scorer that returns what it is told to make."""

    make: Any = good

    def score(self, expert: Subject, task: Task, run: Run) -> Any:
        return self.make(expert)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda e: Scores(torch.full((units(e),), float("nan"))), "finite floats"),
        (lambda e: Scores(torch.ones(units(e) - 1)), "scores of shape"),
        (lambda e: Scores(torch.ones(2, units(e))), "scores of shape"),
        (lambda e: Scores(torch.ones(units(e), dtype=torch.long)), "scores are floats"),
        (lambda e: Scores(torch.ones(units(e), requires_grad=True)), "scores hold no graph"),
    ],
)
def test_wrong_scores_are_caught(make: Any, message: str) -> None:
    caught(check_scorer, Returning(make), message)


def test_other_results_are_caught() -> None:
    with pytest.raises(ConformanceError, match=r"score returns Scores\. Found: list"):
        check_scorer(Returning(lambda expert: [1.0]))


def test_a_good_scorer_passes_and_the_check_leaves_no_trace() -> None:
    states = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    check_scorer(Draw())
    check_scorer(Naughty(lambda expert, task, run: call(expert, task)))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (str(np.random.get_state()), random.getstate())
