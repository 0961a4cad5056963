"""GRUs that attention steers, over right-padded sequences."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AIGRU(nn.Module):
    """A GRU over the inputs scaled by their weights: i_t = a_t x_t (DIEN, "Interest Evolving Layer").

    Args:
        in_dim: width of the input.
        hidden_size: width of the state.
    """

    def __init__(self, in_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.gru = nn.GRU(in_dim, hidden_size, batch_first=True)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """States [B, L, H] from finite inputs [B, L, D] and weights [B, L]; those at padded positions mean nothing."""
        states: Tensor = self.gru(weights[..., None] * x)[0]
        return states


class AUGRU(nn.Module):
    """A GRU whose update gate is scaled by the weights (DIEN, "Interest Evolving Layer").

        r_t = sigmoid(W_r x_t + U_r h_{t-1} + b_r)
        u_t = sigmoid(W_u x_t + U_u h_{t-1} + b_u)
        c_t = tanh(W_c x_t + r_t * U_c h_{t-1} + b_c)
        h_t = (1 - a_t u_t) * h_{t-1} + a_t u_t * c_t,    h_0 = 0

    An input of weight 0 leaves the state as it is.

    Args:
        in_dim: width of the input.
        hidden_size: width of the state.
    """

    def __init__(self, in_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.input = nn.Linear(in_dim, 3 * hidden_size)  # rows of r, u and c
        self.recurrent = nn.Linear(hidden_size, 3 * hidden_size, bias=False)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """States [B, L, H] from finite inputs [B, L, D] and weights [B, L]."""
        H = self.hidden_size
        h = x.new_zeros(x.shape[0], H)
        states = []
        # Only the recurrence is a loop: on one core it takes as long as nn.GRU, and a seventh of a scripted loop.
        for from_input, a in zip(self.input(x).unbind(1), weights[..., None].unbind(1), strict=True):
            input_gates, input_candidate = from_input.split([2 * H, H], dim=1)
            gates, candidate = self.recurrent(h).split([2 * H, H], dim=1)
            r, u = torch.sigmoid(input_gates + gates).chunk(2, dim=1)
            c = torch.tanh(input_candidate + r * candidate)
            h = h + a * u * (c - h)
            states.append(h)
        return torch.stack(states, dim=1)
