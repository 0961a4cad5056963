"""What `models.py` compares with: the ranking and multi-task models as one writes them from the papers in plain torch.

None of the project's layers is used: `nn.Linear`s in lists, `nn.MultiheadAttention`, `nn.GRU`, loops over experts, pairs
and time. Each class reads the same `Embedded` as the model of its name, of the sizes in this file alone, and `take`
copies that model's weights, so that both compute the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rechub_dist.embedded import Embedded
from rechub_dist.models import Model

WIDTH, HIDDEN = 16, [256, 128]
IDS = [f"sparse_{i}" for i in range(26)]
DENSE = [f"dense_{i}" for i in range(13)]
FLAT = WIDTH * len(IDS) + len(DENSE)
PAIRS = list(itertools.combinations(range(len(IDS)), 2))
CROSSES, RANK, CROSS_EXPERTS = 3, 64, 4  # of DCN and DCNv2
ATTENTION, REDUCTION = 16, 3  # AFM's attention units, and FiBiNET's reduction ratio
TASKS, EXPERTS, TOWER = 3, 4, [64]  # multi-task models; PLE has EXPERTS experts a gate, half of them shared
LEVELS = 2
# Models with a history: the candidate and its history in two attributes, and some fields more.
OTHERS = IDS[:6]
TARGET, HISTORY, LENGTH = ["item", "category"], ["items", "categories"], 50
ITEM = WIDTH * len(TARGET)
UNITS, INTEREST, HEADS = [64, 32], 32, 2  # DIN's activation unit, DIEN's states and BST's heads


class Written(nn.Module):
    """A hand-written model: its logits, and beside them DIEN's auxiliary loss."""

    def take(self, ours: Model) -> None:
        """Copy the weights of our model."""
        raise NotImplementedError

    def forward(self, batch: Embedded) -> tuple[Tensor, ...]:
        raise NotImplementedError


class WideDeep(Written):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(len(DENSE), 1, bias=False)
        self.mlp = mlp(FLAT, HIDDEN, 1)

    def take(self, ours: Model) -> None:
        copy(self.linear, ours.wide.linear)
        copy(self.mlp, ours.mlp)

    def forward(self, batch: Embedded) -> tuple[Tensor, ...]:
        return (first_order(batch) + self.linear(dense(batch)) + self.mlp(flat(batch)),)


class DeepFM(Written):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(len(DENSE), 1, bias=False)
        self.mlp = mlp(FLAT, HIDDEN, 1)

    def take(self, ours: Model) -> None:
        copy(self.linear, ours.first_order.linear)
        copy(self.mlp, ours.mlp)

    def forward(self, batch: Embedded) -> tuple[Tensor, ...]:
        fields, x = stack(batch), dense(batch)
        second = 0.5 * (fields.sum(1) ** 2 - (fields**2).sum(1)).sum(1, keepdim=True)
        deep = self.mlp(torch.cat([fields.flatten(1), x], 1))
        return (first_order(batch) + self.linear(x) + second + deep,)


class DCN(Written):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ModuleList(nn.Linear(FLAT, 1, bias=False) for _ in range(CROSSES))
        self.biases = nn.ParameterList(torch.zeros(FLAT) for _ in range(CROSSES))
        self.mlp = mlp(FLAT, HIDDEN)
        self.output = nn.Linear(FLAT + HIDDEN[-1], 1)

    def take(self, ours: Model) -> None:
        copy(self.weights, [layer.linear.weight for layer in ours.cross.layers])
        copy(self.biases, [layer.bias for layer in ours.cross.layers])
        copy(self.mlp, ours.mlp)
        copy(self.output, ours.output)

    def forward(self, batch: Embedded) -> tuple[Tensor, ...]:
        x = x0 = flat(batch)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = x0 * weight(x) + bias + x
        return (self.output(torch.cat([x, self.mlp(x0)], 1)),)


