"""The conformance kit catches what it promises to catch: one broken strategy for each promise."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from torch import nn

import moediff
from moediff import (
    Blueprint,
    Budget,
    Chain,
    Cost,
    CostModel,
    ExpertMixture,
    Intervals,
    Measurement,
    NoEffectWarning,
    Plan,
    Run,
    Scores,
    SearchSpace,
    Subject,
    Task,
)
from moediff.errors import UnknownNameError, WorkdirError
from moediff.testing import (
    ConformanceError,
    check_anatomy,
    check_clusterer,
    check_counter,
    check_expert_tuner,
    check_gate,
    check_metric,
    check_mixture_tuner,
    check_pruner,
    check_report,
    check_scorer,
    check_strategy,
    tiny_subject,
    tiny_unet,
)
from moediff.testing.tiny import Elements, tiny_space
from tests.core.toys import CALLS, Draw, Even, Layers, Nudge

Deed = Callable[[Subject, Task, Run], Any]


def caught(check: Callable[[Any], None], strategy: Any, message: str) -> None:
    """The check names the strategy and the promise."""
    with pytest.raises(ConformanceError, match=message) as info:
        check(strategy)
    assert isinstance(info.value, AssertionError)
    name = strategy.__name__ if isinstance(strategy, type) else type(strategy).__name__
    assert str(info.value).startswith(f"{name}: ")


def units(subject: Subject) -> int:
    return len(subject.anatomy.units)


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


def leave_hook(expert: Subject, task: Task, run: Run) -> None:
    expert.denoiser.conv_in.register_forward_hook(lambda *_: None)


def leave_hook_on_failure(expert: Subject, task: Task, run: Run) -> None:
    handle = expert.denoiser.conv_in.register_forward_hook(lambda *_: None)
    call(expert, task)
    handle.remove()


def call(expert: Subject, task: Task) -> torch.Tensor:
    rows = {name: value[:2] for name, value in task.conditioning.items()}
    output: torch.Tensor = expert.denoiser(task.samples[:2], 3, **rows).sample
    return output


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


# Clusterers


@attrs.frozen
class Cutting:
    """A clusterer that returns what it is told to make."""

    make: Any = None

    def cluster(self, subject: Subject, task: Task, run: Run) -> Any:
        return self.make(subject, run)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s, r: Intervals.uniform(s.total, 2), "1 intervals that cover"),
        (lambda s, r: Intervals.uniform(1000, r.experts), r"cover \[0, 100\).*\(0, 1000\)"),
        (lambda s, r: (0, s.total), "returns Intervals"),
        (lambda s, r: Intervals.uniform(s.total, 1 + torch.rand(1) * r.experts), "random state"),
    ],
)
def test_wrong_intervals_are_caught(make: Any, message: str) -> None:
    caught(check_clusterer, Cutting(make), message)


def test_a_good_clusterer_passes() -> None:
    check_clusterer(Even())


# Gates


@attrs.frozen
class Spending:
    """Close units chain by chain until the budget is met, in every expert alike."""

    floor: bool = True
    keep: float = 1.0
    order: int = 1
    shift: int = 0

    def allocate(
        self,
        experts: Sequence[Subject],
        spaces: Sequence[SearchSpace],
        intervals: Intervals,
        budget: Budget,
        task: Task,
        run: Run,
    ) -> Plan:
        base, prices = experts[0], budget.counter.price(experts[0])
        space = spaces[0]
        goal = moediff.Allowance(budget, prices, (1, 1), lambda part: (0, 0))
        if self.floor:
            goal.check_floor([space, space])
        mask = torch.ones(units(base), dtype=torch.float64)
        for chain in space.chains:
            for unit in chain.units[: -1 if self.order == 1 else None][:: self.order]:
                if float(goal.cost(torch.stack([mask, mask]))) <= goal.limit * self.keep:
                    break
                mask[unit] = 0
        blueprint = Blueprint.from_mask(base.anatomy, mask)
        if self.shift:
            intervals = Intervals((0, 50, intervals.total))
        return Plan(intervals, [blueprint, blueprint])


@attrs.frozen
class Apart(Spending):
    """As the spaces want it: the two experts of the check rank their units the other way round."""

    def allocate(
        self,
        experts: Sequence[Subject],
        spaces: Sequence[SearchSpace],
        intervals: Intervals,
        budget: Budget,
        task: Task,
        run: Run,
    ) -> Plan:
        base = experts[0]
        goal = moediff.Allowance(
            budget, budget.counter.price(base), run.sampling.calls(base.scheduler, intervals),
            lambda part: (0, 1),
        )  # fmt: skip
        if self.floor:
            goal.check_floor(spaces)
        masks = torch.ones(2, units(base), dtype=torch.float64)
        steps = [(e, c, u) for e in (0, 1) for c in spaces[e].chains for u in c.units[:-1]]
        for expert, _, unit in steps:
            if float(goal.cost(masks)) <= goal.limit * self.keep:
                break
            masks[expert, unit] = 0
        cut = [Blueprint.from_mask(base.anatomy, mask) for mask in masks]
        return Plan(intervals, cut, {moediff.plan.REST: (0, 1)})


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (Apart(keep=1.3), "the plan fits the budget of 0.75"),
        (Apart(floor=False, keep=1.0), "refuses a budget under the floor"),
        (Spending(), "chain .* is removed from its start|what its space offers"),
        (Spending(shift=1), "keeps the intervals"),
    ],
)
def test_wrong_plans_are_caught(gate: Any, message: str) -> None:
    caught(check_gate, gate, message)


def test_a_gate_that_refuses_what_can_be_reached_is_caught() -> None:
    @attrs.frozen
    class Fearful:
        """Refuses every budget."""

        def allocate(self, *arguments: Any) -> Plan:
            raise moediff.errors.BudgetError("no")

    caught(check_gate, Fearful(), "spends a budget. Found: refused: no")


def test_a_good_gate_passes() -> None:
    check_gate(Apart())


@attrs.frozen
class StoredOnly:
    """Spends no budget of live cost; whether it says so is up to the test."""

    refuses: bool = True

    def allocate(
        self,
        experts: Sequence[Subject],
        spaces: Sequence[SearchSpace],
        intervals: Intervals,
        budget: Budget,
        task: Task,
        run: Run,
    ) -> Plan:
        if self.refuses and budget.of != "stored":
            raise moediff.errors.OptionError("give a budget of stored cost")
        return Apart().allocate(experts, spaces, intervals, budget, task, run)


def test_a_gate_may_spend_one_kind_of_budget_if_it_refuses_the_other() -> None:
    check_gate(StoredOnly(), of=("stored",))
    caught(check_gate, StoredOnly(), "spends a budget. Found: refused: give a budget of stored")
    with pytest.raises(ConformanceError, match="spends no budget of live cost"):
        check_gate(StoredOnly(refuses=False), of=("stored",))


# Pruners


@attrs.frozen
class Pruning(Layers):
    """A pruner whose space can be spoilt."""

    spoil: str = ""

    def space(self, expert: Subject, scores: Scores) -> SearchSpace:
        chains = super().space(expert, scores).chains
        match self.spoil:
            case "twice":
                chains = (*chains, Chain("again", chains[0].units[:1]))
            case "strange":
                chains = (Chain("layers", (*chains[0].units, 9999)),)
            case "empty":
                chains = (*chains, Chain("none", ()))
            case "nothing":
                chains = (Chain("layers", chains[0].units[:1]),)
            case "lengths":
                chains = (Chain("layers", chains[0].units[: 3 + int(scores.values[0])]),)
            case "hook":
                leave_hook(expert, None, None)  # type: ignore[arg-type]
        return SearchSpace(expert.anatomy, chains, scores)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("twice", "chains are disjoint"),
        ("strange", "chains hold the anatomy's units"),
        ("empty", "chains hold units. Found: none in none"),
        ("nothing", "something may be removed"),
        ("lengths", "chains of the same names and lengths whatever the scores"),
        ("hook", "leaves the hooks as found"),
    ],
)
def test_wrong_spaces_are_caught(spoil: str, message: str) -> None:
    caught(check_pruner, Pruning(spoil), message)


@attrs.frozen
class Carving(Layers):
    """A pruner whose mixture can be spoilt."""

    spoil: str = ""

    def prune(self, experts: Sequence[Subject], plan: Plan) -> Any:
        match self.spoil:
            case "whole":
                whole = Plan(plan.intervals, [Blueprint()] * 2, plan.copies)
                mixture = ExpertMixture.from_experts(experts, whole)
                mixture.plan = plan
            case "other plan":
                whole = Plan(plan.intervals, [Blueprint()] * 2)
                mixture = ExpertMixture.from_experts(experts, whole)
            case "borrowed":
                mixture = ExpertMixture.from_experts(experts, plan)
                for expert in mixture.experts:
                    expert.conv_in = experts[0].denoiser.conv_in
            case "moved":
                mixture = ExpertMixture.from_experts(experts, plan)
                with torch.no_grad():
                    mixture.experts[0].conv_out.bias += 0.1
            case "unshared":
                import copy

                mixture = ExpertMixture.from_experts(experts, plan)
                mixture.experts[1] = copy.deepcopy(mixture.experts[1])
            case "module":
                return nn.ModuleList([e.denoiser for e in experts])
        return mixture


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("whole", "parameters are left"),
        ("other plan", "the mixture carries its plan"),
        ("borrowed", "the mixture owns its weights"),
        ("moved", "computes what the cut denoiser computes"),
        ("unshared", "is one object, as the plan shares it"),
        ("module", "returns an ExpertMixture. Found: ModuleList"),
    ],
)
def test_wrong_mixtures_are_caught(spoil: str, message: str) -> None:
    caught(check_pruner, Carving(spoil), message)


def test_a_good_pruner_passes() -> None:
    check_pruner(Layers())


# Counters


@attrs.frozen
class Counting:
    """A counter that can be spoilt."""

    spoil: str = ""

    def count(self, denoiser: nn.Module, shape: Sequence[int] | None = None) -> Cost:
        cost = Elements().count(denoiser)
        match self.spoil:
            case "free":
                return Cost(0.0, "elements")
            case "no unit":
                return Cost(cost.value, "")
            case "shape":
                return Cost(cost.value * (1 if shape is None else 2), "elements")
            case "trains":
                denoiser.train()
        return cost

    def price(self, subject: Subject) -> CostModel:
        model = Elements().price(subject)
        match self.spoil:
            case "no fixed part":
                # DiffPruning's print: the whole layer is divided among its units.
                return attrs.evolve(model, units=model.units * 1.01)
            case "dropped for free":
                return attrs.evolve(model, bypass=model.bypass * 0)
            case "other unit":
                return attrs.evolve(model, unit="bytes")
        return model


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("free", "a positive cost with a unit"),
        ("no unit", "a positive cost with a unit"),
        ("shape", "the shape in the config is the default"),
        ("trains", "leaves train and eval mode as found"),
        ("no fixed part", "the prices add up to the count"),
        ("dropped for free", r"the price of Blueprint\(drop=.* is its count"),
        ("other unit", "price returns a CostModel in elements"),
    ],
)
def test_wrong_counts_are_caught(spoil: str, message: str) -> None:
    caught(check_counter, Counting(spoil), message)


def test_a_tolerance_lets_measured_prices_pass() -> None:
    check_counter(Counting())
    check_counter(Counting("no fixed part"), tolerance=0.02)


# Tuners


@attrs.frozen
class Preparing(Nudge):
    """A tuner of experts that can be spoilt."""

    spoil: str = ""

    def prepare(self, experts: Any, rank: Any, intervals: Any, task: Any, run: Any) -> Any:
        match self.spoil:
            case "given":
                return experts
            case "one":
                return Nudge().prepare(experts, rank, intervals, task, run)[:1]
            case "nothing":
                return Nudge(0.0).prepare(experts, rank, intervals, task, run)
            case "broken":
                return Nudge(float("nan")).prepare(experts, rank, intervals, task, run)
            case "in place":
                Nudge()._move(experts[0].denoiser, run.generator("x"))
            case "warned":
                import warnings

                warnings.warn("nothing to do", NoEffectWarning, stacklevel=1)
                return Nudge(0.0).prepare(experts, rank, intervals, task, run)
        return Nudge().prepare(experts, rank, intervals, task, run)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("given", "denoisers of their own|warns"),
        ("one", "one expert per interval"),
        ("nothing", r"warns \(NoEffectWarning\) if nothing changed"),
        ("broken", "finite weights"),
        ("in place", "leaves the weights as found"),
    ],
)
def test_wrong_experts_are_caught(spoil: str, message: str) -> None:
    caught(check_expert_tuner, Preparing(spoil=spoil), message)


@attrs.frozen
class Recovering(Nudge):
    """A tuner of mixtures that can be spoilt."""

    spoil: str = ""

    def recover(self, mixture: Any, task: Any, teacher: Any, run: Any) -> Any:
        match self.spoil:
            case "nothing":
                return mixture
            case "broken":
                return Nudge(float("nan")).recover(mixture, task, teacher, run)
            case "teacher":
                self._move(teacher.denoiser, run.generator("x"))
            case "experts":
                return mixture.experts
            case "random":
                mixture.experts[0].conv_out.bias.data += torch.tensor(np.random.rand())
        return Nudge().recover(mixture, task, teacher, run)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("nothing", r"warns \(NoEffectWarning\) if nothing changed"),
        ("broken", "finite weights"),
        ("teacher", "leaves the weights as found"),
        ("experts", "returns an ExpertMixture"),
        ("random", "leaves NumPy's global random state as found"),
    ],
)
def test_wrong_recoveries_are_caught(spoil: str, message: str) -> None:
    caught(check_mixture_tuner, Recovering(spoil=spoil), message)


def test_good_tuners_pass() -> None:
    check_expert_tuner(Nudge())
    check_expert_tuner(Preparing(spoil="warned"))
    check_mixture_tuner(Nudge())


# Metrics


@attrs.frozen
class Measuring:
    """A metric that can be spoilt."""

    spoil: str = ""

    def measure(self, denoiser: nn.Module, subject: Subject, task: Task, run: Run) -> Any:
        expert = attrs.evolve(subject, denoiser=denoiser)
        with torch.no_grad():
            value = float(call(expert, task).abs().mean())
        match self.spoil:
            case "nan":
                value = float("nan")
            case "hook":
                denoiser.register_forward_hook(lambda *_: None)
            case "nameless":
                return Measurement("", value, "", 2)
            case "number":
                return value
            case "clock":
                value += time.perf_counter()
        return Measurement("mean", value, "", 2)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("nan", "a finite value"),
        ("hook", "leaves the hooks as found"),
        ("nameless", "a name, a unit and a number of samples"),
        ("number", "returns a Measurement. Found: float"),
        ("clock", "the same seed gives the same result"),
    ],
)
def test_wrong_figures_are_caught(spoil: str, message: str) -> None:
    caught(check_metric, Measuring(spoil), message)


def test_good_metrics_pass() -> None:
    check_metric(Measuring())
    check_metric(Measuring("clock"), repeatable=False)


# Anatomies


@attrs.frozen
class Describing:
    """The built-in anatomy, spoilt."""

    spoil: str = ""

    def supports(self, denoiser: nn.Module) -> bool:
        return self.spoil == "anything" or hasattr(denoiser, "down_blocks")

    def dissect(self, denoiser: nn.Module) -> Any:
        anatomy = moediff.installed().create("anatomies", "unet2d", {}).dissect(denoiser)
        first, *others = anatomy.layers
        width, *more = first.widths
        match self.spoil:
            case "twice":
                others = [first, *others]
            case "slice":
                gone = attrs.evolve(width.slices[0], module="nowhere")
                width = attrs.evolve(width, slices=(gone, *width.slices[1:]))
            case "consumer":
                width = attrs.evolve(width, consumer="nowhere")
            case "size":
                width = attrs.evolve(width, count=width.count - 1)
            case "axis":
                width = attrs.evolve(width, axis=3, count=4, size=2)
            case "producer":
                # Where the paper multiplies: the closed channels' bias still leaks.
                width = attrs.evolve(width, consumer=width.consumer.replace("conv2", "norm2"))
            case "bypass":
                last = attrs.evolve(others[-1], bypass="shortcut", shortcut=None)
                others = [*others[:-1], last]
            case "none":
                return moediff.Anatomy(())
        first = attrs.evolve(first, widths=(width, *more))
        return moediff.Anatomy((first, *others))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("anything", "supports what it knows"),
        ("none", "returns an Anatomy with units"),
        ("twice", "the names of units are unique"),
        ("slice", "nowhere exists"),
        ("consumer", "nowhere exists"),
        ("size", "has count x size x blocks channels"),
        ("producer", "mask = cut"),
    ],
)
def test_wrong_anatomies_are_caught(spoil: str, message: str) -> None:
    caught(lambda provider: check_anatomy(provider, tiny_unet()), Describing(spoil), message)


def test_a_good_anatomy_passes() -> None:
    check_anatomy(Describing(), tiny_unet())


# Reports


@attrs.frozen
class Reporting:
    """A report of a line, which can be spoilt."""

    spoil: str = ""

    def write(self, folder: Path) -> Path:
        plan, path = folder / "plan.json", folder / "report.txt"
        if self.spoil == "leaving":
            path.touch()
        if self.spoil != "anything" and not plan.is_file():
            raise WorkdirError(f"{folder}: holds no finished run.")
        match self.spoil:
            case "elsewhere":
                path = folder.parent / "report.txt"
            case "altering":
                plan.write_text("{}")
            case "clock":
                path.write_text(str(time.perf_counter()))
                return path
            case "seed":
                random.seed(0)
        path.write_text("a line")
        return path


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("elsewhere", "writes into the run's folder"),
        ("altering", "leaves what the run wrote alone"),
        ("clock", "the same seed gives the same result"),
        ("seed", "leaves random's global state as found"),
        ("anything", "refuses a folder without a finished run"),
        ("leaving", "leaves nothing where it refused"),
    ],
)
def test_wrong_reports_are_caught(spoil: str, message: str) -> None:
    caught(check_report, Reporting(spoil), message)


def test_a_good_report_passes() -> None:
    check_report(Reporting())


# The dispatcher


def test_check_strategy_runs_the_check_of_the_hook() -> None:
    CALLS.clear()
    check_strategy("tuners", Nudge())
    assert CALLS["prepare"] >= 2
    assert CALLS["recover"] >= 2
    with pytest.raises(ConformanceError, match="is a Gate"):
        check_strategy("gates", Draw())
    with pytest.raises(ConformanceError, match="pass an instance"):
        check_strategy("scorers", Draw)
    with pytest.raises(UnknownNameError, match="Did you mean 'scorers'"):
        check_strategy("scorer", Draw())
    check_strategy("metrics", Measuring("clock"), repeatable=False)


def test_the_tiny_space_has_every_unit_once() -> None:
    subject = tiny_subject()
    found = [unit for chain in tiny_space(subject).chains for unit in chain.units]
    assert sorted(found) == list(range(units(subject)))


def test_the_kit_needs_no_test_framework() -> None:
    code = (
        "import sys; sys.modules['pytest'] = sys.modules['hypothesis'] = None\n"
        "import moediff.testing; print(len(moediff.testing.CHECKS))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "9", done.stderr
