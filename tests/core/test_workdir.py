"""Invariants 6 and 8: seeds by name, atomic writes, results stored by what they depend on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moediff import Run, Sampling
from moediff.errors import ArtefactError, WorkdirError
from moediff.storage import (
    Packed,
)
from moediff.workdir import Spent, claim
from tests.core.fresh import python

# Randomness


def test_generators_depend_on_seed_stage_and_name_only() -> None:
    def draw(run: Run, name: str) -> float:
        return float(torch.rand((), generator=run.generator(name)))

    first, second = Run(seed=3), Run(seed=3)
    draw(second, "b")
    torch.rand(7)
    assert draw(first, "a") == draw(second, "a")
    assert draw(first, "a") == draw(first, "a")  # asking again starts again
    assert len({draw(first, "a"), draw(first, "b"), draw(Run(seed=4), "a")}) == 3
    inside = first.stage("s", [], lambda: draw(first, "a"), lambda r: ({}, r), lambda t, d: d)
    assert inside != draw(first, "a")


def test_generators_are_the_same_in_every_process() -> None:
    code = "import torch, moediff; print(moediff.Run(seed=3).generator('a').initial_seed())"
    assert python(code, seed=5) == str(Run(seed=3).generator("a").initial_seed())


def test_generators_leave_the_global_state_alone() -> None:
    state = torch.get_rng_state()
    torch.rand(3, generator=Run().generator("a"))
    assert torch.equal(state, torch.get_rng_state())


# Stages


@attrs.define
class Counting:
    """A stage whose work is counted."""

    times: int = 0

    def run(self, run: Run, *depends: Any, name: str = "work") -> torch.Tensor:
        def compute() -> torch.Tensor:
            self.times += 1
            run.spend(samples=5, steps=2)
            run.record("drawn", torch.arange(3))
            return torch.rand(4, generator=run.generator("x"))

        def pack(result: torch.Tensor) -> Packed:
            return {"result": result}, None

        return run.stage(name, depends, compute, pack, lambda tensors, data: tensors["result"])


BASE: tuple[Any, ...] = (1, "a", torch.zeros(3), Sampling())
CHANGES: list[tuple[Any, ...]] = [
    (2, "a", torch.zeros(3), Sampling()),
    (1, "b", torch.zeros(3), Sampling()),
    (1, "a", torch.tensor([0, 0, 1e-7]), Sampling()),
    (1, "a", torch.zeros(3, dtype=torch.float64), Sampling()),
    (1, "a", torch.zeros(3), Sampling(steps=21)),
    (1, "a", torch.zeros(3), Sampling(), None),
]


def test_an_unchanged_stage_is_read_not_computed(tmp_path: Path) -> None:
    work = Counting()
    first = work.run(Run(cache=tmp_path), *BASE)
    again = Run(cache=tmp_path)
    assert torch.equal(work.run(again, *BASE), first)
    assert work.times == 1
    assert again.records["work/drawn"].tolist() == [0, 1, 2]
    assert (again.ledger["work"].samples, again.ledger["work"].steps) == (5, 2)
    assert again.ledger["work"].seconds > 0


@pytest.mark.parametrize("which", range(len(CHANGES)))
def test_any_changed_dependency_computes_again(tmp_path: Path, which: int) -> None:
    work = Counting()
    work.run(Run(cache=tmp_path), *BASE)
    work.run(Run(cache=tmp_path), *CHANGES[which])
    assert work.times == 2
    work.run(Run(cache=tmp_path), *BASE)
    work.run(Run(cache=tmp_path), *CHANGES[which])
    assert work.times == 2


def test_seed_and_name_are_dependencies_too(tmp_path: Path) -> None:
    work = Counting()
    results = [
        work.run(Run(cache=tmp_path), *BASE),
        work.run(Run(cache=tmp_path, seed=1), *BASE),
        work.run(Run(cache=tmp_path), *BASE, name="other"),
    ]
    assert work.times == 3
    assert len({tuple(result.tolist()) for result in results}) == 3


def test_without_a_folder_nothing_is_kept() -> None:
    work, run = Counting(), Run()
    assert torch.equal(work.run(run, *BASE), work.run(run, *BASE))
    assert work.times == 2
    assert run.ledger["work"].samples == 10
    assert run.checkpoint("x").load() is None
    run.checkpoint("x").save({}, {})
    assert run.checkpoint("x").load() is None


def test_a_damaged_stage_is_named(tmp_path: Path) -> None:
    work = Counting()
    work.run(Run(cache=tmp_path), *BASE)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ArtefactError, match="Delete it and run again"):
        work.run(Run(cache=tmp_path), *BASE)


def test_a_failing_stage_stores_nothing_and_the_run_goes_on(tmp_path: Path) -> None:
    run = Run(cache=tmp_path)

    def fail() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run.stage("bad", [], fail, lambda r: ({}, r), lambda t, d: int(d))
    assert list(tmp_path.iterdir()) == []
    assert "bad" not in run.ledger
    assert run.generator("a").initial_seed() == Run().generator("a").initial_seed()


def test_seconds_of_an_inner_stage_count_once() -> None:
    import time

    run = Run()

    def sleep(seconds: float, inner: float = 0) -> int:
        if inner:
            run.stage("inner", [], lambda: sleep(inner), lambda r: ({}, r), lambda t, d: int(d))
        time.sleep(seconds)
        return 0

    run.stage("outer", [], lambda: sleep(0.02, 0.2), lambda r: ({}, r), lambda t, d: int(d))
    assert run.ledger["inner"].seconds >= 0.2
    assert 0.02 <= run.ledger["outer"].seconds < 0.15


def test_what_ran_inside_a_stage_is_in_the_ledger_when_it_is_read(tmp_path: Path) -> None:
    def outer(run: Run, work: Counting) -> int:
        work.run(run, 1)
        work.run(run, 2)
        run.spend(steps=1)
        return 0

    books = []
    for work in (Counting(), Counting()):
        run = Run(cache=tmp_path / "stages")
        pack: Any = lambda result: ({}, result)  # noqa: E731
        run.stage("outer", [], lambda r=run, w=work: outer(r, w), pack, lambda t, d: int(d))
        work.run(run, 3)
        books.append({k: (v.samples, v.steps) for k, v in run.ledger.items()})
        assert run.records["work/drawn"].tolist() == [0, 1, 2]
    assert books[0] == books[1] == {"work": (15, 6), "outer": (0, 1)}
    assert work.times == 0


def test_the_ledger_adds_up() -> None:
    spent = Spent()
    spent.add(samples=3)
    spent.add(samples=1, steps=2)
    assert (spent.samples, spent.steps) == (4, 2)


def test_progress_yields_its_items() -> None:
    assert list(Run().progress([1, 2, 3], "counting")) == [1, 2, 3]
    bar = Run().progress(None, "counting", total=3)
    bar.update(2)
    bar.close()


# Checkpoints


def test_checkpoints_belong_to_their_stage_and_end_with_it(tmp_path: Path) -> None:
    run, seen = Run(cache=tmp_path), []

    def compute() -> int:
        checkpoint = run.checkpoint("half")
        seen.append(checkpoint.load())
        checkpoint.save({"a": torch.ones(2)}, {"step": 3})
        found = checkpoint.load()
        assert found is not None
        seen.append((found[0]["a"].tolist(), found[1]))
        assert run.checkpoint("other").load() is None
        return 1

    run.stage("s", [], compute, lambda r: ({}, r), lambda t, d: int(d))
    assert seen == [None, ([1.0, 1.0], {"step": 3})]
    assert [f.suffix for f in tmp_path.iterdir()] == [".safetensors"]


def test_unfinished_work_that_a_kill_left_behind_is_tidied_up(tmp_path: Path) -> None:
    def once() -> str:
        return Run(cache=tmp_path).stage(
            "s", (), lambda: "made", pack=lambda v: ({}, v), unpack=lambda t, v: str(v)
        )

    once()
    (stored,) = tmp_path.iterdir()
    stored.with_suffix(".part.checkpoint").touch()
    once()
    assert list(tmp_path.iterdir()) == [stored]


def test_a_checkpoint_that_was_cut_off_counts_as_none(tmp_path: Path) -> None:
    run, found = Run(cache=tmp_path), []

    def compute() -> int:
        checkpoint = run.checkpoint("half")
        checkpoint.save({"a": torch.ones(200)}, {})
        assert checkpoint.path is not None
        checkpoint.path.write_bytes(checkpoint.path.read_bytes()[:-9])
        found.append(checkpoint.load())
        return 1

    run.stage("s", [], compute, lambda r: ({}, r), lambda t, d: int(d))
    assert found == [None]


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from moediff import Run

folder, die_at = Path(sys.argv[1]), int(sys.argv[2])
run = Run(cache=folder)

def compute():
    generator, value, start = run.generator("walk"), torch.zeros(3), 0
    checkpoint = run.checkpoint("walk")
    if found := checkpoint.load():
        generator.set_state(found[0]["generator"])
        value, start = found[0]["value"], found[1]["step"]
        print("resumed at", start)
    for step in range(start, 8):
        value = 0.9 * value + torch.randn(3, generator=generator)
        if step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        checkpoint.save({"value": value, "generator": generator.get_state()}, {"step": step + 1})
    return value

run.stage("before", [1], lambda: print("before"), lambda r: ({}, None), lambda t, d: None)
value = run.stage("walk", [1], compute, lambda r: ({"v": r}, None), lambda t, d: t["v"])
print(value.numpy().tobytes().hex())
"""


