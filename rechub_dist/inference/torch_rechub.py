"""Weights of torch-rechub 0.9.0 in the places that the same mathematics has here.

Its networks have a bias before each batch norm, which has no effect on what is learned and goes into the running mean.
Its first order is linear in the embeddings, `<w_f, v_f>`: for an id that is one number, its first-order weight here.
Its towers end with an activation; ours with a linear map, which becomes the identity.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from rechub_dist.errors import UserError, nearest, one_line, shown
from rechub_dist.features import Feature, IdFeature
from rechub_dist.layers.activation import Dice
from rechub_dist.layers.cross import LowRankCross, MatrixCross, MixtureCross
from rechub_dist.layers.grouped import GroupedLinear, GroupedMLP
from rechub_dist.layers.linear import FirstOrder
from rechub_dist.layers.mlp import MLP
from rechub_dist.models import Model

Tables = Mapping[str, Tensor]  # the weights [rows, dim] to fill, by table

REFUSED: Final = {
    "BST": "of its transformer only the target's output enters the MLP, and positions count from the oldest behaviour",
    "DIEN": "its Dice normalises over the units of a row, where the paper and rechub_dist do over the batch",
    "DIN": "its Dice normalises over the units of a row, where the paper and rechub_dist do over the batch",
    "EDCN": "its deep tower has two layers between bridges, where the paper and rechub_dist have one",
    "GRU4Rec": "its vectors are an MLP's, scaled to length 1; here a session's is the state of the GRU, an item's raw",
    "MIND": "it routes from random numbers, by a softmax over the history: its answers differ from call to call",
    "MMoE": "its gates have a batch norm, and so a bias, where the paper and rechub_dist have none",
    "NARM": "its attention is a softmax over the session, where the paper and rechub_dist have none",
    "PLE": "its gates have a batch norm, and so a bias, where the paper and rechub_dist have none",
    "SASRec": "its attention has biases and an output layer, and reads keys before the layer norm",
    "YoutubeDNN": "it scores by cosine, where the paper and rechub_dist do by inner product",
}
_LINEAR: Final = "linear.fc"


@torch.no_grad()
def fill(path: Path, model: Model, tables: Tables) -> None:
    """Put the weights in a file that torch-rechub's `torch.save(model.state_dict(), path)` wrote into a model.

    Args:
        path: of the file.
        model: as RUN.yaml describes it, whatever its weights are.
        tables: those of its lookups; rows are ids.

    Raises:
        UserError: the file cannot be read, its model is not this one, or its mathematics is not that of this one.
    """
    name = type(model).__name__
    if name in REFUSED:
        raise UserError(f"{path}: {name} of torch-rechub does not convert: {REFUSED[name]}; train it here")
    if name not in _CONVERTED or not type(model).__module__.startswith("rechub_dist.models."):
        raise UserError(f"{path}: torch-rechub has no {name}; it converts {', '.join(sorted(_CONVERTED))}")
    weights = Weights(path, [lookup.feature for lookup in model.lookups() if isinstance(lookup.feature, IdFeature)])
    for lookup in model.lookups():
        if not lookup.name.endswith(".linear"):
            weights.put(tables[lookup.table.name], weights.embedding(lookup.feature), f"table {lookup.table.name!r}")
    _CONVERTED[name](model, weights, tables)
    weights.check_all_taken()


class Weights:
    """The tensors of a state_dict, and which of them have been taken.

    Args:
        path: of the file.
        features: with ids, in the order in which the model reads them.

    Raises:
        UserError: it is no such file, or has the features in another order.
    """

    def __init__(self, path: Path, features: Sequence[Feature]) -> None:
        self._path = path
        self._tensors = _read(path)
        self._taken: set[str] = set()
        there = [n.split(".")[2] for n in self._tensors if n.startswith("embedding.embed_dict.")]
        here = [name for name in dict.fromkeys(feature.name for feature in features) if name in there]
        known = [name for name in there if name in here]
        if here != known:
            raise UserError(
                f"{path} has the features in the order {', '.join(known)}, the run's model in the order "
                f"{', '.join(here)}: list them as torch-rechub had them, since their weights go by it"
            )
        self._owners: dict[str, str] = {}
        for feature in features:
            if feature.name in there and isinstance(feature, IdFeature):
                other = self._owners.setdefault(feature.table.name, feature.name)
                if other != feature.name:
                    raise UserError(
                        f"{path} has a table for feature {other!r} and one for {feature.name!r}, which here read one, "
                        f"{feature.table.name!r}: give them tables of their own in the schema"
                    )

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self._tensors

    def take(self, name: str) -> Tensor:
        """A tensor. Raises UserError if there is none."""
        if name not in self._tensors:
            raise self.wrong(f"has no {name}, which the run's model needs: {nearest(name, self._tensors)}")
        self._taken.add(name)
        return self._tensors[name]

    def embedding(self, feature: Any) -> Tensor:
        """The table that a feature reads, [rows, dim]: its own, or the one that it shares."""
        return self.take(f"embedding.embed_dict.{self._owners.get(feature.table.name, feature.name)}.weight")

    def put(self, target: Tensor, value: Tensor, what: str) -> None:
        """Copy a value. Raises UserError if its shape is another one."""
        if target.shape != value.shape:
            there, here = ("x".join(map(str, tensor.shape)) for tensor in (value, target))
            raise self.wrong(f"has {what} as {there}, and the run's model as {here}; make its sizes those of the file")
        target.copy_(value)

    def check_all_taken(self) -> None:
        """Raise UserError if a tensor has not been taken."""
        left = [name for name in self._tensors if name not in self._taken and not name.endswith("num_batches_tracked")]
        if left:
            more = f" and {len(left) - 1} more" if left[1:] else ""
            raise self.wrong(f"has {left[0]}{more}, for which the run's model has no place; make it the same model")

    def wrong(self, what: str) -> UserError:
        """An error about the file."""
        return UserError(f"{self._path} {what}")


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}; name the weights that torch-rechub saved") from None
    except Exception as error:  # whatever torch's readers raise
        why = one_line(error).partition(". ")[0][:200]
        raise UserError(f"{path} is no file of torch.save(model.state_dict()): {why}") from None
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{path} holds a {type(found).__name__}, not weights: save model.state_dict()")
    if all(name.startswith("module.") for name in found):  # of DataParallel
        found = {name.removeprefix("module."): value for name, value in found.items()}
    for name, value in found.items():
        if not value.isfinite().all():
            raise UserError(f"{path}: {shown(name)} has values that are no finite numbers")
    return {name: value.float() if value.is_floating_point() else value for name, value in found.items()}


@dataclass(frozen=True)
class _Layer:
    """A hidden layer of torch-rechub: linear, batch norm, activation."""

    weight: Tensor
    gamma: Tensor
    beta: Tensor
    mean: Tensor
    variance: Tensor
    slope: Tensor | None


def _layers(weights: Weights, prefix: str, count: int) -> list[_Layer]:
    found = []
    for place in range(0, 4 * count, 4):
        linear, norm, activation = (f"{prefix}.mlp.{place + i}" for i in range(3))
        if weights.has(f"{activation}.alpha"):
            raise weights.wrong(f"has Dice in {prefix}, which normalises over the units of a row; it does not convert")
        mean = weights.take(f"{norm}.running_mean") - weights.take(f"{linear}.bias")
        norms = [weights.take(f"{norm}.{name}") for name in ("weight", "bias", "running_var")]
        slope = weights.take(f"{activation}.weight") if weights.has(f"{activation}.weight") else None
        found.append(_Layer(weights.take(f"{linear}.weight"), norms[0], norms[1], mean, norms[2], slope))
    return found


def _put_mlps(
    target: MLP | GroupedMLP, weights: Weights, prefixes: Sequence[str], columns: Tensor | None = None
) -> None:
    """Fill an MLP from one of theirs, or several side by side; `columns`: which of our inputs are theirs."""
    linears = [layer for layer in target.layers if isinstance(layer, nn.Linear | GroupedLinear)]
    norms = [layer for layer in target.layers if isinstance(layer, nn.BatchNorm1d)]
    slopes = [layer for layer in target.layers if isinstance(layer, nn.PReLU)]
    outputs = [linear for linear in linears if linear.bias is not None]
    hidden = [linear for linear in linears if linear.bias is None]
    if not norms and weights.has(f"{prefixes[0]}.mlp.1.running_mean"):
        raise weights.wrong("is of networks with batch norm: set model.batch_norm: true")
    if any(isinstance(layer, Dice) for layer in target.layers):
        raise weights.wrong("is of networks whose Dice is another one: set the model's activation to what it was")
    every = [_layers(weights, prefix, len(hidden)) for prefix in prefixes]
    for number, linear in enumerate(hidden):
        layers = [one[number] for one in every]
        _put_linear(linear, [layer.weight for layer in layers], weights, prefixes[0], columns)
        columns = None
        norm = norms[number]
        for mine, value in (
            (norm.weight, [layer.gamma for layer in layers]),
            (norm.bias, [layer.beta for layer in layers]),
            (norm.running_mean, [layer.mean for layer in layers]),
            (norm.running_var, [layer.variance for layer in layers]),
        ):
            assert mine is not None
            weights.put(mine, torch.cat(value), f"{prefixes[0]}'s batch norm")
        if (layers[0].slope is not None) != bool(slopes):
            there = "prelu" if not slopes else "no prelu"
            raise weights.wrong(f"has {there} in {prefixes[0]}: set the model's activation to what it was")
        if slopes:
            expanded = [layer.slope.expand(len(layer.beta)) for layer in layers if layer.slope is not None]
            weights.put(slopes[number].weight, torch.cat(expanded), f"{prefixes[0]}'s prelu")
    for output in outputs:
        names = [f"{prefix}.mlp.{4 * len(hidden)}" for prefix in prefixes]
        _put_linear(output, [weights.take(f"{name}.weight") for name in names], weights, names[0], columns)
        biases = torch.stack([weights.take(f"{name}.bias") for name in names])
        assert output.bias is not None
        weights.put(output.bias, biases if isinstance(output, GroupedLinear) else biases[0], f"{names[0]}.bias")


def _put_linear(
    target: nn.Linear | GroupedLinear, values: list[Tensor], weights: Weights, what: str, columns: Tensor | None = None
) -> None:
    if len({value.shape for value in values}) > 1:
        raise weights.wrong(f"has networks of other sizes beside {what}; here all tasks' have the same")
    if columns is not None:
        width = target.weight.shape[1]
        wide = [torch.zeros(len(value), width) for value in values]
        values = [empty.index_copy(1, columns, value) for empty, value in zip(wide, values, strict=True)]
    grouped = isinstance(target, GroupedLinear)
    weights.put(target.weight, torch.stack([value.T for value in values]) if grouped else values[0], what)


def _put_first_order(target: FirstOrder, weights: Weights, tables: Tables) -> Tensor:
    """Fill the first order; returns its bias, [1]."""
    row, place = weights.take(f"{_LINEAR}.weight")[0], 0
    seen: dict[str, str] = {}
    for lookup in target.lookups:
        vectors = weights.embedding(lookup.feature)
        part = row[place : place + vectors.shape[1]]
        place += vectors.shape[1]
        other = seen.setdefault(lookup.table.name, lookup.feature.name)
        if other != lookup.feature.name:
            raise weights.wrong(
                f"has first-order weights for {other!r} and for {lookup.feature.name!r}, which share a table; here the "
                "ids of a table have one each: it does not convert"
            )
        if len(part) < vectors.shape[1]:
            break
        weights.put(tables[lookup.table.name], (vectors @ part)[:, None], f"table {lookup.table.name!r}")
    width = 0 if target.linear is None else target.linear.in_features
    if target.linear is not None:  # dense values, which but for WideDeep's are not in theirs
        target.linear.weight.copy_(row[place:][None] if len(row) == place + width else torch.zeros(1, width))
    if len(row) not in (place, place + width):
        raise weights.wrong(f"has a first order of {len(row)} numbers, and the run's features have {place + width}")
    return weights.take(f"{_LINEAR}.bias")


def _last(mlp: MLP) -> nn.Linear:
    last = mlp.layers[-1]
    assert isinstance(last, nn.Linear)
    return last


def _deepfm(model: Any, weights: Weights, tables: Tables) -> None:
    width, dense = model.fields.width, model.fields.dense_width
    given = weights.take("mlp.mlp.0.weight").shape[1]
    if given not in (width, dense):
        raise weights.wrong(
            f"has {given} inputs of the deep part; they must be all {width} of the run's features, or its {dense} dense"
        )
    columns = torch.arange(width - dense, width) if given == dense != width else None
    _put_mlps(model.mlp, weights, ["mlp"], columns)
    _last(model.mlp).bias.add_(_put_first_order(model.first_order, weights, tables))


def _widedeep(model: Any, weights: Weights, tables: Tables) -> None:
    _put_mlps(model.mlp, weights, ["mlp"])
    _last(model.mlp).bias.add_(_put_first_order(model.wide, weights, tables))


def _put_output(model: Any, weights: Weights) -> None:
    weights.put(model.output.weight, weights.take(f"{_LINEAR}.weight"), f"{_LINEAR}.weight")
    weights.put(model.output.bias, weights.take(f"{_LINEAR}.bias"), f"{_LINEAR}.bias")


def _dcn(model: Any, weights: Weights, _tables: Tables) -> None:
    for number, layer in enumerate(model.cross.layers):
        weights.put(layer.linear.weight, weights.take(f"cn.w.{number}.weight"), "a cross layer")
        weights.put(layer.bias, weights.take(f"cn.b.{number}"), "a cross layer's bias")
    if model.mlp is not None:
        _put_mlps(model.mlp, weights, ["mlp"])
    _put_output(model, weights)


def _dcnv2(model: Any, weights: Weights, _tables: Tables) -> None:
    for number, layer in enumerate(model.cross.layers):
        if weights.has("crossnet.gating.0.weight"):
            _put_mixture(layer, number, weights)
            continue
        if not isinstance(layer, MatrixCross):
            raise weights.wrong("has whole matrices in its cross layers: leave model.low_rank and num_experts out")
        if weights.take(f"crossnet.b.{number}").any():
            raise weights.wrong(
                "adds the bias of a cross layer outside the product with x_0, the paper and rechub_dist within: DCNv2 "
                "converts with low-rank experts alone"
            )
        weights.put(layer.linear.weight, weights.take(f"crossnet.w.{number}.weight"), "a cross layer")
        layer.linear.bias.zero_()
    if len(model.mlp.layers):
        _put_mlps(model.mlp, weights, ["parallel_dnn" if model.parallel else "stacked_dnn"])
    _put_output(model, weights)


def _put_mixture(layer: nn.Module, number: int, weights: Weights) -> None:
    if isinstance(layer, LowRankCross) or not isinstance(layer, MixtureCross):
        raise weights.wrong("has low-rank experts in its cross layers: set model.low_rank and num_experts (at least 2)")
    experts = layer.gate.out_features
    gates = torch.cat([weights.take(f"crossnet.gating.{expert}.weight") for expert in range(experts)])
    weights.put(layer.gate.weight, gates, "the gates of the cross layers")  # one for all layers there
    u, v, c = (weights.take(f"crossnet.{name}_list.{number}") for name in "uvc")
    weights.put(layer.reduce.weight, v, "a cross layer's V")
    weights.put(layer.mix.weight, c.transpose(1, 2), "a cross layer's C")
    weights.put(layer.expand.weight, u.transpose(0, 1).flatten(1), "a cross layer's U")
    weights.put(layer.expand.bias, weights.take(f"crossnet.bias.{number}")[:, 0], "a cross layer's bias")


def _afm(model: Any, weights: Weights, tables: Tables) -> None:
    """Its attention is 1 throughout, a sum over pairs; ours sums to 1: equal weights, times their number."""
    inner = [weights.take(f"attention_liner.{name}") for name in ("weight", "bias")]
    weights.take("h")
    fields = len(model.fields.lookups)
    if model.attention is not None:
        linears = [layer for layer in model.attention.mlp.layers if isinstance(layer, nn.Linear)]
        if len(linears) != 1:
            raise weights.wrong("has one layer in its attention: give model.attention_units one width")
        weights.put(linears[0].weight, inner[0], "the attention")
        weights.put(linears[0].bias, inner[1], "the attention's bias")
        model.attention.score.weight.zero_()
    weights.put(model.projection.weight, weights.take("p").T * (fields * (fields - 1) / 2), "p")
    weights.put(model.bias, _put_first_order(model.first_order, weights, tables), "the bias")


def _fibinet(model: Any, weights: Weights, tables: Tables) -> None:
    """It has no first order, and one set of matrices for both products."""
    weights.put(model.senet.squeeze.weight, weights.take("senet_layer.mlp.0.weight"), "the SENET layer")
    weights.put(model.senet.excite.weight, weights.take("senet_layer.mlp.2.weight"), "the SENET layer")
    for product in (model.raw, model.weighted):
        name = "bilinear_interaction.bilinear_layer"
        if isinstance(product.linear, GroupedLinear):
            count = len(product.linear.weight)
            matrices = [weights.take(f"{name}.{number}.weight").T for number in range(count)]
            if not product.of_pairs:
                weights.take(f"{name}.{count}.weight")  # the last field's, which is never used
            weights.put(product.linear.weight, torch.stack(matrices), "the bilinear layer")
        else:
            weights.put(product.linear.weight, weights.take(f"{name}.weight"), "the bilinear layer")
    width, dense = model.mlp.layers[0].in_features, model.fields.dense_width
    _put_mlps(model.mlp, weights, ["mlp"], torch.arange(width - dense) if dense else None)
    for lookup in model.first_order.lookups:
        tables[lookup.table.name].zero_()
    if model.first_order.linear is not None:
        model.first_order.linear.weight.zero_()


def _sharedbottom(model: Any, weights: Weights, _tables: Tables) -> None:
    _put_mlps(model.bottom, weights, ["bottom_mlp"])
    _put_mlps(model.towers, weights, [f"towers.{task}" for task in range(model.num_tasks)])


def _esmm(model: Any, weights: Weights, _tables: Tables) -> None:
    if model.num_tasks != 2:
        raise weights.wrong("has one conversion: leave model.num_conversions out")
    _put_mlps(model.networks, weights, ["tower_ctr", "tower_cvr"])


def _dssm(model: Any, weights: Weights, _tables: Tables) -> None:
    if getattr(model, "num_tasks", 0):
        raise weights.wrong("has no tasks beside retrieval: set model.num_tasks: 0 and task_types: []")
    for side in ("user", "item"):
        mlp: MLP = getattr(model, f"{side}_tower").mlp
        last = _last(mlp)
        if last.in_features != last.out_features:
            raise weights.wrong(
                "has towers that end with their last hidden layer: give the model all its dims as hidden_units, and "
                "the last of them again as the width of the vectors (embedding_dim; of FacebookDSSM a further unit)"
            )
        hidden = MLP(1, [])  # the same without the last
        hidden.layers = mlp.layers[:-1]
        _put_mlps(hidden, weights, [f"{side}_mlp"])
        nn.init.eye_(last.weight)
        last.bias.zero_()


_CONVERTED: Final[dict[str, Callable[[Any, Weights, Tables], None]]] = {
    "AFM": _afm,
    "DCN": _dcn,
    "DCNv2": _dcnv2,
    "DSSM": _dssm,
    "DeepFM": _deepfm,
    "ESMM": _esmm,
    "FacebookDSSM": _dssm,
    "FiBiNET": _fibinet,
    "SharedBottom": _sharedbottom,
    "WideDeep": _widedeep,
}
