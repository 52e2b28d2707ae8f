"""Train the bundled digits demo: a class-conditional diffusion model and a classifier.

Both nets learn from scikit-learn's 8x8 handwritten digits, minus a fixed held-out fifth (see
``moediff_plugins.digits.load_images``). One CPU thread is enough; the whole run takes well under
an hour:

    PYTHONPATH=plugins python examples/train_digits_base.py

The base net is a diffusers ``UNet2DModel`` with epsilon prediction and a null class for
classifier-free guidance. Its moving average (EMA) is validated on the held-out images with fixed
noise, and the average with the lowest validation loss is exported in float16. The run can be
stopped and started again with the same arguments: it resumes from ``--work-dir``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import safetensors
import sklearn
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from moediff_plugins.digits import ASSETS, NULL_LABEL, DigitsClassifier, Split, load_images

TRAIN_TIMESTEPS = 1000
MAX_PARAMS = 2_000_000
DATA_DESCRIPTION = (
    "scikit-learn load_digits: 1797 real 8x8 scans of handwritten digits (UCI Optical Recognition "
    "of Handwritten Digits), values 0..16 scaled to [-1, 1]; 80 % train, 20 % held out "
    "(moediff_plugins.digits.load_images)"
)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train the bundled digits demo.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--part", choices=("all", "base", "classifier"), default="all")
    parser.add_argument("--steps", type=int, default=6000, help="training steps of the base net")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of the base net")
    parser.add_argument("--warmup", type=int, default=200, help="steps of linear warmup")
    parser.add_argument("--weight-decay", type=float, default=1e-2)
    parser.add_argument("--dropout", type=float, default=0.1, help="dropout inside the U-Net")
    parser.add_argument("--label-dropout", type=float, default=0.1)
    parser.add_argument("--ema-decay", type=float, default=0.999)
    parser.add_argument("--eval-every", type=int, default=100)
    parser.add_argument("--classifier-epochs", type=int, default=80)
    parser.add_argument("--classifier-lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work-dir", type=Path, default=Path("runs/digits"), help="checkpoints")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder for the exported assets")
    return parser.parse_args()


def load_tensors(split: Split) -> tuple[Tensor, Tensor]:
    """Load a split as images (n, 1, 8, 8) in [-1, 1] and labels (n,)."""
    images, labels = load_images(split)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warmup, then cosine decay to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


# ---------------------------------------------------------------------------------------- base net


def build_base(dropout: float) -> tuple[UNet2DModel, DDPMScheduler]:
    """Create the untrained U-Net and its noise scheduler."""
    model = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 48, 80),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=16,
        attention_head_dim=16,
        num_class_embeds=NULL_LABEL + 1,
        dropout=dropout,
    )
    if count_params(model) > MAX_PARAMS:
        raise ValueError(f"the base net has {count_params(model)} parameters, over {MAX_PARAMS}")
    scheduler = DDPMScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="epsilon",
        clip_sample=False,
    )
    return model, scheduler


def count_params(model: nn.Module) -> int:
    """Count the parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def validation_loss(model: UNet2DModel, scheduler: DDPMScheduler, repeats: int = 4) -> float:
    """Noise-prediction error on the held-out images, same noise and timesteps at each call."""
    images, labels = load_tensors("test")
    images, labels = images.repeat(repeats, 1, 1, 1), labels.repeat(repeats)
    generator = torch.Generator().manual_seed(1234)
    noise = torch.randn(images.shape, generator=generator)
    timesteps = torch.randint(0, TRAIN_TIMESTEPS, labels.shape, generator=generator)
    noisy = scheduler.add_noise(images, noise, timesteps)
    was_training = model.training
    model.eval()
    total = 0.0
    for part in torch.arange(len(images)).split(256):
        predicted = model(noisy[part], timesteps[part], class_labels=labels[part]).sample
        total += F.mse_loss(predicted, noise[part], reduction="sum").item()
    model.train(was_training)
    return total / images.numel()