class DCNv2(Written):
    def __init__(self) -> None:
        super().__init__()
        self.cross = nn.ModuleList(self.layer() for _ in range(CROSSES))
        self.mlp = mlp(FLAT, HIDDEN)
        self.output = nn.Linear(FLAT + HIDDEN[-1], 1)

    def layer(self) -> nn.Module:
        return nn.Linear(FLAT, FLAT)

    def take(self, ours: Model) -> None:
        copy(self.cross, ours.cross)
        copy(self.mlp, ours.mlp)
        copy(self.output, ours.output)

    def forward(self, batch: Embedded) -> tuple[Tensor, ...]:
        x = x0 = flat(batch)
        for layer in self.cross:
            x = x0 * layer(x) + x
        return (self.output(torch.cat([x, self.mlp(x0)], 1)),)


class DCNv2Mixture(DCNv2):
    def layer(self) -> nn.Module:
        return Mixture()

    def take(self, ours: Model) -> None:
        for layer, of_ours in zip(self.cross, ours.cross.layers, strict=True):
            copy(layer.gate, of_ours.gate)
            for i in range(CROSS_EXPERTS):
                copy(layer.V[i], of_ours.reduce, i)
                copy(layer.C[i], of_ours.mix, i)
                copy(layer.U[i], [of_ours.expand.weight[:, i * RANK : (i + 1) * RANK]])
            copy([layer.bias], [of_ours.expand.bias])
        copy(self.mlp, ours.mlp)
        copy(self.output, ours.output)