def test_a_killed_run_goes_on_and_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["-c", str(tmp_path / "whole"), "-1"])
    exec(KILLED, {"__name__": "whole"})
    whole = capsys.readouterr().out.splitlines()
    assert whole[0] == "before"
    assert python(KILLED, tmp_path / "killed", 5, check=False) in ("", "before")
    resumed = python(KILLED, tmp_path / "killed", -1, seed=9).splitlines()
    assert resumed == ["resumed at 5", whole[-1]]  # the stage before was not run again
    assert [f for f in (tmp_path / "killed").iterdir() if "checkpoint" in f.name] == []


# Claims


IDENTITY = {"recipe": {"seed": 1}, "denoiser": "abc", "given": []}


def test_a_folder_is_claimed_once_for_one_run(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    claim(folder, IDENTITY)
    claim(folder, IDENTITY)
    with pytest.raises(WorkdirError, match="holds another run; it differs in denoiser, recipe"):
        claim(folder, {**IDENTITY, "recipe": {"seed": 2}, "denoiser": "x"})
    with pytest.raises(WorkdirError, match="differs in given"):
        claim(folder, {k: v for k, v in IDENTITY.items() if k != "given"})
    assert json.loads((folder / "run.json").read_text()) == IDENTITY


def test_folders_that_are_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkdirError, match="is a file"):
        claim(tmp_path / "file", IDENTITY)
    with pytest.raises(WorkdirError, match="is not empty and holds no run"):
        claim(tmp_path, IDENTITY)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "run.json").write_text("{")
    with pytest.raises(WorkdirError, match="not valid JSON"):
        claim(broken, IDENTITY)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["broken", "file"]


def test_a_claim_that_was_killed_can_be_made_again(tmp_path: Path) -> None:
    (tmp_path / ".run.json.123.partial").write_text("{")
    claim(tmp_path, IDENTITY)
    assert (tmp_path / "run.json").exists()


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=4))
def test_claims_compare_by_content(identity: dict[str, Any]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        claim(Path(folder), identity)
        claim(Path(folder), dict(reversed(identity.items())))
        with pytest.raises(WorkdirError):
            claim(Path(folder), {**identity, "more": "x" * 9})
