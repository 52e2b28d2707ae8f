"""Sketched gradients: the map itself, its error bound, and that nothing is held or left behind."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import moediff
from moediff import Run, Subject
from moediff_plugins.clusterers.alignment import Alignment
from moediff_plugins.clusterers.sketching import (
    CountSketch,
    Projection,
    Whole,
    add_gradient,
    cosines,
    differentiable,
)
from moediff_plugins.metrics.memory import live_peak


def named(*sizes: int) -> dict[str, nn.Parameter]:
    return {str(index): nn.Parameter(torch.zeros(size)) for index, size in enumerate(sizes)}


def drawn(parameters: dict[str, nn.Parameter], size: int, seed: int = 0) -> CountSketch:
    return CountSketch.of(parameters, size, Run(seed=seed).generator)


def dense(sketch: Projection, sizes: list[int]) -> torch.Tensor:
    """The projection as a matrix (d, P), column by column."""
    columns = []
    for index, size in enumerate(sizes):
        for unit in torch.eye(size):
            columns.append(torch.zeros(sketch.size))
            sketch.add(columns[-1], str(index), unit, 1.0)
    return torch.stack(columns, dim=1)


def chain(width: int, length: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(length)))


# The map


@pytest.mark.parametrize("sizes", [[1], [8], [32], [33], [100], [3, 40, 9]])
def test_every_entry_goes_to_one_place_and_rows_do_not_meet(sizes: list[int]) -> None:
    matrix = dense(drawn(named(*sizes), 8), sizes)
    assert torch.equal(matrix.abs().sum(0), torch.ones(sum(sizes)))
    assert torch.equal(matrix.abs().max(0).values, torch.ones(sum(sizes)))
    start = 0
    for size in sizes:
        for row in torch.split(matrix[:, start : start + size], 8, dim=1):
            assert row.abs().sum(1).max() == 1
        start += size


def test_rows_of_a_block_are_offset_differently() -> None:
    # Offsets that are equal, or half of d apart, would let whole rows meet with one common sign.
    for seed in range(50):
        (block,) = drawn(named(16 * 8), 16, seed).hashes["0"]
        assert len({offset % 8 for offset in block.offsets}) == 8


@given(st.integers(0, 100), st.floats(-2, 2), st.floats(-2, 2))
def test_the_projection_is_linear_and_adds_up(seed: int, a: float, b: float) -> None:
    sizes = [3, 50, 17]
    sketch = drawn(named(*sizes), 8, seed)
    matrix = dense(sketch, sizes).double()
    x, y = torch.randn(2, 70, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    total = torch.zeros(8)
    for index, (one, two) in enumerate(zip(x.split(sizes), y.split(sizes), strict=True)):
        sketch.add(total, str(index), one.view(1, -1), a)
        sketch.add(total, str(index), two, b)
    torch.testing.assert_close(total.double(), matrix @ (a * x + b * y), rtol=1e-5, atol=1e-5)


def test_the_hash_depends_on_seed_and_name_only() -> None:
    both, alone = drawn(named(40, 30), 8), drawn(named(40), 8)
    assert both.hashes["0"][0].offsets == alone.hashes["0"][0].offsets
    assert torch.equal(both.hashes["0"][0].columns, alone.hashes["0"][0].columns)
    other = drawn(named(40), 8, seed=1).hashes["0"][0]
    assert (other.offsets, other.signs) != (
        alone.hashes["0"][0].offsets,
        alone.hashes["0"][0].signs,
    )


def test_the_hash_takes_two_numbers_per_row_and_d_per_block() -> None:
    (small,) = drawn(named(10), 64).hashes["0"]
    assert len(small.columns) == 10
    blocks = drawn(named(64 * 100), 64).hashes["0"]
    assert [len(block.offsets) for block in blocks] == [32, 32, 32, 4]
    assert all(len(block.columns) == 64 for block in blocks)


# The bound

VECTORS: dict[str, Callable[[torch.Generator], torch.Tensor]] = {
    "constant": lambda generator: torch.ones(300),
    "equal rows": lambda generator: torch.randn(16, generator=generator).repeat(19)[:300],
    "random": lambda generator: torch.randn(300, generator=generator),
    "sparse": lambda generator: torch.eye(300)[[3, 250]].sum(0),
}


@pytest.mark.parametrize("kind", VECTORS)
def test_products_are_unbiased_and_within_the_bound(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = nn.functional.normalize(VECTORS[kind](generator), dim=0)
    y = nn.functional.normalize(x + 0.05 * torch.randn(300, generator=generator), dim=0)
    errors = []
    for seed in range(500):
        sketch = drawn(named(200, 100), 16, seed)
        left, right = torch.zeros(2, 16)
        for total, vector in ((left, x), (right, y)):
            sketch.add(total, "0", vector[:200], 1.0)
            sketch.add(total, "1", vector[200:], 1.0)
        errors.append(float(left @ right - x @ y))
    found = torch.tensor(errors, dtype=torch.float64)
    deviation = found.std() / math.sqrt(len(found))
    assert found.mean().abs() <= 4 * deviation
    squares = found.square()
    assert squares.mean() - 4 * squares.std() / math.sqrt(len(found)) <= 2 / (16 - 2)
    assert squares.mean() > 0


def test_cosines_of_gradients_are_within_the_bound(subject: Subject, task: moediff.Task) -> None:
    size, errors = 1024, []
    for seed in range(3):
        exact, sketched = Run(experts=2, seed=seed), Run(experts=2, seed=seed)
        for sketch, run in ((None, exact), (size, sketched)):
            options = Alignment(stride=125, images=4, batch=4, sketch=sketch)
            options.cluster(subject, task, run)
        wanted = exact.records["free/similarity"]
        pairs = torch.ones_like(wanted).triu(1).bool()
        error = (sketched.records["free/similarity"] - wanted)[pairs]
        errors.append(error / (1 - wanted[pairs].square()))
    found = torch.cat(errors).square().mean().sqrt() * math.sqrt(size - 2)
    assert 0.5 < found <= 2


# Projecting while the backward pass goes on


def test_gradients_are_those_of_autograd() -> None:
    net = chain(6, 4)
    net[3] = net[0]  # used twice
    net.register_parameter("idle", nn.Parameter(torch.ones(5)))
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    with differentiable(net) as parameters:
        loss = net(x).square().mean()
        wanted = torch.autograd.grad(
            loss, list(parameters.values()), retain_graph=True, materialize_grads=True
        )
        whole = torch.zeros(Whole.of(parameters).size)
        add_gradient(whole, loss, parameters, Whole.of(parameters), 0.5)
    flat = torch.cat([part.flatten() for part in wanted])
    torch.testing.assert_close(whole, flat / 2)
    assert len(flat) == 3 * 42 + 5


def test_no_more_than_a_few_layers_gradients_are_held() -> None:
    net = chain(64, 24)
    x = torch.ones(1, 64)

    def sketched() -> None:
        with differentiable(net) as parameters:
            add_gradient(total, net(x).sum(), parameters, sketch, 1.0)

    def whole() -> None:
        with differentiable(net) as parameters:
            torch.autograd.grad(net(x).sum(), list(parameters.values()))

    total, sketch = torch.zeros(256), drawn(dict(net.named_parameters()), 256)
    layer = 64 * 65 * 4
    assert live_peak(whole) > 24 * layer
    assert live_peak(sketched) < 4 * layer
    assert total.abs().sum() > 0


class Broken:
    """A projection that fails on its second gradient."""

    size = 4

    def __init__(self) -> None:
        self.calls = 0

    def add(self, total: torch.Tensor, name: str, gradient: torch.Tensor, weight: float) -> None:
        self.calls += 1
        if self.calls == 2:
            raise ValueError("no room")


def test_nothing_stays_behind_also_after_an_error() -> None:
    net = chain(4, 2).requires_grad_(False)
    kept = torch.ones(4, 4)
    net[0].weight.grad = kept
    for projection in (drawn(dict(net.named_parameters()), 4), Broken()):
        total = torch.zeros(4)
        fails = isinstance(projection, Broken)
        expected = pytest.raises(ValueError, match="no room") if fails else nullcontext()
        with expected, differentiable(net) as parameters:
            add_gradient(total, net(torch.ones(1, 4)).sum(), parameters, projection, 1.0)
        assert (total.abs().sum() == 0) == fails
        assert not any(p.requires_grad or p._backward_hooks for p in net.parameters())
        assert net[0].weight.grad is kept
        assert torch.equal(kept, torch.ones(4, 4))
        assert all(p.grad is None for p in net[1].parameters())


# Cosines


def test_cosines_are_summed_over_columns() -> None:
    rows, columns = torch.randn(3, 70_000), torch.randn(2, 70_000)
    wanted = nn.functional.cosine_similarity(rows[:, None].double(), columns[None].double(), dim=-1)
    torch.testing.assert_close(cosines(rows, columns), wanted)
    torch.testing.assert_close(cosines(rows).diagonal(), torch.ones(3, dtype=torch.float64))
    assert torch.equal(cosines(torch.zeros(1, 4), torch.ones(2, 4)), torch.zeros(1, 2).double())
