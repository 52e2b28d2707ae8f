"""Invariant 1, mask = cut, and masks as differentiable gates."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import moediff
from moediff import Anatomy, Blueprint, Subject, cut, masked
from moediff.errors import PlanError
from moediff.masking import masked_channels
from moediff.surgery import Bypass
from tests.conftest import UNETS, conditioning, tiny_unet

TOLERANCE = 1e-5  # of the output's scale, float32


def call(net: nn.Module, rows: int = 2, double: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(1, 3, 8, 8, generator=generator).repeat(rows, 1, 1, 1)
    inputs = {name: value[:1].repeat(rows) for name, value in conditioning(net, 1).items()}
    output: torch.Tensor = net(sample.double() if double else sample, 321, **inputs).sample
    return output


def closing(anatomy: Anatomy, *units: int) -> torch.Tensor:
    mask = torch.ones(len(anatomy.units))
    mask[list(units)] = 0
    return mask


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().max() / second.abs().max())


def hooks(net: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


@torch.no_grad()
def test_mask_is_cut_for_every_unit(any_subject: Subject) -> None:
    net, anatomy = any_subject.denoiser, any_subject.anatomy
    intact = call(net)
    moved = 0
    for index in range(len(anatomy.units)):
        mask = closing(anatomy, index)
        with masked(net, anatomy, mask):
            closed = call(net)
        removed = call(cut(net, anatomy, Blueprint.from_mask(anatomy, mask)))
        assert distance(closed, removed) <= TOLERANCE, anatomy.units[index].name
        moved += not torch.equal(removed, intact)
    assert moved == len(anatomy.units)  # a unit without any effect would make this test blind


SUBJECTS: dict[str, Subject] = {}


def subject_of(kind: str) -> Subject:
    if kind not in SUBJECTS:
        net = tiny_unet(kind)
        provider = moediff.installed().create("anatomies", "unet2d", {})
        SUBJECTS[kind] = Subject(net, None, provider.dissect(net), (0, 1000))
    return SUBJECTS[kind]


def random_mask(anatomy: Anatomy, data: st.DataObject) -> torch.Tensor:
    """Any mask that keeps a unit of each width."""
    bits = data.draw(
        st.lists(st.booleans(), min_size=len(anatomy.units), max_size=len(anatomy.units))
    )
    mask = torch.tensor(bits, dtype=torch.float32)
    for span in anatomy.spans.values():
        mask[span.start + data.draw(st.integers(0, span.stop - span.start - 1))] = 1
    return mask


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(UNETS)), st.data())
@torch.no_grad()
def test_mask_is_cut_for_random_plans(kind: str, data: st.DataObject) -> None:
    subject = subject_of(kind)
    mask = random_mask(subject.anatomy, data)
    with masked(subject.denoiser, subject.anatomy, mask):
        closed = call(subject.denoiser)
    blueprint = Blueprint.from_mask(subject.anatomy, mask)
    assert distance(closed, call(cut(subject.denoiser, subject.anatomy, blueprint))) <= TOLERANCE


@torch.no_grad()
def test_rows_masked_together_equal_rows_masked_alone(any_subject: Subject) -> None:
    net, anatomy = any_subject.denoiser, any_subject.anatomy
    units = len(anatomy.units)
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(6, units, generator=generator)
    masks[0], masks[1] = 1, (masks[1] > 0.5).float()
    with masked(net, anatomy, masks):
        together = call(net, rows=6)
    for row, mask in zip(together, masks, strict=True):
        with masked(net, anatomy, mask):
            assert distance(row, call(net, rows=1)[0]) <= TOLERANCE


@torch.no_grad()
def test_a_soft_layer_is_one_composition(any_subject: Subject) -> None:
    """y = u f(x) + (1 - u) bypass(x), over ResBlock and attention together."""
    net, anatomy = any_subject.denoiser, any_subject.anatomy
    for layer in anatomy.layers:
        if not layer.droppable:
            continue
        entered: list[torch.Tensor] = []
        left: list[torch.Tensor] = []
        first, last = (net.get_submodule(layer.modules[i]) for i in (0, -1))
        handles = [
            first.register_forward_pre_hook(lambda m, a, into=entered: into.append(a[0])),
            last.register_forward_hook(lambda m, a, out, into=left: into.append(out)),
        ]
        call(net)
        mask = torch.ones(len(anatomy.units))
        mask[anatomy.layer_units[layer.name]] = 0.3
        with masked(net, anatomy, mask):
            observed: list[torch.Tensor] = []
            handle = last.register_forward_hook(lambda m, a, out, into=observed: into.append(out))
            call(net)
            handle.remove()
        for handle in handles:
            handle.remove()
        wanted = 0.3 * left[0] + 0.7 * Bypass.of(net, layer)(entered[0])
        torch.testing.assert_close(observed[0], wanted)


def test_gradients_reach_every_mask(any_subject: Subject) -> None:
    net, anatomy = any_subject.denoiser, any_subject.anatomy
    masks = torch.full((len(anatomy.units),), 0.7, requires_grad=True)
    with masked(net, anatomy, masks):
        (gradient,) = torch.autograd.grad(call(net).square().sum(), masks)
    assert torch.isfinite(gradient).all()
    silent = [anatomy.units[i].name for i in (gradient == 0).nonzero().flatten().tolist()]
    assert not silent
    assert all(parameter.grad is None for parameter in net.parameters())


def test_gradients_reach_masks_that_are_one() -> None:
    """An open mask must still be gated when it is being learned."""
    subject = subject_of("plain")
    masks = torch.ones(len(subject.anatomy.units), requires_grad=True)
    with masked(subject.denoiser, subject.anatomy, masks):
        (gradient,) = torch.autograd.grad(call(subject.denoiser).square().sum(), masks)
    assert bool((gradient != 0).all())


def test_mask_gradient_is_the_slope() -> None:
    """Against central differences in float64, one layer and one width unit."""
    net = tiny_unet().double()
    anatomy = subject_of("plain").anatomy
    for index in (0, 1):
        mask = torch.ones(len(anatomy.units), dtype=torch.float64)
        mask[index] = 0.6
        learned = mask.clone().requires_grad_(True)
        with masked(net, anatomy, learned):
            (gradient,) = torch.autograd.grad(call(net, double=True).square().sum(), learned)
        values = []
        for step in (-1e-5, 1e-5):
            moved = mask.clone()
            moved[index] += step
            with masked(net, anatomy, moved), torch.no_grad():
                values.append(call(net, double=True).square().sum())
        slope = (values[1] - values[0]) / 2e-5
        torch.testing.assert_close(gradient[index], slope, rtol=1e-5, atol=1e-8)


@torch.no_grad()
def test_open_masks_change_nothing_and_hang_no_hook() -> None:
    subject = subject_of("plain")
    intact = call(subject.denoiser)
    with masked(subject.denoiser, subject.anatomy, torch.ones(len(subject.anatomy.units))):
        assert hooks(subject.denoiser) == 0
        assert torch.equal(call(subject.denoiser), intact)


def test_no_hook_survives_a_normal_or_a_failing_run() -> None:
    subject = subject_of("plain")
    net, mask = subject.denoiser, torch.zeros(len(subject.anatomy.units))
    with masked(net, subject.anatomy, mask):
        assert hooks(net) > 0
    assert hooks(net) == 0

    def interrupted() -> None:
        with masked(net, subject.anatomy, mask):
            net(torch.zeros(1, 5, 8, 8), 3)

    with pytest.raises(RuntimeError, match="channels"):
        interrupted()
    assert hooks(net) == 0


def test_hooks_are_gone_if_they_cannot_all_be_hung() -> None:
    """An anatomy that names a module that is not there fails halfway through the hanging."""
    subject = subject_of("plain")
    other = tiny_unet("class-conditional")  # fewer layers per block
    with (
        pytest.raises(AttributeError),
        masked(other, subject.anatomy, torch.zeros(len(subject.anatomy.units))),
    ):
        pass
    assert hooks(other) == 0


@pytest.mark.parametrize("shape", [(3,), (2, 3), (), (1, 1, 84)])
def test_masks_of_another_length_are_refused(shape: tuple[int, ...]) -> None:
    subject = subject_of("plain")
    with (
        pytest.raises(PlanError, match="masks: got shape"),
        masked(subject.denoiser, subject.anatomy, torch.ones(shape)),
    ):
        pass


@torch.no_grad()
def test_closing_all_channels_of_a_unit_is_closing_the_unit() -> None:
    subject = subject_of("plain")
    net, anatomy = subject.denoiser, subject.anatomy
    width = next(iter(anatomy.widths.values()))
    channels = torch.ones(width.count * width.size)
    channels[: width.size] = 0
    with masked(net, anatomy, closing(anatomy, anatomy.spans[width.name].start)):
        wanted = call(net)
    with masked_channels(net, width, channels):
        assert torch.equal(call(net), wanted)
    with masked_channels(net, width, torch.stack([channels, torch.ones_like(channels)])):
        rows = call(net)
    assert distance(rows[0], wanted[0]) <= TOLERANCE
    assert distance(rows[1], call(net)[1]) <= TOLERANCE
    assert hooks(net) == 0
