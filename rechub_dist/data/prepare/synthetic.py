"""A synthetic data set of any size with known probabilities, and the best scores that any model can reach on it.

Ids follow a power law, dense values are standard normal. The logit of a row is the sum of

- a weight for each id (first order) and for each dense value,
- the products of small latent vectors of a few pairs of sparse features (second order, as in factorization machines),
- with `sequence`, the affinity of a target item to the items of the row's history,

each scaled to a fixed share of the logit's variance, plus a bias that gives the positive rate. The label is drawn with
the logit's sigmoid as probability. `truth.json` has the scores of these probabilities on the drawn labels.

Weights are a hash of (seed, name, id), so that no table of a vocabulary's size is needed, and rows are generated one
row group at a time: memory does not grow with `rows` or `vocabulary`. The rows depend on all arguments except `files`.
Splits are 8 : 1 : 1, identically distributed.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rechub_dist.data.columns.hashing import mix64
from rechub_dist.data.prepare.writer import ROW_GROUP, SPLITS, TRUTH_FILE, ShardWriter, prepared_folder, write_schema
from rechub_dist.errors import UserError
from rechub_dist.features import DenseFeature, Feature, FeatureSchema, Label, SequenceFeature, SparseFeature, Table

DATASET = "synthetic"
POSITIVE_RATE = 0.25
LOGIT_VARIANCE = 3.0
SHARES = {"sparse": 0.35, "dense": 0.30, "pairs": 0.35, "sequence": 0.30}
LABEL_CORRELATION = 0.8
RANK = 4
DECAY = 0.4
PAIRS = 2
MAX_LENGTH = 20
PROBE_ROWS = 65_536
BINS = 1 << 18

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def synthesize(
    out: Path,
    rows: int,
    *,
    dense: int = 13,
    sparse: int = 26,
    vocabulary: int = 1000,
    sequence: bool = False,
    skew: float = 1.05,
    seed: int = 0,
    labels: int = 1,
    files: int = 4,
) -> None:
    """Write a synthetic prepared folder.

    Args:
        out: the folder to write.
        rows: total number of rows; valid and test have a tenth each, rounded down.
        dense: number of dense features, `dense_0` and so on.
        sparse: number of sparse features, `sparse_0` and so on, each with its own table.
        vocabulary: rows of each table.
        sequence: add a sparse feature `item` and a sequence feature `history` that share a table.
        skew: exponent of the ids' power law; 0 is uniform.
        seed: of both the probabilities and the rows.
        labels: number of labels: `label`, or `label_0` and so on; the logits of the others correlate by 0.8 with those
            of the first.
        files: number of shards of the train split; valid and test have shards of the same size.

    Raises:
        UserError: a number is out of range.
    """
    for name, value, low in (
        ("rows", rows, 10), ("dense", dense, 0), ("sparse", sparse, 0), ("vocabulary", vocabulary, 1),
        ("labels", labels, 1), ("files", files, 1), ("seed", seed, 0),
    ):  # fmt: skip
        if value < low:
            raise UserError(f"{name} is {value}, must be at least {low}")
    if vocabulary >= 1 << 31:
        raise UserError(f"vocabulary is {vocabulary}, must be below 2**31")
    if not skew >= 0:
        raise UserError(f"skew is {skew}, must not be negative")
    if not (dense or sparse or sequence):
        raise UserError("dense and sparse are 0: there is nothing to learn from")
    world = _World(dense, sparse, vocabulary, sequence, skew, seed, labels)
    tenth = rows // 10
    sizes = dict(zip(SPLITS, (rows - 2 * tenth, tenth, tenth), strict=True))
    shard_rows = math.ceil(sizes["train"] / files)
    truth: dict[str, dict[str, dict[str, float | None]]] = {}
    with prepared_folder(out, DATASET) as folder:
        for number, (split, size) in enumerate(sizes.items()):
            scores = {name: _Score() for name in world.label_names}
            with ShardWriter(folder, split, world.arrow_schema, shard_rows) as writer:
                for chunk, start in enumerate(range(0, size, ROW_GROUP)):
                    random = np.random.default_rng([seed, number, chunk])
                    sample = world.sample(random, min(ROW_GROUP, size - start))
                    columns = sample.columns()
                    for name, probability in world.probabilities(sample):
                        drawn = random.random(len(probability)) < probability
                        scores[name].add(probability, drawn)
                        columns[name] = pa.array(drawn.astype(np.int8))
                    writer.write(pa.table(columns))
            truth[split] = {name: score.result() for name, score in scores.items()}
        (folder / TRUTH_FILE).write_text(json.dumps(truth, indent=2) + "\n", encoding="utf-8")
        write_schema(folder, DATASET, world.schema)


def synthetic_schema(dense: int, sparse: int, vocabulary: int, sequence: bool, labels: int) -> FeatureSchema:
    """The schema of the data set that `synthesize` writes for the same arguments."""
    names = [f"sparse_{i}" for i in range(sparse)] + (["item"] if sequence else [])
    features: list[Feature] = [SparseFeature(name, Table(name, vocabulary)) for name in names]
    if sequence:
        features.append(SequenceFeature("history", Table("item", vocabulary), max_length=MAX_LENGTH))
    features += [DenseFeature(f"dense_{i}") for i in range(dense)]
    targets = ["label"] if labels == 1 else [f"label_{i}" for i in range(labels)]
    return FeatureSchema(tuple(features), tuple(Label(name) for name in targets))


@dataclass(frozen=True)
class _Sample:
    """Rows without labels. `history` is (items, lengths), with the items of all rows concatenated."""

    dense: Floats  # [rows, dense]
    sparse: dict[str, Ints]
    history: tuple[Ints, Ints] | None

    def columns(self) -> dict[str, pa.Array]:
        columns = {name: pa.array(ids.astype(np.int32)) for name, ids in self.sparse.items()}
        if self.history is not None:
            items, lengths = self.history
            offsets = pa.array(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32))
            columns["history"] = pa.ListArray.from_arrays(offsets, pa.array(items.astype(np.int32)))
        for i in range(self.dense.shape[1]):
            columns[f"dense_{i}"] = pa.array(self.dense[:, i].astype(np.float32))
        return columns


@dataclass(frozen=True)
class _World:
    """The distribution of the rows, and the true probabilities."""

    dense: int
    sparse: int
    vocabulary: int
    sequence: bool
    skew: float
    seed: int
    labels: int

    @property
    def sparse_names(self) -> list[str]:
        return [feature.name for feature in self.schema.features if isinstance(feature, SparseFeature)]

    @property
    def label_names(self) -> list[str]:
        return [label.name for label in self.schema.labels]

    @property
    def schema(self) -> FeatureSchema:
        return synthetic_schema(self.dense, self.sparse, self.vocabulary, self.sequence, self.labels)

    @property
    def arrow_schema(self) -> pa.Schema:
        types = {"sparse": pa.int32(), "sequence": pa.list_(pa.int32()), "dense": pa.float32()}
        columns = [(feature.name, types[feature.kind]) for feature in self.schema.features]
        return pa.schema([*columns, *((name, pa.int8()) for name in self.label_names)])

    # rows

    def sample(self, random: np.random.Generator, rows: int) -> _Sample:
        dense = random.standard_normal((rows, self.dense))
        dense = dense.astype(np.float32).astype(np.float64)  # probabilities are those of the values as stored
        sparse = {name: self._ids(random, name, rows) for name in self.sparse_names}
        history = None
        if self.sequence:
            # each row has a taste; each item of its history is the one of two candidates that fits the taste better
            lengths = random.integers(1, MAX_LENGTH + 1, rows)
            total = int(lengths.sum())
            taste = np.repeat(random.standard_normal((rows, RANK)), lengths, axis=0)
            one, other = self._ids(random, "item", total), self._ids(random, "item", total)
            gain = (taste * (self._vectors("item/taste", one) - self._vectors("item/taste", other))).sum(axis=1)
            history = np.where(gain > 0, one, other), lengths
        return _Sample(dense, sparse, history)

    def _ids(self, random: np.random.Generator, table: str, rows: int) -> Ints:
        """Ids [rows] with a power law over ranks, which an affine bijection scatters over the table."""
        u, top, power = random.random(rows), self.vocabulary + 1.0, 1.0 - self.skew
        place = top**u if abs(power) < 1e-9 else (1.0 + u * (top**power - 1.0)) ** (1.0 / power)
        rank = np.clip(place.astype(np.int64) - 1, 0, self.vocabulary - 1)
        key = self._key(f"{table}/order")
        factor = int(key % np.uint64(self.vocabulary)) | 1
        while math.gcd(factor, self.vocabulary) != 1:
            factor += 2
        return (rank * (factor % self.vocabulary) + int(key >> np.uint64(33))) % self.vocabulary

    # weights

    def _key(self, name: str) -> np.uint64:
        return np.uint64(mix64(mix64(np.array([self.seed], np.uint64)) ^ np.uint64(zlib.crc32(name.encode())))[0])

    def _weights(self, name: str, ids: Ints) -> Floats:
        """A standard normal weight for each id, float64."""
        with np.errstate(over="ignore"):
            bits = mix64(self._key(name) + ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        radius = np.sqrt(-2.0 * np.log(((bits >> np.uint64(32)).astype(np.float64) + 0.5) / 2.0**32))
        angle = (bits & np.uint64(0xFFFFFFFF)).astype(np.float64) * (2.0 * math.pi / 2.0**32)
        return np.asarray(radius * np.cos(angle))

    def _vectors(self, name: str, ids: Ints) -> Floats:
        """A latent vector for each id, [ids, RANK]; components decay, so that few samples per id are informative."""
        return np.stack([self._weights(f"{name}/{k}", ids) * DECAY**k for k in range(RANK)], axis=1)

    def _offset_vectors(self, name: str, ids: Ints) -> Floats:
        """With a mean in the first component, so that products have a first-order part, where models start to learn."""
        vectors = self._vectors(name, ids)
        vectors[:, 0] += 1.0
        return vectors

    # logits

    def _parts(self, sample: _Sample, label: int) -> dict[str, Floats]:
        """The parts of a label's logit, unscaled, [rows] each; labels after the first have first-order parts only."""
        parts: dict[str, Floats] = {}
        if sample.sparse:
            parts["sparse"] = np.sum(
                [self._weights(f"{n}/weight/{label}", x) for n, x in sample.sparse.items()], axis=0
            )
        if self.dense:
            parts["dense"] = sample.dense @ self._weights(f"dense/weight/{label}", np.arange(self.dense))
        if label:
            return parts
        pairs = [(f"sparse_{i}", f"sparse_{i + 1}") for i in range(0, self.sparse - 1, 2)][:PAIRS]
        if pairs:
            vectors = {
                name: self._offset_vectors(f"{name}/vector", sample.sparse[name]) for pair in pairs for name in pair
            }
            parts["pairs"] = np.sum([(vectors[a] * vectors[b]).sum(axis=1) for a, b in pairs], axis=0)
        if sample.history is not None:
            items, lengths = sample.history
            starts = np.cumsum(lengths) - lengths
            liked = np.add.reduceat(self._vectors("item/taste", items), starts, axis=0) / lengths[:, None]
            parts["sequence"] = (liked * self._vectors("item/taste", sample.sparse["item"])).sum(axis=1)
        return parts

    @cached_property
    def _probe(self) -> _Sample:
        return self.sample(np.random.default_rng([self.seed, len(SPLITS)]), PROBE_ROWS)

    @cached_property
    def _scales(self) -> list[dict[str, tuple[float, float]]]:
        """For each label, (mean, factor) by part, which centre it and give it its share of the variance."""
        scales = []
        for label in range(self.labels):
            parts = self._parts(self._probe, label)
            shares = {name: SHARES[name] for name in parts}
            total = sum(shares.values())
            scales.append(
                {
                    name: (
                        float(part.mean()),
                        math.sqrt(LOGIT_VARIANCE * shares[name] / total) / (float(part.std()) or 1.0),
                    )
                    for name, part in parts.items()
                }
            )
        return scales

    def _logits(self, sample: _Sample) -> Iterator[Floats]:
        first: Floats | None = None
        for label, scales in enumerate(self._scales):
            parts = self._parts(sample, label)
            own: Floats = np.sum([(parts[name] - mean) * factor for name, (mean, factor) in scales.items()], axis=0)
            if first is None:
                first = own
                yield first
            else:
                yield LABEL_CORRELATION * first + math.sqrt(1.0 - LABEL_CORRELATION**2) * own

    @cached_property
    def _biases(self) -> list[float]:
        """For each label, the bias with which the probe has the positive rate, by bisection."""
        biases = []
        for logits in self._logits(self._probe):
            low, high = -20.0, 20.0
            for _ in range(50):
                middle = (low + high) / 2.0
                low, high = (middle, high) if _sigmoid(logits + middle).mean() < POSITIVE_RATE else (low, middle)
            biases.append(low)
        return biases

    def probabilities(self, sample: _Sample) -> Iterator[tuple[str, Floats]]:
        """The name and true probabilities [rows] of each label."""
        for name, bias, logits in zip(self.label_names, self._biases, self._logits(sample), strict=True):
            yield name, _sigmoid(logits + bias)


