"""Holds converted weights against torch-rechub itself: the same rows, answers to 1e-5.

It needs torch-rechub 0.9.0, which rechub_dist does not: in an environment that has rechub_dist,

    pip install --no-deps torch-rechub==0.9.0 && pip install pandas scikit-learn
    python benchmarks/torch_rechub_weights.py

Each model is made with random weights and statistics, saved as torch-rechub saves it, converted, loaded, and asked
about random rows with empty, short and long lists. Of the models that are refused the reason is printed.

`--golden tests/golden/torch_rechub` writes the small files that the tests read.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch_rechub.basic.features import DenseFeature, SequenceFeature, SparseFeature
from torch_rechub.models.matching import DSSM, FaceBookDSSM
from torch_rechub.models.multi_task import ESMM, SharedBottom
from torch_rechub.models.ranking import AFM, DCN, DCNv2, DeepFM, FiBiNet, WideDeep

from rechub_dist.data.run_file import load_run
from rechub_dist.inference.convert import convert
from rechub_dist.inference.run import load
from rechub_dist.inference.torch_rechub import REFUSED

ROWS, DIM, MOST = 32, 4, 1e-5
GOLDEN = (
    *("DeepFM", "DeepFM of dense", "WideDeep", "DCN of prelu", "DCNv2", "AFM", "FiBiNET field_each", "SharedBottom"),
    *("ESMM", "DSSM"),
)
LISTS = ("tags", "brands", "history")
SCHEMA = {
    "name": "converted",
    "tables": {"item": {"rows": 9}},
    "features": {
        "user": {"kind": "sparse", "rows": 11},
        "item": {"kind": "sparse", "table": "item"},
        "shop": {"kind": "sparse", "rows": 5},
        "tags": {"kind": "sparse", "rows": 7, "pooling": "mean"},
        "brands": {"kind": "sparse", "rows": 6, "pooling": "sum"},
        "history": {"kind": "sequence", "table": "item", "max_length": 6},
        "age": {"kind": "dense"},
        "profile": {"kind": "dense", "dim": 3},
    },
    "labels": {"click": {}, "buy": {}, "stay": {"type": "regression"}},
}
Case = tuple[Callable[[], nn.Module], dict[str, Any], list[str]]  # theirs, our parameters, labels


def feature(name: str) -> Any:
    """A feature of torch-rechub like that of SCHEMA."""
    return {
        "user": SparseFeature("user", 11, DIM),
        "item": SparseFeature("item", 9, DIM, padding_idx=0),
        "shop": SparseFeature("shop", 5, DIM),
        "tags": SequenceFeature("tags", 7, DIM, pooling="mean", padding_idx=0),
        "brands": SequenceFeature("brands", 6, DIM, pooling="sum", padding_idx=0),
        "history": SequenceFeature("history", 9, DIM, pooling="mean", shared_with="item", padding_idx=0),
        "negative": SparseFeature("negative", 9, DIM, shared_with="item", padding_idx=0),
        "age": DenseFeature("age"),
        "profile": DenseFeature("profile", 3),
    }[name]


def features(names: str) -> list[Any]:
    """Several, by their names."""
    return [feature(name) for name in names.split()]


def cases() -> dict[str, Case]:
    """By name: how torch-rechub makes a model, the parameters of ours, and its labels."""
    ids, dense = "user item tags brands", "age profile"
    every = f"{ids} history {dense}"  # history shares the table of item
    mlp = {"dims": [8, 6], "dropout": 0.1, "activation": "relu"}
    units = {"hidden_units": [8, 6], "batch_norm": True}
    ours = {"features": every.split(), **units}
    tasks = {"task_types": ["classification", "regression"]}
    towers = [{"dims": [5], "activation": "relu"}] * 2
    sides = {"user_features": ["user", "tags", "history", "age"], "item_features": ["item", "shop", "profile"]}
    of_sides = [features(" ".join(names)) for names in sides.values()]
    small = {"features": ["user", "item", "shop"]}
    deepfm = {"dropout_rates": [0.1, 0.0], "embedding_dim": DIM, **units}
    return {
        "DeepFM": (
            lambda: DeepFM(features(f"{ids} {dense}"), features(ids), mlp),
            {"features": f"{ids} {dense}".split(), **deepfm},
            ["click"],
        ),
        "DeepFM of dense": (  # as in torch-rechub's examples
            lambda: DeepFM(features(dense), features(ids), mlp),
            {"features": f"{ids} {dense}".split(), **deepfm},
            ["click"],
        ),
        "WideDeep": (
            lambda: WideDeep(features(f"user shop {dense}"), features(every), mlp),
            {"wide_features": f"user shop {dense}".split(), "deep_features": every.split(), "dropout_rates": 0.1}
            | units,
            ["click"],
        ),
        "DCN": (lambda: DCN(features(every), 3, mlp), {"cross_num": 3, **ours}, ["click"]),
        "DCN of prelu": (
            lambda: DCN(features(every), 2, {**mlp, "activation": "prelu"}),
            {"cross_num": 2, "activation": "prelu", **ours},
            ["click"],
        ),
        "DCNv2": (
            lambda: DCNv2(features(every), 2, mlp, low_rank=3, num_experts=4),
            {"cross_num": 2, "low_rank": 3, "num_experts": 4, **ours},
            ["click"],
        ),
        "DCNv2 stacked": (
            lambda: DCNv2(features(every), 2, mlp, model_structure="stacked", low_rank=3, num_experts=2),
            {"cross_num": 2, "low_rank": 3, "num_experts": 2, "structure": "stacked", **ours},
            ["click"],
        ),
        "AFM": (
            lambda: AFM(features(ids), DIM, t=5),
            {"features": ids.split(), "attention_units": [5], "embedding_dim": DIM, "dropout_rate": 0.0},
            ["click"],
        ),
        **{
            f"FiBiNET {kind}": (
                lambda kind=kind: FiBiNet(features("user item shop"), mlp, 2, kind),
                {"bilinear_type": kind, "reduction_ratio": 2, **small, **units},
                ["click"],
            )
            for kind in ("field_all", "field_each", "field_interaction")
        },
        "SharedBottom": (
            lambda: SharedBottom(features(every), ["classification", "regression"], mlp, towers),
            {"num_tasks": 2, "task_hidden_units": [5], **tasks, **ours},
            ["click", "stay"],
        ),
        "ESMM": (
            lambda: ESMM(features("user tags"), features("item shop"), mlp, mlp),
            {"features": ["user", "tags", "item", "shop"], "tower_units": [], "embedding_dim": DIM, **units},
            ["click", "buy"],
        ),
        "DSSM": (
            lambda: DSSM(*of_sides, mlp, mlp),
            {**sides, "dropout_rates": 0.1, "embedding_dim": 6, "temperature": 1.0, **units},
            [],
        ),
        "FacebookDSSM": (
            lambda: FaceBookDSSM(of_sides[0], of_sides[1], features("negative shop profile"), mlp, mlp),
            {**sides, "num_tasks": 0, "task_types": [], **units, "hidden_units": [8, 6, 6]},
            [],
        ),
    }


def rows() -> dict[str, Any]:
    """Columns as ours take them; ids of lists begin at 1, since torch-rechub pads with 0."""
    rng = np.random.default_rng(0)

    def lists(most: int, length: int) -> list[list[int]]:
        return [rng.integers(1, most, n).tolist() for n in [0, 1, length, *rng.integers(0, length + 1, ROWS - 3)]]

    return {
        "user": rng.integers(0, 11, ROWS).tolist(),
        "item": rng.integers(0, 9, ROWS).tolist(),
        "shop": rng.integers(0, 5, ROWS).tolist(),
        "tags": lists(7, 3),
        "brands": lists(6, 2),
        "history": lists(9, 6),
        "age": rng.normal(size=ROWS).astype(np.float32).tolist(),
        "profile": rng.normal(size=(ROWS, 3)).astype(np.float32).tolist(),
    }


def padded(columns: dict[str, Any]) -> dict[str, Tensor]:
    """The columns as torch-rechub takes them."""
    found = {name: torch.tensor(values) for name, values in columns.items() if name not in LISTS}
    for name in LISTS:
        longest = max(map(len, columns[name]))
        found[name] = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in columns[name]])
    return {**found, "negative": found["item"]}


@torch.no_grad()
def at_random(model: nn.Module) -> nn.Module:
    """The model with random weights and statistics, ready to be asked."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.normal_(std=0.7)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_(std=0.3)  # type: ignore[union-attr]
            module.running_var.uniform_(0.2, 0.6)  # type: ignore[union-attr]
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx] = 0
    return model.eval()


