"""Prompts from templates, and their division into those to train on and those to sample."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moediff.errors import DataError, MoediffError, OptionError, UnknownNameError
from moediff_plugins.prompts import expand, split_prompts


def test_every_combination_in_the_template_s_order() -> None:
    found = expand("a {colour} {animal}", animal=["cat", "dog"], colour=["red", "blue"])
    assert found == ["a red cat", "a red dog", "a blue cat", "a blue dog"]


def test_a_name_may_come_twice_and_braces_may_be_written() -> None:
    assert expand("{x} and {x} {{sic}}", x=("a", "b")) == ["a and a {sic}", "b and b {sic}"]
    assert expand("no words") == ["no words"]
    assert expand("{template}", template=["t"]) == ["t"]


@pytest.mark.parametrize(
    ("template", "words", "error", "message"),
    [
        ("a {colour}", {}, UnknownNameError, "{colour} has no list of words"),
        ("a {colur}", {"colour": ["red"]}, UnknownNameError, "Did you mean 'colour'?"),
        ("a cat", {"colour": ["red"]}, UnknownNameError, "has no place for it"),
        ("a {}", {"colour": ["red"]}, UnknownNameError, "{} has no list of words"),
        ("a {colour.real}", {"colour": ["red"]}, UnknownNameError, "{colour.real} has no list"),
        ("a {colour", {"colour": ["red"]}, OptionError, "cannot read 'a {colour'"),
        ("a {colour}", {"colour": []}, OptionError, "colour: got []; pass a list of at least one"),
        ("a {colour}", {"colour": "red"}, OptionError, "colour: got 'red'; pass a list"),
    ],
)
def test_what_does_not_fit_is_refused(
    template: str, words: dict[str, list[str]], error: type[MoediffError], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        expand(template, **words)


@given(
    prompts=st.lists(st.text(max_size=3), min_size=1, max_size=30),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**63 - 1),
)
def test_the_two_lists_are_disjoint_and_complete(
    prompts: list[str], share: float, seed: int
) -> None:
    distinct = list(dict.fromkeys(prompts))
    if len(distinct) < 2:
        with pytest.raises(DataError, match="got 1 different"):
            split_prompts(prompts, share, seed)
        return
    state = torch.get_rng_state()
    train, held = split_prompts(iter(prompts), share, seed)
    assert not set(train) & set(held)
    assert train == [p for p in distinct if p in set(train)]
    assert held == [p for p in distinct if p not in set(train)]
    assert min(len(train), len(held)) >= 1
    assert abs(len(held) - share * len(distinct)) <= 1
    assert (train, held) == split_prompts(prompts, share, seed)
    assert torch.equal(state, torch.get_rng_state())


def test_the_seed_decides() -> None:
    prompts = [str(number) for number in range(40)]
    assert split_prompts(prompts, 0.25, 0) != split_prompts(prompts, 0.25, 1)
    assert len(split_prompts(prompts, 0.25, 0)[1]) == 10


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, float("nan")])
def test_other_shares_are_refused(share: float) -> None:
    with pytest.raises(OptionError, match="held_out_share: got"):
        split_prompts(["a", "b"], share, 0)
