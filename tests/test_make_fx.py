"""Every form where make_fx records it: the graph computes what the call does, of other numbers too, and has no operator
that refused its arguments. Before autograd (``pre_dispatch=True``) the mode is in none of torch's lists of modes: a
kernel that is called past the dispatcher would leave its results in the graph as constants."""

import pytest
import torch
from test_forms_watched import NAMES_OF, assert_equal, results_of
from test_handed_forms import tensors
from torch.fx.experimental.proxy_tensor import make_fx

WAYS = [(tracing, ahead) for tracing in ("real", "fake") for ahead in (False, True)]
# The types of all tensors, and of all but one.
KINDS = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float64)]


def of(name, kind, other, odd):
    given = {which: given for which, given in tensors(8, kind).items() if which in NAMES_OF[name]}
    return {which: t.to(other) if which == odd else t for which, t in given.items()}


def cells():
    for name, names in NAMES_OF.items():
        for kind, other in KINDS:
            for odd in [None] if kind is other else names:
                yield pytest.param(name, kind, other, odd, id=f"{name}, {kind}, {odd} {other}".replace("torch.", ""))


@pytest.mark.parametrize(("name", "kind", "other", "odd"), [*cells()])
def test_the_graph_is_the_call(name, kind, other, odd):
    given = of(name, kind, other, odd)
    try:
        before = results_of(name, given)
    except (RuntimeError, TypeError):
        pytest.skip("refused")
    later = {which: t.flip(0) * 2 for which, t in given.items()}
    expected = results_of(name, later)
    assert not all(torch.equal(one.float(), two.float()) for one, two in zip(before, expected, strict=True))

    def call(*tensors):
        return tuple(one.clone() for one in results_of(name, dict(zip(given, tensors, strict=True))))

    for tracing, ahead in WAYS:
        graph = make_fx(call, tracing_mode=tracing, pre_dispatch=ahead)(*given.values())
        if tracing == "real":
            assert_equal(graph(*later.values()), expected)
        else:  # without values LayerNorm is torch's, and two steps of mixed types are one formula: other roundings
            torch.testing.assert_close(graph(*later.values()), tuple(expected))
