"""What a manifest says: of the run, of its pods, of failures."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from rechub_dist.cli.main import app
from rechub_dist.config import read_run
from rechub_tests.manifests import EXAMPLE, KINDS, ROOT, by_kind, pod_templates, render, run_render, trainer_pod

AGENT_KINDS = [kind for kind in KINDS if kind != "rayjob"]


def container(template: dict[str, Any]) -> dict[str, Any]:
    (found,) = template["spec"]["containers"]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_pods_get_the_run_file(kind: str, tmp_path: Path) -> None:
    objects = render(kind, "--cpu", "6", "--nproc-per-node", "2", "--set", "train.epochs=7")
    config_map = by_kind(objects, "ConfigMap")
    (tmp_path / "run.yaml").write_text(config_map["data"]["run.yaml"])
    config = read_run(tmp_path / "run.yaml")
    assert (config.train.epochs, config.data.root, str(config.output_dir)) == (7, "/data/synthetic", "/runs/deepfm")
    assert config.distributed.threads == 3  # a process counts the cores of the node
    template = trainer_pod(objects)
    volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
    assert volumes["run"]["configMap"]["name"] == config_map["metadata"]["name"]
    assert {m["name"]: m["mountPath"] for m in container(template)["volumeMounts"]}["run"] == "/run"


@pytest.mark.slow
def test_a_schema_beside_the_run_file_comes_inline(tmp_path: Path) -> None:
    (tmp_path / "schema.yaml").write_text("{features: {a: {kind: sparse, rows: 5}}, labels: {click: {}}}")
    (tmp_path / "run.yaml").write_text(
        "{output_dir: /runs/x, data: {root: 's3://bucket/x', dataset: schema.yaml},"
        " model: {name: DeepFM, features: [a], hidden_units: [4], dropout_rates: 0.0, embedding_dim: 4},"
        " distributed: {threads: 5}}"
    )
    arguments = (str(tmp_path / "run.yaml"), "--kind", "job", "--image", "x", "--output-claim", "runs")
    done = run_render(*arguments)
    config_map = by_kind(list(yaml.safe_load_all(done.stdout)), "ConfigMap")
    assert config_map["metadata"]["name"] == "run-run"
    run = yaml.safe_load(config_map["data"]["run.yaml"])
    assert run["data"]["dataset"]["features"] == {"a": {"kind": "sparse", "rows": 5}}
    assert run["distributed"]["threads"] == 5
    changed = run_render(*arguments, "--set", "model.name=DeepFN")  # the rank's own check, as the schema is known
    assert (changed.returncode, changed.stdout) == (2, "")
    assert changed.stderr == "error: model.name: no model 'DeepFN': did you mean 'DeepFM'?\n"


@pytest.mark.parametrize("kind", AGENT_KINDS)
def test_the_agent_reads_its_arguments(kind: str) -> None:
    sizes = ("--workers", "3", "--nproc-per-node", "2", "--grace-seconds", "200", "--max-restarts", "4")
    template = trainer_pod(objects := render(kind, *sizes))
    found = container(template)
    assert found["command"] == ["rechub-dist"]
    said = get_command(app).commands["train"].make_context("train", found["args"][1:]).params
    assert (found["args"][0], said["run_file"]) == ("train", Path("/run/run.yaml"))
    assert (said["nnodes"], said["nproc"], said["max_restarts"], said["grace"]) == ("3", 2, 4, 200)
    assert said["join"] >= 600  # nodes and images take their time
    if kind == "trainjob":
        trainer = by_kind(objects, "TrainJob")["spec"]["trainer"]
        assert (trainer["numNodes"], trainer["numProcPerNode"]) == (3, 2)
    # the cluster waits longer than the agent, which waits as long as a checkpoint may take
    assert template["spec"]["terminationGracePeriodSeconds"] > 200


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_job_may_take_over(kind: str) -> None:
    def said(*options: str) -> bool:
        objects = render(kind, *options)
        if kind == "rayjob":
            return " --take-over" in by_kind(objects, "RayJob")["spec"]["entrypoint"]
        return container(trainer_pod(objects))["args"][-1] == "--take-over"

    assert said("--take-over")
    assert not said()


@pytest.mark.parametrize("kind", AGENT_KINDS)
def test_attempts_of_a_job_know_each_other(kind: str) -> None:
    environment = {item["name"]: item for item in container(trainer_pod(render(kind)))["env"]}
    label = "metadata.labels['batch.kubernetes.io/controller-uid']"
    assert environment["RECHUB_LAUNCH"]["valueFrom"]["fieldRef"]["fieldPath"] == label


def test_the_first_pod_has_the_rendezvous_store() -> None:
    objects = render("job", "--workers", "3")
    job, service, template = by_kind(objects, "Job"), by_kind(objects, "Service"), trainer_pod(objects)
    assert (job["spec"]["completions"], job["spec"]["parallelism"], job["spec"]["completionMode"]) == (3, 3, "Indexed")
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["metadata"]["name"] == template["spec"]["subdomain"]
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    (port,) = [port["port"] for port in service["spec"]["ports"]]
    # an indexed Job names its pods' hosts <job>-<index>
    host = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert f"--rdzv={host}:{port}" in container(template)["args"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_pod_is_confined(kind: str) -> None:
    templates = [template for item in render(kind, "--tensorboard") for template in pod_templates(item)]
    assert len(templates) == (4 if kind == "rayjob" else 2)
    for template in templates:
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] != 0
        found = container(template)
        assert found["securityContext"]["readOnlyRootFilesystem"] is True
        assert found["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert found["resources"]["limits"].keys() >= {"cpu", "memory"}
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        mounts = {mount["mountPath"]: mount for mount in found["volumeMounts"]}
        assert {mount["name"] for mount in mounts.values()} == set(volumes)
        home = next(variable["value"] for variable in found["env"] if variable["name"] == "HOME")
        for path in ("/tmp", home, "/dev/shm"):
            assert "emptyDir" in volumes[mounts[path]["name"]]
            assert not mounts[path].get("readOnly", False)
        assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}


@pytest.mark.parametrize("kind", KINDS)
def test_gpus(kind: str) -> None:
    template = trainer_pod(objects := render(kind, "--workers", "2", "--gpus-per-worker", "4"))
    found = container(template)
    assert found["resources"]["limits"]["nvidia.com/gpu"] == "4"
    assert template["spec"]["tolerations"][0]["key"] == "nvidia.com/gpu"
    if kind == "rayjob":
        entry = by_kind(objects, "RayJob")["spec"]["entrypoint"]
        assert entry.endswith("/run/run.yaml --num-workers 8 --cpus-per-worker 1 --gpus-per-worker 1 --max-failures 3")
    else:
        assert "--nproc=4" in found["args"]
    assert "nvidia.com/gpu" not in container(trainer_pod(render(kind)))["resources"]["limits"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_pods_go_to_different_nodes(kind: str) -> None:
    for spread, policy in (("preferred", "ScheduleAnyway"), ("required", "DoNotSchedule")):
        template = trainer_pod(render(kind, "--spread", spread))
        (constraint,) = template["spec"]["topologySpreadConstraints"]
        assert constraint["whenUnsatisfiable"] == policy
        assert constraint["labelSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()


def test_the_ray_command_has_these_options() -> None:
    entry = by_kind(render("rayjob", "--gpus-per-worker", "1"), "RayJob")["spec"]["entrypoint"].split()
    tree = ast.parse((ROOT / entry[1].removeprefix("/app/")).read_text())
    (main,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    known = {argument.arg for argument in main.args.args}
    assert {word[2:].replace("-", "_") for word in entry if word.startswith("--")} <= known


def test_what_counts_as_a_failure() -> None:
    job = by_kind(render("job", "--backoff-limit", "5"), "Job")["spec"]
    assert (job["backoffLimitPerIndex"], job["maxFailedIndexes"]) == (5, 0)
    assert job["podFailurePolicy"]["rules"][0] == {
        "action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]
    }  # fmt: skip
    assert by_kind(render("jobset", "--backoff-limit", "5"), "JobSet")["spec"]["failurePolicy"] == {"maxRestarts": 5}
    assert by_kind(render("rayjob", "--backoff-limit", "5"), "RayJob")["spec"]["backoffLimit"] == 5
    for kind in AGENT_KINDS:
        environment = {item["name"]: item.get("value") for item in container(trainer_pod(render(kind)))["env"]}
        assert environment["RECHUB_PREEMPTED_EXIT_CODE"] not in {"0", "2"}


@pytest.mark.parametrize("kind", AGENT_KINDS)
def test_liveness_is_asked_for(kind: str) -> None:
    assert "livenessProbe" not in container(trainer_pod(render(kind)))
    probe = container(trainer_pod(render(kind, "--liveness", "600")))["livenessProbe"]
    assert probe["exec"]["command"][1:] == [
        "-m",
        "rechub_dist.launching.kubernetes.alive",
        "/runs/deepfm/health",
        "--seconds",
        "600",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_ports_of_metrics_are_named(kind: str) -> None:
    assert not {port["name"] for port in container(trainer_pod(render(kind))).get("ports", [])} & {"metrics-0"}
    metrics = ("--nproc-per-node", "2", "--set", "monitor.metrics_port=9400")
    ports = container(trainer_pod(render(kind, *metrics)))["ports"]
    assert {"metrics-0": 9400, "metrics-1": 9401}.items() <= {p["name"]: p["containerPort"] for p in ports}.items()


def test_tensorboard_reads_the_output_claim() -> None:
    objects = render("job", "--tensorboard")
    deployment = by_kind(objects, "Deployment")
    (template,) = pod_templates(deployment)
    found = container(template)
    assert "--logdir=/runs/deepfm/tensorboard" in found["args"]
    assert next(mount for mount in found["volumeMounts"] if mount["mountPath"] == "/runs")["readOnly"] is True
    service = next(
        item for item in objects if item["metadata"]["name"] == "deepfm-tensorboard" and item is not deployment
    )
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    assert not service["spec"]["selector"].items() <= trainer_pod(objects)["metadata"]["labels"].items()


def policies(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {item["metadata"]["name"]: item["spec"] for item in objects if item["kind"] == "NetworkPolicy"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_lets_in_only_the_run(kind: str) -> None:
    metrics = ("--nproc-per-node", "2", "--set", "monitor.metrics_port=9400")
    objects = render(kind, "--tensorboard", *metrics, "--namespace", "recommenders")
    found = policies(objects)
    run = {"matchLabels": {"app.kubernetes.io/instance": "deepfm"}}
    templates = [template for item in objects for template in pod_templates(item)]
    for template in templates:  # of every component
        assert run["matchLabels"].items() <= template["metadata"]["labels"].items()
    whole = found.pop("deepfm")
    assert (whole["podSelector"], whole["policyTypes"]) == (run, ["Ingress", "Egress"])
    assert whole["ingress"] == [{"from": [{"podSelector": run}]}]  # on any port: gloo and NCCL choose theirs
    own, dns, storage = whole["egress"]
    assert own == {"to": [{"podSelector": run}]}
    assert {(port["protocol"], port["port"]) for port in dns["ports"]} >= {("UDP", 53), ("TCP", 53)}
    assert [port["port"] for port in storage["ports"]] == [443, 80]
    opened = {
        "deepfm-metrics": ("trainer", {"protocol": "TCP", "port": 9400, "endPort": 9401}),
        "deepfm-tensorboard": ("tensorboard", {"protocol": "TCP", "port": 6006}),
        **({"deepfm-dashboard": ("head", {"protocol": "TCP", "port": 8265})} if kind == "rayjob" else {}),
    }
    assert found.keys() == opened.keys()
    for name, (component, port) in opened.items():
        spec = found[name]
        assert spec["policyTypes"] == ["Ingress"]
        chosen = spec["podSelector"]["matchLabels"]
        assert chosen["app.kubernetes.io/component"] == component
        assert any(chosen.items() <= template["metadata"]["labels"].items() for template in templates)
        (rule,) = spec["ingress"]
        assert rule["ports"] == [port]
        assert all("namespaceSelector" in source for source in rule["from"])  # nothing from outside the cluster


def test_the_network_lets_out_to_storage() -> None:
    objects = render(
        "job", "--egress-port", "8020", "--egress-port", "443", "--set", "data.storage.endpoint=http://minio:9000",
        "--set", "data.root=s3://bucket/synthetic", "--set", "checkpoint.folder=hdfs://name:9870/runs",
    )  # fmt: skip
    ports = [port["port"] for port in policies(objects)["deepfm"]["egress"][2]["ports"]]
    assert ports == [443, 80, 9000, 9870, 8020]


def test_the_network_may_be_left_to_others() -> None:
    assert not policies(render("job", "--no-network-policy", "--tensorboard"))


def test_metrics_of_pods_are_for_all_of_the_cluster() -> None:
    def address(*options: str) -> str | None:
        objects = render("job", *options)
        run = yaml.safe_load(by_kind(objects, "ConfigMap")["data"]["run.yaml"])
        return run.get("monitor", {}).get("metrics_address")

    port = ("--set", "monitor.metrics_port=9400")
    assert address() is None
    assert address(*port) == "0.0.0.0"
    assert address(*port, "--set", "monitor.metrics_address=127.0.0.1") == "127.0.0.1"


def test_it_writes_a_file(tmp_path: Path) -> None:
    done = run_render(*EXAMPLE, "--kind", "job", "-o", str(tmp_path / "job.yaml"))
    assert (done.returncode, done.stdout) == (0, "")
    assert list(yaml.safe_load_all((tmp_path / "job.yaml").read_text())) == render("job")


def test_checkpoints_may_go_to_an_object_store() -> None:
    options = [part for part in EXAMPLE if part not in {"--output-claim", "runs"}]
    done = run_render(*options, "--kind", "job", "--set", "checkpoint.folder=s3://bucket/deepfm")
    assert done.returncode == 0, done.stderr
    volumes = {
        volume["name"]: volume for volume in trainer_pod(list(yaml.safe_load_all(done.stdout)))["spec"]["volumes"]
    }
    assert volumes["runs"]["emptyDir"] == {}


BAD = [
    (["--name", "Deep_FM"], "--name Deep_FM: must be at most 40 lower-case letters"),
    (["--name", "7th"], "beginning with a letter"),
    (["--name", "a" * 41], "at most 40"),
    (["--namespace", "a.b"], "--namespace a.b"),
    (["--output-claim", "my_claim"], "--output-claim my_claim"),
    (["--image", "two words"], "--image two words"),
    (["--memory", "8 GB"], "--memory 8 GB: write a quantity"),
    (["--cpu", "0"], "--cpu 0: write a quantity above 0"),
    (["--gpus-per-worker", "1", "--nproc-per-node", "2"], "--gpus-per-worker 1: 2 ranks per pod need one GPU each"),
    (["--gpus-per-worker", "1", "--set", "device=cpu"], "the run file has device: cpu"),
    (["--set", "device=cuda"], "device: cuda needs --gpus-per-worker"),
    (["--set", "data.root=data/synthetic"], "data.root: data/synthetic is not in the pods"),
    (["--set", "monitor.metrics_port=29400"], "a rank would listen on port 29400"),
    (["--memory", "8"], "--memory 8: 8 bytes"),
    (["--set", "train.epoch=1"], "unknown key 'train.epoch': did you mean 'epochs'?"),
    (["--node-selector", "gpu"], "--node-selector gpu: write LABEL=VALUE"),
    (["--node-selector", "my label=x y"], "--node-selector my label=x y: a label is at most 63"),
    (["--node-selector", "a=1", "--node-selector", "a=2"], "--node-selector a=2: a is given twice"),
    (["--head-cpu", "1"], "--head-cpu: needs --kind rayjob"),
    (["--tensorboard-memory", "2Gi"], "--tensorboard-memory: needs --tensorboard"),
    (["--spread", "some"], "--spread some: must be preferred or required"),
    (["--kind", "rayjob", "--liveness", "600"], "--liveness: Ray watches its workers itself"),
    (["--no-network-policy", "--egress-port", "9000"], "--egress-port: without network policies all ports are open"),
    (["-o", "/nowhere/job.yaml"], "--out /nowhere/job.yaml: cannot be written"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[" ".join(options)[:40] for options, _ in BAD])
def test_a_mistake_is_one_line(options: list[str], message: str) -> None:
    done = run_render(*EXAMPLE, "--kind", "job", *options)
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("left_out", ["--output-claim", "--data-claim"])
def test_a_run_that_would_leave_nothing_or_find_nothing_is_refused(left_out: str) -> None:
    at = EXAMPLE.index(left_out)
    done = run_render(*EXAMPLE[:at], *EXAMPLE[at + 2 :], "--kind", "job")
    assert done.returncode == 2
    assert f"{left_out} NAME" in done.stderr


@pytest.mark.slow
def test_code_of_ones_own_is_for_the_image_to_bring(tmp_path: Path) -> None:
    (tmp_path / "schema.yaml").write_text("{features: {a: {kind: sparse, rows: 5}}, labels: {click: {}}}")
    (tmp_path / "own_pods_code.py").write_text("from rechub_dist.models import DeepFM\nclass Net(DeepFM): ...\n")
    (tmp_path / "run.yaml").write_text(
        "{output_dir: /runs/x, data: {root: 's3://bucket/x', dataset: schema.yaml},"
        " model: {name: 'own_pods_code:Net', features: [a], hidden_units: [4], dropout_rates: 0.0, embedding_dim: 4}}"
    )
    arguments = (str(tmp_path / "run.yaml"), "--kind", "job", "--image", "x", "--output-claim", "runs")
    done = run_render(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("note: model.name: own_pods_code:Net: the image must contain this code")
    config_map = by_kind(list(yaml.safe_load_all(done.stdout)), "ConfigMap")
    assert "code" not in yaml.safe_load(config_map["data"]["run.yaml"])  # where it lies here says nothing there
    wrong = run_render(*arguments, "--set", "model.name=own_pods_code:Nat")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "error: model.name: module 'own_pods_code' has no 'Nat': did you mean 'Net'?\n"
