"""Attention over right-padded sequences."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rechub_dist.layers.masking import places, zero_padding
from rechub_dist.layers.mlp import MLP


class ActivationUnit(nn.Module):
    """sum_j a(e_j, v) e_j over a row's behaviours e_j, a(e_j, v) = MLP([e_j, v, e_j - v, e_j * v]) for its target v.

    DIN, section 4.3; the weights a are not normalised. In training only real positions enter the MLP, so that
    padding cannot shift the statistics of Dice. In evaluation positions do not depend on each other, so that all of
    them enter, with shapes that an export can trace.

    Args:
        width: of a behaviour's and of the target's vector.
        hidden_units: the MLP's hidden widths.
        activation: the MLP's activation.
    """

    def __init__(self, width: int, hidden_units: list[int], activation: str) -> None:
        super().__init__()
        self.mlp = MLP(4 * width, hidden_units, activation=activation, out_dim=1)

    def forward(self, behaviors: Tensor, target: Tensor, mask: Tensor, total: int | None = None) -> Tensor:
        """[B, D] from behaviours [B, L, D], of which mask, bool [B, L], tells the real ones, and targets [B, D].

        `total` is the number of real positions, if it is known.
        """
        if not self.training:
            weights = self.weights(behaviors, target, mask)
            return torch.bmm(weights[:, None], zero_padding(behaviors, mask)).squeeze(1)
        place = places(mask, total)  # [P], P real positions among B * L
        row = place // mask.shape[1]
        e = behaviors.flatten(0, 1).index_select(0, place)
        of_v = self._of_target(target).index_select(0, row)
        weights = self.mlp.behind_first(self._first(e, target.index_select(0, row), of_v))  # [P, 1]
        return torch.zeros_like(target).index_add(0, row, weights * e)

    def weights(self, behaviors: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """The weights a in evaluation, [B, L], 0 where padded; arguments as `forward` has them."""
        hidden = self._first(behaviors, target[:, None], self._of_target(target)[:, None])  # [B, L, units]
        return self.mlp.behind_first(hidden.flatten(0, 1)).view(mask.shape).masked_fill(~mask, 0.0)

    # W [e, v, e - v, e * v] + b = (W_1 + W_3) e + W_4 (e * v) + (W_2 - W_3) v + b: what is v's is computed once a row.

    def _first(self, e: Tensor, v: Tensor, of_v: Tensor) -> Tensor:
        """The MLP's first layer, [..., units]."""
        w1, _, w3, w4 = self.mlp.first.weight.chunk(4, dim=1)
        return F.linear(e, w1 + w3) + F.linear(e * v, w4) + of_v

    def _of_target(self, v: Tensor) -> Tensor:
        """v's part of it, [B, units]."""
        _, w2, w3, _ = self.mlp.first.weight.chunk(4, dim=1)
        return F.linear(v, w2 - w3, self.mlp.first.bias)


class CausalSelfAttention(nn.Module):
    """softmax(Q K^T / sqrt(d / heads)) V, where position t sees positions 0 .. t (SASRec, section III-B).

    Q, K and V are projections of the input; as in the paper the heads are concatenated and not projected again. In a
    right-padded row the padded keys come after every real position, so that the causal mask hides them too; every
    position sees at least itself, so that a row of length 0 gives no NaN.

    Args:
        width: of the input and the output.
        num_heads: a divisor of `width`.
        dropout_rate: of the attention weights.
        bias: whether the projections have biases; the paper's have none.
    """

    def __init__(self, width: int, num_heads: int, dropout_rate: float, *, bias: bool = False) -> None:
        super().__init__()
        _check_heads(width, num_heads)
        self.num_heads = num_heads
        self.dropout_rate = dropout_rate
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, width, bias=bias)
        self.value = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """[B, L, D] -> [B, L, D], from finite values; those at padded positions mean nothing.

        K and V are projections of `keys`, [B, L, D], if given.
        """
        of = x if keys is None else keys
        pairs = ((self.query, x), (self.key, of), (self.value, of))
        q, k, v = (_split_heads(layer(inputs), self.num_heads) for layer, inputs in pairs)
        dropout = self.dropout_rate if self.training else 0.0
        heads = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)  # [B, heads, L, D / heads]
        return heads.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """[head_1 .. head_n] W_O, head_i = softmax(Q_i K_i^T / sqrt(d / n)) V_i over the real positions (BST, 2.2).

    Every position sees every real one. All projections are without bias, as in the paper.

    Args:
        width: d, of the input and the output.
        num_heads: n, a divisor of `width`.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        _check_heads(width, num_heads)
        self.num_heads = num_heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D], from finite values and mask, bool [B, L], with at least one real position a row.

        What comes out at padded positions means nothing.
        """
        q, k, v = (_split_heads(layer(x), self.num_heads) for layer in (self.query, self.key, self.value))
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])  # [B, heads, L, D / heads]
        attended: Tensor = self.output(heads.transpose(1, 2).flatten(2))
        return attended


class BilinearAttention(nn.Module):
    """a_t = softmax over the real t of h_t^T W e (DIEN, "Interest Evolving Layer").

    Args:
        width: of a state h_t.
        target_width: of the target's vector e.
    """

    def __init__(self, width: int, target_width: int) -> None:
        super().__init__()
        self.project = nn.Linear(target_width, width, bias=False)

    def forward(self, states: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """Weights [B, L], 0 where padded, from finite states [B, L, H], target [B, E] and mask, bool [B, L].

        They sum to 1, or, in a row without a real position, to 0.
        """
        return _softmax(torch.einsum("blh,bh->bl", states, self.project(target)), mask)


class AdditiveAttention(nn.Module):
    """a_j = v^T sigmoid(A_1 q + A_2 h_j)  (NARM, "Local Encoder").

    Args:
        width: of a state h_j and of the query q.
        attention_size: rows of A_1 and A_2.
        normalize: softmax of the a_j over the real positions; the paper has none.
    """

    def __init__(self, width: int, attention_size: int, *, normalize: bool = False) -> None:
        super().__init__()
        self.normalize = normalize
        self.query = nn.Linear(width, attention_size, bias=False)
        self.key = nn.Linear(width, attention_size, bias=False)
        self.score = nn.Linear(attention_size, 1, bias=False)

    def forward(self, states: Tensor, query: Tensor, mask: Tensor) -> Tensor:
        """Weights [B, L], 0 where padded, from finite states [B, L, H], query [B, H] and mask, bool [B, L]."""
        hidden = torch.sigmoid(self.query(query)[:, None] + self.key(states))  # [B, L, A]
        weights: Tensor = self.score(hidden).squeeze(2)
        return _softmax(weights, mask) if self.normalize else weights.masked_fill(~mask, 0.0)


def _softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Over the real positions, zeros elsewhere: [B, L] -> [B, L]."""
    # Not -inf: a row of it has no softmax, and its gradient would be NaN.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=1).masked_fill(~mask, 0.0)


def _check_heads(width: int, num_heads: int) -> None:
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"num_heads is {num_heads}: it must divide the width {width}")


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, L, D] -> [B, heads, L, D / heads]."""
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2)
