"""The only file that makes a decoder layer small enough to be wrong in a known way, and a model of two of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Layer(nn.Module):
    """The common shape, in transformers' words."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(16, 1e-6)
        self.mixer = nn.Linear(16, 16)
        self.post_attention_layernorm = nn.RMSNorm(16, 1e-6)
        self.mlp = nn.Linear(16, 16)

    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> Tensor:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states = self.mixer(hidden_states) * scale
        hidden_states = residual + hidden_states

        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = self.mlp(hidden_states)
        return residual + hidden_states


class Model(nn.Module):
    def __init__(self, layer: type[Layer]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(layer() for _ in range(2))

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        return {"x": x()}

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def x() -> Tensor:
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
