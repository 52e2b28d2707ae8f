"""Mixtures on disk: what is missing, cut off or altered is a clear error, no random model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDPMScheduler, UNet2DModel

import moediff
from moediff import ExpertMixture
from moediff.errors import ArtefactError, OptionError
from moediff.plan import REST
from tests.conftest import tiny_task, tiny_unet
from tests.core.mixtures import dissected, equal, mixture_of, trained
from tests.core.toys import CALLS, recipe


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    trained(mixture_of(dissected())).save_pretrained(folder)
    return folder


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def edit(text: str, change: Any) -> str:
    data = json.loads(text)
    change(data)
    return json.dumps(data)


def shift(data: Any) -> None:
    data["plan"]["cuts"][1] += 1


def other_units(data: Any) -> None:
    name = next(iter(data["plan"]["blueprints"][0]["keep"]))
    data["plan"]["blueprints"][0]["keep"][name] = [3]


def other_sharing(data: Any) -> None:
    data["plan"]["copies"][REST] = [0, 1, 1]


def no_weights(data: Any) -> None:
    del data["weights"]


DAMAGE: dict[str, tuple[str, Any]] = {
    "weights: a flipped byte at the end": ("mixture.safetensors", lambda b: flip(b, len(b) - 1)),
    "weights: a flipped byte in the middle": (
        "mixture.safetensors",
        lambda b: flip(b, len(b) // 2),
    ),
    "weights: cut off": ("mixture.safetensors", lambda b: b[:-1]),
    "weights: cut in half": ("mixture.safetensors", lambda b: b[: len(b) // 2]),
    "weights: empty": ("mixture.safetensors", lambda b: b""),
    "weights: missing": ("mixture.safetensors", None),
    "plan: missing": ("mixture.json", None),
    "plan: cut off": ("mixture.json", lambda b: b[:-30]),
    "plan: no object": ("mixture.json", lambda b: b"[]"),
    "plan: other cuts": ("mixture.json", lambda b: edit(b.decode(), shift).encode()),
    "plan: other units": ("mixture.json", lambda b: edit(b.decode(), other_units).encode()),
    "plan: other sharing": ("mixture.json", lambda b: edit(b.decode(), other_sharing).encode()),
    "plan: no checksum": ("mixture.json", lambda b: edit(b.decode(), no_weights).encode()),
    "format": ("mixture.json", lambda b: b.replace(b'"format": 1', b'"format": 2')),
}


@pytest.mark.parametrize("kind", sorted(DAMAGE))
def test_damaged_files_are_clear_errors(saved: Path, tmp_path: Path, kind: str) -> None:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    name, change = DAMAGE[kind]
    if change is None:
        (tmp_path / name).unlink()
    else:
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(change(before))
        assert (tmp_path / name).read_bytes() != before
    with pytest.raises(ArtefactError):
        ExpertMixture.from_pretrained(tmp_path)


def test_a_flipped_bit_anywhere_is_an_error_or_harmless(saved: Path, tmp_path: Path) -> None:
    """Padding and the format's own note may change; weights, names and shapes may not."""
    whole = ExpertMixture.from_pretrained(saved)
    (tmp_path / "mixture.json").write_bytes((saved / "mixture.json").read_bytes())
    data = (saved / "mixture.safetensors").read_bytes()
    errors = 0
    for at in range(0, len(data), len(data) // 40):
        (tmp_path / "mixture.safetensors").write_bytes(flip(data, at))
        try:
            assert equal(ExpertMixture.from_pretrained(tmp_path), whole)
        except ArtefactError:
            errors += 1
    assert errors >= 38


def test_an_empty_folder_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="Give a folder that `save_pretrained` wrote"):
        ExpertMixture.from_pretrained(tmp_path / "none")


class OwnUNet(UNet2DModel):
    """A denoiser that diffusers does not have."""


def test_a_denoiser_of_one_s_own_is_built_and_refused_before_anything_is_stored(
    tmp_path: Path,
) -> None:
    own = OwnUNet.from_config(tiny_unet().config)
    mixture = moediff.build_experts(own, DDPMScheduler(), tiny_task(), recipe())
    with pytest.raises(OptionError, match="got a OwnUNet, and a mixture is stored by the name"):
        mixture.save_pretrained(tmp_path / "mixture")
    CALLS.clear()
    with pytest.raises(OptionError, match="build without workdir and cache"):
        moediff.build_experts(own, DDPMScheduler(), tiny_task(), recipe(), tmp_path / "run")
    assert not CALLS
    assert not list(tmp_path.iterdir())
