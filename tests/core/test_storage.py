"""Invariants 7 and 8: content by hash, writes that are atomic, files that say what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moediff import Sampling
from moediff.errors import ArtefactError
from moediff.storage import (
    fingerprint,
    read_packed,
    settings,
    write_atomic,
    write_json,
    write_packed,
)
from tests.conftest import tiny_task, tiny_unet
from tests.core.fresh import python

# Fingerprints


VALUES: list[Any] = [
    1,
    1.0,
    True,
    "1",
    None,
    [1],
    [[1]],
    [1, [2]],
    [1, 2],
    {"a": 1},
    {"a": {"b": 1}},
    {"a": 1, "b": 1},
    torch.zeros(2),
    torch.zeros(2, 1),
    torch.zeros(2, dtype=torch.float64),
    torch.zeros(2, dtype=torch.int32),
    torch.tensor(0.0),
    torch.zeros(0),
    torch.tensor([True, False]),
    torch.ones(2, dtype=torch.bfloat16),
    np.zeros(2),
    np.zeros((2, 1)),
    Sampling(),
    Sampling(steps=3),
]


def test_different_content_has_different_fingerprints() -> None:
    prints = [fingerprint(value) for value in VALUES]
    assert len(set(prints)) == len(VALUES)


def test_equal_content_has_equal_fingerprints() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    strided = torch.arange(6.0).view(2, 3).t()
    assert fingerprint(strided) == fingerprint(strided.contiguous())
    assert fingerprint({"cuts": (0, 5)}) == fingerprint({"cuts": [0, 5]})  # as JSON gives it back
    assert fingerprint(tiny_unet()) == fingerprint(tiny_unet())
    assert fingerprint(tiny_task()) == fingerprint(tiny_task())


def test_fingerprints_follow_weights_config_and_order() -> None:
    net = tiny_unet()
    before = fingerprint(net)
    with torch.no_grad():
        net.conv_in.bias[0] += 1e-6
    assert fingerprint(net) != before
    assert fingerprint(tiny_unet()) != fingerprint(tiny_unet(act_fn="gelu"))
    assert fingerprint(1, 2) != fingerprint(2, 1)
    assert fingerprint("ab", "c") != fingerprint("a", "bc")


def test_fingerprints_are_the_same_in_every_process() -> None:
    """Diffusers keeps a set in its configs, whose order follows the process's hash seed."""
    code = (
        "from diffusers import DDPMScheduler\n"
        "from moediff.storage import fingerprint, settings\n"
        "from tests.conftest import tiny_unet, tiny_task\n"
        "print(fingerprint(tiny_unet(), settings(DDPMScheduler().config), tiny_task()))"
    )
    from diffusers import DDPMScheduler

    here = fingerprint(tiny_unet(), settings(DDPMScheduler().config), tiny_task())
    assert python(code, seed=1) == here


# Files


def test_packed_files_there_and_back(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(2, 3).t(), "b": torch.ones(1, dtype=torch.bfloat16)}
    write_packed(tmp_path / "deep" / "x.safetensors", (tensors, {"n": [1, "zwei"]}))
    found, data = read_packed(tmp_path / "deep" / "x.safetensors")
    assert data == {"n": [1, "zwei"]}
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["x.safetensors"]


def test_a_writer_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"old": True})

    def half(target: Path) -> None:
        target.write_text("{")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_atomic(path, half)
    assert json.loads(path.read_text()) == {"old": True}
    assert [f.name for f in tmp_path.iterdir()] == ["x.json"]


def test_a_writer_that_is_killed_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"old": True})
    python(
        "import os, signal, sys, pathlib\n"
        "from moediff.storage import write_atomic\n"
        "def half(target):\n"
        "    target.write_text('{')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomic(pathlib.Path(sys.argv[1]), half)",
        path,
        check=False,
    )
    assert json.loads(path.read_text()) == {"old": True}
    partial = [f for f in tmp_path.iterdir() if f != path]
    assert [f.suffix for f in partial] == [".partial"]  # the kill did come halfway


@pytest.mark.parametrize("damage", ["missing", "empty", "cut off", "other", "foreign"])
def test_files_that_are_not_ours_are_errors(tmp_path: Path, damage: str) -> None:
    import safetensors.torch

    path = tmp_path / "x.safetensors"
    write_packed(path, ({"a": torch.zeros(100)}, {}))
    whole = path.read_bytes()
    match damage:
        case "missing":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "cut off":
            path.write_bytes(whole[:-10])
        case "other":
            path.write_bytes(b"hello" * 100)
        case "foreign":
            safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ArtefactError, match=r"x\.safetensors: cannot be read"):
        read_packed(path)
