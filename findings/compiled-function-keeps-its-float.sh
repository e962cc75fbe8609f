#!/usr/bin/env bash
# A good guess: torch.compile takes a float that is passed to torch.autograd.Function.apply, whatever else uses it.
# Instead: as soon as the float is dynamic (with the default dynamic=None: from its second value on), nothing can use it
# after the Function has. A second Function ends in "lift_tracked_freevar_to_input should not be called on root
# SubgraphTracer", a multiplication in "Argument 'item' of Node 'mul' does not belong to this Graph". The first value works,
# and so do ints, a float that only one Function uses or that was used before it, and operators of torch.library.
# Who is hurt: authors of norms and activations whose eps or scale is an argument of a Function: what was compiled and
# tested with one value fails for the user who passes another, and a test that calls the Function once never sees it.
# What to do: register an operator (torch.library.custom_op, register_autograd) instead of a Function; or dynamic=False.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q numpy==2.4.6
cd "$folder"
cat >program.py <<'E'
import sys

import torch

print("Python", sys.version.split()[0], "torch", torch.__version__)


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x * factor

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


@torch.library.custom_op("findings::scale", mutates_args=())
def scale(x: torch.Tensor, factor: float) -> torch.Tensor:
    return x * factor


scale.register_fake(lambda x, factor: torch.empty_like(x))
scale.register_autograd(
    lambda ctx, grad: (grad * ctx.factor, None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "factor", inputs[1]),
)


def one_function(x, factor):
    return Scale.apply(x, factor) * 0.5


def function_second(x, factor):
    return Scale.apply(x * factor, factor)


def function_first(x, factor):
    return Scale.apply(x, factor) * factor


def two_functions(x, factor):
    return Scale.apply(Scale.apply(x, factor), factor)


def two_operators(x, factor):
    return scale(scale(x, factor), factor)


def outcomes(function, values, **options):
    """For each value "", or what was raised; a wrong result is an error."""
    torch._dynamo.reset()
    compiled, found = torch.compile(function, backend="eager", **options), []
    print(function.__name__, *(f"{name}={value}" for name, value in options.items()))
    for value in values:
        x = torch.ones(3, requires_grad=True)
        message = ""
        try:
            (grad,) = torch.autograd.grad(compiled(x, value).sum(), x)
        except Exception as error:
            message = str(error).splitlines()[0]
        else:
            assert torch.equal(grad, torch.autograd.grad(function(x, value).sum(), x)[0])
        print(f"    {value}: {message or 'right'}")
        found.append(message)
    return found


floats = (0.5, 0.25, 0.125)
for function, expected in (
    (two_functions, "lift_tracked_freevar_to_input"),
    (function_first, "does not belong to this Graph"),
):
    first, *later = outcomes(function, floats)
    assert not first and all(expected in message for message in later)
    assert all(expected in message for message in outcomes(function, floats, dynamic=True))
    assert not any(outcomes(function, floats, dynamic=False))
assert not any(outcomes(two_functions, (2, 3, 4)))
for function in (one_function, function_second, two_operators):
    assert not any(outcomes(function, floats))
E
venv/bin/python program.py
