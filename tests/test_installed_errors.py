"""Proves that torch's errors keep their type and text under ``install()``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rmsnorm import _native, installed

pytestmark = pytest.mark.skipif(
    not _native.cpu_targets(), reason="without the native library there is nothing to install"
)


def _changed_before_backward():
    x = torch.ones(2, 3, requires_grad=True)
    kept = x * 1
    y = F.rms_norm(kept, (3,))
    kept.add_(1)
    y.sum().backward()


def _twice():
    y = F.rms_norm(torch.ones(2, 3, requires_grad=True), (3,)).sum()
    y.backward()
    y.backward()


_X, _LEAF, _ONES = torch.ones(2, 3), torch.ones(2, 3, requires_grad=True), torch.ones(3)


WRONG = {
    "other columns": lambda: F.rms_norm(_X, (4,)),
    "other columns, to be differentiated": lambda: F.rms_norm(_LEAF, (4,)),
    "no columns": lambda: F.rms_norm(_X, ()),
    "negative columns": lambda: F.rms_norm(_X, (-1,)),
    "more dimensions than there are": lambda: F.rms_norm(_X, (2, 2, 3)),
    "a weight of other columns": lambda: F.rms_norm(_X, (3,), torch.ones(4)),
    "a weight of other dimensions": lambda: F.rms_norm(_X, (3,), torch.ones(2, 3)),
    "such a weight, to be differentiated": lambda: F.rms_norm(_LEAF, (3,), torch.ones(4)),
    "the operator with such a weight": lambda: torch._fused_rms_norm(_X, [3], torch.ones(4), 1e-6),
    "the operator with more dimensions": lambda: torch._fused_rms_norm(_X, [1, 2, 3], None, 1e-6),
    "int64": lambda: F.rms_norm(torch.ones(2, 3, dtype=torch.int64), (3,)),
    "int64 with an int64 weight": lambda: F.rms_norm(_X.long(), (3,), _ONES.long()),
    "the operator with int64": lambda: torch._fused_rms_norm(_X.long(), [3], None, None),
    "bool": lambda: F.rms_norm(torch.ones(2, 3, dtype=torch.bool), (3,)),
    "float8": lambda: F.rms_norm(_X.to(torch.float8_e4m3fn), (3,)),
    "bits": lambda: F.rms_norm(torch.empty(2, 3, dtype=torch.bits8), (3,)),
    "the layer with int64": lambda: torch.nn.RMSNorm(3)(_X.long()),
    "the layer without weight with int64": lambda: torch.nn.RMSNorm(3, elementwise_affine=False)(_X.long()),
    "an integer weight": lambda: F.rms_norm(_X, (3,), _ONES.long()),
    "a weight on meta": lambda: F.rms_norm(_X, (3,), _ONES.to("meta")),
    "an input on meta": lambda: F.rms_norm(_X.to("meta"), (3,), _ONES),
    "a weight on meta, to be differentiated": lambda: F.rms_norm(_LEAF, (3,), _ONES.to("meta")),
    "sparse": lambda: F.rms_norm(_X.to_sparse(), (3,)),
    "mkldnn": lambda: F.rms_norm(_X.to_mkldnn(), (3,)),
    "a sparse weight": lambda: F.rms_norm(_X, (3,), _ONES.to_sparse()),
    "a list": lambda: F.rms_norm([1.0, 2.0], (2,)),
    "a numpy array": lambda: F.rms_norm(_X.numpy(), (3,)),
    "None": lambda: F.rms_norm(None, (3,)),
    "a weight as list": lambda: F.rms_norm(_X, (3,), [1.0, 1.0, 1.0]),
    "an int as shape": lambda: F.rms_norm(_X, 3),
    "floats as shape": lambda: F.rms_norm(_X, (3.0,)),
    "a string as eps": lambda: F.rms_norm(_X, (3,), None, "a"),
    "a list to the layer": lambda: torch.nn.RMSNorm(3)([1.0, 2.0, 3.0]),
    "a gradient of another shape": lambda: F.rms_norm(_LEAF, (3,)).backward(_ONES),
    "a gradient on meta": lambda: F.rms_norm(_LEAF, (3,)).backward(_X.to("meta")),
    "a complex gradient": lambda: F.rms_norm(_LEAF, (3,)).backward(_X.to(torch.complex64)),
    "no gradient": lambda: F.rms_norm(_LEAF, (3,)).backward(),
    "backward twice": _twice,
    "backward after a change": _changed_before_backward,
}


@pytest.mark.filterwarnings("ignore")  # torch warns of sparse layouts and of types that don't match
@pytest.mark.parametrize("wrong", WRONG)
def test_errors_are_torchs_own(wrong):
    """Type and text, to the letter; what torch takes is taken. torch without us is the oracle."""

    def outcome():
        try:
            return str(WRONG[wrong]())
        except Exception as error:
            return type(error), str(error)

    before = outcome()
    with installed():
        assert outcome() == before


def test_an_error_of_torchs_formula_is_raised_as_it_was():
    """Each thread has its own, and an earlier one isn't told again."""
    with installed():
        for call, kind, message in (
            (lambda: F.rms_norm(_X.long(), (3,)), NotImplementedError, "\"rms_norm\" not implemented for 'Long'"),
            (lambda: torch._fused_rms_norm(_X, [3], torch.ones(4), 1e-6), RuntimeError, "The size of tensor a"),
            (lambda: F.rms_norm(_X.bool(), (3,)), NotImplementedError, "\"rms_norm\" not implemented for 'Bool'"),
        ):
            with pytest.raises(RuntimeError, match=f"^{message}") as error:
                call()
            assert error.type is kind
            assert "\n" not in str(error.value)
