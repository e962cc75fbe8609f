"""The only file that knows what options of several commands mean: lists of names and sizes, threads, files that can be
written. What is wrong with them is said in one line.
"""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from . import asked, export

SECONDS_PER_RACE = 1.5
FILES = {"--json": (".json",), "--csv": (".csv",), "--report": (".html", ".png")}

Threads = Annotated[str, typer.Option(help="Thread counts, separated by commas; each gets a process of its own.")]
Seconds = Annotated[float, typer.Option(min=0.001, help="For each race; at least 7 rounds are run.")]


def one_of(option: str, text: str, known: Collection[str]) -> list[str]:
    """A list of names as the command line gives it."""
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(known)}", param_hint=option)
    return names


def sizes(option: str, text: str) -> list[int]:
    """A list of sizes as the command line gives it."""
    numbers = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if 0 in numbers:
        good = "whole numbers from 1 up, separated by commas, like 1,512,4096"
        raise typer.BadParameter(f"{text!r} is not a list of sizes; give {good}", param_hint=option)
    return numbers


def thread_counts(text: str) -> list[int] | None:
    """A list of thread counts, or None: what torch would take."""
    if not text:
        return None
    counts, most = sizes("--threads", text), os.cpu_count() or 1
    if max(counts) > most:
        raise typer.BadParameter(f"{max(counts)} threads on {most} cores can't be timed", param_hint="--threads")
    return counts


def check_device(name: str) -> None:
    """Refuses a device that isn't here, in one line."""
    try:
        there = name == "cpu" or torch.get_device_module(name).is_available()
        reason = f"torch {torch.__version__} finds no such device on this machine, so nothing was timed"
    except RuntimeError:
        there, reason = False, "not a device that torch knows; give cpu, cuda or xpu"
    if not there:
        Console(stderr=True).print(f"--device {name}: {reason}", markup=False, soft_wrap=True)
        raise typer.Exit(2)


def check_file(option: str, file: Path | None, *suffixes: str) -> None:
    """Refuses a file that can't be written, before anything is measured."""
    if option == "--json" and file == asked.STDOUT:
        return
    if file and (reason := export.refusal(file, *(suffixes or FILES[option]))):
        Console(stderr=True).print(f"{option}: {reason}", markup=False, soft_wrap=True)
        raise typer.Exit(2)
