"""Prompts for text-conditional models: templates over word lists, and what to hold out."""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterable, Sequence

import torch

from moediff.errors import DataError, OptionError, UnknownNameError, did_you_mean


def expand(template: str, /, **words: Sequence[str]) -> list[str]:
    """Every combination of words in a template; the last name's words change first.

        expand("a {colour} {animal}", colour=["red", "blue"], animal=["cat", "dog"])

    gives "a red cat", "a red dog", "a blue cat", "a blue dog".

    Raises:
        OptionError: the template cannot be read, or a list is empty or no list.
        UnknownNameError: a name of the template has no list, or a list has no place in it.
    """
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template)]
    except ValueError as error:
        raise OptionError(
            f"template: cannot read {template!r} ({error}). Write {{name}} for a word of the list "
            "`name`, and {{{{ for a brace."
        ) from error
    names = list(dict.fromkeys(field for field in fields if field is not None))
    for name in names:
        if name not in words:
            raise UnknownNameError(
                f"template: {{{name}}} has no list of words.{did_you_mean(name, words)}"
            )
    for name, choices in words.items():
        if name not in names:
            raise UnknownNameError(
                f"{name}: the template {template!r} has no place for it.{did_you_mean(name, names)}"
            )
        if isinstance(choices, str) or not len(choices):
            raise OptionError(f"{name}: got {choices!r}; pass a list of at least one word.")
    combinations = itertools.product(*(words[name] for name in names))
    return [template.format(**dict(zip(names, chosen, strict=True))) for chosen in combinations]


def split_prompts(
    prompts: Iterable[str], held_out_share: float, seed: int
) -> tuple[list[str], list[str]]:
    """Two lists without a common prompt: those to train on, and those to sample.

    A prompt that comes twice counts once; both lists keep the given order.

    Args:
        prompts: at least two different ones.
        held_out_share: the share of the second list, over 0 and under 1; it is rounded so that
            neither list is empty.
        seed: decides which.

    Raises:
        OptionError: the share is outside.
        DataError: there are fewer than two different prompts.
    """
    if not 0 < held_out_share < 1:
        raise OptionError(f"held_out_share: got {held_out_share}; allowed is over 0 and under 1.")
    distinct = list(dict.fromkeys(prompts))
    if len(distinct) < 2:
        raise DataError(
            f"prompts: got {len(distinct)} different one(s); allowed are at least 2, one to train "
            "on and one to sample. Add prompts."
        )
    count = min(max(round(len(distinct) * held_out_share), 1), len(distinct) - 1)
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed))
    held = set(order[:count].tolist())
    return (
        [prompt for index, prompt in enumerate(distinct) if index not in held],
        [prompt for index, prompt in enumerate(distinct) if index in held],
    )
