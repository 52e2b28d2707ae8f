"""The task: its parts, batches and prompts, and everything that a stranger may set wrongly."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import pytest
import torch

from moediff import Task
from moediff.errors import DataError, OptionError
from moediff.storage import fingerprint
from tests.conftest import tiny_task

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


def test_subset_keeps_the_rows_of_its_classes() -> None:
    task = Task.from_arrays(BYTES, [0, 1, 2, 0, 1, 2], null_label=3).subset([2, 0])
    assert task.conditioning["class_labels"].tolist() == [0, 2, 0, 2]
    assert torch.equal(task.samples, Task.from_arrays(BYTES[[0, 2, 3, 5]]).samples)
    assert task.null["class_labels"].tolist() == [3]


@pytest.mark.parametrize("classes", [[7], [0, 7], []])
def test_subset_of_absent_classes_is_refused(classes: list[int]) -> None:
    with pytest.raises(DataError, match=r"allowed are \[0, 1\]"):
        Task.from_arrays(BYTES, [0, 1] * 3).subset(classes)


def test_subset_needs_labels() -> None:
    with pytest.raises(DataError, match="no labels"):
        Task.from_arrays(BYTES).subset([0])


def test_batches_keep_rows_together_and_repeat_with_their_seed() -> None:
    task = Task.from_arrays(BYTES, np.arange(6))
    first, second = (task.batch(50, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first.clean, second.clean)
    labels = first.conditioning["class_labels"]
    assert torch.equal(first.clean, task.samples[labels])
    assert set(labels.tolist()) == set(range(6))


def test_conditioning_is_dropped_at_its_rate() -> None:
    task = Task.from_arrays(BYTES, [0] * 6, null_label=9)
    labels = task.batch(4000, torch.Generator().manual_seed(0)).conditioning["class_labels"]
    share = (labels == 9).double().mean().item()
    assert share == pytest.approx(0.1, abs=0.02)
    never = attrs.evolve(task, drop_conditioning=0.0).batch(500, torch.Generator().manual_seed(0))
    assert set(never.conditioning["class_labels"].tolist()) == {0}


def test_dropping_works_for_sequences_too() -> None:
    tokens, null = torch.ones(6, 4, 5), torch.zeros(1, 4, 5)
    name = "encoder_hidden_states"
    task = Task(torch.zeros(6, 3, 8, 8), {name: tokens}, {name: null}, drop_conditioning=0.5)
    rows = task.batch(400, torch.Generator().manual_seed(0)).conditioning[name]
    means = rows.flatten(1).mean(1)
    assert set(means.tolist()) == {0.0, 1.0}
    assert means.mean().item() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("rate", [1.0, -0.1])
def test_drop_rates_outside_are_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="drop_conditioning"):
        attrs.evolve(tiny_task(), drop_conditioning=rate)


def test_prompts_are_spread_over_the_classes() -> None:
    task = Task.from_arrays(BYTES, [0, 2, 0, 2, 0, 2], null_label=5)
    chosen, null = task.prompts(4)
    assert chosen["class_labels"].tolist() == [0, 0, 2, 2]
    assert null["class_labels"].tolist() == [5] * 4
    assert len(task.prompts(20)[0]["class_labels"]) == 20
    assert Task.from_arrays(BYTES).prompts(3) == ({}, {})


def test_check_names_what_does_not_fit() -> None:
    plain, labelled = Task.from_arrays(BYTES), Task.from_arrays(BYTES, [0] * 6)
    plain.check((3, 8, 8), conditioned=False)
    labelled.check((3, 8, 8), conditioned=True)
    with pytest.raises(DataError, match=r"shape \(3, 8, 8\); the denoiser takes \(1, 8, 8\)"):
        plain.check((1, 8, 8), conditioned=False)
    with pytest.raises(DataError, match="Pass labels"):
        plain.check((3, 8, 8), conditioned=True)
    with pytest.raises(DataError, match="Leave the labels out"):
        labelled.check((3, 8, 8), conditioned=False)


# --------------------------------------------------------------------- held-out prompts, extra rows

WORDS = torch.arange(12, dtype=torch.float32).view(6, 2, 1)
TEXT = "encoder_hidden_states"


def text_task(**changes: Any) -> Task:
    return Task(torch.zeros(4, 3, 8, 8), {TEXT: WORDS[:4]}, held_out={TEXT: WORDS[4:]}, **changes)


def test_sampling_asks_for_the_held_out_prompts_and_training_for_the_others() -> None:
    task = text_task(null={TEXT: torch.full((1, 2, 1), -1.0)})
    chosen, null = task.prompts(4)
    assert torch.equal(chosen[TEXT], WORDS[[4, 4, 5, 5]])
    assert torch.equal(null[TEXT], torch.full((4, 2, 1), -1.0))
    assert torch.equal(task.prompts(4, training=True)[0][TEXT], WORDS[:4])
    assert torch.equal(task.prompts(8, training=True)[0][TEXT], WORDS[[0, 0, 1, 1, 2, 2, 3, 3]])
    rows = attrs.evolve(task, null={}).batch(200, torch.Generator().manual_seed(0))
    assert set(rows.conditioning[TEXT].flatten().tolist()) == set(range(8))
    assert len(task) == 4


def test_held_out_labels_are_sampled_in_order() -> None:
    task = Task.from_arrays(BYTES, [0, 1, 2, 0, 1, 2])
    task = attrs.evolve(task, held_out={"class_labels": torch.tensor([2, 1, 1, 2])})
    assert task.prompts(4)[0]["class_labels"].tolist() == [1, 1, 2, 2]
    part = task.subset([0, 1])
    assert part.held_out["class_labels"].tolist() == [1, 1]
    assert part.prompts(3)[0]["class_labels"].tolist() == [1, 1, 1]
    with pytest.raises(DataError, match=r"held_out: got \{'class_labels': 0\} rows"):
        task.subset([0]).check((3, 8, 8), conditioned=True)


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        ({"other": WORDS}, r"held_out: got rows of shape \{'other': \(2, 1\)\}; those of the"),
        ({TEXT: WORDS[:, :1]}, r"\(1, 1\)\}; those of the task have .*\(2, 1\)"),
        ({TEXT: WORDS[:0]}, "0} rows; allowed is one number for all keywords, at least 1"),
    ],
)
def test_check_names_held_out_rows_that_do_not_fit(
    held_out: dict[str, torch.Tensor], message: str
) -> None:
    text_task().check((3, 8, 8), conditioned=False)
    with pytest.raises(DataError, match=message):
        attrs.evolve(text_task(), held_out=held_out).check((3, 8, 8), conditioned=False)


def test_held_out_keywords_have_one_number_of_rows() -> None:
    both = {TEXT: WORDS, "mask": WORDS[:, :, 0]}
    task = Task(torch.zeros(6, 3, 8, 8), both)
    uneven = attrs.evolve(task, held_out={TEXT: WORDS[:2], "mask": WORDS[:3, :, 0]})
    with pytest.raises(DataError, match=r"got \{'encoder_hidden_states': 2, 'mask': 3\} rows"):
        uneven.check((3, 8, 8), conditioned=False)


@pytest.mark.parametrize(("size", "share", "others"), [(8, 3 / 8, 3), (64, 3 / 8, 24), (5, 0.1, 0)])
def test_extra_rows_fill_their_share_of_every_batch(size: int, share: float, others: int) -> None:
    extra = Task.from_arrays(BYTES[3:], [7, 8, 9], null_label=5)
    task = Task.from_arrays(BYTES[:3], [0, 1, 2], null_label=4)
    mixed = attrs.evolve(task, extra=extra, extra_share=share)
    found = [mixed.batch(size, torch.Generator().manual_seed(seed)) for seed in (0, 1, 0)]
    assert torch.equal(found[0].clean, found[2].clean)
    labels = [batch.conditioning["class_labels"] for batch in found]
    for batch, words in zip(found, labels, strict=True):
        assert batch.clean.shape == (size, 3, 8, 8)
        assert set(words[: size - others].tolist()) <= {0, 1, 2, 4}  # 4 where it was dropped
        assert set(words[size - others :].tolist()) <= {5, 7, 8, 9}
        for image, word in zip(batch.clean, words.tolist(), strict=True):
            if word in (0, 1, 2, 7, 8, 9):
                assert torch.equal(
                    image, (*task.samples, *extra.samples)[word % 7 + 3 * (word > 6)]
                )


def test_without_extra_rows_batches_are_as_before() -> None:
    task = Task.from_arrays(BYTES, [0] * 6, null_label=9)
    batch = task.batch(50, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(6, (50,), generator=generator)
    dropped = torch.rand(50, generator=generator) < 0.1
    assert torch.equal(batch.clean, task.samples[rows])
    assert torch.equal(batch.conditioning["class_labels"], torch.where(dropped, 9, 0))


def test_extra_and_its_share_come_together() -> None:
    task = tiny_task()
    with pytest.raises(OptionError, match=r"extra_share: got 0\.5 without an `extra` task"):
        attrs.evolve(task, extra_share=0.5)
    with pytest.raises(OptionError, match=r"extra_share: got 0\.0 with an `extra` task"):
        attrs.evolve(task, extra=task)
    with pytest.raises(ValueError, match="extra_share"):
        attrs.evolve(task, extra=task, extra_share=1.0)


def test_check_looks_into_the_extra_rows() -> None:
    task = Task.from_arrays(BYTES)
    mixed = attrs.evolve(task, extra=Task.from_arrays(BYTES[:2]), extra_share=0.25)
    mixed.check((3, 8, 8), conditioned=False)
    small = attrs.evolve(mixed, extra=Task.from_arrays(BYTES[:, :4]))
    with pytest.raises(DataError, match=r"shape \(3, 4, 8\); the denoiser takes \(3, 8, 8\)"):
        small.check((3, 8, 8), conditioned=False)
    worded = attrs.evolve(mixed, extra=Task(mixed.samples, {TEXT: WORDS}))
    with pytest.raises(DataError, match="extra: got rows of shape"):
        worded.check((3, 8, 8), conditioned=False)


def test_classes_are_those_of_labels_that_are_numbers() -> None:
    assert Task.from_arrays(BYTES, [4, 0, 4, 2, 0, 2]).classes == [0, 2, 4]
    assert Task.from_arrays(BYTES).classes == []
    samples = Task.from_arrays(BYTES).samples
    assert Task(samples, {"class_labels": torch.eye(6)}).classes == []  # embedded as they are


def test_the_fingerprint_tells_tasks_apart() -> None:
    task = text_task()
    extra = attrs.evolve(task, held_out={})
    others = [
        attrs.evolve(task, held_out={}),
        attrs.evolve(task, held_out={TEXT: WORDS[5:]}),
        attrs.evolve(task, extra=extra, extra_share=0.5),
        attrs.evolve(task, extra=extra, extra_share=0.25),
        attrs.evolve(task, extra=attrs.evolve(extra, samples=extra.samples + 1), extra_share=0.5),
    ]
    assert fingerprint(text_task()) == fingerprint(task)
    assert len({fingerprint(t) for t in (task, *others)}) == 6


@pytest.mark.parametrize(
    ("labels", "null", "outside"), [([0, 9], 3, 9), ([-1, 0], 3, -1), ([0, 1], 4, 4)]
)
def test_labels_that_the_denoiser_does_not_know_are_refused(
    labels: list[int], null: int, outside: int
) -> None:
    task = Task.from_arrays(BYTES[:2], labels, null_label=null)
    with pytest.raises(DataError, match=f"labels: got {outside}; the denoiser knows 4 classes"):
        task.check((3, 8, 8), conditioned=True, classes=4)
    Task.from_arrays(BYTES[:2], [0, 2], null_label=3).check((3, 8, 8), True, 4)
    task.check((3, 8, 8), conditioned=True)  # a denoiser that does not say


def test_labels_that_are_vectors_are_sampled_in_their_order() -> None:
    rows = torch.arange(12.0).view(4, 3)
    task = Task(torch.zeros(4, 3, 8, 8), {"class_labels": rows})
    assert torch.equal(task.prompts(4)[0]["class_labels"], rows)
    with pytest.raises(DataError, match=r"got \[0\]; allowed are \[\]"):
        task.subset([0])


def test_samples_and_labels_lie_on_the_cpu() -> None:
    for task in (
        Task(torch.zeros(4, 3, 8, 8, device="meta")),
        Task(torch.zeros(4, 3, 8, 8), {"class_labels": torch.zeros(4, device="meta")}),
    ):
        with pytest.raises(DataError, match=r"task: got tensors on .*meta; allowed is cpu"):
            task.check((3, 8, 8), conditioned=True)