class Mixture(nn.Module):
    """sum_i G_i(x) (U_i tanh(C_i tanh(V_i x)) + b), expert by expert."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(FLAT, CROSS_EXPERTS, bias=False)
        self.V = nn.ModuleList(nn.Linear(FLAT, RANK, bias=False) for _ in range(CROSS_EXPERTS))
        self.C = nn.ModuleList(nn.Linear(RANK, RANK, bias=False) for _ in range(CROSS_EXPERTS))
        self.U = nn.ModuleList(nn.Linear(RANK, FLAT, bias=False) for _ in range(CROSS_EXPERTS))
        self.bias = nn.Parameter(torch.zeros(FLAT))

    def forward(self, x: Tensor) -> Tensor:
        experts = [
            U(torch.tanh(C(torch.tanh(V(x))))) + self.bias for V, C, U in zip(self.V, self.C, self.U, strict=True)
        ]
        return mix(self.gate(x), experts)


class AFM(Written):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(len(DENSE), 1, bias=False)
        self.attention = nn.Sequential(nn.Linear(WIDTH, ATTENTION), nn.ReLU(), nn.Linear(ATTENTION, 1, bias=False))
        self.projection = nn.Linear(WIDTH, 1)  # its bias is w_0
        self.i, self.j = torch.triu_indices(len(IDS), len(IDS), 1)

    def take(self, ours: Model) -> None:
        copy(self.linear, ours.first_order.linear)
        copy(self.attention, ours.attention)
        copy(self.projection, [ours.projection.weight, ours.bias])

    def forward(self, batch: Embedded) -> tuple[Tensor, ...]:
        fields = stack(batch)
        products = fields[:, self.i] * fields[:, self.j]
        weights = torch.softmax(self.attention(products), 1)
        return (first_order(batch) + self.linear(dense(batch)) + self.projection((weights * products).sum(1)),)


class FiBiNET(Written):
    kind = "field_interaction"

    def __init__(self) -> None:
        super().__init__()
        fields = len(IDS)
        hidden = fields // REDUCTION
        self.linear = nn.Linear(len(DENSE), 1, bias=False)
        self.senet = nn.Sequential(
            nn.Linear(fields, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, fields, bias=False), nn.ReLU()
        )
        matrices = {"field_all": 1, "field_each": fields - 1, "field_interaction": len(PAIRS)}[self.kind]
        self.raw, self.weighted = (
            nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(matrices)) for _ in range(2)
        )
        self.mlp = mlp(2 * len(PAIRS) * WIDTH + len(DENSE), HIDDEN, 1)

    def take(self, ours: Model) -> None:
        copy(self.linear, ours.first_order.linear)
        copy(self.senet, ours.senet)
        for mine, theirs in ((self.raw, ours.raw), (self.weighted, ours.weighted)):
            for group, layer in enumerate(mine):
                copy(layer, theirs, None if self.kind == "field_all" else group)
        copy(self.mlp, ours.mlp)

    def forward(self, batch: Embedded) -> tuple[Tensor, ...]:
        fields, x = stack(batch), dense(batch)
        weights = self.senet(fields.mean(2))
        p = self.products(self.raw, fields)
        q = self.products(self.weighted, fields * weights[:, :, None])
        return (first_order(batch) + self.linear(x) + self.mlp(torch.cat([p, q, x], 1)),)

    def products(self, layers: nn.ModuleList, fields: Tensor) -> Tensor:
        v = fields.unbind(1)
        if self.kind == "field_interaction":
            return torch.cat([layer(v[i]) * v[j] for layer, (i, j) in zip(layers, PAIRS, strict=True)], 1)
        left = [layers[0 if self.kind == "field_all" else i](v[i]) for i in range(len(IDS) - 1)]
        return torch.cat([left[i] * v[j] for i, j in PAIRS], 1)


class FiBiNETEach(FiBiNET):
    kind = "field_each"


class FiBiNETAll(FiBiNET):
    kind = "field_all"


class EDCN(Written):
    def __init__(self) -> None:
        super().__init__()
        fields = len(IDS) + len(DENSE)
        self.cross_gates, self.deep_gates = (
            nn.ParameterList(torch.zeros(fields) for _ in range(CROSSES)) for _ in range(2)
        )
        self.weights = nn.ModuleList(nn.Linear(FLAT, 1, bias=False) for _ in range(CROSSES))
        self.biases = nn.ParameterList(torch.zeros(FLAT) for _ in range(CROSSES))
        self.deep = nn.ModuleList(nn.Linear(FLAT, FLAT) for _ in range(CROSSES))
        self.output = nn.Linear(3 * FLAT, 1)
        self.widths = torch.tensor([WIDTH] * len(IDS) + [1] * len(DENSE))

    def take(self, ours: Model) -> None:
        copy(self.cross_gates, ours.regulation.logits[:, 0])
        copy(self.deep_gates, ours.regulation.logits[:, 1])
        copy(self.weights, [layer.linear.weight for layer in ours.cross])
        copy(self.biases, [layer.bias for layer in ours.cross])
        copy(self.deep, ours.deep)
        copy(self.output, ours.output)

    def regulate(self, logits: Tensor, x: Tensor) -> Tensor:
        gates = len(logits) * torch.softmax(logits, 0)
        return x * gates.repeat_interleave(self.widths)

    def forward(self, batch: Embedded) -> tuple[Tensor, ...]:
        bridge = flat(batch)
        start = None
        for i in range(CROSSES):
            c, h = self.regulate(self.cross_gates[i], bridge), self.regulate(self.deep_gates[i], bridge)
            start = c if start is None else start
            cross = start * self.weights[i](c) + self.biases[i] + c
            deep = torch.relu(self.deep[i](h))
            bridge = cross * deep
        return (self.output(torch.cat([cross, deep, bridge], 1)),)


class DIN(Written):
    def __init__(self) -> None:
        super().__init__()
        self.unit = mlp(4 * ITEM, UNITS, 1, Dice)
        self.mlp = mlp(WIDTH * len(OTHERS) + 2 * ITEM, HIDDEN, 1, Dice)

    def take(self, ours: Model) -> None:
        copy(self.unit, ours.attention)
        copy(self.mlp, ours.mlp)

    def forward(self, batch: Embedded) -> tuple[Tensor, ...]:
        behaviors, mask, lengths = history(batch, HISTORY)
        target = concat(batch, TARGET)
        e = behaviors[mask]  # Dice takes the statistics of real behaviours, so only these enter the unit
        v = target.repeat_interleave(lengths, 0)
        weights = behaviors.new_zeros(mask.shape)
        weights[mask] = self.unit(torch.cat([e, v, e - v, e * v], 1)).squeeze(1)
        interest = (weights[:, :, None] * behaviors).sum(1)
        return (self.mlp(torch.cat([concat(batch, OTHERS), target, interest], 1)),)


class DIEN(Written):
    def __init__(self) -> None:
        super().__init__()
        self.extractor = nn.GRU(ITEM, INTEREST, batch_first=True)
        self.next = nn.Linear(INTEREST, ITEM, bias=False)
        self.attention = nn.Linear(ITEM, INTEREST, bias=False)
        self.evolution = self.cell()
        self.mlp = mlp(WIDTH * len(OTHERS) + ITEM + INTEREST, HIDDEN, 1, Dice)

    def cell(self) -> nn.Module:
        return AUGRUCell(INTEREST, INTEREST)

    def take(self, ours: Model) -> None:
        copy(self.extractor, ours.extractor)
        copy(self.next, ours.next_behavior)
        copy(self.attention, ours.attention)
        copy(self.evolution, ours.evolution)
        copy(self.mlp, ours.mlp)

    def evolve(self, states: Tensor, weights: Tensor) -> Tensor:
        h = torch.zeros_like(states[:, 0])
        all_states = []
        for t in range(states.shape[1]):
            h = self.evolution(states[:, t], h, weights[:, t, None])
            all_states.append(h)
        return torch.stack(all_states, 1)

    def forward(self, batch: Embedded) -> tuple[Tensor, ...]:
        behaviors, mask, lengths = history(batch, HISTORY)
        negatives, _, _ = history(batch, [f"{name}.negative" for name in HISTORY])
        target = concat(batch, TARGET)
        states, _ = self.extractor(behaviors)

        predicted = self.next(states[:, :-1])
        happened = F.logsigmoid((predicted * behaviors[:, 1:]).sum(2))
        drawn = F.logsigmoid(-(predicted * negatives[:, 1:]).sum(2))
        loss = -((happened + drawn) * mask[:, 1:]).sum(1) / (lengths - 1).clamp(min=1)

        scores = (states * self.attention(target)[:, None]).sum(2)
        weights = torch.softmax(scores.masked_fill(~mask, -1e9), 1)
        evolved = self.evolve(states, weights)
        final = evolved[torch.arange(len(lengths)), (lengths - 1).clamp(min=0)] * (lengths > 0)[:, None]
        return self.mlp(torch.cat([concat(batch, OTHERS), target, final], 1)), loss


class AUGRUCell(nn.Module):
    """A GRU's step whose update gate is scaled by the attention."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.x = nn.Linear(width, 3 * hidden)
        self.h = nn.Linear(hidden, 3 * hidden, bias=False)

    def forward(self, x: Tensor, h: Tensor, a: Tensor) -> Tensor:
        xr, xu, xc = self.x(x).chunk(3, 1)
        hr, hu, hc = self.h(h).chunk(3, 1)
        r, u = torch.sigmoid(xr + hr), torch.sigmoid(xu + hu)
        c = torch.tanh(xc + r * hc)
        return (1 - a * u) * h + a * u * c


