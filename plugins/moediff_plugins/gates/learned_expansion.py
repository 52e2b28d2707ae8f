"""Learn which layers deserve copies, the future work that MoEDM names (end of Sec. 3.2)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import ClassVar

import attrs
import torch
from attrs.validators import ge, gt, instance_of, le

from moediff.allowance import Allowance
from moediff.cost import Budget
from moediff.denoising import denoising_loss
from moediff.errors import BudgetError, NoEffectWarning, OptionError
from moediff.plan import REST, Blueprint, Plan
from moediff.space import SearchSpace
from moediff.subject import Subject, apart
from moediff.task import Task
from moediff.timesteps import Intervals
from moediff.workdir import Run
from moediff_plugins.gates.discard import discard, remaining
from moediff_plugins.gates.gated_copies import GatedCopies
from moediff_plugins.gates.settings import Plain
from moediff_plugins.tuners.training import train


@attrs.frozen
class LearnedExpansion:
    """Discard as `one-hot` does, then learn one gate per layer under a budget of stored cost.

    Expert i runs with the weights w_l + d_l + s_l (D_li - mean_j D_lj) in every layer l that
    remains. The shared d_l takes what all intervals want; without the mean it would share that with
    the D_li, and copies would be credited for what one layer could do. The gate s_l = sigmoid(a_l)
    opens where the intervals want different weights. Loss (after DiffPruning Eq. 15, for stored
    cost): the denoising loss on the interval of the step, in turns, plus `penalty` times
    R = log(max / min) of the cost of the rounded gates (straight-through) and the budget.

    Then layers get one copy per interval in order of their gates, ties in network order, each as
    long as it fits. Price is in the gates already: R pulls at each in proportion to its price, and
    AdamW divides by the size of what pulls, so what adds up is use per price. (Of two layers of
    equal use the dearer one gets the lower gate; the tests have the case.) A layer in which scores
    by interval have made the experts different has copies anyway and is not asked.

    The gates see what a few hundred steps gain on the task's own samples, and where those are few,
    layers with many weights gain most. Compare before you rely on it: on the digits the loss on
    other images is that of `one-hot` with outer layers (`benchmarks/results/expansion-digits.md`).

    The base keeps its weights; d, D and a are thrown away. Memory: with gradients and AdamW about
    4 (N + 1) times the remaining layers in float32. Records: `loss-expansion` (steps,) without R,
    `gates` (L,) (nan: not asked) and `cost` (), what the rounded gates would store, as a share of
    the base's.

    Attributes:
        live: share of the base's cost, by the budget's counter, that one expert keeps.
        steps: optimiser steps, one interval each.
        batch: B, images per step.
        learning_rate: AdamW's, of d and D.
        gate_rate: AdamW's, of the logits a.
        weight_decay: AdamW's.
        penalty: weight of R.
        save_every: steps between two checkpoints.

    Raises:
        OptionError: the budget is of "live" cost, which copies do not change, or a tuner has made
            the experts separate already.
        BudgetError: the budget is under the floor, or holds less than `live`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"prices", "stored"})

    live: float = attrs.field(default=0.3, validator=[gt(0), le(1)])
    steps: int = attrs.field(default=1000, validator=[instance_of(int), ge(1)])
    batch: int = attrs.field(default=32, validator=[instance_of(int), ge(1)])
    learning_rate: float = attrs.field(default=1e-3, validator=gt(0))
    gate_rate: float = attrs.field(default=1e-2, validator=gt(0))
    weight_decay: float = attrs.field(default=0.0, validator=ge(0))
    penalty: float = attrs.field(default=0.1, validator=gt(0))
    save_every: int = attrs.field(default=500, validator=[instance_of(int), ge(1)])

    def allocate(
        self,
        experts: Sequence[Subject],
        spaces: Sequence[SearchSpace],
        intervals: Intervals,
        budget: Budget,
        task: Task,
        run: Run,
    ) -> Plan:
        self._check(experts, budget)
        anatomy, count = experts[0].anatomy, len(experts)
        table = {REST: (0,) * count}  # grows below, and with it what the allowance counts
        prices = budget.counter.price(experts[0])
        calls = run.sampling.calls(experts[0].scheduler, intervals)
        allowance = Allowance(budget, prices, calls, lambda part: table.get(part, table[REST]))
        allowance.check_floor(spaces)
        masks = self._discarded(spaces, allowance)
        blueprints = [Blueprint.from_mask(anatomy, mask) for mask in masks]
        for layer in anatomy.layers:
            if len({blueprint.layer(anatomy, layer.name) for blueprint in blueprints}) > 1:
                table[layer.name] = tuple(range(count))
        start = float(allowance.cost(masks))
        if not allowance.fits(masks):
            raise BudgetError(
                f"budget: got {budget.value:.4g} of the base model's {prices.unit} (stored); "
                f"after the discard to live={self.live} the plan stores {start / prices.full:.4f}"
                " without any copy that could be left out. Ask for more, or for a smaller live."
            )
        asked = [name for name in remaining(anatomy, masks) if name not in table]
        extra = prices.layers(masks)[1:].sum(0)  # (L,), what copies of each layer add
        extra = extra[[anatomy.layer_index[name] for name in asked]]  # (A,)
        gates = torch.zeros(len(asked))
        if count > 1 and asked:
            limit = allowance.limit
            gates = self._learn(experts, blueprints, asked, extra / limit, start / limit, task, run)
        for index in gates.argsort(descending=True, stable=True).tolist():
            table[asked[index]] = tuple(range(count))
            if not allowance.fits(masks):
                del table[asked[index]]
        if all(set(numbers) == {0} for numbers in table.values()):
            warnings.warn(
                f"learned-expansion: the budget of {budget.value:.4g} has no room for a copy of "
                f"any layer beside live={self.live}, or there is one interval; nothing is copied. "
                "Ask for a larger budget, a smaller live or more experts.",
                NoEffectWarning,
                stacklevel=2,
            )
        found = torch.full((len(anatomy.layers),), float("nan"))
        found[[anatomy.layer_index[name] for name in asked]] = gates
        run.record("gates", found)
        rounded = start + float((gates.double().round() * extra).sum())
        run.record("cost", torch.tensor(rounded / prices.full))
        return Plan(intervals, blueprints, table)

    def _check(self, experts: Sequence[Subject], budget: Budget) -> None:
        if budget.of != "stored":
            raise OptionError(
                f'budget: got of="{budget.of}"; learned-expansion allows of="stored", because '
                "copies change what is stored and never what a call costs. Set the cost of a call "
                f'with `live` (now {self.live}) and give Budget(..., of="stored").'
            )
        if apart(experts):
            raise OptionError(
                "experts: got denoisers that differ; learned-expansion allows one denoiser for all "
                "intervals, of which it learns what to copy. Leave `prepare` out, or use one-hot."
            )

    def _discarded(self, spaces: Sequence[SearchSpace], allowance: Allowance) -> torch.Tensor:
        """Masks (N, U) that keep `live` of the cost, as `one-hot` would for such a budget."""
        budget = allowance.budget
        if budget.value < self.live:
            raise BudgetError(
                f"budget: got {budget.value:.4g} (stored), which is less than live={self.live}, "
                "what a single expert keeps. Ask for more, or for a smaller live."
            )
        alone = attrs.evolve(allowance, budget=Budget(self.live, budget.counter))
        try:
            return discard(spaces, lambda masks: alone)
        except BudgetError as error:
            raise BudgetError(f"learned-expansion, live={self.live}: {error}") from error

    def _learn(
        self,
        experts: Sequence[Subject],
        blueprints: Sequence[Blueprint],
        layers: Sequence[str],
        extra: torch.Tensor,
        start: float,
        task: Task,
        run: Run,
    ) -> torch.Tensor:
        """The gates (A,) of A layers; costs are shares of the budget."""
        scale = self.gate_rate / self.learning_rate
        model = GatedCopies(experts, blueprints, layers, scale)

        def descend(step: int, generator: torch.Generator) -> torch.Tensor:
            index = step % len(experts)
            expert = experts[index]
            batch = task.batch(self.batch, generator, expert.device)
            timesteps = expert.timesteps(self.batch, generator)  # (B,)
            loss = denoising_loss(
                model.expert(index), expert.scheduler, batch, timesteps, generator
            )
            gates = model.gates().double().cpu()
            rounded = gates + (gates.round() - gates).detach()
            cost = start + (rounded * extra).sum()
            penalty = self.penalty * cost.log().abs()  # log(max(T, T_d) / min(T, T_d))
            total: torch.Tensor = loss + penalty.to(loss)
            total.backward()  # type: ignore[no-untyped-call]
            return loss

        settings = Plain(self.learning_rate, self.weight_decay, self.save_every)
        parameters = list(model.parameters())
        train(settings, "expansion", model, parameters, descend, self.steps, self.batch, run)
        return model.gates().detach().cpu()
