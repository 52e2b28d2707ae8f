"""What a mixture is on disk: tensors, what they mean, and checks that both are whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from torch import nn

from moediff.errors import ArtefactError, OptionError
from moediff.registry import Registry
from moediff.storage import Tensors, fingerprint
from moediff.subject import Subject

FORMAT = 1


def distinct(module: nn.Module) -> Tensors:
    """A module's tensors by name, those that several names share under the first of them."""
    state = module.state_dict()
    return {names[0]: state[names[0]] for names in _shared(module)}


def _shared(module: nn.Module) -> list[list[str]]:
    """The names of a module's tensors, those of one tensor together."""
    groups: dict[int, list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def sealed(data: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    """Data with the format and the SHA-256 of the tensors and of the data themselves."""
    whole = {"format": FORMAT, **data, "weights": fingerprint(tensors)}
    return {**whole, "checksum": _checksum(whole)}


def check(tensors: Tensors, data: Mapping[str, Any]) -> None:
    """Raise `ArtefactError` unless tensors and data are those that were sealed together."""
    if data.get("format") != FORMAT:
        raise ArtefactError(
            f"mixture: got format {data.get('format')!r}; this moediff reads {FORMAT}. Build "
            "it again, or install the moediff that wrote it."
        )
    if data["checksum"] != _checksum(data):
        raise ArtefactError(
            "mixture: the plan or the config is not the one that was saved (checksum differs). "
            "Restore a copy, or build a mixture from the other plan: given={'plan': plan}."
        )
    if fingerprint(dict(tensors)) != data["weights"]:
        raise ArtefactError(
            "mixture: the weights are not those that were saved (checksum differs). Restore a "
            "copy or build it again."
        )


def storable(base_class: str) -> Any:
    """The class of a base model, by the name under which mixtures of it are stored.

    Raises:
        OptionError: diffusers has no such class, so nothing could build the mixture again.
    """
    if not hasattr(diffusers, base_class):
        raise OptionError(
            f"denoiser: got a {base_class}, and a mixture is stored by the name of a class of "
            "diffusers. Use that class itself, or build without workdir and cache and do not save."
        )
    return getattr(diffusers, base_class)


def base_shapes(data: Mapping[str, Any], registry: Registry) -> Subject:
    """The base model of a mixture on `meta`, without weights; the registry knows its anatomy."""
    base_class = storable(data["base_class"])
    with torch.device("meta"):
        base = base_class.from_config(data["config"])
    kind = getattr(diffusers, data["scheduler"]["class"])
    return registry.dissect(base, kind.from_config(data["scheduler"]["config"]))


def fill(module: nn.Module, tensors: Tensors) -> None:
    """Put tensors in place of a module's `meta` ones, keeping what is shared shared.

    Raises:
        ArtefactError: the names are not those of `distinct`.
    """
    groups = _shared(module)
    expected = {names[0] for names in groups}
    if expected != set(tensors):
        missing, extra = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
        raise ArtefactError(f"mixture: tensors missing: {missing}; not expected: {extra}.")
    # A tensor that lies in a file at an odd address takes other kernels, with other rounding.
    aligned = {name: tensor.clone() for name, tensor in tensors.items()}
    # Experts share modules, not parameters: a shared module is filled once per name, alike.
    module.load_state_dict(
        {name: aligned[names[0]] for names in groups for name in names}, assign=True
    )


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as JSON holds it."""

    def convert(value: Any) -> Any:
        return value.tolist() if hasattr(value, "tolist") else str(value)

    found: dict[str, Any] = json.loads(json.dumps(dict(config), default=convert))
    return found


def _checksum(data: Mapping[str, Any]) -> str:
    """SHA-256 of everything that decides what the weights mean."""
    content = {name: value for name, value in data.items() if name != "checksum"}
    return fingerprint(json.dumps(content, sort_keys=True))
