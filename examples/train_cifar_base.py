"""Train the colour base of the benchmarks: a class-conditional diffusion model of 32x32 images.

The images are CIFAR-10's, as JPEG bytes in one ``cifar10_jpeg.npz``. Training may stop at any time,
also by a kill, and goes on where it stopped:

    python examples/train_cifar_base.py --data FOLDER --hours 2

The learning rate stays constant after its warm-up, so a later run can add hours. What is exported
comes from a copy: ``--finish 2000`` lets the rate fall to zero over 2,000 more steps, and writes
the moving average in half precision, a grid of samples, the log and a card to ``--export``. The
constant-rate checkpoint in ``--out`` stays, to go on from.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from diffusers.utils import numpy_to_pil
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from tqdm import tqdm

from moediff import Sampling
from moediff.sampling import generate, initial_noise
from moediff.storage import read_packed, write_atomic, write_json, write_packed

NULL_LABEL = 10
"""The class that stands for none, for classifier-free guidance."""

TRAIN_TIMESTEPS = 1000


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train the colour base of the benchmarks.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of cifar10_jpeg.npz")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar-base"), help="checkpoints")
    parser.add_argument("--steps", type=int, default=1_000_000, help="stop at this step, or")
    parser.add_argument("--hours", type=float, default=math.inf, help="after so many hours")
    parser.add_argument("--finish", type=int, default=0, help="steps of the falling rate")
    parser.add_argument("--export", type=Path, help="folder for the result of --finish")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=500, help="steps of the rising rate")
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--label-dropout", type=float, default=0.1)
    parser.add_argument("--eval-every", type=int, default=500, help="steps to a log line")
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 192])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def load_cifar(folder: Path, split: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
    """Decode one split of ``cifar10_jpeg.npz``.

    Returns:
        Images (n, 3, 32, 32), uint8, and labels (n,).
    """
    with np.load(folder / "cifar10_jpeg.npz") as file:
        packed, ends = file[f"{split}_jpeg"], file[f"{split}_offsets"]
        labels = torch.from_numpy(file[f"{split}_labels"].astype(np.int64))
    files = (packed[a:b].tobytes() for a, b in itertools.pairwise(ends))
    images = np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels


def to_unit(images: Tensor) -> Tensor:
    """Bytes to the range [-1, 1] of a denoiser."""
    return images.float() / 127.5 - 1


def build_base(widths: Sequence[int]) -> tuple[UNet2DModel, DDPMScheduler]:
    """Create the untrained U-Net and its noise scheduler.

    Its mid-layers are by far its widest. Attention starts at 8x8 pixels: at 16x16 it would take
    half of the time of a step on a CPU.
    """
    levels = len(widths)
    attention = [2 <= level < 3 for level in range(levels)]
    model = UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=tuple(widths),
        layers_per_block=1,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        norm_num_groups=math.gcd(16, *widths),
        attention_head_dim=min(32, *widths),
        num_class_embeds=NULL_LABEL + 1,
    )
    scheduler = DDPMScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="epsilon",
        clip_sample=False,
    )
    return model, scheduler


class Trainer:
    """The model, its optimiser and its moving average, which a checkpoint holds together."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        torch.manual_seed(args.seed)
        self.model, self.scheduler = build_base(args.widths)
        self.model.to(args.device)
        self.parameters = list(self.model.parameters())
        self.optimiser = torch.optim.AdamW(self.parameters, lr=args.lr, fused=True)
        self.average = EMAModel(self.parameters, decay=args.ema, foreach=True)
        self.images, self.labels = load_cifar(args.data, "train")
        self.log: list[dict[str, Any]] = []
        self.step, self.seconds, self.losses = 0, 0.0, [0.0][:0]

    def save(self, path: Path) -> None:
        """Write everything that going on needs."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"average.{i}": value for i, value in enumerate(self.average.shadow_params)}
        for index, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{key}": value for key, value in state.items()}
        data = {"step": self.step, "seconds": self.seconds, "log": self.log, "losses": self.losses}
        write_packed(path, (tensors, data))

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote."""
        tensors, data = read_packed(path)
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "optimiser": {}}
        for name, tensor in tensors.items():
            part, key = name.split(".", 1)
            parts[part][key] = tensor.clone()  # aligned, for a resumed step to round the same
        self.model.load_state_dict(parts["model"])
        shadow = [parts["average"][str(i)] for i in range(len(self.parameters))]
        self.average.shadow_params = [tensor.to(self.args.device) for tensor in shadow]
        self.average.optimization_step = data["step"]
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["optimiser"].items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = tensor
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": state})
        self.step, self.seconds = data["step"], data["seconds"]
        self.log, self.losses = data["log"], data["losses"]

    def train_step(self, rate: float) -> float:
        """One step of the denoising loss; its randomness depends on the seed and its number."""
        args = self.args
        generator = torch.Generator().manual_seed((args.seed + 1) * 1_000_003 + self.step)
        rows = torch.randint(0, len(self.images), (args.batch,), generator=generator)
        flipped = torch.rand(args.batch, 1, 1, 1, generator=generator) < 0.5
        dropped = torch.rand(args.batch, generator=generator) < args.label_dropout
        clean = to_unit(self.images[rows])
        clean = torch.where(flipped, clean.flip(-1), clean)
        asked = torch.where(dropped, NULL_LABEL, self.labels[rows])
        loss = self.loss(clean, asked, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.average.step(self.parameters)
        self.step += 1
        return loss.item()

    def loss(self, clean: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """The mean squared error () of the predicted noise, in bfloat16 where it is safe."""
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(0, TRAIN_TIMESTEPS, (len(clean),), generator=generator)
        noisy = self.scheduler.add_noise(clean, noise, timesteps)
        noisy, noise, timesteps, labels = (
            tensor.to(self.args.device) for tensor in (noisy, noise, timesteps, labels)
        )
        with torch.autocast(torch.device(self.args.device).type, torch.bfloat16):
            predicted = self.model(noisy, timesteps, class_labels=labels).sample
        return mse_loss(predicted.float(), noise)

    @torch.no_grad()
    def validation_loss(self, images: Tensor, labels: Tensor) -> float:
        """The moving average's loss on test images, with the same noise at each call."""
        generator = torch.Generator().manual_seed(1234)
        self.average.store(self.parameters)
        self.average.copy_to(self.parameters)
        parts = zip(images.split(256), labels.split(256), strict=True)
        losses = [self.loss(to_unit(part), wanted, generator).item() for part, wanted in parts]
        self.average.restore(self.parameters)
        return float(np.mean(losses))

    def rate(self, step: int, last: int) -> float:
        """The learning rate: rises, stays, and falls over the last `--finish` steps if asked."""
        risen = min(1.0, (step + 1) / self.args.warmup)
        left = (last - step) / self.args.finish if self.args.finish else 1.0
        return float(self.args.lr * min(risen, left))

    def train(self, last: int, checkpoint: Path) -> None:
        """Train up to step `last` or for `--hours`; write a log line and a checkpoint as asked."""
        args = self.args
        images, labels = (tensor[:2048] for tensor in load_cifar(args.data, "test"))
        begun, before = time.monotonic(), self.seconds
        progress = tqdm(range(self.step, last), initial=self.step, total=last, mininterval=5)
        for step in progress:
            self.losses.append(self.train_step(self.rate(step, last)))
            over = time.monotonic() - begun > args.hours * 3600
            if self.step % args.eval_every and self.step < last and not over:
                continue
            self.seconds = round(before + time.monotonic() - begun, 1)
            if self.step % args.eval_every == 0 or self.step == last:
                train, self.losses = float(np.mean(self.losses)), []
                row = {"step": self.step, "train_loss": train}
                row["test_loss"] = self.validation_loss(images, labels)
                self.log.append(row | {"seconds": self.seconds})
                progress.write(json.dumps(self.log[-1]), file=sys.stdout)
                sys.stdout.flush()
            self.save(checkpoint)
            if over:
                break


@torch.no_grad()
def sample_grid(model: UNet2DModel, scheduler: DDPMScheduler, guidance: float) -> Image.Image:
    """Ten images of each class, a row each: DDIM, 20 steps."""
    labels = torch.arange(10).repeat_interleave(10).to(model.device)
    noise = initial_noise(range(len(labels)), (3, 32, 32)).to(model.device)
    how = Sampling(scheduler="ddim", steps=20, guidance=guidance)
    free = {"class_labels": torch.full_like(labels, NULL_LABEL)}
    asked = {"class_labels": labels}
    made = generate(model, scheduler, how, noise, asked, free, range(len(labels)))
    pixels = (made.clamp(-1, 1) / 2 + 0.5).cpu()  # (100, 3, 32, 32)
    rows = [torch.cat(list(row), dim=2) for row in pixels.split(10)]
    grid: Image.Image = numpy_to_pil(torch.cat(rows, dim=1).permute(1, 2, 0).numpy()[None])[0]
    return grid.resize((grid.width * 2, grid.height * 2), Image.Resampling.NEAREST)


def export(trainer: Trainer, folder: Path) -> None:
    """Write the moving average in half precision, a grid of samples, the log and the card."""
    args = trainer.args
    trainer.average.copy_to(trainer.parameters)
    trainer.model.eval()
    trainer.model.half().save_pretrained(folder / "unet")
    trainer.scheduler.save_pretrained(folder / "scheduler")
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes files that only their owner can read
    grid = sample_grid(trainer.model.float(), trainer.scheduler, guidance=2.0)
    write_atomic(folder / "samples.png", lambda path: grid.save(path, format="png"))
    lines = "".join(json.dumps(row) + "\n" for row in trainer.log)
    write_atomic(folder / "training_log.jsonl", lambda path: path.write_text(lines))
    command = "python examples/train_cifar_base.py --data FOLDER"
    card = {
        "params": sum(parameter.numel() for parameter in trainer.parameters),
        "seed": args.seed,
        "steps": trainer.step,
        "falling_rate_steps": args.finish,
        "batch": args.batch,
        "images_seen": trainer.step * args.batch,
        "learning_rate": args.lr,
        "ema": args.ema,
        "label_dropout": args.label_dropout,
        "test_loss": trainer.log[-1]["test_loss"],
        "seconds": trainer.seconds,
        "device": args.device,
        "data": "CIFAR-10, 50,000 training images, from JPEG files, flipped at random",
        "commands": [
            f"{command} --steps {trainer.step - args.finish}",
            f"{command} --finish {args.finish} --export FOLDER",
        ],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
    }
    write_json(folder / "card.json", card)
    print(json.dumps(card, indent=2))


def main() -> None:
    """Train, or finish and export."""
    args = parse_args()
    trainer = Trainer(args)
    ongoing, finishing = args.out / "last.safetensors", args.out / "finishing.safetensors"
    if not args.finish:
        if ongoing.exists():
            trainer.load(ongoing)
        trainer.train(args.steps, ongoing)
        return
    trainer.load(ongoing)
    last = trainer.step + args.finish
    if finishing.exists():
        trainer.load(finishing)
    trainer.train(last, finishing)
    if trainer.step < last:  # out of time: the same command goes on
        return
    export(trainer, args.export or args.out / "export")
    finishing.unlink()


if __name__ == "__main__":
    main()
