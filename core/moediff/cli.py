"""The command line: `moediff plugins`, `moediff run`, `moediff report`, `moediff count`."""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moediff.engine import build_experts
from moediff.errors import MoediffError, OptionError, WorkdirError
from moediff.modelfile import load_meta, load_model
from moediff.recipefile import load_recipe
from moediff.registry import HOOKS, installed
from moediff.task import Task

MODEL = {"path": "a string"}
TASK = {
    "path": "a string",
    "size": "an integer",
    "classes": "a list of integers",
    "null_label": "an integer",
}
"""The keys of a recipe file's tables that are not the recipe's, and what they hold."""

KINDS = {str: "a string", int: "an integer"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; a mistake in its input is one line on stderr and exit code 2."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except MoediffError as error:
        print(f"moediff: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moediff", description="Turn a diffusion model into efficient timestep experts."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    plugins = commands.add_parser("plugins", help="what is installed, from which distribution")
    plugins.add_argument("--json", action="store_true", help="print JSON")
    plugins.set_defaults(command=_plugins)

    run = commands.add_parser("run", help="build a mixture from a recipe file")
    run.add_argument("recipe", type=Path, metavar="RECIPE.toml")
    run.add_argument("--out", type=Path, required=True, metavar="DIR")
    run.add_argument("--resume", action="store_true", help="go on with a run that was killed")
    run.add_argument("--device", default="cpu", help="where to train, such as cuda")
    run.add_argument("--quiet", action="store_true", help="draw no progress bars")
    run.set_defaults(command=_run)

    report = commands.add_parser("report", help="show what a finished run has found")
    report.add_argument("folder", type=Path, metavar="DIR")
    report.add_argument("--kind", default="page", help="which of the installed reports")
    report.set_defaults(command=_report)

    count = commands.add_parser("count", help="params and MACs of a model, on meta")
    count.add_argument("model", type=Path, metavar="MODEL", help="a folder or a config.json")
    count.add_argument("--json", action="store_true", help="print JSON")
    count.set_defaults(command=_count)
    return parser


def _plugins(options: argparse.Namespace) -> None:
    registry = installed()
    rows = [
        {"hook": entry.hook, "name": entry.name, "distribution": entry.distribution}
        for entries in registry.entries.values()
        for entry in entries
    ]
    rows.sort(key=lambda row: (HOOKS.index(row["hook"]), row["name"]))
    if options.json:
        print(json.dumps({"strategies": rows, "left_out": dict(registry.broken)}, indent=2))
        return
    for row in rows:
        print(f"{row['hook']:<12} {row['name']:<22} {row['distribution']}")
    for distribution, reason in registry.broken.items():
        print(f"left out     {distribution:<22} {reason}")


def _run(options: argparse.Namespace) -> None:
    if options.recipe.suffix != ".toml":
        raise OptionError(
            f"recipe: got {options.recipe}; allowed is a .toml file, which names the model and the "
            f'task as well. Write one with base = "{options.recipe}".'
        )
    recipe = load_recipe(options.recipe)
    about = tomllib.loads(options.recipe.read_text(encoding="utf-8"))
    denoiser, scheduler = load_model(_table(about, "model", MODEL)["path"])
    task = _task(_table(about, "task", TASK), denoiser)
    started = (options.out / "run.json").exists()
    if started and not options.resume:
        raise WorkdirError(
            f"{options.out}: a run was started there. Pass --resume to go on with it, or choose "
            "another folder."
        )
    if options.resume and not started:
        raise WorkdirError(f"{options.out}: holds no run to resume. Leave --resume out.")
    try:
        denoiser.to(options.device)
    except (RuntimeError, AssertionError) as error:  # torch's, of a name or a missing device
        raise OptionError(
            f"device: got {options.device!r}: {str(error).splitlines()[0]}. Give cpu, or a device "
            "that this machine has."
        ) from error
    build_experts(denoiser, scheduler, task, recipe, options.out, verbose=not options.quiet)
    print(f"wrote {options.out / 'mixture'}")


def _table(about: dict[str, Any], name: str, allowed: Mapping[str, str]) -> dict[str, Any]:
    table = about.get(name)
    if not isinstance(table, dict) or "path" not in table or not set(table) <= set(allowed):
        raise OptionError(
            f"{name}: got {table!r}; the recipe file needs a table [{name}] with `path`, and of "
            f"other keys only {', '.join(sorted(set(allowed) - {'path'})) or 'none'}."
        )
    for key, value in table.items():
        numbers = isinstance(value, list) and all(type(number) is int for number in value)
        kind = "a list of integers" if numbers else KINDS.get(type(value), type(value).__name__)
        if kind != allowed[key]:
            raise OptionError(f"{name}.{key}: got {value!r}; allowed is {allowed[key]}.")
    return table


def _task(table: dict[str, Any], denoiser: Any) -> Task:
    size, channels = denoiser.config.sample_size, denoiser.config.in_channels
    task = Task.from_folder(
        table["path"], table.get("size", size), table.get("null_label"), channels
    )
    return task.subset(table["classes"]) if "classes" in table else task


def _report(options: argparse.Namespace) -> None:
    report = installed().create("reports", options.kind, {})
    print(f"wrote {report.write(options.folder)}")


def _count(options: argparse.Namespace) -> None:
    denoiser = load_meta(options.model)
    registry = installed()
    counts = {
        name: registry.create("counters", name, {}).count(denoiser) for name in ("params", "macs")
    }
    macs = counts["macs"]
    if options.json:
        result = {
            "params": int(counts["params"].value),
            "macs": int(macs.value),
            "unit": macs.unit,
            "by_operator": {name: int(value) for name, value in macs.by_operator.items()},
        }
        print(json.dumps(result, indent=2))
        return
    print(f"params  {counts['params'].value / 1e6:10.2f} M")
    print(f"MACs    {macs.value / 1e9:10.2f} G  (one forward pass, batch 1)")
    for name, value in sorted(macs.by_operator.items(), key=lambda item: -item[1]):
        print(f"  {name:<40} {value / 1e9:10.2f} G")
