"""Project gradients to few numbers while a backward pass makes them: they are never held whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import attrs
import torch
from torch import nn

from moediff.subject import gradients

Parameters = Mapping[str, nn.Parameter]


class Projection(Protocol):
    """A linear map of named gradients to `size` numbers."""

    @property
    def size(self) -> int:
        """How many numbers, d."""

    def add(self, total: torch.Tensor, name: str, gradient: torch.Tensor, weight: float) -> None:
        """Add `weight` times the projection of one parameter's gradient to `total` (size,)."""


@attrs.frozen(eq=False)
class Whole:
    """No projection: every gradient at its own place among all P numbers."""

    size: int
    starts: Mapping[str, int]

    @classmethod
    def of(cls, parameters: Parameters) -> Whole:
        starts, size = {}, 0
        for name, parameter in parameters.items():
            starts[name] = size
            size += parameter.numel()
        return cls(size, starts)

    def add(self, total: torch.Tensor, name: str, gradient: torch.Tensor, weight: float) -> None:
        start = self.starts[name]
        total[start : start + gradient.numel()].add_(gradient.flatten().float(), alpha=weight)


@attrs.frozen(eq=False)
class Hash:
    """Where the entries of one block go: column signs (d,), and an offset and a sign per row."""

    columns: torch.Tensor
    offsets: list[int]
    signs: list[int]


@attrs.frozen(eq=False)
class CountSketch:
    """A count sketch (Charikar et al., 2002) to d numbers whose hash is stored per row of d.

    A tensor is flattened and cut into blocks of at most d / 2 rows of d entries. Entry c of row r
    goes to place (c + o_r) mod d with the sign a_r b_c. Signs are fair coins; within a block the
    offsets o_r differ modulo d / 2, otherwise they are uniform. So rows are added at once, the hash
    of P parameters is about 2 P / d numbers and d per block, and nothing is drawn per entry.

    Error. Let E(x, y) = <Sx, Sy> - <x, y>. Entries of one row never meet; those of two rows of a
    block meet with probability 1 / (d - 2), and all others with 1 / d. The signs of a pair that
    meets have mean zero, and those of two such pairs are uncorrelated (the offsets 0 and d / 2,
    where they are not, cannot occur), so for unit x and y

        mean E = 0
        var E <= 2 / (d - 2)

    With y = c x + s z, where z is orthogonal to x and c^2 + s^2 = 1, the cosine of the sketches is
    off by, to first order,

        s^2 (c / 2 (E(x, x) - E(z, z)) + s E(x, z))
        root mean square <= s^2 (c + s) sqrt(2 / (d - 2)) <= 2 (1 - c^2) / sqrt(d - 2)

    and by about (1 - c^2) / sqrt(d) where no few entries dominate: 0.016 at d = 4096 for gradients
    that are orthogonal, 0.003 for a cosine of 0.9.
    """

    size: int
    hashes: Mapping[str, tuple[Hash, ...]]

    @classmethod
    def of(
        cls, parameters: Parameters, size: int, generator: Callable[[str], torch.Generator]
    ) -> CountSketch:
        """Draw the hash of every parameter tensor.

        Args:
            parameters: by name, where their gradients will be.
            size: d, even.
            generator: name -> the generator of that tensor's hash.
        """
        hashes = {
            name: tuple(_hashes(parameter, size, generator(name)))
            for name, parameter in parameters.items()
        }
        return cls(size, hashes)

    def add(self, total: torch.Tensor, name: str, gradient: torch.Tensor, weight: float) -> None:
        flat = gradient.flatten().float()
        line = flat.new_zeros(2 * self.size)  # the second half wraps around
        for block, drawn in zip(
            torch.split(flat, self.size**2 // 2), self.hashes[name], strict=True
        ):
            rows = torch.split(block, self.size)
            for row, offset, sign in zip(rows, drawn.offsets, drawn.signs, strict=True):
                columns = drawn.columns[: len(row)]
                line[offset : offset + len(row)].addcmul_(row, columns, value=sign)
        total.add_(line[: self.size] + line[self.size :], alpha=weight)


def _hashes(parameter: torch.Tensor, size: int, generator: torch.Generator) -> Iterator[Hash]:
    left = math.ceil(parameter.numel() / size)  # rows
    while left > 0:
        rows, half = min(left, size // 2), size // 2
        coins = torch.randint(2, (2, rows), generator=generator)
        columns = 2 * torch.randint(2, (size,), generator=generator) - 1
        offsets = torch.randperm(half, generator=generator)[:rows] + half * coins[0]
        signs = 2 * coins[1] - 1
        # A tensor of a single, short row needs no more signs than entries.
        columns = columns[: parameter.numel()].to(parameter.device, torch.float32)
        yield Hash(columns, offsets.tolist(), signs.tolist())
        left -= rows


@contextmanager
def differentiable(denoiser: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """Let gradients flow to every parameter, then set the flags back as they were."""
    parameters = dict(denoiser.named_parameters())
    with torch.enable_grad(), gradients(parameters.values(), True):
        yield parameters


def add_gradient(
    total: torch.Tensor,
    loss: torch.Tensor,
    parameters: Parameters,
    projection: Projection,
    weight: float,
) -> None:
    """Add `weight` times the projected gradient of a loss () to `total` (size,), in place.

    Every parameter's gradient is projected when the backward pass has made it and freed at once.
    No `.grad` is touched and no hook stays.
    """

    def taker(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def take(gradient: torch.Tensor) -> torch.Tensor:
            projection.add(total, name, gradient, weight)
            return gradient.new_zeros(()).expand_as(gradient)  # what is handed on holds one number

        return take

    handles = [
        parameter.register_hook(taker(name))  # type: ignore[no-untyped-call]
        for name, parameter in parameters.items()
    ]
    try:
        torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()


def cosines(rows: torch.Tensor, columns: torch.Tensor | None = None) -> torch.Tensor:
    """Cosines (G, H) between rows (G, d) and (H, d), summed in float64 without such a copy.

    Without `columns`, those among the rows themselves. The cosine with a zero vector is 0.
    """
    columns = rows if columns is None else columns
    parts = zip(*(torch.split(side, 65_536, dim=1) for side in (rows, columns)), strict=True)
    products = torch.zeros(len(rows), len(columns), dtype=torch.float64)
    for left, right in parts:
        products += left.double() @ right.double().T
    return products / _lengths(rows)[:, None] / _lengths(columns)[None, :]


def _lengths(vectors: torch.Tensor) -> torch.Tensor:
    squares = [part.double().square().sum(1) for part in torch.split(vectors, 65_536, dim=1)]
    return torch.stack(squares).sum(0).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
