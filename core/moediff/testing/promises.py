"""The promises that every role shares: a value, the subject as it was found, repeatable results."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import attrs
import numpy as np
import torch
from torch import nn

from moediff.errors import MoediffError
from moediff.storage import fingerprint
from moediff.subject import Subject, preserved

T = TypeVar("T")

HOOKS = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_load_state_dict_post_hooks",
    "_load_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
)


class ConformanceError(MoediffError, AssertionError):
    """A strategy that broke a promise of its role."""


def promise(holds: bool, strategy: Any, text: str, found: str) -> None:
    """Raise `ConformanceError` unless a promise holds."""
    if not holds:
        raise ConformanceError(f"{type(strategy).__name__}: promised: {text}. Found: {found}.")


def check_value(strategy: Any, protocols: Sequence[type]) -> None:
    """A strategy is a frozen attrs value of hyper-parameters, all defaulted, that has its verb.

    Raises:
        ConformanceError: it is not.
    """
    if isinstance(strategy, type):
        raise ConformanceError(
            f"{strategy.__name__}: got the class; pass an instance, for example "
            f"{strategy.__name__}()."
        )
    cls = type(strategy)
    verbs = " or ".join(protocol.__name__ for protocol in protocols)
    promise(
        isinstance(strategy, tuple(protocols)), strategy, f"is a {verbs}", "a verb that is missing"
    )
    promise(attrs.has(cls), strategy, "is an attrs class", "another kind of class")
    fields = attrs.fields(cls)
    name = fields[0].name if fields else "conformance"
    try:
        object.__getattribute__(strategy, "__setattr__")(name, getattr(strategy, name, None))
    except attrs.exceptions.FrozenInstanceError:
        pass
    except AttributeError as error:
        promise(False, strategy, "is frozen", f"a class that only refuses new names ({error})")
    else:
        promise(False, strategy, "is frozen", f"that {name} can be assigned")
    bare = [field.name for field in fields if field.init and field.default is attrs.NOTHING]
    promise(not bare, strategy, "every field has a default", f"none for {', '.join(bare)}")
    held = [f.name for f in fields if isinstance(getattr(strategy, f.name), torch.Tensor)]
    promise(not held, strategy, "no field holds a tensor", f"one in {', '.join(held)}")
    twin = attrs.evolve(strategy)
    promise(twin == strategy, strategy, "equal fields make equal values", "an unequal copy")
    try:
        same = hash(twin) == hash(strategy)
    except TypeError as error:
        raise ConformanceError(f"{cls.__name__}: promised: is hashable. Found: {error}.") from error
    promise(same, strategy, "equal values have equal hashes", "different ones")
    promise(bool((cls.__doc__ or "").strip()), strategy, "says what it does", "no docstring")
    for words in ("needs", "provides"):
        value: Any = getattr(strategy, words, frozenset())
        fits = isinstance(value, frozenset) and all(isinstance(word, str) for word in value)
        promise(fits, strategy, f"`{words}` is a frozenset of words", repr(value))


def _bits(value: torch.Tensor) -> bytes:
    return bytes(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _state(denoiser: nn.Module) -> dict[str, Any]:
    named = {**dict(denoiser.named_parameters()), **dict(denoiser.named_buffers())}
    return {
        "the modules": {name: type(m).__name__ for name, m in denoiser.named_modules()},
        "the names of the tensors": sorted(named),
        "the weights": {name: _bits(tensor) for name, tensor in named.items()},
        "dtype and device": {name: (t.dtype, str(t.device)) for name, t in named.items()},
        "the gradients": {n: None if t.grad is None else _bits(t.grad) for n, t in named.items()},
        "requires_grad": {name: tensor.requires_grad for name, tensor in named.items()},
        "train and eval mode": {name: m.training for name, m in denoiser.named_modules()},
        "the hooks": {
            f"{name}.{kind.strip('_')}": len(getattr(module, kind, ()))
            for name, module in denoiser.named_modules()
            for kind in HOOKS
        },
        "tensor hooks": {
            name: len(getattr(t, "_backward_hooks", None) or {}) for name, t in named.items()
        },
    }


def _surroundings() -> dict[str, Any]:
    keys = np.random.get_state()
    return {
        "torch's global random state": {"cpu": _bits(torch.get_rng_state())},
        "NumPy's global random state": {
            str(i): np.asarray(part).tobytes() for i, part in enumerate(keys)
        },
        "random's global state": {"": random.getstate()},
        "whether gradients are on": {"": torch.is_grad_enabled()},
        "the default dtype": {"": torch.get_default_dtype()},
        "the number of threads": {"": torch.get_num_threads()},
        "deterministic algorithms": {"": torch.are_deterministic_algorithms_enabled()},
    }


@contextmanager
def untouched(strategy: Any, *subjects: Subject, data: Sequence[Any] = ()) -> Iterator[None]:
    """Compare subjects, data and global state before and after, also after a failing run.

    Args:
        strategy: whom to name.
        subjects: their denoisers must not change in anything.
        data: tensors, attrs values or modules that must not change in content.

    Raises:
        ConformanceError: the strategy left a trace.
    """
    before = [*(_state(subject.denoiser) for subject in subjects), _surroundings()]
    content = fingerprint(*data)
    failed = ""
    try:
        yield
    except Exception as error:
        failed = f" after a failing run ({type(error).__name__}: {error})"
        raise
    finally:
        after = [*(_state(subject.denoiser) for subject in subjects), _surroundings()]
        for old, new in zip(before, after, strict=True):
            for what in old:
                promise(
                    old[what] == new[what],
                    strategy,
                    f"leaves {what} as found{failed}",
                    f"a change in {_difference(old[what], new[what])}",
                )
        promise(content == fingerprint(*data), strategy, "leaves the data alone", "a change")


def _difference(old: Any, new: Any) -> str:
    if not isinstance(old, dict):
        return f"{len(old)} -> {len(new)} of them"
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(names[:3]) or "its entries"


@contextmanager
def settled() -> Iterator[None]:
    """Put the global random states back, so that a check itself leaves no trace."""
    with preserved(nn.Module()):
        yield


def disturb(seed: int) -> None:
    """Move every global random state, as other code in the same process would."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def repeated(strategy: Any, compute: Callable[[], T], content: Callable[[T], Any]) -> T:
    """Run twice with other things done in between, and return the result if both agree.

    Args:
        strategy: whom to name.
        compute: builds everything anew and runs the verb.
        content: what has to be equal, bit for bit.

    Raises:
        ConformanceError: the two differ, or the verb raised.
    """
    results = []
    for attempt in (1, 2):
        disturb(attempt)
        try:
            results.append(compute())
        except ConformanceError:
            raise
        except Exception as error:
            raise ConformanceError(
                f"{type(strategy).__name__}: promised: runs on an ordinary subject. Found: "
                f"{type(error).__name__}: {error}"
            ) from error
    prints = [fingerprint(content(result)) for result in results]
    promise(
        prints[0] == prints[1],
        strategy,
        "the same seed gives the same result, whatever ran before",
        "two results that differ. Draw from run.generator(name) only",
    )
    return results[0]


class ProvokedError(Exception):
    """What a denoiser raises in a failing run."""


def failing(strategy: Any, make: Callable[[], Subject], verb: Callable[[Subject], Any]) -> None:
    """Run a verb on denoisers that fail at their first, second and fourth call.

    A verb that never gets to that call is not judged by it.

    Raises:
        ConformanceError: the failing run left a trace, or swallowed the error.
    """
    for limit in (1, 2, 4):
        subject, calls = make(), [0]

        def count(
            module: nn.Module, args: Any, limit: int = limit, calls: list[int] = calls
        ) -> None:
            calls[0] += 1
            if calls[0] == limit:
                raise ProvokedError

        subject.denoiser.register_forward_pre_hook(count)
        raised = False
        try:
            with untouched(strategy, subject):
                verb(subject)
        except ProvokedError:
            raised = True
        except ConformanceError:
            raise
        except Exception as error:  # an error of its own that tells of ours is as good
            raised = isinstance(error.__cause__ or error.__context__, ProvokedError)
            promise(raised, strategy, "fails for the denoiser's reason", repr(error))
        promise(raised or calls[0] < limit, strategy, "lets errors through", "a swallowed one")