class DIENWithAIGRU(DIEN):
    def cell(self) -> nn.Module:
        return nn.GRU(INTEREST, INTEREST, batch_first=True)

    def evolve(self, states: Tensor, weights: Tensor) -> Tensor:
        evolved: Tensor = self.evolution(weights[:, :, None] * states)[0]
        return evolved


class BST(Written):
    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(LENGTH + 1, WIDTH))
        self.input = nn.Linear(ITEM + WIDTH, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, bias=False, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.network = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.LeakyReLU(), nn.Linear(4 * WIDTH, WIDTH))
        self.mlp = mlp(WIDTH * (len(OTHERS) + LENGTH + 1), HIDDEN, 1, lambda _: nn.LeakyReLU())

    def take(self, ours: Model) -> None:
        [block] = ours.blocks
        attention = block.attention
        copy([self.positions], [ours.positions])
        copy(self.input, ours.input)
        joined = torch.cat([attention.query.weight, attention.key.weight, attention.value.weight])
        copy(self.attention, [joined, attention.output.weight])
        copy(self.norm1, block.attention_norm)
        copy(self.norm2, block.network_norm)
        copy(self.network, block.network)
        copy(self.mlp, ours.mlp)

    def forward(self, batch: Embedded) -> tuple[Tensor, ...]:
        behaviors, _, lengths = history(batch, HISTORY)
        rows = torch.arange(len(lengths))[:, None]
        newest_first = behaviors[rows, (lengths[:, None] - 1 - torch.arange(behaviors.shape[1])).clamp(min=0)]
        items = torch.cat([concat(batch, TARGET)[:, None], newest_first], 1)
        mask = torch.arange(items.shape[1]) <= lengths[:, None]
        positions = self.positions[: items.shape[1]].expand(len(items), -1, -1)
        x = self.input(torch.cat([items, positions], 2))
        attended, _ = self.attention(x, x, x, key_padding_mask=~mask, need_weights=False)
        x = self.norm1(x + attended)
        x = self.norm2(x + self.network(x)) * mask[:, :, None]
        x = F.pad(x, (0, 0, 0, LENGTH + 1 - x.shape[1]))
        return (self.mlp(torch.cat([concat(batch, OTHERS), x.flatten(1)], 1)),)


