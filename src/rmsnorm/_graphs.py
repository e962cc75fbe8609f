"""The only file that decides what a graph of ``torch.compile`` has of a norm: our operator, or the formula."""

from __future__ import annotations

from contextlib import suppress

MODES = ("exact", "inductor")

_mode = "exact"


def set_compile_mode(mode: str) -> None:
    """What ``torch.compile`` makes of our norms from now on, in functions, layers and patched models.

    ``"exact"``, as it is unless this is called: our operators, with the bits of eager mode, forward and backward. On
    the CPU those that stand beside a residual add are joined with it into one pass over memory
    (:func:`rmsnorm.add_rms_norm`, :func:`rmsnorm.rms_norm_add`, :func:`rmsnorm.sandwich_rms_norm`), where that changes
    no bit. ``"inductor"``: torch's own operators, as if the norm had been written out. Inductor fuses them with
    what stands beside them, whatever it is, and the graph is as fast, and rounds, as that of a model which has never
    heard of us: half types keep float32 between the steps that are fused, statistics are summed in float32 in an order
    that depends on the machine, rows whose squares overflow are not rescued, and backward is Inductor's, too.

    For the whole process. Graphs made in the other mode are made anew when they are called next; eager mode, exported
    programs and ``install()`` know no mode.

    Args:
        mode: ``"exact"`` or ``"inductor"``.

    Raises:
        ValueError: another mode.

    Examples:
        >>> set_compile_mode("inductor")
        >>> set_compile_mode("exact")
    """
    global _mode
    if mode not in MODES:
        raise ValueError(f"set_compile_mode: unknown mode {mode!r}; choose one of {', '.join(map(repr, MODES))}")
    _mode = mode


def hands_over() -> bool:
    """Whether Inductor gets the formula. dynamo, which traces this, remembers what was asked: a graph holds as long as
    the mode does."""
    _prepare()
    return _mode == "inductor"


def _prepare() -> None:
    """Puts our pass among Inductor's, in the one of two places which nobody uses; dynamo calls it while it traces."""
    with suppress(ImportError, AttributeError):  # a torch whose Inductor is another: norms are joined with nothing
        from torch._inductor import config

        from ._neighbours import Neighbours

        places = "post_grad_custom_pre_pass", "post_grad_custom_post_pass"
        taken = [getattr(config, place) for place in places]
        if not any(isinstance(one, Neighbours) for one in taken) and None in taken:
            setattr(config, places[taken.index(None)], Neighbours())


# What torch.compiler.assume_constant_result says, which imports all of dynamo: called when it compiles, not traced.
_prepare._dynamo_marked_constant = True  # type: ignore[attr-defined]
