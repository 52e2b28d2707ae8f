"""The mixture: routes batches, drops into pipelines, and is saved without pickle, bit-equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from torch import nn

from moediff import Blueprint, ExpertMixture, Intervals, Plan
from moediff.errors import DataError, PlanError
from moediff.plan import REST
from moediff.surgery import parts_of, untie
from tests.core.fresh import python
from tests.core.mixtures import (
    CUTS,
    LABELS,
    MIXED,
    SAMPLE,
    dissected,
    equal,
    mixture_of,
    plan_of,
    trained,
)


def sharing(mixture: ExpertMixture) -> dict[str, tuple[int, ...]]:
    """For every part the number of its distinct module, expert by expert."""
    found = {}
    for layer, paths in parts_of(mixture.experts[0], mixture.anatomy):
        for path in paths:
            ids = [id(expert.get_submodule(path)) for expert in mixture.experts]
            order = list(dict.fromkeys(ids))
            found[path if layer is None else layer.name] = tuple(order.index(i) for i in ids)
    return found


@pytest.mark.parametrize(
    "steps", [MIXED, MIXED.double(), MIXED.float(), torch.tensor([1000.0, 0, 0, 0])]
)
def test_mixed_batches_equal_row_by_row_calls(steps: torch.Tensor) -> None:
    mixture = trained(mixture_of(dissected())).double()  # so that the batch size does not show
    sample = SAMPLE.double()
    with torch.no_grad():
        rows = torch.cat(
            [
                mixture(sample[i : i + 1], steps[i : i + 1], class_labels=LABELS[i : i + 1]).sample
                for i in range(4)
            ]
        )
        by_keyword = mixture(sample, steps, class_labels=LABELS).sample
        by_position = mixture(sample, steps, LABELS).sample
        (as_tuple,) = mixture(sample, steps, LABELS, False)
        (other_tuple,) = mixture(sample, timestep=steps, class_labels=LABELS, return_dict=False)
        by_expert = torch.cat(
            [
                mixture.experts[int(mixture.route(steps[i]))](
                    sample[i : i + 1], steps[i], LABELS[i : i + 1]
                ).sample
                for i in range(4)
            ]
        )
    torch.testing.assert_close(rows, by_expert, rtol=1e-9, atol=1e-9)
    for whole in (by_keyword, by_position, as_tuple, other_tuple):
        torch.testing.assert_close(whole, rows, rtol=1e-9, atol=1e-9)
    assert (rows[0] - rows[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "timestep", [299, 299.9, torch.tensor(299), torch.tensor([299]), torch.tensor([299] * 4)]
)
def test_every_form_of_a_timestep_reaches_its_expert(timestep: Any) -> None:
    mixture = trained(mixture_of(dissected()))
    with torch.no_grad():
        made = mixture(SAMPLE, timestep, class_labels=LABELS)
        wanted = mixture.experts[0](SAMPLE, timestep, class_labels=LABELS)
    assert type(made) is type(wanted)
    assert torch.equal(made.sample, wanted.sample)


def test_gradients_of_a_mixed_batch_reach_exactly_its_experts() -> None:
    plan = Plan(CUTS, [Blueprint()] * 3, {REST: (0, 1, 2)})
    mixture = mixture_of(dissected(), plan).untie()
    mixture(SAMPLE, torch.tensor([0, 700, 0, 700]), class_labels=LABELS).sample.sum().backward()
    reached = [any(p.grad is not None for p in expert.parameters()) for expert in mixture.experts]
    assert reached == [True, False, True]


class Passing(nn.Module):
    """A denoiser with nested inputs, as SDXL and ControlNet have them."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, sample: Any, timestep: Any, extra: Any, residuals: Any) -> Any:
        return (self.scale * sample + extra["rows"] + residuals[0] + extra["one"],)


def test_nested_arguments_are_split_too() -> None:
    mixture = mixture_of(dissected())
    mixture.experts = nn.ModuleList([Passing(1), Passing(2), Passing(3)])
    rows = torch.arange(4.0).view(4, 1, 1, 1)
    extra = {"rows": rows, "one": torch.ones(1)}
    (made,) = mixture(SAMPLE, MIXED, extra=extra, residuals=(10 * rows,))
    scales = torch.tensor([3.0, 1, 2, 2]).view(4, 1, 1, 1)
    torch.testing.assert_close(made, scales * SAMPLE + 11 * rows + 1)


def test_bad_timesteps_are_errors() -> None:
    mixture = mixture_of(dissected())
    for wrong in (-1, 1001, float("nan"), torch.tensor([3.0, float("nan")])):
        with pytest.raises(DataError, match="timestep: got"):
            mixture(SAMPLE, wrong, class_labels=LABELS)
    with pytest.raises(PlanError, match="got 2 values for a batch of 4"):
        mixture(SAMPLE, torch.tensor([0, 999]), class_labels=LABELS)


