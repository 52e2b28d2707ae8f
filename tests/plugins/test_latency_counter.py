"""The latency counter: a table that adds up, is measured once, and says what it was measured on."""

from __future__ import annotations

import json
import time
from typing import Any

import attrs
import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

import moediff
from moediff.anatomy import Anatomy, Layer, Slice, Width
from moediff.errors import ArtefactError, CountError
from moediff_plugins.counters import latency
from moediff_plugins.counters.latency import Latency, _slope
from moediff_plugins.counters.prediction import predicted_and_measured
from moediff_plugins.counters.timing import captured, device_name, fastest
from moediff_plugins.metrics.latency import Latency as Measured
from tests.conftest import tiny_task, tiny_unet

QUICK = Latency(batch=2, rounds=3)


class Sleeping(nn.Conv2d):
    """Takes `pace` seconds per input channel."""

    pace = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.pace * self.in_channels)
        return super().forward(x)


class Part(nn.Module):
    def __init__(self, pace: float, start: float) -> None:
        super().__init__()
        self.enter, self.leave, self.start = nn.Conv2d(1, 8, 1), Sleeping(8, 1, 1), start
        self.leave.pace = pace

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.start)
        return x + self.leave(self.enter(x))


class Timed(nn.Module):
    """A denoiser of which every layer's time is known: seconds per channel, and to start."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"sample_size": 4, "in_channels": 1}
        self.parts = nn.ModuleList([Part(6e-3, 2e-3), Part(5e-4, 20e-3)])

    def forward(self, sample: torch.Tensor, timestep: Any, return_dict: bool = True) -> Any:
        time.sleep(10e-3)
        for part in self.parts:
            sample = part(sample)
        return (sample,)


@pytest.fixture
def timed() -> moediff.Subject:
    layers = []
    for name in ("parts.0", "parts.1"):
        places = (Slice(f"{name}.enter", "out"), Slice(f"{name}.leave", "in"))
        width = Width(f"{name}.channels", "groups", 4, 2, f"{name}.leave", 1, places)
        layers.append(Layer(name, 0, "mid", 1, (name,), (width,)))
    return moediff.Subject(Timed(), DDPMScheduler(), Anatomy(tuple(layers)), (0, 1000))


@pytest.fixture(autouse=True)
def _forget() -> Any:
    """Tables of one test are no tables of the next."""
    kept = dict(latency.TABLES)
    latency.TABLES.clear()
    yield
    latency.TABLES.clear()
    latency.TABLES.update(kept)


def test_the_table_finds_which_units_take_long(timed):
    """By hand, in ms: 12 a unit in the first layer, 1 in the second; sleep is never short."""
    prices = Latency(batch=1, rounds=3).price(timed)
    assert prices.unit == "ms"
    assert float(prices.units[1]) > 2 * float(prices.units[6])
    assert float(prices.layers(torch.ones(10).double())[0]) >= 40
    assert (prices.bypass < prices.layers(torch.ones(10).double())).all()


def test_a_slope_is_the_line_through_the_whole_layer():
    times = {("a", "whole", 0): 10.0, ("a", "w", 4): 6.0, ("a", "w", 1): 3.0, ("a", "v", 1): 0.0}
    assert _slope(times, "a", "w", 8) == pytest.approx(1.0)
    times["a", "w", 1] = 10.0  # the cut to one unit saves nothing: 4 x 4 / (16 + 49)
    assert _slope(times, "a", "w", 8) == pytest.approx(16 / 65)
    times |= {("a", "w", 4): 11.0, ("a", "w", 1): 12.0}
    assert _slope(times, "a", "w", 8) == 0.0
    assert _slope(times, "a", "missing", 1) == 0.0


def test_the_table_adds_up_to_the_whole_call_and_removing_never_costs(any_subject):
    prices = QUICK.price(any_subject)
    (table,) = latency.TABLES.values()
    assert prices.full == pytest.approx(table["total"], rel=1e-9)
    assert table["device"] == device_name(any_subject.device)
    for part in (prices.units, prices.fixed, prices.bypass):
        assert (part >= -1e-9).all()
    assert prices.outside >= -1e-9
    masks = 1 - torch.eye(len(any_subject.anatomy.units), dtype=torch.float64)
    assert (prices.experts(masks) <= prices.full + 1e-9).all()


def test_a_process_measures_once_and_a_folder_keeps_it(subject, tmp_path):
    counter = attrs.evolve(QUICK, folder=str(tmp_path / "tables"))
    first, second = counter.price(subject), counter.price(subject)
    assert torch.equal(first.units, second.units)
    (file,) = (tmp_path / "tables").iterdir()
    content = json.loads(file.read_text())
    assert content["unit"] == "ms"
    assert content["device"] == device_name(torch.device("cpu"))
    content["outside"] = 123.0
    file.write_text(json.dumps(content))
    latency.TABLES.clear()
    assert counter.price(subject).outside == 123.0
    # Weights do not matter, shapes do.
    other = moediff.installed().dissect(tiny_unet(seed=1), DDPMScheduler())
    assert counter.price(other).outside == 123.0
    counter.price(moediff.installed().dissect(tiny_unet("class-conditional"), DDPMScheduler()))
    assert len(list((tmp_path / "tables").iterdir())) == 2
    file.write_text("{")
    latency.TABLES.clear()
    with pytest.raises(ArtefactError, match="Delete it"):
        counter.price(subject)


def test_another_process_reads_the_table_from_the_usual_place(subject):
    first = QUICK.price(subject)
    latency.TABLES.clear()
    assert torch.equal(QUICK.price(subject).units, first.units)  # no two timings are equal
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert not torch.equal(QUICK.price(subject).units, first.units)
    finally:
        torch.set_num_threads(threads)


def test_a_denoiser_without_weights_is_refused(subject):
    with pytest.raises(CountError, match="meta"):
        QUICK.count(subject.denoiser.to("meta"))


def test_measuring_leaves_the_model_as_it_was(subject):
    net = subject.denoiser.train()
    before = {name: (value, value.clone()) for name, value in net.state_dict().items()}
    QUICK.price(subject)
    QUICK.count(net)
    assert all(module.training for module in net.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())
    for name, value in net.state_dict().items():
        assert value.data_ptr() == before[name][0].data_ptr()
        assert torch.equal(value, before[name][1])


def test_fastest_are_in_milliseconds_and_in_order():
    found = fastest([lambda: time.sleep(0.03), lambda: None], torch.device("cpu"), 3)
    assert found[0] >= 30  # sleep is never short
    assert found[1] < found[0]


def test_captured_are_the_arguments_of_a_call():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    seen = captured(net, ["1"], {"input": torch.ones(1, 2)})
    assert torch.equal(seen["1"][0][0], net[0](torch.ones(1, 2)))
    assert not net[1]._forward_pre_hooks


def test_predicted_stands_beside_measured(subject):
    run = moediff.Run(sampling=moediff.Sampling("ddim", 2))
    intervals = moediff.Intervals.uniform(1000, 2)
    drop = moediff.Blueprint(("down_blocks.1.resnets.1", "up_blocks.0.resnets.2"))
    plan = moediff.Plan(intervals, (drop, drop), {"*": (0, 1)})
    mixture = moediff.ExpertMixture.from_experts(subject.split(intervals), plan)
    prices = Latency(batch=4, rounds=3).price(subject)
    predicted, measured = predicted_and_measured(
        mixture, prices, Measured(pairs=3), subject, tiny_task(), run
    )
    assert predicted == pytest.approx(
        float(prices.experts(drop.mask(subject.anatomy))) / prices.full
    )
    assert 0 < predicted < 1
    assert measured.unit == "x base"
    assert float(run.records["free/predicted"]) == pytest.approx(predicted)
    assert float(run.records["free/measured"]) == pytest.approx(measured.value)