def save_atomically(tensors: Mapping[str, Tensor], path: Path, meta: Mapping[str, Any]) -> None:
    """Write tensors and JSON metadata to one safetensors file, whole or not at all."""
    partial = path.with_suffix(".partial")
    own = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
    save_file(own, partial, metadata={"json": json.dumps(dict(meta))})
    os.replace(partial, path)


def save_checkpoint(
    path: Path,
    model: UNet2DModel,
    ema: EMAModel,
    optimizer: torch.optim.Optimizer,
    meta: Mapping[str, Any],
) -> None:
    """Save everything that a resumed run needs (without pickle)."""
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
    tensors |= {f"ema.{i}": value for i, value in enumerate(ema.shadow_params)}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{key}": value for key, value in state.items()}
    save_atomically(tensors, path, meta)


def load_checkpoint(
    path: Path, model: UNet2DModel, ema: EMAModel, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Restore what ``save_checkpoint`` saved and return its metadata."""
    with safe_open(path, "pt") as file:
        meta: dict[str, Any] = json.loads(file.metadata()["json"])
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
    for name, value in load_file(path).items():
        part, key = name.split(".", 1)
        parts[part][key] = value
    model.load_state_dict(parts["model"])
    ema.shadow_params = [parts["ema"][str(i)] for i in range(len(parts["ema"]))]
    ema.optimization_step = meta["step"]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in parts["optimizer"].items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return meta


def train_base(args: argparse.Namespace) -> dict[str, Any]:
    """Train the base net, export its best moving average and return its card."""
    images, labels = load_tensors("train")
    torch.manual_seed(args.seed)
    model, scheduler = build_base(args.dropout)
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, lr=args.lr, weight_decay=args.weight_decay)
    ema = EMAModel(params, decay=args.ema_decay)

    args.work_dir.mkdir(parents=True, exist_ok=True)
    checkpoint, best = args.work_dir / "last.safetensors", args.work_dir / "best.safetensors"
    meta: dict[str, Any] = {"step": 0, "seconds": 0.0, "best_val": math.inf, "log": []}
    if checkpoint.exists():
        meta = load_checkpoint(checkpoint, model, ema, optimizer)

    model.train()
    started, losses = time.monotonic() - meta["seconds"], []
    progress = tqdm(range(meta["step"], args.steps), initial=meta["step"], total=args.steps)
    for step in progress:
        torch.manual_seed((args.seed + 1) * 1_000_003 + step)  # so a resumed run is the same run
        set_learning_rate(optimizer, learning_rate(step, args.steps, args.warmup, args.lr))
        chosen = torch.randperm(len(images))[: args.batch_size]
        clean, noise = images[chosen], torch.randn(len(chosen), *images.shape[1:])
        timesteps = torch.randint(0, TRAIN_TIMESTEPS, (len(chosen),))
        dropped = torch.rand(len(chosen)) < args.label_dropout
        asked = torch.where(dropped, NULL_LABEL, labels[chosen])
        noisy = scheduler.add_noise(clean, noise, timesteps)
        loss = F.mse_loss(model(noisy, timesteps, class_labels=asked).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        ema.step(params)
        losses.append(loss.item())

        done = step + 1
        if done % args.eval_every and done != args.steps:
            continue
        ema.store(params)
        ema.copy_to(params)
        val = validation_loss(model, scheduler)
        if val < meta["best_val"]:
            meta |= {"best_val": val, "best_step": done}
            save_atomically(model.state_dict(), best, {"step": done, "val_loss": val})
        ema.restore(params)
        seconds = round(time.monotonic() - started, 1)
        row = {"step": done, "train_loss": float(np.mean(losses)), "val_loss": val}
        meta |= {"step": done, "seconds": seconds}
        meta["log"].append(row | {"seconds": seconds})
        losses = []
        save_checkpoint(checkpoint, model, ema, optimizer, meta)
        progress.set_postfix(train=f"{row['train_loss']:.4f}", val=f"{val:.4f}")

    model, _ = build_base(dropout=0.0)  # so that later training of the export is free of dropout
    model.load_state_dict(load_file(best))
    before = validation_loss(model, scheduler)
    model.half().save_pretrained(args.out / "unet")
    scheduler.save_pretrained(args.out / "scheduler")
    after = validation_loss(model.float(), scheduler)
    lines = "".join(json.dumps(row) + "\n" for row in meta["log"])
    (args.out / "training_log.jsonl").write_text(lines, encoding="utf-8")
    return {
        "params": count_params(model),
        "steps": args.steps,
        "exported_step": meta["best_step"],
        "batch_size": args.batch_size,
        "learning_rate": args.lr,
        "weight_decay": args.weight_decay,
        "dropout": args.dropout,
        "label_dropout": args.label_dropout,
        "ema_decay": args.ema_decay,
        "val_loss_float32": before,
        "val_loss_float16_rounded": after,
        "seconds": meta["seconds"],
    }


# -------------------------------------------------------------------------------------- classifier


def random_shift(images: Tensor) -> Tensor:
    """Shift each image (n, 1, 8, 8) by up to one pixel each way, filling with background."""
    windows = F.pad(images, (1, 1, 1, 1), value=-1.0).unfold(2, 8, 1).unfold(3, 8, 1)
    down, right = torch.randint(0, 3, (2, len(images)))
    return windows[torch.arange(len(images)), :, down, right]


@torch.no_grad()
def accuracy(model: DigitsClassifier, images: Tensor, labels: Tensor) -> float:
    """Share of images whose most likely class is the label."""
    return (model(images).argmax(1) == labels).float().mean().item()


def train_classifier(args: argparse.Namespace) -> dict[str, Any]:
    """Train the classifier with small shifts, export it and return its card."""
    images, labels = load_tensors("train")
    torch.manual_seed(args.seed)
    model = DigitsClassifier().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.classifier_lr, weight_decay=1e-2)
    per_epoch = math.ceil(len(images) / args.batch_size)
    steps, step, started = args.classifier_epochs * per_epoch, 0, time.monotonic()
    for _ in tqdm(range(args.classifier_epochs)):
        for chosen in torch.randperm(len(images)).split(args.batch_size):
            set_learning_rate(optimizer, learning_rate(step, steps, 50, args.classifier_lr))
            loss = F.cross_entropy(model(random_shift(images[chosen])), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    model.eval()
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), args.out / "classifier.safetensors")
    return {
        "params": count_params(model),
        "epochs": args.classifier_epochs,
        "batch_size": args.batch_size,
        "learning_rate": args.classifier_lr,
        "train_accuracy": accuracy(model, images, labels),
        "test_accuracy": accuracy(model, *load_tensors("test")),
        "seconds": round(time.monotonic() - started, 1),
    }


# -------------------------------------------------------------------------------------------- card


def command_line() -> str:
    """Command line of this run, without the folders of the machine it ran on."""
    kept, skip = [], False
    for word in sys.argv[1:]:
        if skip:
            skip = False
        elif word.split("=")[0] in ("--work-dir", "--out"):
            skip = "=" not in word
        else:
            kept.append(word)
    return " ".join(["PYTHONPATH=plugins python examples/train_digits_base.py", *kept])


def write_card(out: Path, part: str, card: Mapping[str, Any], seed: int) -> None:
    """Add the card of one part to ``card.json``."""
    path = out / "card.json"
    whole = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    modules = (torch, diffusers, safetensors, sklearn)
    versions |= {module.__name__: str(module.__version__) for module in modules}
    whole["data"] = DATA_DESCRIPTION
    whole[part] = {"seed": seed, **card, "command": command_line(), "versions": versions}
    path.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Train the asked parts."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    for part, train in (("classifier", train_classifier), ("base", train_base)):
        if args.part in ("all", part):
            card = train(args)
            write_card(args.out, part, card, args.seed)
            for path in args.out.rglob("*.safetensors"):
                path.chmod(0o644)  # safetensors writes files that only their owner can read
            print(part, json.dumps(card, indent=2))


if __name__ == "__main__":
    main()
