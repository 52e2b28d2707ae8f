"""The finished mixture: ordinary denoisers that may share layers, and the rule t -> expert."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from torch import nn

from moediff import surgery
from moediff.artefact import FORMAT, base_shapes, check, distinct, fill, plain, sealed, storable
from moediff.errors import ArtefactError, PlanError
from moediff.plan import REST, Plan
from moediff.registry import Registry, installed
from moediff.storage import (
    Packed,
    Tensors,
    read_packed,
    settings,
    write_json,
    write_packed,
)
from moediff.subject import Subject
from moediff.timesteps import Intervals

WEIGHTS = "mixture.safetensors"
MIXTURE = "mixture.json"


class ExpertMixture(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """N efficient experts behind the interface of the denoiser that they were made from.

    Assign it to a pipeline (`pipe.unet = mixture`); every scheduler works, because the expert is
    chosen from the timestep alone and no step is remembered.

    Args:
        experts: N denoisers, as `moediff.surgery.assemble` shares and cuts them.
        plan: with N intervals.
        subject: the base model's scheduler and anatomy.
        tied: whether copies that the plan tells apart are still one.
    """

    config_name = "config.json"
    _supports_gradient_checkpointing = True

    def __init__(
        self, experts: Sequence[nn.Module], plan: Plan, subject: Subject, *, tied: bool
    ) -> None:
        super().__init__()
        if len(experts) != len(plan.intervals):
            raise PlanError(
                f"experts: got {len(experts)}; the plan has {len(plan.intervals)} intervals."
            )
        config: Any = subject.denoiser.config
        self.register_to_config(**config)
        self.experts = nn.ModuleList(experts)
        self.plan = plan
        self.tied = tied
        self.anatomy = subject.anatomy
        self.base_class = type(subject.denoiser).__name__
        self.scheduler_config = settings(subject.scheduler.config)
        self.scheduler_class = type(subject.scheduler).__name__

    @classmethod
    def from_experts(cls, experts: Sequence[Subject], plan: Plan) -> ExpertMixture:
        """Cut N experts as the plan says; copies that start equal are still tied.

        The experts are left alone: the mixture holds weights of its own.
        """
        subject = experts[0]
        denoisers = [expert.denoiser for expert in experts]
        cut = surgery.assemble(denoisers, subject.anatomy, plan, tied=True)
        mixture = cls(cut, plan, subject, tied=True)
        mixture.eval()
        return mixture

    @property
    def intervals(self) -> Intervals:
        """The plan's intervals."""
        return self.plan.intervals

    def route(self, timestep: float | torch.Tensor) -> int | torch.Tensor:
        """The expert of a timestep; see `Intervals.route`."""
        return self.plan.intervals.route(timestep)

    def forward(
        self, sample: torch.Tensor, timestep: float | torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Call the expert of `timestep` as the base denoiser is called.

        Args:
            sample: (B, C, H, W).
            timestep: a number, or a tensor () or (B,). A batch whose rows belong to several
                experts is split; every tensor argument with B rows is split alike.
            args: further positional arguments of the base denoiser.
            kwargs: its keyword arguments.

        Returns:
            What the base denoiser returns.
        """
        routed = self.route(timestep)
        if isinstance(routed, int):
            return self.experts[routed](sample, timestep, *args, **kwargs)
        present: list[int] = sorted(set(routed.tolist()))
        if len(present) == 1:
            return self.experts[present[0]](sample, timestep, *args, **kwargs)
        if len(routed) != len(sample):
            raise PlanError(
                f"timestep: got {len(routed)} values for a batch of {len(sample)}; allowed are one "
                "value or one per row."
            )
        return self._mixed(routed, present, (sample, timestep, *args), kwargs)

    def _mixed(
        self,
        routed: torch.Tensor,
        present: Sequence[int],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        rows = {index: (routed == index).nonzero().squeeze(1) for index in present}

        def part(value: Any, index: int) -> Any:
            if isinstance(value, Mapping):  # such as `added_cond_kwargs`
                return {name: part(item, index) for name, item in value.items()}
            if isinstance(value, list | tuple):
                return type(value)(part(item, index) for item in value)
            batched = isinstance(value, torch.Tensor) and value.shape[:1] == routed.shape
            return value[rows[index].to(value.device)] if batched else value

        outputs = [
            self.experts[index](
                *(part(value, index) for value in args),
                **{name: part(value, index) for name, value in kwargs.items()},
            )
            for index in present
        ]
        back = torch.cat([rows[index] for index in present]).argsort()
        first = outputs[0]
        if isinstance(first, tuple):
            return tuple(torch.cat(pieces)[back] for pieces in zip(*outputs, strict=True))
        joined = {name: torch.cat([output[name] for output in outputs])[back] for name in first}
        return type(first)(**joined)

    def untie(self) -> ExpertMixture:
        """Give every copy of the plan weights of its own, in place, and return the mixture."""
        surgery.untie(list(self.experts), self.anatomy, self.plan)
        self.tied = False
        return self

    def _sources(self) -> list[int]:
        """Number the experts so that those with layers tied beyond the plan are equal (N,)."""
        sources = list(range(len(self.experts)))
        for layer, paths in surgery.parts_of(self.experts[0], self.anatomy):
            numbers = self.plan.copy_numbers(layer.name if layer else REST)
            modules = [expert.get_submodule(paths[0]) for expert in self.experts]
            for i, j in itertools.combinations(range(len(modules)), 2):
                if modules[i] is modules[j] and numbers[i] != numbers[j]:
                    sources = [sources[i] if number == sources[j] else number for number in sources]
        return sources

    def pack(self) -> Packed:
        """Tensors, each shared one once, and JSON data; `unpack` is the way back."""
        tensors = distinct(self)
        scheduler = {"class": self.scheduler_class, "config": plain(self.scheduler_config)}
        data = {
            "base_class": self.base_class,
            "config": settings(json.loads(self.to_json_string())),
            "plan": self.plan.to_json(),
            "scheduler": scheduler,
            "tied": self.tied,
            "sources": self._sources(),
        }
        return tensors, sealed(data, tensors)

    @classmethod
    def unpack(
        cls, tensors: Tensors, data: Mapping[str, Any], registry: Registry | None = None
    ) -> ExpertMixture:
        """Rebuild a mixture: shapes on `meta` from config and plan, then a strict load.

        Args:
            tensors: by name, from `pack`.
            data: from `pack`.
            registry: where the base's anatomy is looked up; the installed plugins by default.

        Raises:
            ArtefactError: the tensors are not those that were packed.
        """
        check(tensors, data)
        subject = base_shapes(data, registry or installed())
        plan = Plan.from_json(data["plan"])
        tied, sources = bool(data["tied"]), data["sources"]
        bases = {number: copy.deepcopy(subject.denoiser) for number in set(sources)}
        denoisers = [bases[number] for number in sources]
        experts = surgery.assemble(denoisers, subject.anatomy, plan, tied=tied)
        mixture = cls(experts, plan, subject, tied=tied)
        fill(mixture, tensors)
        mixture.eval()
        return mixture

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write `config.json`, `mixture.json` and `mixture.safetensors` into a folder.

        Args:
            save_directory: made if it is missing; files of the same names are replaced.
            kwargs: what pipelines pass along; sharding, variants and pickles do not apply.
        """
        storable(self.base_class)
        folder = Path(save_directory)
        tensors, data = self.pack()
        write_packed(folder / WEIGHTS, (tensors, {"format": FORMAT}))
        write_json(folder / self.config_name, {"_class_name": "ExpertMixture", **data["config"]})
        write_json(folder / MIXTURE, data)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        registry: Registry | None = None,
        **kwargs: Any,
    ) -> ExpertMixture:
        """Load what `save_pretrained` wrote; the outputs are bit-equal.

        Args:
            pretrained_model_name_or_path: the folder.
            registry: where the base's anatomy is looked up; the installed plugins by default.
            kwargs: `torch_dtype` and `subfolder` are honoured; the others do not apply.

        Raises:
            ArtefactError: a file is missing, truncated or altered.
        """
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        try:
            data = json.loads((folder / MIXTURE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArtefactError(
                f"{folder / MIXTURE}: cannot be read ({error}). Give a folder that "
                "`save_pretrained` wrote."
            ) from error
        tensors, _ = read_packed(folder / WEIGHTS)
        try:
            mixture = cls.unpack(tensors, data, registry)
        except (KeyError, TypeError, AttributeError) as error:
            raise ArtefactError(
                f"{folder / MIXTURE}: is not a mixture's ({type(error).__name__}: {error}). "
                "Restore a copy or build it again."
            ) from error
        dtype = kwargs.get("torch_dtype")
        if isinstance(dtype, torch.dtype):
            mixture.to(dtype)
        return mixture

    def enable_freeu(self, *args: Any, **kwargs: Any) -> None:
        """Refuse FreeU, which rewrites the features of blocks that an expert may not have."""
        raise _refusal("FreeU")

    def fuse_qkv_projections(self) -> None:
        """Refuse fused projections, which would hide the heads from masks and cuts."""
        raise _refusal("fused QKV projections")

    def _load_ip_adapter_weights(self, *args: Any, **kwargs: Any) -> None:
        raise _refusal("IP-Adapter")


def _refusal(feature: str) -> NotImplementedError:
    return NotImplementedError(
        f"{feature}: not possible for an ExpertMixture. Apply it to the base model before the "
        "mixture is built, or to `mixture.experts[i]`."
    )


# Pipelines write the module of a component's class into model_index.json and look it up there.
ExpertMixture.__module__ = "moediff"
