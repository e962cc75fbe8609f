"""Trains an ensemble of small networks at once with torch.func.vmap, and asks where its members disagree.

    python examples/ensemble.py --members 16

Every network has two RMSNorms and its own weights. ``stack_module_state`` stacks them, ``vmap`` runs forward and
gradients of all members together: a norm of all is one call of the kernel, with more rows, and the gains of each member
are multiplied behind it. At the end each member answers alone, outside of vmap, to compare.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

import rmsnorm


def build(width: int) -> nn.Module:
    """A network from a number to a number."""
    hidden = (nn.Linear(width, width), nn.SiLU(), rmsnorm.RMSNorm(width, eps=1e-5))
    return nn.Sequential(nn.Linear(1, width), nn.SiLU(), rmsnorm.RMSNorm(width, eps=1e-5), *hidden, nn.Linear(width, 1))


def data(points: int) -> tuple[Tensor, Tensor]:
    """A noisy sine, known from -2 to 2 alone."""
    x = torch.rand(points, 1) * 4 - 2
    return x, torch.sin(3 * x) + 0.1 * torch.randn(points, 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in {"members": 8, "steps": 300, "width": 64, "points": 256}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{default}, if not given")
    options = parser.parse_args()
    if options.members < 2:
        parser.error(f"--members {options.members}: it takes two to disagree")

    torch.manual_seed(0)
    members = [build(options.width) for _ in range(options.members)]
    weights, buffers = stack_module_state(members)  # {name: [members, ...]}
    skeleton = build(options.width).to("meta")  # knows the order of the layers, and holds no numbers
    x, y = data(options.points)

    def predict(weights: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(skeleton, (weights, buffers), (x,))

    def loss(weights: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(predict(weights, buffers, x), y)

    step_of_all = vmap(grad_and_value(loss), in_dims=(0, 0, 0, 0))  # weights, buffers and data of each member
    optimizer = torch.optim.Adam(weights.values(), lr=3e-3)
    begin = time.perf_counter()
    for step in range(1, options.steps + 1):
        drawn = torch.randint(options.points, (options.members, 64))  # a batch of its own for each member
        gradients, losses = step_of_all(weights, buffers, x[drawn], y[drawn])
        for name, weight in weights.items():
            weight.grad = gradients[name]
        optimizer.step()
        if step == 1 or step % max(1, options.steps // 5) == 0:
            each = 1e3 * (time.perf_counter() - begin) / step
            least, most = losses.min(), losses.max()
            print(f"step {step:4}  loss {losses.mean():.3f}, members {least:.3f} to {most:.3f}  {each:.1f} ms")

    grid = torch.linspace(-4, 4, 9)[:, None]
    with torch.no_grad():
        answers = vmap(predict, in_dims=(0, 0, None))(weights, buffers, grid)  # [members, 9, 1]
        alone = torch.stack(
            [predict({name: w[i] for name, w in weights.items()}, {}, grid) for i in range(options.members)]
        )
    print("   x   sin(3x)     mean  spread of the members")
    for point, mean, spread in zip(grid[:, 0], answers.mean(0)[:, 0], answers.std(0)[:, 0], strict=True):
        known = "" if abs(point) <= 2 else "   never seen"
        print(f"{point:4.0f}  {torch.sin(3 * point):8.2f} {mean:8.2f} {spread:8.2f}{known}")
    print(f"one at a time: the answers differ by at most {(alone - answers).abs().max():.0e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
