"""Cutting, bypassing, sharing: what is one object is exactly what the copies table says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moediff import Anatomy, Blueprint, Intervals, Plan, Slice, Subject, Width, cut
from moediff.errors import AnatomyError, PlanError
from moediff.plan import REST
from moediff.storage import fingerprint
from moediff.surgery import Bypass, _cut_width, assemble, parts_of, untie
from tests.conftest import conditioning, tiny_unet

KINDS = [(0, 0, 0), (0, 1, 2), (0, 0, 1), (0, 1, 1)]
THIRDS = Intervals((0, 300, 600, 1000))


def count(modules: list[nn.Module]) -> int:
    """Distinct parameter elements."""
    return sum(p.numel() for p in {id(p): p for m in modules for p in m.parameters()}.values())


def call(net: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        sample = torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8)
        output: torch.Tensor = net(sample, 5, **conditioning(net, 2)).sample
    return output


def sizes(net: nn.Module, anatomy: Anatomy) -> dict[str, int]:
    """Parameter elements of each layer, and of the rest."""
    return {
        layer.name if layer else REST: sum(
            p.numel()
            for path in paths
            for p in net.get_submodule(path).parameters(layer is not None)
        )
        for layer, paths in parts_of(net, anatomy)
    }


def numbers_of(experts: list[nn.Module], path: str) -> tuple[int, ...]:
    """0 for the first distinct module at a path, 1 for the next, and so on."""
    ids = [id(expert.get_submodule(path)) for expert in experts]
    order = list(dict.fromkeys(ids))
    return tuple(order.index(i) for i in ids)


def assert_sharing(experts: list[nn.Module], anatomy: Anatomy, plan: Plan) -> None:
    for layer, paths in parts_of(experts[0], anatomy):
        wanted = plan.copy_numbers(layer.name if layer else REST)
        for path in paths:
            assert numbers_of(experts, path) == wanted, path


def tables(anatomy: Anatomy) -> list[dict[str, tuple[int, ...]]]:
    """All shared, all apart, layers apart with a shared rest, and layer by layer another way."""
    names = [layer.name for layer in anatomy.layers]
    mixed = {name: KINDS[i % len(KINDS)] for i, name in enumerate(names)}
    return [
        {},
        {REST: (0, 1, 2)},
        {**dict.fromkeys(names, (0, 1, 2))},
        {REST: (0, 1, 1), **mixed},
        {REST: (0, 0, 0), **mixed},
    ]


@pytest.mark.parametrize("which", range(5))
def test_sharing_is_exactly_the_copies_table(any_subject: Subject, which: int) -> None:
    net, anatomy = any_subject.denoiser, any_subject.anatomy
    before = fingerprint(net)
    plan = Plan(THIRDS, [Blueprint()] * 3, tables(anatomy)[which])
    experts = assemble([net] * 3, anatomy, plan, tied=False)
    assert_sharing(experts, anatomy, plan)
    stored = sum(
        size * len(set(plan.copy_numbers(name))) for name, size in sizes(net, anatomy).items()
    )
    assert count(experts) == stored
    assert all(torch.equal(call(expert), call(net)) for expert in experts)
    assert not {id(p) for e in experts for p in e.parameters()} & {id(p) for p in net.parameters()}
    assert fingerprint(net) == before


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_table_with_cuts_shares_right_and_computes_right(data: st.DataObject) -> None:
    anatomy, net = SUBJECT.anatomy, SUBJECT.denoiser
    table = {REST: data.draw(st.sampled_from(KINDS))}
    rows: list[dict[str, tuple[int, ...]]] = [{}, {}, {}]
    drops: list[list[str]] = [[], [], []]
    for layer in anatomy.layers:
        numbers = table[layer.name] = data.draw(st.sampled_from(KINDS))
        for number in set(numbers):
            gone = layer.droppable and data.draw(st.booleans())
            kept = {
                width.name: tuple(
                    sorted(data.draw(st.sets(st.integers(0, width.count - 1), min_size=1)))
                )
                for width in layer.widths
            }
            for expert in (i for i in range(3) if numbers[i] == number):
                rows[expert].update({} if gone else kept)
                drops[expert] += [layer.name] if gone else []
    blueprints = [Blueprint(tuple(d), r) for d, r in zip(drops, rows, strict=True)]
    plan = Plan(THIRDS, blueprints, table)
    experts = assemble([net] * 3, anatomy, plan, tied=False)
    assert_sharing(experts, anatomy, plan)
    tied = assemble([net] * 3, anatomy, plan, tied=True)
    untie(tied, anatomy, plan)
    assert_sharing(tied, anatomy, plan)
    for expert, other, blueprint in zip(experts, tied, blueprints, strict=True):
        wanted = call(cut(net, anatomy, blueprint))
        assert torch.equal(call(expert), wanted)
        assert torch.equal(call(other), wanted)


def _subject() -> Subject:
    import moediff

    net = tiny_unet("three-stages")
    provider = moediff.installed().create("anatomies", "unet2d", {})
    return Subject(net, None, provider.dissect(net), (0, 1000))


SUBJECT = _subject()


def test_experts_that_were_tuned_apart_bring_their_own_weights(subject: Subject) -> None:
    nets = [tiny_unet(seed=seed) for seed in (0, 1)]
    plan = Plan(Intervals.uniform(1000, 2), [Blueprint()] * 2, {REST: (0, 1)})
    before = [fingerprint(net) for net in nets]
    experts = assemble(nets, subject.anatomy, plan, tied=True)
    assert_sharing(experts, subject.anatomy, plan)  # different sources are never tied
    assert all(torch.equal(call(e), call(n)) for e, n in zip(experts, nets, strict=True))
    assert [fingerprint(net) for net in nets] == before


def test_a_layer_shared_by_tuned_experts_is_the_first_ones(subject: Subject) -> None:
    nets = [tiny_unet(seed=seed) for seed in (0, 1)]
    layer = subject.anatomy.layers[0]
    plan = Plan(Intervals.uniform(1000, 2), [Blueprint()] * 2, {REST: (0, 1), layer.name: (0, 0)})
    experts = assemble(nets, subject.anatomy, plan, tied=False)
    assert_sharing(experts, subject.anatomy, plan)
    assert fingerprint(experts[1].get_submodule(layer.name)) == fingerprint(
        nets[0].get_submodule(layer.name)
    )


def test_tied_copies_are_one_until_untied(any_subject: Subject) -> None:
    anatomy = any_subject.anatomy
    first = next(iter(anatomy.widths))
    plan = Plan(THIRDS, [Blueprint(), Blueprint((), {first: (1,)}), Blueprint()], {REST: (0, 1, 2)})
    experts = assemble([any_subject.denoiser] * 3, anatomy, plan, tied=True)
    cut_layer = next(layer for layer in anatomy.layers if first in {w.name for w in layer.widths})
    for layer, paths in parts_of(experts[0], anatomy):
        wanted = (0, 1, 0) if layer is cut_layer else (0, 0, 0)
        assert numbers_of(experts, paths[0]) == wanted
    outputs = [call(expert) for expert in experts]
    untie(experts, anatomy, plan)
    assert_sharing(experts, anatomy, plan)
    assert all(torch.equal(call(e), out) for e, out in zip(experts, outputs, strict=True))


def test_training_an_untied_copy_leaves_the_others_alone(subject: Subject) -> None:
    plan = Plan(Intervals.uniform(1000, 2), [Blueprint()] * 2, {REST: (0, 1)})
    experts = assemble([subject.denoiser] * 2, subject.anatomy, plan, tied=True)
    untie(experts, subject.anatomy, plan)
    before = call(experts[1])
    with torch.no_grad():
        for parameter in experts[0].parameters():
            parameter.zero_()
    assert torch.equal(call(experts[1]), before)
    assert not torch.equal(call(experts[0]), before)


def test_untying_twice_changes_nothing_more(subject: Subject) -> None:
    plan = Plan(Intervals.uniform(1000, 2), [Blueprint()] * 2, {REST: (0, 1)})
    experts = assemble([subject.denoiser] * 2, subject.anatomy, plan, tied=True)
    untie(experts, subject.anatomy, plan)
    ids = [id(p) for e in experts for p in e.parameters()]
    untie(experts, subject.anatomy, plan)
    assert [id(p) for e in experts for p in e.parameters()] == ids


def test_cut_returns_a_smaller_copy_and_leaves_the_model(any_subject: Subject) -> None:
    net, anatomy = any_subject.denoiser, any_subject.anatomy
    before, modules = fingerprint(net), dict(net.named_modules())
    everything = Blueprint(tuple(anatomy.layer_units), dict.fromkeys(anatomy.widths, (0,)))
    smaller = cut(net, anatomy, everything)
    assert count([smaller]) < count([net])
    assert torch.isfinite(call(smaller)).all()
    assert fingerprint(net) == before
    assert dict(net.named_modules()) == modules


def test_cut_modules_say_their_new_sizes(subject: Subject) -> None:
    width = next(w for w in subject.anatomy.widths.values() if w.kind == "groups")
    smaller = cut(subject.denoiser, subject.anatomy, Blueprint((), {width.name: (0, 2)}))
    block = smaller.get_submodule(width.consumer.removesuffix(".conv2"))
    channels = 2 * width.size
    assert (block.conv1.out_channels, block.conv2.in_channels) == (channels, channels)
    assert (block.norm2.num_channels, block.norm2.num_groups) == (channels, 2)
    assert block.time_emb_proj.out_features == channels
    heads = next(w for w in subject.anatomy.widths.values() if w.kind == "heads")
    smaller = cut(subject.denoiser, subject.anatomy, Blueprint((), {heads.name: (1,)}))
    assert smaller.get_submodule(heads.consumer.removesuffix(".to_out.0")).heads == 1


def test_frozen_parameters_stay_frozen_when_cut(subject: Subject) -> None:
    net = tiny_unet().requires_grad_(False)
    name = next(iter(subject.anatomy.widths))
    smaller = cut(net, subject.anatomy, Blueprint((), {name: (0,)}))
    assert not any(parameter.requires_grad for parameter in smaller.parameters())


def test_sides_are_cut_where_the_blocks_say() -> None:
    """Two blocks one after the other, as scale and shift: unit 1 of 3 stays in both."""
    net = nn.Sequential(nn.Linear(2, 12))
    rows = net[0].weight.detach().clone()
    _cut_width(net, Width("w", "groups", 3, 2, "0", 1, (Slice("0", "out", blocks=2),)), (1,))
    assert torch.equal(net[0].weight, rows[[2, 3, 8, 9]])
    assert net[0].out_features == 4


@pytest.mark.parametrize(
    "module", [nn.Conv2d(4, 4, 1, groups=2), nn.LayerNorm(4), nn.Conv1d(4, 4, 1)]
)
def test_a_module_that_cannot_shrink_is_named(module: nn.Module) -> None:
    width = Width("w", "groups", 4, 1, "0", 1, (Slice("0", "out"),))
    with pytest.raises(
        AnatomyError, match=f"0: cannot cut the out side of a {type(module).__name__}"
    ):
        _cut_width(nn.Sequential(module), width, (0,))


def test_bypasses_pass_on_what_stays() -> None:
    sample = torch.randn(1, 6, 2, 2)
    convolution = nn.Conv2d(6, 4, 1)
    assert torch.equal(Bypass("identity", 6)(sample, None), sample)
    assert torch.equal(Bypass("previous", 4)(sample, temb=None), sample[:, :4])
    assert torch.equal(Bypass("shortcut", 4, convolution)(sample), convolution(sample))


def test_disagreeing_sharers_are_refused(subject: Subject) -> None:
    name = next(iter(subject.anatomy.widths))
    plan = Plan(Intervals.uniform(1000, 2), [Blueprint(), Blueprint((), {name: (0,)})])
    with pytest.raises(PlanError, match="experts that share copy 0 keep different units"):
        assemble([subject.denoiser] * 2, subject.anatomy, plan, tied=False)
