"""The peak memory of a denoiser call beside the base model's (MoEDM Appendix C, Table 6)."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import torch
from attrs.validators import ge, instance_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moediff.roles import Measurement
from moediff.sampling import fit
from moediff.subject import Subject
from moediff.task import Task
from moediff.workdir import Run


@attrs.frozen
class Memory:
    """Ratio of the peak bytes that the weights and one denoiser call take, this model's over base.

    The weights are all that are stored, every expert's copies included; the call is the most
    demanding one of the run's sampling. On CUDA its bytes are what the allocator hands out, with
    the workspaces of kernels (and its peak statistics are reset). Elsewhere, `meta` included, they
    are those of the tensors that are alive at once, which is exact and repeatable but leaves out
    what a kernel allocates inside itself. Table 6 does not say what else its figures hold. The
    bytes of this model and of the base are recorded as `memory` (2,).

    Attributes:
        batch: B, rows of a call; MoEDM uses 4.
    """

    batch: int = attrs.field(default=4, validator=[instance_of(int), ge(1)])

    def measure(self, denoiser: nn.Module, subject: Subject, task: Task, run: Run) -> Measurement:
        device = subject.device
        generator = run.generator("memory")
        sample = torch.randn(self.batch, *subject.shape, generator=generator).to(device)
        conditioning, _ = task.prompts(self.batch, device)
        # Routing reads the timestep, so it stays on the CPU: `meta` holds no values.
        timesteps = run.sampling.prepare(subject.scheduler).timesteps
        peak = partial(_cuda_peak, device) if device.type == "cuda" else live_peak

        def total(model: nn.Module) -> int:
            rows, words = fit(model, sample, conditioning)
            calls = [peak(partial(model, rows, t, **words)) for t in timesteps]
            return max(calls) + weight_bytes(model)

        with torch.inference_mode():
            used = torch.tensor([total(denoiser), total(subject.denoiser)])
        run.record("memory", used)
        return Measurement("memory", float(used[0] / used[1]), "x base", self.batch)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers, a shared one counted once."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def live_peak(call: Callable[[], Any]) -> int:
    """Most bytes of tensors made during a call that were alive at the same time."""
    mode = _Live()
    with mode:
        call()
    return mode.peak


def _cuda_peak(device: torch.device, call: Callable[[], Any]) -> int:
    call()  # the first call leaves workspaces behind, which later ones share
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that operators make, and takes off those that go away."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(tensor)._cdata for tensor in _tensors((args, kwargs))}
        output = func(*args, **(kwargs or {}))
        for tensor in _tensors(output):
            storage = _storage(tensor)
            if storage._cdata not in self.known | given:  # neither a view nor in place
                self._add(storage, storage._cdata, storage.nbytes())
        return output

    def _add(self, storage: torch.UntypedStorage, key: int, size: int) -> None:
        def gone() -> None:
            self.known.remove(key)
            self.now -= size

        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, gone)


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()
