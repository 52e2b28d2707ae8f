"""Keeping results: hashes by content, atomic writes, tensors with JSON beside them; no pickle."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import nn

from moediff.errors import ArtefactError

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
