"""The only file that decides what a graph of ``torch.compile`` has of a norm: our operator, or the formula."""

from __future__ import annotations

from contextlib import suppress
from functools import cache

from ._shown import shown

MODES = ("exact", "inductor")

chosen = "exact"
"""What set_compile_mode() was told last; dynamo, which traces who reads it, makes a graph anew when it has changed."""


def set_compile_mode(mode: str) -> None:
    """What ``torch.compile`` makes of our norms from now on, in functions, layers and patched models.

    ``"exact"``, as it is unless this is called: our kernels, with the bits of eager mode, forward and backward. On
    the CPU a residual add beside a norm is joined with it into one pass over memory (:func:`rmsnorm.add_rms_norm`,
    :func:`rmsnorm.rms_norm_add`, :func:`rmsnorm.sandwich_rms_norm`), and so are rotary embedding behind the norms
    of query and key (:func:`rmsnorm.heads_rms_norm_rope`), what is added to a gradient, and in inference a product
    or a cast, where that changes no bit; what else follows a norm, code of Inductor's does while the rows are in a
    cache. ``"inductor"``: torch's own operators, as if the norm were written out. The graph is that of a model
    which has never heard of us, and rounds as that: half types keep float32 between steps that are fused,
    statistics are summed in float32 in an order that depends on the machine, rows whose squares overflow are not
    rescued, and backward is Inductor's, too.

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
    global chosen
    if mode not in MODES:
        raise ValueError(f"set_compile_mode: unknown mode {shown(mode)}; choose one of {', '.join(map(repr, MODES))}")
    chosen = mode


def hands_over() -> bool:
    """Whether Inductor gets the formula."""
    prepare()
    return chosen == "inductor"


def prepare() -> None:
    """Tells Inductor about our operators; dynamo calls it while it traces. Our passes come among Inductor's, each in
    the one of two places which nobody uses."""
    with suppress(ImportError, AttributeError):  # a torch whose Inductor is another: norms are joined with nothing
        from torch._inductor import config

        from ._few import Few
        from ._neighbours import Neighbours

        ends = "pre_pass", "post_pass"
        # Aliases that autograd made are gone after Inductor's own passes over forward and backward.
        for kind, when, order in ((Few, "joint", ends[::-1]), (Neighbours, "post_grad", ends)):
            places = [f"{when}_custom_{end}" for end in order]
            taken = [getattr(config, place) for place in places]
            if not any(isinstance(one, kind) for one in taken) and None in taken:
                setattr(config, places[taken.index(None)], kind())
    _register()


# What torch.compiler.assume_constant_result says, which imports all of dynamo: called when it compiles, not traced.
prepare._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _register() -> None:
    """Tells Inductor how our operators are lowered and called, once: others may change the places above."""
    with suppress(ImportError, AttributeError):  # a torch whose Inductor is another: they are called as operators
        from . import _called

        if _called.ready():
            from . import _direct, _template

            _direct.register()
            _template.register()