@torch.no_grad()
def answers(model: nn.Module, labels: list[str], x: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """What torch-rechub answers, by our names."""
    if not labels:
        item = model.item_tower(x)  # type: ignore[operator]
        vectors = {"user": model.user_tower(x), "item": item[0] if isinstance(item, tuple) else item}  # type: ignore[operator]
        return {name: array.numpy() for name, array in vectors.items()}
    found = model(x).reshape(ROWS, -1).numpy()
    if isinstance(model, ESMM):
        names = ["predicted_buy_given_click", "predicted_click", "predicted_buy"]
    else:
        names = [f"predicted_{label}" for label in labels]
    return dict(zip(names, found.T, strict=True))


def write_run(folder: Path, name: str, parameters: dict[str, Any], labels: list[str]) -> Path:
    """A run file of a model, and beside its folder the schema of its data; there is no data."""
    tree: dict[str, Any] = {
        "output_dir": "out",
        "data": {"root": "data", "dataset": "../dataset.yaml", "batch_size": 16},
        "model": {"name": name, **parameters},
    }
    if labels:
        tree["data"]["labels"] = labels
    if "embedding_dim" not in parameters or name == "DSSM":
        tree["embedding"] = {"dim": DIM}
    folder.mkdir(parents=True, exist_ok=True)
    (folder.parent / "dataset.yaml").write_text(yaml.safe_dump(SCHEMA, sort_keys=False))
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def ours(out: Path, labels: list[str], columns: dict[str, Any]) -> dict[str, np.ndarray]:
    """What the converted run answers."""
    run = load(out)
    if labels:
        return run.predict(columns)
    user = np.stack([vectors[0] for vectors in run.vectors("user", columns)["vectors"]])
    return {"user": user, "item": np.stack(list(run.vectors("item", columns)["vector"]))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golden", type=Path, help="also write the weights, run files and answers into this folder")
    golden = parser.parse_args().golden
    columns = rows()
    worst = 0.0
    for case, (make, parameters, labels) in cases().items():
        model = at_random(make())
        wanted = answers(model, labels, padded(columns))
        with tempfile.TemporaryDirectory() as folder:
            path = write_run(Path(folder) / "run", case.split()[0], parameters, labels)
            torch.save(model.state_dict(), Path(folder) / "weights.pth")
            convert(Path(folder) / "weights.pth", load_run(path, [f"output_dir={folder}/out"]))
            got = ours(Path(folder) / "out", labels, columns)
        apart = max(float(np.abs(got[name] - values).max()) for name, values in wanted.items())
        spread = min(float(np.std(values)) for values in wanted.values())
        print(f"{case:28} differs by up to {apart:.1e}, among answers with a deviation of {spread:.2g}")
        worst = max(worst, apart)
        if golden is not None and case in GOLDEN:
            folder_of = golden / case.replace(" ", "_").lower()
            write_run(folder_of, case.split()[0], parameters, labels)
            torch.save(model.state_dict(), folder_of / "weights.pth")
            lists = {name: np.round(values.astype(float), 7).tolist() for name, values in wanted.items()}
            (folder_of / "expected.json").write_text(json.dumps(lists))
    if golden is not None:
        (golden / "rows.json").write_text(json.dumps(columns))
    for name, why in REFUSED.items():
        print(f"{name:28} refused: {why}")
    assert worst < MOST, f"differs by {worst}"


if __name__ == "__main__":
    main()
