"""The run: what every strategy is handed besides data, and where results are kept.

Every stage's result is stored under a hash of what it depends on. Writes are atomic, hold no
pickle, and a kill at any moment loses at most what came after the last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import attrs
import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import nn
from tqdm.auto import tqdm

from moediff.errors import ArtefactError, WorkdirError
from moediff.sampling import Sampling

T = TypeVar("T")
Tensors = dict[str, torch.Tensor]
Packed = tuple[Tensors, Any]
"""Tensors by name, and JSON data beside them."""


def fingerprint(*values: Any) -> str:
    """SHA-256 of plain data, attrs values, arrays, tensors and modules, by content."""
    digest = hashlib.sha256()
    for value in values:
        _feed(digest, value)
    return digest.hexdigest()


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A diffusers config without its bookkeeping, whose order changes from process to process."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _feed(digest: Any, value: Any) -> None:
    kind = list if isinstance(value, tuple) else type(value)  # JSON knows no tuples
    digest.update(kind.__qualname__.encode() + b"\0")
    match value:
        case torch.Tensor():
            array = value.detach().cpu().contiguous()
            digest.update(f"{array.dtype}{tuple(array.shape)}".encode())
            digest.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())
        case np.ndarray():
            digest.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
        case nn.Module():
            _feed(digest, settings(getattr(value, "config", {})))
            _feed(digest, dict(value.state_dict()))
        case Mapping():
            for key in sorted(value, key=str):
                _feed(digest, str(key))
                _feed(digest, value[key])
        case list() | tuple():
            digest.update(str(len(value)).encode())
            for item in value:
                _feed(digest, item)
        case _ if attrs.has(type(value)):
            digest.update(type(value).__module__.encode())
            for field in attrs.fields(type(value)):
                _feed(digest, getattr(value, field.name))
        case _:
            digest.update(repr(value).encode())
    digest.update(b"\1")


def write_atomic(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write JSON data atomically."""
    text = json.dumps(data, indent=2) + "\n"
    write_atomic(path, lambda target: target.write_text(text, encoding="utf-8"))


def write_packed(path: Path, packed: Packed) -> None:
    """Write tensors and JSON data as one safetensors file, atomically."""
    tensors, data = packed
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"moediff": json.dumps(data)}
    write_atomic(path, lambda target: safetensors.torch.save_file(whole, target, metadata))


def read_packed(path: Path) -> Packed:
    """Read what `write_packed` wrote.

    Raises:
        ArtefactError: the file is missing, truncated or not one of ours.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            data = json.loads(file.metadata()["moediff"])
            return {name: file.get_tensor(name) for name in file.keys()}, data  # noqa: SIM118
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ArtefactError(
            f"{path}: cannot be read ({error}). Delete it and run again, or restore a copy."
        ) from error


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
    ) -> T:
        """Return a stage's stored result, or compute and store it.

        Args:
            name: the stage, also the prefix of its generators and records.
            depends: everything that the result depends on.
            compute: makes the result.
            pack: result -> tensors and JSON data.
            unpack: the way back.
        """
        key = fingerprint(self.seed, name, *depends)[:20]
        path = self.cache / f"{name}-{key}.safetensors" if self.cache else None
        if path is not None and path.exists():
            tensors, data = read_packed(path)
            records = {
                k.removeprefix("record:"): v for k, v in tensors.items() if k[:7] == "record:"
            }
            inner = {k: Spent(**v) for k, v in data["inner"].items()}
            found = _Stage(name, path, Spent(**data["spent"]), records, inner)
            self._book(name, found, read=True)
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
            for leftover in path.parent.glob(f"{path.stem}.*.checkpoint"):
                leftover.unlink()
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


def _sum(before: Spent | None, more: Spent) -> Spent:
    before = before or Spent()
    return Spent(
        before.samples + more.samples, before.steps + more.steps, before.seconds + more.seconds
    )


def claim(folder: Path, identity: Mapping[str, Any]) -> None:
    """Mark a folder as one run's, or check that it is this run's.

    Raises:
        WorkdirError: the folder holds another run, or files that are not a run's.
    """
    path = folder / "run.json"
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
    write_json(path, dict(identity))
