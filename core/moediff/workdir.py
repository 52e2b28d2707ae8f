"""The run: what every strategy is handed besides data, and where results are kept.

Every stage's result is stored under a hash of what it depends on. Writes are atomic, hold no
pickle, and a kill at any moment loses at most what came after the last checkpoint.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import attrs
import torch
from tqdm.auto import tqdm

from moediff.errors import ArtefactError, OptionError, WorkdirError
from moediff.sampling import Sampling
from moediff.storage import Packed, Tensors, fingerprint, read_packed, write_json, write_packed

log = logging.getLogger(__name__)

T = TypeVar("T")


@attrs.define
class Spent:
    """What a stage has used: samples passed through a denoiser, optimiser steps, seconds."""

    samples: int = 0
    steps: int = 0
    seconds: float = 0.0

    def add(self, samples: int = 0, steps: int = 0) -> None:
        self.samples += samples
        self.steps += steps


@attrs.frozen(eq=False)
class Checkpoint:
    """A place for a stage's unfinished work; without a folder, nothing is kept."""

    path: Path | None

    def load(self) -> Packed | None:
        """What was saved last, or None. A file that was cut off counts as none."""
        if self.path is None or not self.path.exists():
            return None
        try:
            return read_packed(self.path)
        except ArtefactError:
            return None

    def save(self, tensors: Tensors, data: Any) -> None:
        if self.path is not None:
            write_packed(self.path, (tensors, data))


@attrs.define(eq=False)
class _Stage:
    name: str
    path: Path | None
    spent: Spent = attrs.field(factory=Spent)
    records: Tensors = attrs.field(factory=dict)
    inner: dict[str, Spent] = attrs.field(factory=dict)
    inner_seconds: float = 0.0


@attrs.define(eq=False)
class Run:
    """What a strategy is handed besides data.

    Attributes:
        sampling: how images are generated, by the recipe.
        experts: N, how many intervals are asked for.
        seed: the recipe's seed; randomness comes from `generator` only.
        device: where denoisers run.
        cache: the folder of stage results; None keeps nothing.
        verbose: whether progress bars are drawn.
        ledger: what each stage has spent.
        records: tensors that stages left for reports, by "stage/name".
    """

    sampling: Sampling = attrs.field(factory=Sampling)
    experts: int = 2
    seed: int = 0
    device: torch.device = attrs.field(factory=lambda: torch.device("cpu"))
    cache: Path | None = None
    verbose: bool = False
    ledger: dict[str, Spent] = attrs.field(factory=dict)
    records: Tensors = attrs.field(factory=dict)
    _stages: list[_Stage] = attrs.field(factory=lambda: [_Stage("free", None)], init=False)

    def generator(self, name: str) -> torch.Generator:
        """A CPU generator whose seed depends on the run's seed, the stage and `name` only."""
        seed = fingerprint(self.seed, self._stages[-1].name, name)
        return torch.Generator().manual_seed(int(seed[:15], 16))

    def checkpoint(self, name: str) -> Checkpoint:
        """The current stage's place for unfinished work of that name."""
        path = self._stages[-1].path
        return Checkpoint(path.with_suffix(f".{name}.checkpoint") if path else None)

    def progress(
        self, items: Iterable[T] | None, description: str, total: int | None = None
    ) -> Any:
        """A tqdm bar over items, or over `total` if items is None; silent unless `verbose`."""
        return tqdm(
            items,
            desc=description,
            total=total,
            disable=not self.verbose,
            mininterval=1.0,
            leave=False,
        )

    def say(self, text: str) -> None:
        """Tell the user something: logged at INFO, and shown above the bars if `verbose`."""
        log.info(text)
        if self.verbose:
            tqdm.write(text, file=sys.stderr)

    def spend(self, samples: int = 0, steps: int = 0) -> None:
        """Add to what the current stage has used."""
        self._stages[-1].spent.add(samples, steps)

    def record(self, name: str, tensor: torch.Tensor) -> None:
        """Leave a tensor for reports; it is stored and restored with the stage's result."""
        stage = self._stages[-1]
        key = f"{stage.name}/{name}"
        stage.records[key] = self.records[key] = tensor.detach().cpu().clone()

    def stage(
        self,
        name: str,
        depends: Iterable[Any],
        compute: Callable[[], T],
        pack: Callable[[T], Packed],
        unpack: Callable[[Tensors, Any], T],
        *,
        seeded: bool = True,
    ) -> T:
        """Return a stage's stored result, or compute and store it.

        Args:
            name: the stage, also the prefix of its generators and records.
            depends: everything that the result depends on.
            compute: makes the result.
            pack: result -> tensors and JSON data.
            unpack: the way back.
            seeded: whether the result depends on the run's seed; if not, runs that differ in it
                share the result.
        """
        key = fingerprint(self.seed if seeded else None, name, *depends)[:20]
        path = self.cache / f"{name}-{key}.safetensors" if self.cache else None
        if path is not None and path.exists():
            tensors, data = read_packed(path)
            records = {
                k.removeprefix("record:"): v for k, v in tensors.items() if k[:7] == "record:"
            }
            inner = {k: Spent(**v) for k, v in data["inner"].items()}
            found = _Stage(name, path, Spent(**data["spent"]), records, inner)
            self._book(name, found, read=True)
            _tidy(path)
            return unpack({k: v for k, v in tensors.items() if k[:7] != "record:"}, data["value"])
        stage = _Stage(name, path)
        with self._entered(stage):
            result = compute()
        self._book(name, stage, read=False)
        if path is not None:
            tensors, value = pack(result)
            records = {f"record:{k}": v for k, v in stage.records.items()}
            inside = {k: attrs.asdict(v) for k, v in stage.inner.items()}
            spent = attrs.asdict(stage.spent)
            write_packed(
                path, (tensors | records, {"value": value, "spent": spent, "inner": inside})
            )
            _tidy(path)
        return result

    def _book(self, name: str, stage: _Stage, *, read: bool) -> None:
        """Enter a stage's records and spending, for the run and for the stage around it."""
        outer = self._stages[-1]
        outer.records.update(stage.records)
        self.records.update(stage.records)
        own = {name: stage.spent}
        # What ran inside a stage has been entered as it ran, unless the whole stage was read.
        for book, entries in ((outer.inner, {**stage.inner, **own}), (self.ledger, own)):
            for key, spent in (entries | stage.inner if read else entries).items():
                book[key] = _sum(book.get(key), spent)

    @contextmanager
    def _entered(self, stage: _Stage) -> Iterator[None]:
        started = time.perf_counter()
        self._stages.append(stage)
        try:
            yield
        finally:
            self._stages.pop()
            elapsed = time.perf_counter() - started
            stage.spent.seconds = elapsed - stage.inner_seconds
            self._stages[-1].inner_seconds += elapsed