class SharedBottom(Written):
    def __init__(self) -> None:
        super().__init__()
        self.bottom = mlp(FLAT, HIDDEN)
        self.towers = nn.ModuleList(mlp(HIDDEN[-1], TOWER, 1) for _ in range(TASKS))

    def take(self, ours: Model) -> None:
        copy(self.bottom, ours.bottom)
        copy_groups(self.towers, ours.towers)

    def forward(self, batch: Embedded) -> tuple[Tensor, ...]:
        shared = self.bottom(flat(batch))
        return (torch.cat([tower(shared) for tower in self.towers], 1),)


class ESMM(Written):
    def __init__(self) -> None:
        super().__init__()
        self.networks = nn.ModuleList(mlp(FLAT, [*HIDDEN, *TOWER], 1) for _ in range(TASKS))

    def take(self, ours: Model) -> None:
        copy_groups(self.networks, ours.networks)

    def forward(self, batch: Embedded) -> tuple[Tensor, ...]:
        x = flat(batch)
        return (torch.cat([network(x) for network in self.networks], 1),)


class MMoE(Written):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(mlp(FLAT, HIDDEN) for _ in range(EXPERTS))
        self.gates = nn.ModuleList(nn.Linear(FLAT, EXPERTS, bias=False) for _ in range(TASKS))
        self.towers = nn.ModuleList(mlp(HIDDEN[-1], TOWER, 1) for _ in range(TASKS))

    def take(self, ours: Model) -> None:
        copy_groups(self.experts, ours.experts)
        copy_groups(self.gates, ours.gates)
        copy_groups(self.towers, ours.towers)

    def forward(self, batch: Embedded) -> tuple[Tensor, ...]:
        x = flat(batch)
        experts = [expert(x) for expert in self.experts]
        towers = zip(self.gates, self.towers, strict=True)
        return (torch.cat([tower(mix(gate(x), experts)) for gate, tower in towers], 1),)


class PLE(Written):
    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            Level(FLAT if level == 0 else HIDDEN[-1], last=level == LEVELS - 1) for level in range(LEVELS)
        )
        self.towers = nn.ModuleList(mlp(HIDDEN[-1], TOWER, 1) for _ in range(TASKS))

    def take(self, ours: Model) -> None:
        for level, of_ours in zip(self.levels, ours.levels, strict=True):
            copy_groups([*itertools.chain(*level.own), *level.shared], of_ours.experts)
            copy_groups(level.gates, of_ours.gates)
            if level.shared_gate is not None:
                copy(level.shared_gate, of_ours.shared_gate)
        copy_groups(self.towers, ours.towers)

    def forward(self, batch: Embedded) -> tuple[Tensor, ...]:
        x = flat(batch)
        states, shared = [x] * TASKS, x
        for level in self.levels:
            states, shared = level(states, shared)
        return (torch.cat([tower(state) for tower, state in zip(self.towers, states, strict=True)], 1),)