def test_bfloat16_weights_do_not_move_the_route() -> None:
    subject = dissected()
    plan = Plan(Intervals((0, 501, 1000)), [Blueprint()] * 2, {REST: (0, 1)})
    mixture = trained(mixture_of(subject, plan)).to(torch.bfloat16)
    sample, timestep = SAMPLE.to(torch.bfloat16), torch.tensor([501] * 4)
    assert float(timestep.to(torch.bfloat16)[0]) == 500
    with torch.no_grad():
        made = mixture(sample, timestep, class_labels=LABELS).sample
        assert torch.equal(made, mixture.experts[1](sample, timestep, class_labels=LABELS).sample)


def test_one_expert_per_interval() -> None:
    subject = dissected()
    with pytest.raises(PlanError, match="experts: got 2; the plan has 3 intervals"):
        ExpertMixture([subject.denoiser] * 2, plan_of(subject), subject, tied=False)


def test_the_base_is_left_alone_and_the_mixture_is_in_eval_mode() -> None:
    subject = dissected()
    before = {name: value.clone() for name, value in subject.denoiser.state_dict().items()}
    mixture = trained(mixture_of(subject))
    assert all(torch.equal(before[k], v) for k, v in subject.denoiser.state_dict().items())
    assert not any(module.training for module in mixture.modules())


@pytest.mark.parametrize(
    "feature", ["enable_freeu", "fuse_qkv_projections", "_load_ip_adapter_weights"]
)
def test_what_a_mixture_cannot_do_is_refused(feature: str) -> None:
    with pytest.raises(NotImplementedError, match="not possible for an ExpertMixture"):
        getattr(mixture_of(dissected()), feature)()


# Saving


LOAD = """
import sys, torch, moediff
from diffusers import DDIMPipeline, DDPMPipeline
torch.set_num_threads(1)
mixture = moediff.ExpertMixture.from_pretrained(sys.argv[1])
inputs = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    made = mixture(**inputs).sample
print(made.numpy().tobytes().hex())
print(sum(p.numel() for p in mixture.parameters()), mixture.tied, mixture.plan.to_json())
"""


def test_a_fresh_process_gives_bit_equal_output(tmp_path: Path) -> None:
    mixture = trained(mixture_of(dissected()))
    mixture.save_pretrained(tmp_path / "m")
    inputs = {"sample": SAMPLE, "timestep": MIXED, "class_labels": LABELS}
    torch.save(inputs, tmp_path / "inputs.pt")
    with torch.no_grad():
        made = mixture(**inputs).sample
    lines = python(LOAD, tmp_path / "m", tmp_path / "inputs.pt", seed=77).splitlines()
    assert lines[0] == made.numpy().tobytes().hex()
    count = sum(p.numel() for p in mixture.parameters())
    assert lines[1] == f"{count} False {mixture.plan.to_json()}"


@pytest.mark.parametrize("untied", [False, True])
def test_what_is_shared_is_still_one_object_after_loading(tmp_path: Path, untied: bool) -> None:
    mixture = mixture_of(dissected())
    if untied:
        trained(mixture)
    mixture.save_pretrained(tmp_path)
    loaded = ExpertMixture.from_pretrained(tmp_path)
    assert sharing(loaded) == sharing(mixture)
    assert loaded.tied is mixture.tied
    assert loaded.plan == mixture.plan
    count = {id(p): p.numel() for p in loaded.parameters()}
    assert sum(count.values()) == sum(p.numel() for p in mixture.parameters())
    assert equal(loaded, mixture)
    # one parameter, whichever expert's name it is reached by
    names: dict[int, set[int]] = {}
    for (_, mine), (_, theirs) in zip(
        mixture.named_parameters(remove_duplicate=False),
        loaded.named_parameters(remove_duplicate=False),
        strict=True,
    ):
        names.setdefault(id(mine), set()).add(id(theirs))
    assert all(len(ids) == 1 for ids in names.values())
    assert all(p.requires_grad and not p.is_meta for p in loaded.parameters())


def test_training_a_loaded_mixture_trains_what_is_shared_once(tmp_path: Path) -> None:
    mixture = trained(mixture_of(dissected()))
    mixture.save_pretrained(tmp_path)
    results = []
    for net in (mixture, ExpertMixture.from_pretrained(tmp_path)):
        optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
        for timestep in (100, 500, 900):
            optimiser.zero_grad()
            net(SAMPLE, timestep, class_labels=LABELS).sample.square().mean().backward()
            optimiser.step()
        results.append(net)
    assert equal(*results)
    assert sharing(results[0]) == sharing(results[1])


