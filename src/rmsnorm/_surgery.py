"""The only file that opens the room of exact surgery, when somebody asks for it: its four functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from .surgery import SurgeryReport


def fold(
    model: nn.Module,
    *,
    keep: bool = True,
    inputs: Any = None,
    verify: bool = True,
    untie: bool = False,
    tokenizer: Any = None,
    tokens: int = 16,
) -> SurgeryReport:
    r"""Multiplies the gain of each norm into the linear layers that read it, and proves that nothing else changed.

        W · (g ⊙ x̂ + b) + c  =  (W · diag(g)) · x̂ + (W · b + c)

    Who reads a norm is found by running the model once and following its output, not by names. A norm whose output
    goes into linear layers only, experts and routers included, gets the gain 1 (its weight is 1, or 0 where the gain is
    ``1 + weight``) and the bias 0; its gain goes into the columns of their weights, in fp64, rounded once. Every other
    norm stays, and the report says why. A folded Llama is a Llama. The idea is FlashNorm's (arXiv 2407.09577).

    Runs and proof are of ``eval()``: a branch that only training takes isn't followed, and dropout between a norm with
    a bias and its readers scales that bias no more. What counts is what lies at the top of the output.

    Args:
        model: any module; a model of transformers, or one of yours with ``inputs``. It is changed in place.
        keep: False keeps nothing for :func:`rmsnorm.unfold`; by default the weights that change are kept.
        inputs: what the model is called with: a tensor, a tuple of arguments, a dict of keyword arguments, or a list of
            these, one for each run. Every weight that reads a norm has to run: experts that nobody chose aren't known.
            By default they are made, for models of transformers.
        verify: False leaves out the proof, which runs copies of the model in float64 and bfloat16.
        untie: whether a head gets a weight of its own that it shares with the embeddings. Else the last norm of such
            models keeps its gain. ``config.tie_word_embeddings`` is then False, so transformers loads what it saved.
        tokenizer: makes tokens of the real text that a language model is scored on; without it bytes are tokens.
        tokens: how many a language model writes before and after, greedily.

    Returns:
        A :class:`rmsnorm.surgery.SurgeryReport`: print it, or ``.to_dict()`` it.

    Raises:
        TypeError: the model is no ``torch.nn.Module``.
        ValueError: no inputs were given, and none can be made.
        OverflowError: a weight outgrows its type; the model is what it was.
        rmsnorm.surgery.SurgeryError: the proof failed; the model is what it was.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.RMSNorm(8), torch.nn.Linear(8, 4)).requires_grad_(False)
        >>> gain = model[0].weight.uniform_(0.5, 2.0)
        >>> report = fold(model, inputs=torch.randn(3, 8))
        >>> report.done[0].done, model[0].weight.unique(), report.differences["float64"].worst < 1e-12
        ('into 1.weight', tensor([1.]), True)
    """
    from .surgery import operate

    options = {"keep": keep, "inputs": inputs, "verify": verify, "tokenizer": tokenizer, "tokens": tokens}
    return operate("fold", model, **options, untie=untie)


def to_rms(
    model: nn.Module,
    *,
    keep: bool = True,
    inputs: Any = None,
    verify: bool = True,
    untie: bool = True,
    tokenizer: Any = None,
    tokens: int = 16,
) -> SurgeryReport:
    r"""Makes RMSNorms of the LayerNorms of a pre-norm model, and proves that it computes what it did.

        LayerNorm(s) = RMSNorm(C s) ⊙ g + b,   C = I - 11ᵀ/n

    Everything that writes into the residual stream is centred: the rows of embeddings, the outputs of linear layers,
    their biases, adapters (LoRA), tokens that are parameters. The stream's mean is 0 then, and its variance is its mean
    square, with the same eps. The bias of each norm goes into the linear layers behind it, as in :func:`rmsnorm.fold`;
    the gain stays. A scale of each channel behind a linear layer (layer scale) goes into that layer. Where the stream
    begins behind something that no weight writes, such as a GELU or a norm of the embeddings, it is centred there once,
    by a hook of the module that it enters. A norm that can't be changed stays a LayerNorm, which a centred stream
    doesn't disturb.
    Dropout in the residual stream is no part of this: it is exact in evaluation mode, and where dropout is 0.
    Source: Jiang et al., Pre-RMSNorm (arXiv 2305.14858).

    Args:
        model, keep, inputs, verify, tokenizer, tokens: as for :func:`rmsnorm.fold`.
        untie: whether a head that shares its weight with the embeddings gets one of its own; they are centred, and it
            isn't. If False, such models are left as they are.

    Returns:
        A :class:`rmsnorm.surgery.SurgeryReport`.

    Raises:
        TypeError, ValueError, OverflowError, rmsnorm.surgery.SurgeryError: as for :func:`rmsnorm.fold`.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 4))
        >>> report = to_rms(model, inputs=torch.randn(3, 4))
        >>> type(model[1]).__name__, report.differences["float64"].worst < 1e-12
        ('RMSNorm', True)
    """
    from .surgery import operate

    options = {"keep": keep, "inputs": inputs, "verify": verify, "tokenizer": tokenizer, "tokens": tokens}
    return operate("to_rms", model, **options, untie=untie)


def rotate(
    model: nn.Module,
    *,
    kind: str = "hadamard",
    seed: int = 0,
    keep: bool = True,
    inputs: Any = None,
    verify: bool = True,
    tokenizer: Any = None,
    tokens: int = 16,
) -> SurgeryReport:
    r"""Puts an orthogonal matrix through each residual stream, which RMSNorms without a gain don't notice.

        RMSNorm(s Q) = RMSNorm(s) Q

    What writes into the stream is multiplied by Q, and what reads its norms by Qᵀ. Numbers that are large in one
    channel are spread over all: the report has the largest input of each norm, before and after. It is the step that
    SliceGPT (arXiv 2401.15024), QuaRot (2404.00456) and SpinQuant (2405.16406) build on. Norms with a gain don't allow
    it: :func:`rmsnorm.fold` first, with ``untie=True``, and :func:`rmsnorm.to_rms` before where they are LayerNorms.

    Args:
        model, keep, inputs, verify, tokenizer, tokens: as for :func:`rmsnorm.fold`.
        kind: ``"hadamard"``, with random signs, where a width that is no power of two takes a random orthogonal matrix
            for its odd part; or ``"random"``.
        seed: of the random numbers.

    Returns:
        A :class:`rmsnorm.surgery.SurgeryReport`.

    Raises:
        TypeError, ValueError, OverflowError, rmsnorm.surgery.SurgeryError: as for :func:`rmsnorm.fold`; another kind is
            a ValueError, too.

    Examples:
        >>> norm = torch.nn.RMSNorm(8, elementwise_affine=False)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), norm, torch.nn.Linear(8, 4))
        >>> report = rotate(model, inputs=torch.randn(3, 4))
        >>> report.done[0].done, report.differences["float64"].worst < 1e-12
        ('rotated (hadamard, 8 columns)', True)
    """
    from .surgery import operate

    options = {"keep": keep, "inputs": inputs, "verify": verify, "tokenizer": tokenizer, "tokens": tokens}
    return operate("rotate", model, **options, kind=kind, seed=seed)


def unfold(model: nn.Module) -> None:
    """Takes back what fold, to_rms and rotate did to a model, the last first: the very bits, the very modules.

    Args:
        model: the model that was changed, not a copy of it. One that wasn't is left alone.

    Raises:
        TypeError: it is no ``torch.nn.Module``.
        ValueError: a change was made with ``keep=False``; a weight that it kept has no place any more.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.RMSNorm(8), torch.nn.Linear(8, 4))
        >>> before = model[1].weight.clone()
        >>> report = fold(model, inputs=torch.randn(3, 8))
        >>> unfold(model)
        >>> torch.equal(model[1].weight, before)
        True
    """
    from .surgery import take_back

    take_back(model)