class Level(nn.Module):
    def __init__(self, width: int, last: bool) -> None:
        super().__init__()
        each = EXPERTS // 2
        self.own = nn.ModuleList(nn.ModuleList(mlp(width, HIDDEN) for _ in range(each)) for _ in range(TASKS))
        self.shared = nn.ModuleList(mlp(width, HIDDEN) for _ in range(each))
        self.gates = nn.ModuleList(nn.Linear(width, 2 * each, bias=False) for _ in range(TASKS))
        self.shared_gate = None if last else nn.Linear(width, (TASKS + 1) * each, bias=False)

    def forward(self, states: list[Tensor], state: Tensor) -> tuple[list[Tensor], Tensor]:
        own = [[expert(s) for expert in experts] for experts, s in zip(self.own, states, strict=True)]
        shared = [expert(state) for expert in self.shared]
        new = [mix(gate(s), [*mine, *shared]) for gate, s, mine in zip(self.gates, states, own, strict=True)]
        if self.shared_gate is not None:
            state = mix(self.shared_gate(state), [*itertools.chain(*own), *shared])
        return new, state


class Dice(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, eps=1e-8, affine=False)
        self.alpha = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        p = torch.sigmoid(self.norm(x))
        return p * x + (1 - p) * self.alpha * x


def mlp(
    width: int, units: list[int], out: int | None = None, activation: Callable[[int], nn.Module] = lambda _: nn.ReLU()
) -> nn.Sequential:
    pairs = itertools.pairwise([width, *units])
    layers = [layer for before, after in pairs for layer in (nn.Linear(before, after), activation(after))]
    return nn.Sequential(*layers) if out is None else nn.Sequential(*layers, nn.Linear(units[-1], out))


def mix(scores: Tensor, experts: list[Tensor]) -> Tensor:
    """The experts' sum by the softmax of their scores."""
    return torch.einsum("be,bed->bd", torch.softmax(scores, 1), torch.stack(experts, 1))


def concat(batch: Embedded, names: list[str]) -> Tensor:
    return torch.cat([batch.vectors[name] for name in names], 1)


def stack(batch: Embedded) -> Tensor:
    return torch.stack([batch.vectors[name] for name in IDS], 1)


def dense(batch: Embedded) -> Tensor:
    return torch.cat([batch.dense[name] for name in DENSE], 1)


def flat(batch: Embedded) -> Tensor:
    return torch.cat([*(batch.vectors[name] for name in IDS), *(batch.dense[name] for name in DENSE)], 1)


def first_order(batch: Embedded) -> Tensor:
    return torch.cat([batch.vectors[f"{name}.linear"] for name in IDS], 1).sum(1, keepdim=True)


def history(batch: Embedded, names: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """The vectors of one position side by side, which positions are real, and how many."""
    values, lengths = torch.cat([batch.sequences[name].values for name in names], 2), batch.sequences[names[0]].lengths
    return values, torch.arange(values.shape[1]) < lengths[:, None], lengths


def copy(
    target: nn.Module | Iterable[Tensor], source: nn.Module | Iterable[Tensor], group: int | None = None
) -> None:
    """Parameters in their order; of grouped ones those of one group, whose matrices lie the other way round."""
    to, given = (list(x.parameters() if isinstance(x, nn.Module) else x) for x in (target, source))
    for parameter, value in zip(to, given, strict=True):
        of_group = value if group is None else value[group].t()  # t() leaves a bias as it is
        assert parameter.shape == of_group.shape
        parameter.data.copy_(of_group.detach())


def copy_groups(targets: Iterable[nn.Module], source: nn.Module) -> None:
    for group, target in enumerate(targets):
        copy(target, source, group)
