"""Checks of reports, on a run whose mixture was handed in."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moediff.engine import build_experts
from moediff.errors import WorkdirError
from moediff.mixture import ExpertMixture
from moediff.recipefile import load_recipe
from moediff.roles import Report
from moediff.testing import tiny
from moediff.testing.promises import check_value, promise, repeated, settled, untouched


def check_report(strategy: Any) -> None:
    """A file in the run's folder, equal for equal runs; nothing else there changes.

    Raises:
        ConformanceError: a promise is broken.
    """
    check_value(strategy, (Report,))
    with settled(), TemporaryDirectory() as place:
        folder, empty = Path(place, "run"), Path(place, "empty")
        empty.mkdir()
        _finished_run(folder)
        before = _contents(folder)

        def write() -> tuple[Path, str]:
            with untouched(strategy):
                found: Path = strategy.write(folder)
            return found, found.read_bytes().hex()

        path, _ = repeated(strategy, write, lambda found: found[1])
        promise(folder in path.parents, strategy, "writes into the run's folder", str(path))
        after = {name: content for name, content in _contents(folder).items() if name != path}
        promise(after == before, strategy, "leaves what the run wrote alone", "a change")
        try:
            strategy.write(empty)
        except WorkdirError:
            pass
        else:
            promise(False, strategy, "refuses a folder without a finished run", "a report")
        left = [file.name for file in empty.iterdir()]
        promise(not left, strategy, "leaves nothing where it refused", str(left))


def _finished_run(folder: Path) -> None:
    base = tiny.tiny_subject("conditional")
    plan = tiny.tiny_plan(base)
    mixture = ExpertMixture.from_experts(base.split(plan.intervals), plan)
    recipe = load_recipe("moedm", recover=None, sampling=tiny.tiny_run().sampling)
    task = tiny.tiny_task("conditional")
    build_experts(base.denoiser, base.scheduler, task, recipe, folder, given={"mixture": mixture})


def _contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