class _Score:
    """AUC, log loss and normalized entropy of probabilities, computed incrementally.

    The AUC counts pairs in the same of 2**18 equal bins of the probability as ties.
    """

    def __init__(self) -> None:
        self._bins = np.zeros((2, BINS), np.int64)
        self._loss = 0.0

    def add(self, probability: Floats, label: NDArray[np.bool_]) -> None:
        bins = np.minimum((probability * BINS).astype(np.int64), BINS - 1)
        for value in (0, 1):
            self._bins[value] += np.bincount(bins[label == bool(value)], minlength=BINS)
        self._loss -= float(np.log(np.where(label, probability, 1.0 - probability)).sum())

    def result(self) -> dict[str, float | None]:
        """The scores; those that need both classes are None if there is only one."""
        negatives, positives = self._bins
        below = np.cumsum(negatives) - negatives
        n, p = int(negatives.sum()), int(positives.sum())
        rate = p / (n + p)
        loss = self._loss / (n + p)
        both = n > 0 and p > 0
        entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate)) if both else None
        return {
            "rows": n + p,
            "positive_rate": rate,
            "auc": float((positives * (below + negatives / 2.0)).sum()) / (n * p) if both else None,
            "log_loss": loss,
            "normalized_entropy": loss / entropy if entropy else None,
        }


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(1.0 / (1.0 + np.exp(-x)))
