"""The only file that knows optional packages: the lines that install them and this one, and what some log unasked."""

from __future__ import annotations

import importlib.metadata
import logging
import re
import shlex

ON_AN_INDEX = False
"""Whether ``pip install rmsnorm`` finds this package. To be changed, here alone, on the day that it does."""

NAME = "rmsnorm"
_OF_EXTRA = re.compile(r"""^(?P<package>[^;]+);\s*extra\s*==\s*["'](?P<extra>[^"']+)["']$""")


def package_line(extra: str = "") -> str:
    """What installs this package, with an extra or without: from an index, or in a checkout.

    The build needs the torch that it is for, so in a checkout pip must not fetch another one for it.
    """
    chosen = f"[{extra}]" if extra else ""
    if ON_AN_INDEX:
        return f"pip install {_quoted(NAME + chosen)}"
    return f"pip install --no-build-isolation {_quoted('.' + chosen)}"


def extra_line(extra: str) -> str:
    """What adds an extra to the package that runs: named by the index, or, before it is on one, the packages
    themselves, which is right for a checkout, a git address and a wheel alike."""
    return package_line(extra) if ON_AN_INDEX else packages_line(*packages(extra))


def packages_line(*names: str, options: str = "") -> str:
    """What installs other packages."""
    return " ".join(["pip install", *filter(None, [options]), *map(_quoted, names)])


def packages(extra: str) -> list[str]:
    """The requirements of an extra, as the installed package declares them; those of the extras inside it, too."""
    found: list[str] = []
    for requirement in importlib.metadata.requires(NAME) or ():
        match = _OF_EXTRA.match(requirement)
        if match and match["extra"] == extra:
            package = match["package"].strip()
            inner = re.fullmatch(rf"{NAME}\[(.+)\]", package)
            found += packages(inner[1]) if inner else [package]
    return list(dict.fromkeys(found))


def hush() -> None:
    """Leaves warnings that optional packages log about themselves, when transformers imports them, out of a command's
    output: torchao's, which has libraries for GPUs and uses an interface of torch that is on its way out."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _quoted(text: str) -> str:
    """For a shell: ``>`` and brackets mean something there."""
    return shlex.quote(text)
