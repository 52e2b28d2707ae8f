"""Read a denoiser from a diffusers folder, or its shapes alone, without its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from moediff.errors import OptionError
from moediff.sampling import trains
from moediff.storage import settings


def load_model(path: str | Path) -> tuple[Any, Any]:
    """Load a denoiser (float32, eval mode) and its scheduler from a saved diffusers pipeline.

    A pipeline is often saved with the scheduler that it samples with. One that cannot train gives
    the DDPM scheduler of the same noise schedule.

    Args:
        path: a folder with unet/ and scheduler/.

    Raises:
        OptionError: one of the two is missing or cannot be read.
    """
    path, found = Path(path), {}
    for part, fallback in (("unet", "UNet2DModel"), ("scheduler", "DDPMScheduler")):
        name = "config.json" if part == "unet" else "scheduler_config.json"
        try:
            config = json.loads((path / part / name).read_text(encoding="utf-8"))
            kind = getattr(diffusers, config.get("_class_name", fallback))
            found[part] = kind.from_pretrained(path / part, local_files_only=True)
        except (OSError, ValueError, AttributeError) as error:
            reason = str(error).splitlines()[0]
            raise OptionError(
                f"model: cannot load {path / part}: {reason}. Give a folder with unet/ and "
                "scheduler/, as a diffusers pipeline saves them."
            ) from error
    scheduler = found["scheduler"]
    if not trains(scheduler):
        scheduler = diffusers.DDPMScheduler.from_config(settings(scheduler.config))
    return found["unet"].float().eval(), scheduler


def load_meta(path: str | Path) -> nn.Module:
    """Build a denoiser on `meta` from a model folder, a pipeline folder or a config.json.

    Raises:
        OptionError: there is no such file, it is not JSON, or it names no diffusers model.
    """
    path = Path(path)
    folders = (path, path / "unet", path / "transformer")
    found = [folder / "config.json" for folder in folders if (folder / "config.json").is_file()]
    file = found[0] if path.is_dir() and found else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OptionError(
            f"model: cannot read {file}: {reason}. Give a diffusers model folder or its "
            "config.json."
        ) from error
    name = config.get("_class_name") if isinstance(config, dict) else None
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
        raise OptionError(
            f"model: {file} has the _class_name {name!r}; allowed is the name of a diffusers "
            "model, for example 'UNet2DModel'. Add it to the config."
        )
    try:
        with torch.device("meta"):
            model: nn.Module = kind.from_config(config).eval()  # type: ignore[attr-defined]
    except (TypeError, ValueError, AssertionError) as error:
        raise OptionError(f"model: {file} does not describe a {name}: {error}.") from error
    return model
