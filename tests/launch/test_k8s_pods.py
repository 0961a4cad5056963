"""What pods could not do is refused, by what they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel

from rechub_dist.config import RunConfig, Selection, stored_run
from rechub_dist.data.run_file import load_run
from rechub_dist.errors import UserError
from rechub_dist.launching.kubernetes.kinds import KINDS, render
from rechub_dist.launching.kubernetes.run_file import run_for_pods
from rechub_dist.launching.kubernetes.settings import Settings, Size
from rechub_dist.launching.kubernetes.view import pod_view
from rechub_tests.manifests import by_kind, pod_templates, trainer_pod

SCHEMA = "{features: {a: {kind: sparse, rows: 100}, b: {kind: dense}}, labels: {click: {}}}"
SETTINGS = Settings(name="x", image="x", output_claim="runs", data_claim="data")


def run_file(folder: Path, dataset: str = SCHEMA) -> Path:
    path = folder / "run.yaml"
    path.write_text(
        f"{{output_dir: /runs/x, data: {{root: /data/x, dataset: {dataset}}},"
        " model: {name: DeepFM, features: [a, b], hidden_units: [4], dropout_rates: 0.0, embedding_dim: 8}}"
    )
    return path


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    return run_file(tmp_path)


def for_pods(path: Path, *overrides: str, kind: str = "job", settings: Settings = SETTINGS) -> RunConfig:
    return run_for_pods(path, overrides, pod_view(kind, settings))


NOT_THERE = [
    ("data.root=/home/me/d", "data.root: /home/me/d is not in the pods"),
    ("data.root=file:///home/me/d", "data.root: file:///home/me/d is not in the pods"),
    ("data.root=local:///home/me/d", "data.root: local:///home/me/d is not in the pods"),
    ("data.root=data", "data.root: data is not in the pods"),
    ("data.root=/database", "data.root: /database is not in the pods"),
    ("data.root=/data/../etc", "data.root: /data/../etc is not in the pods"),
    ("data.root=/tmp/x", "data.root: /tmp/x is not in the pods"),  # it is, and is empty
    ("data.train=/home/me/train", "data.train: /home/me/train is not in the pods"),
    ("data.train=../../home", "data.train: /data/x/../../home is not in the pods"),
    ("data.train=[a, /home/me/b]", "data.train.1: /home/me/b is not in the pods"),
    ("data.train={path: /home/me/train}", "data.train.path: /home/me/train is not in the pods"),
    ("data.valid=/home/me/v", "data.valid: /home/me/v is not in the pods"),
    ("data.test=/home/me/t", "data.test: /home/me/t is not in the pods"),
    ("data.items=/home/me/i", "data.items: /home/me/i is not in the pods"),
    ("data.mix=[{path: a}, {path: /home/me/b}]", "data.mix.1.path: /home/me/b is not in the pods"),
    ("data.features={c: {kind: sparse, rows: 5, vocabulary: /home/v}}", "c.vocabulary: /home/v is not in the pods"),
    ("warm_start={from: runs/other}", "warm_start.from: runs/other is not in the pods"),
    ("warm_start={embeddings: [{table: a, file: a.npy}]}", "warm_start.embeddings.0.file: a.npy is not in the pods"),
    (
        "objective={name: retrieval, sampling: {name: file, path: w.npy}}",
        "objective.sampling.path: w.npy is not in the pods; use --set objective.sampling.path=/data/... "
        "(--data-claim NAME), /runs/... (--output-claim NAME) or an address such as s3://bucket/folder\n",
    ),
    ("embedding.plan=plan.json", "embedding.plan: plan.json is not in the pods"),
    ("checkpoint.folder=/home/me/c", "checkpoint.folder: /home/me/c is not in the pods"),
    ("checkpoint.folder=c", "checkpoint.folder: c is not in the pods"),
    ("checkpoint.folder=/data/c", "checkpoint.folder: /data/c is read-only in the pods"),
    ("checkpoint.folder=/tmp/c", "checkpoint.folder: /tmp/c: checkpoints would be deleted with the pods"),
    ("output_dir=x", "output_dir: x is not writable in the pods"),
    ("output_dir=/data/x", "output_dir: /data/x is not writable in the pods"),
    ("output_dir=/tmp/x", "output_dir: /tmp/x is deleted with the pods"),
]


@pytest.mark.parametrize(("override", "message"), NOT_THERE)
def test_places_that_the_pods_have_not(run_yaml: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        for_pods(run_yaml, override)
    assert message in f"{caught.value}\n"


@pytest.mark.parametrize(
    "override",
    [
        "data.root=/data",
        "data.root=//data/x/",
        "data.root=file:///data/x",
        "data.root=/runs/data",
        "data.root=s3://bucket/d",
        "output_dir=/runs",
        "data.train=['part-*', {path: s3://bucket/d, where: [[day, '=', '1e3']]}]",
        "warm_start={from: /runs/other, embeddings: [{table: a, file: /data/a.npy}]}",
        "checkpoint.folder=s3://bucket/c",
    ],
)
def test_places_that_they_have(run_yaml: Path, override: str) -> None:
    assert for_pods(run_yaml, override) == load_run(run_yaml, [override, "distributed.threads=2"])


def test_claims_are_what_makes_places(run_yaml: Path) -> None:
    with pytest.raises(UserError, match=r"data\.root: /data/x is not in the pods; .*--data-claim NAME"):
        for_pods(run_yaml, settings=replace(SETTINGS, data_claim=None))
    bare = replace(SETTINGS, output_claim=None)
    with pytest.raises(UserError, match="checkpoints would be deleted with the pods; give --output-claim NAME"):
        for_pods(run_yaml, settings=bare)
    with pytest.raises(UserError, match=r"warm_start\.from: /runs/y is not in the pods"):
        for_pods(run_yaml, "checkpoint.folder=s3://b/c", "warm_start={from: /runs/y}", settings=bare)
    assert for_pods(run_yaml, "checkpoint.folder=s3://b/c", settings=bare)


def test_a_schema_in_a_claim_is_left_to_the_pods(tmp_path: Path) -> None:
    path = run_file(tmp_path, "/data/schema.yaml")
    assert for_pods(path).data.dataset == "/data/schema.yaml"
    (tmp_path / "schema.yaml").write_text(SCHEMA)
    for name in ("schema.yaml", str(tmp_path / "schema.yaml"), f"file://{tmp_path}/schema.yaml"):
        dataset = for_pods(run_file(tmp_path, name)).data.dataset
        assert isinstance(dataset, dict)
        assert dataset["features"].keys() == {"a", "b"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_pods_are_what_the_check_takes_them_for(run_yaml: Path, kind: str) -> None:
    settings = replace(SETTINGS, cpu="6", nproc_per_node=2, memory="4Gi", workers=3)
    config = for_pods(run_yaml, kind=kind, settings=settings)
    spec = trainer_pod(list(yaml.safe_load_all(render(kind, settings, config))))["spec"]
    (container,) = spec["containers"]
    view = pod_view(kind, settings)
    assert container["resources"]["limits"] == {"cpu": "6", "memory": "4Gi"}
    assert (view.memory, view.ranks, view.pods, view.cpus) == (4 * 2**30, 2, 3, 3)
    volumes = {volume.pop("name"): volume for volume in spec["volumes"]}
    seen = {m["mountPath"]: (volumes[m["name"]], not m.get("readOnly", False)) for m in container["volumeMounts"]}
    assert seen == {str(mount.path): (mount.volume, mount.writable) for mount in view.mounts}
    claims = {path for path, (volume, _) in seen.items() if "persistentVolumeClaim" in volume}
    assert claims == {str(mount.path) for mount in view.mounts if mount.kept} == {"/runs", "/data"}


def test_what_is_written_is_what_is_read(run_yaml: Path) -> None:
    overrides = ["warm_start={from: /runs/y, tables: ['1e3']}", "data.train={path: t, where: [[d, '=', '1e5']]}"]
    config = for_pods(run_yaml, *overrides)
    text = by_kind(list(yaml.safe_load_all(render("job", SETTINGS, config))), "ConfigMap")["data"]["run.yaml"]
    read = stored_run(text, "run.yaml")
    assert read == load_run(run_yaml, [*overrides, "distributed.threads=2"])
    assert read.warm_start is not None
    assert (read.warm_start.from_, read.warm_start.tables) == ("/runs/y", ("1e3",))


def test_a_run_file_that_no_config_map_holds(tmp_path: Path) -> None:
    (tmp_path / "schema.yaml").write_text(f"{{name: {'a' * 2**20}, {SCHEMA[1:]}")
    with pytest.raises(UserError, match=r"run\.yaml: 1,.* bytes with the schema, but a ConfigMap holds 1,048,576"):
        for_pods(run_file(tmp_path, "schema.yaml"))


@pytest.mark.parametrize(
    ("kind", "ranks", "port", "message"),
    [
        ("job", 1, 0, "must all be in 1024 .. 65535"),
        ("job", 1, 80, "must all be in 1024 .. 65535"),  # of root
        ("job", 2, 65535, "must all be in 1024 .. 65535"),
        ("job", 1, 29400, "listen on port 29400, but the rendezvous store listens there"),
        ("pytorchjob", 4, 29397, "listen on port 29400, but the rendezvous store listens there"),
        ("rayjob", 2, 8079, "listen on port 8080, but Ray serves its own metrics there"),
        ("rayjob", 1, 52365, "listen on port 52365, but Ray's agent listens there"),
        ("rayjob", 1, 15000, "listen on port 15000, but Ray's workers listen there"),
    ],
)
def test_ports_that_the_ranks_cannot_have(run_yaml: Path, kind: str, ranks: int, port: int, message: str) -> None:
    settings = replace(SETTINGS, nproc_per_node=ranks)
    with pytest.raises(UserError, match=f"monitor.metrics_port: {port}: .*{message}"):
        for_pods(run_yaml, f"monitor.metrics_port={port}", kind=kind, settings=settings)


@pytest.mark.parametrize(
    ("kind", "ranks", "port"), [("job", 2, 65534), ("job", 3, 29397), ("rayjob", 1, 29400), ("job", 1, 8080)]
)
def test_ports_that_they_can_have(run_yaml: Path, kind: str, ranks: int, port: int) -> None:
    settings = replace(SETTINGS, nproc_per_node=ranks)
    config = for_pods(run_yaml, f"monitor.metrics_port={port}", kind=kind, settings=settings)
    assert config.monitor.metrics_port == port


def test_tables_that_do_not_fit_the_pods(run_yaml: Path) -> None:
    large = "data.dataset.features.a.rows=200000000"  # 12 GB and more
    with pytest.raises(UserError, match=r"do not fit 1 ranks of 6\.4 GB"):
        for_pods(run_yaml, large)
    assert for_pods(run_yaml, large, settings=replace(SETTINGS, workers=8))
    assert for_pods(run_yaml, large, settings=replace(SETTINGS, memory="64Gi"))
    assert for_pods(run_yaml, large, settings=replace(SETTINGS, gpus=1))  # of a size that is not known here
    in_host = "embedding.kernel=fused_uvm"  # of which the size is known
    with pytest.raises(UserError, match=r"embedding\.kernel: .* do not fit 1 ranks of 6\.4 GB of host memory"):
        for_pods(run_yaml, large, in_host, settings=replace(SETTINGS, gpus=1))
    assert for_pods(run_yaml, large, in_host, settings=replace(SETTINGS, gpus=1, memory="64Gi"))
    with pytest.raises(UserError, match=r"do not fit 1 ranks of 4 GB"):
        for_pods(run_yaml, large, "embedding.memory_per_rank_gb=4", settings=replace(SETTINGS, gpus=1))
    with pytest.raises(UserError, match=r"memory_per_rank_gb: 5 GiB for each of 2 rank\(s\) is more than the pod has"):
        for_pods(run_yaml, "embedding.memory_per_rank_gb=5", settings=replace(SETTINGS, nproc_per_node=2))


def test_what_a_rank_would_refuse(run_yaml: Path) -> None:
    with pytest.raises(UserError, match=r"model\.name: no model 'DeepFN'"):
        for_pods(run_yaml, "model.name=DeepFN")
    with pytest.raises(UserError, match=r"lazy_adam.* is not available on CPU"):
        for_pods(run_yaml, "embedding.optimizer.name=lazy_adam")
    assert for_pods(run_yaml, "embedding.optimizer.name=lazy_adam", settings=replace(SETTINGS, gpus=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory": "8"}, "--memory 8: 8 bytes is too small for 1 rank.s.: give at least 256Mi"),
        ({"memory": "512m"}, r"--memory 512m: 0\.512 bytes"),
        ({"memory": "1Gi", "nproc_per_node": 8}, "8 rank.s.: give at least 2048Mi"),
        ({"memory": "2Gi", "shared_memory": "16Gi"}, "--shared-memory 16Gi: is part of the pod's memory"),
        ({"shared_memory": "64"}, "--shared-memory 64: 64 bytes"),
        ({"cpu": "two"}, "--cpu two: write a quantity"),
        ({"head": Size("2", "4")}, "--head-memory 4: 4 bytes"),
        ({"submitter": Size("0", "1Gi")}, "--submitter-cpu 0: write a quantity"),
        ({"board": Size("1", "1GB")}, "--tensorboard-memory 1GB: write a quantity"),
        ({"node_selector": {"my label": "x"}}, "--node-selector my label=x: a label is"),
        ({"node_selector": {"pool": "ok!"}}, "--node-selector pool=ok!: a label is"),
        ({"workers": 100_001}, "--workers: 100,001 is above the cluster's maximum"),
        ({"ttl_seconds": 2**31}, "--ttl-seconds: 2,147,483,648 is above"),
        ({"image": "r.example//x"}, "--image r.example//x"),
    ],
)
def test_options_that_the_cluster_would_refuse(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(SETTINGS, **change)


@pytest.mark.parametrize("kind", KINDS)
def test_every_container_has_the_limits_that_are_asked_for(run_yaml: Path, kind: str) -> None:
    settings = replace(
        SETTINGS, tensorboard=True, head=Size("3", "5Gi"), submitter=Size("1", "2Gi"), board=Size("700m", "3Gi")
    )
    objects = list(yaml.safe_load_all(render(kind, settings, for_pods(run_yaml, kind=kind, settings=settings))))
    found = {}
    for template in (template for item in objects for template in pod_templates(item)):
        (container,) = template["spec"]["containers"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        found[template["metadata"]["labels"]["app.kubernetes.io/component"]] = container["resources"]["limits"]
    ray = {"head": {"cpu": "3", "memory": "5Gi"}, "submitter": {"cpu": "1", "memory": "2Gi"}}
    assert found == {
        "trainer": {"cpu": "2", "memory": "8Gi"},
        "tensorboard": {"cpu": "700m", "memory": "3Gi"},
        **(ray if kind == "rayjob" else {}),
    }


def test_a_ray_node_has_room_for_its_ranks_and_no_more(run_yaml: Path) -> None:
    for cpu, ranks, offered in (("3", 2, "2"), ("8", 2, "8"), ("500m", 1, "1"), ("1", 2, "2")):
        settings = replace(SETTINGS, cpu=cpu, nproc_per_node=ranks)
        text = render("rayjob", settings, for_pods(run_yaml, kind="rayjob", settings=settings))
        spec = by_kind(list(yaml.safe_load_all(text)), "RayJob")["spec"]
        (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
        assert group["rayStartParams"]["num-cpus"] == offered
        words = spec["entrypoint"].split()
        assert int(words[words.index("--cpus-per-worker") + 1]) * ranks == int(offered)


def test_no_key_that_names_a_place_is_forgotten() -> None:
    # whoever adds a key here adds it to `places`, and to NOT_THERE above
    assert place_keys(RunConfig) == {
        "output_dir", "data.root", "data.train", "data.train.path", "data.valid", "data.valid.path", "data.test",
        "data.test.path", "data.items", "data.items.path", "data.mix.path", "objective.sampling.path",
        "warm_start.from", "warm_start.embeddings.file", "checkpoint.folder", "embedding.plan",
        "code",  # of the image, which nobody knows here: a note says so
    }  # fmt: skip


def place_keys(section: type[BaseModel], prefix: str = "") -> set[str]:
    """The keys of a section that name files or folders, by their names or types."""
    found = set()
    for name, field in section.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        kinds = types(field.annotation)
        if {Path, Selection} & kinds or key.rpartition(".")[2] in {"root", "path", "file", "folder", "from"}:
            found.add(key)
        for child in kinds:
            if isinstance(child, type) and issubclass(child, BaseModel):
                found |= place_keys(child, f"{key}.")
    return found


def types(annotation: object) -> set[object]:
    """An annotation's plain types."""
    arguments = get_args(annotation)
    return {kind for argument in arguments for kind in types(argument)} if arguments else {annotation}