def _tidy(path: Path) -> None:
    """Remove the unfinished work of a finished stage."""
    for leftover in path.parent.glob(f"{path.stem}.*.checkpoint"):
        leftover.unlink()


def _sum(before: Spent | None, more: Spent) -> Spent:
    before = before or Spent()
    return Spent(
        before.samples + more.samples, before.steps + more.steps, before.seconds + more.seconds
    )


def claim(folder: Path, identity: Mapping[str, Any]) -> None:
    """Mark a folder as one run's, or check that it is this run's.

    Raises:
        WorkdirError: the folder holds another run, or files that are not a run's.
        OptionError: the identity holds what JSON cannot.
    """
    path = folder / "run.json"
    try:
        identity = json.loads(json.dumps(identity))  # as it will be found again
    except TypeError as error:
        raise OptionError(
            f"recipe: cannot be written to {path} ({error}). Strategies in a run with a folder "
            "have options that JSON knows: numbers, words, lists and tables of them."
        ) from error
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise WorkdirError(
                f"{path}: is not valid JSON ({error}). Choose an empty folder."
            ) from error
        differing = sorted(k for k in {*identity, *found} if identity.get(k) != found.get(k))
        if differing:
            raise WorkdirError(
                f"{folder}: holds another run; it differs in {', '.join(differing)}. "
                "Choose another folder, or delete this one."
            )
        return
    if folder.exists() and not folder.is_dir():
        raise WorkdirError(f"{folder}: is a file. Choose a folder.")
    # A process that was killed while it wrote run.json leaves only its partial file.
    if folder.exists() and any(not f.name.endswith(".partial") for f in folder.iterdir()):
        raise WorkdirError(f"{folder}: is not empty and holds no run. Choose an empty folder.")
    write_json(path, identity)