def test_a_loaded_tied_mixture_unties_as_the_first_one(tmp_path: Path) -> None:
    mixture = mixture_of(dissected())
    mixture.save_pretrained(tmp_path)
    loaded = ExpertMixture.from_pretrained(tmp_path).untie()
    mixture.untie()
    assert sharing(loaded) == sharing(mixture)
    untie(list(loaded.experts), loaded.anatomy, loaded.plan)
    assert equal(loaded, mixture)


@pytest.mark.parametrize("pattern", [(0, 1, 2), (0, 1, 0), (0, 0, 1), (0, 1, 1)])
def test_experts_tuned_apart_are_saved_tied_too(tmp_path: Path, pattern: tuple[int, ...]) -> None:
    """What is tied beyond the plan depends on which experts were one denoiser."""
    nets = [dissected(seed=seed) for seed in range(3)]
    plan = Plan(CUTS, [Blueprint()] * 3, {REST: (0, 1, 2)})
    mixture = ExpertMixture.from_experts([nets[number] for number in pattern], plan)
    assert mixture.tied
    mixture.save_pretrained(tmp_path)
    loaded = ExpertMixture.from_pretrained(tmp_path)
    assert sharing(loaded) == sharing(mixture)
    assert equal(loaded, mixture)


def test_each_shared_tensor_is_in_the_file_once(tmp_path: Path) -> None:
    mixture = trained(mixture_of(dissected()))
    mixture.save_pretrained(tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "mixture.safetensors")
    elements = sum(p.numel() for p in mixture.parameters())
    assert sum(value.numel() for value in stored.values()) == elements
    size = (tmp_path / "mixture.safetensors").stat().st_size
    assert 4 * elements < size < 4 * elements + 100_000
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "config.json", "mixture.json", "mixture.safetensors",
    ]  # fmt: skip


def test_half_precision_is_kept_and_can_be_asked_for(tmp_path: Path) -> None:
    mixture = trained(mixture_of(dissected()))
    mixture.save_pretrained(tmp_path / "whole")
    mixture.to(torch.float16)
    mixture.save_pretrained(tmp_path / "half")
    assert equal(ExpertMixture.from_pretrained(tmp_path / "half"), mixture)
    asked = ExpertMixture.from_pretrained(tmp_path / "whole", torch_dtype=torch.float16)
    assert asked.dtype == torch.float16
    assert equal(asked, mixture)


def test_saving_again_replaces_and_subfolders_are_honoured(tmp_path: Path) -> None:
    subject = dissected()
    mixture_of(subject).save_pretrained(tmp_path / "a" / "unet")
    mixture = trained(mixture_of(subject))
    mixture.save_pretrained(tmp_path / "a" / "unet", safe_serialization=True, variant=None)
    assert equal(ExpertMixture.from_pretrained(tmp_path / "a", subfolder="unet"), mixture)


# Pipelines


PIPELINE = """
import sys, torch
import moediff
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    made = pipe(batch_size=2, num_inference_steps=4, generator=generator, output_type="np")
    print(type(pipe).__name__, type(pipe.unet).__name__, made.images.tobytes().hex())
"""


def test_whole_pipelines_are_saved_and_loaded_in_a_fresh_process(tmp_path: Path) -> None:
    lines, folders = [], []
    for kind, scheduler in ((DDPMPipeline, DDPMScheduler()), (DDIMPipeline, DDIMScheduler())):
        subject = dissected("plain")
        pipe = kind(unet=subject.denoiser, scheduler=scheduler)
        pipe.unet = trained(mixture_of(subject))
        pipe.set_progress_bar_config(disable=True)
        folder = tmp_path / kind.__name__
        pipe.save_pretrained(folder)
        index = json.loads((folder / "model_index.json").read_text())
        assert index["unet"] == ["moediff", "ExpertMixture"]
        generator = torch.Generator().manual_seed(3)
        made = pipe(batch_size=2, num_inference_steps=4, generator=generator, output_type="np")
        lines.append(f"{kind.__name__} ExpertMixture {made.images.tobytes().hex()}")
        folders.append(folder)
    assert python(PIPELINE, *folders, seed=77).splitlines() == lines


def test_the_mixture_looks_like_its_base_to_a_pipeline() -> None:
    subject = dissected()
    mixture = mixture_of(subject)
    assert mixture.config.sample_size == subject.denoiser.config.sample_size
    assert mixture.config.in_channels == 3
    assert mixture.dtype == torch.float32
    assert mixture.device == torch.device("cpu")


def test_a_mixture_is_packed_alike_in_every_process() -> None:
    code = """
from diffusers import DDPMScheduler
from moediff.storage import fingerprint
from tests.core.mixtures import dissected, mixture_of
print(fingerprint(mixture_of(dissected()).pack()))
"""
    assert python(code, seed=1) == python(code, seed=2)
