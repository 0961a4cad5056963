"""The run file for the pods, validated as their ranks would."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rechub_dist.config import RunConfig, read_run, stored_run
from rechub_dist.config.locations import Location
from rechub_dist.data.parquet.storage import local_path
from rechub_dist.data.places import places
from rechub_dist.data.run_file import resolve_dataset
from rechub_dist.errors import UserError
from rechub_dist.launching.kubernetes.rules import CONFIG_MAP_BYTES, PORTS
from rechub_dist.launching.kubernetes.view import DATA, RUN_FILE, RUNS, PodView

_UNKNOWN = 1 << 60  # GPU memory in bytes if unknown: unlimited


def run_for_pods(path: Path, overrides: Iterable[str], pod: PodView) -> RunConfig:
    """Load and validate the run for the pods, as its ranks will read it.

    A schema file that the pods do not have is inlined. Unless the run file sets them, `distributed.threads` is set, and
    metrics are served on all addresses, as Prometheus comes from elsewhere.

    Raises:
        UserError: as `load_run`; the pods lack a file, folder, port, device or memory that the run needs; or, if the
            schema is known, building the model or planning the sharding fails.
    """
    config = read_run(path, overrides)
    if isinstance(config.data.dataset, str) and not _in_pods(config.data.dataset, pod):
        config = resolve_dataset(config, base=path.parent)
    if config.distributed.threads is None:
        distributed = config.distributed.model_copy(update={"threads": pod.cpus})
        config = config.model_copy(update={"distributed": distributed})
    if config.monitor.metrics_port is not None and "metrics_address" not in config.monitor.model_fields_set:
        monitor = config.monitor.model_copy(update={"metrics_address": "0.0.0.0"})
        config = config.model_copy(update={"monitor": monitor})
    text = config.dump_given()
    if len(text.encode()) > CONFIG_MAP_BYTES:
        raise UserError(
            f"{path}: {len(text.encode()):,} bytes with the schema, but a ConfigMap holds {CONFIG_MAP_BYTES:,}; remove "
            f"data.dataset, so that the pods read dataset.yaml below data.root"
        )
    read = stored_run(text, RUN_FILE)
    assert read.model_dump(mode="json") == config.model_dump(mode="json"), "what is written is what is read"
    for place in places(read):
        _check_place(place, pod)
    _check_device(read, pod)
    _check_ports(read, pod)
    if isinstance(read.data.dataset, dict):
        _check_parts(read.model_copy(update={"code": path.parent}), pod)  # import code from the local folder
    return read


def _in_pods(address: str, pod: PodView) -> bool:
    """Whether the pods can open an absolute path or an address."""
    inside = local_path(address)
    if inside is None:
        return True
    mount = pod.mount_of(inside)
    return mount is not None and mount.kept


def _check_place(place: Location, pod: PodView) -> None:
    path = local_path(place.address)
    if path is None:
        return  # an object store
    where = f"{place.key}: {place.address}"
    mount = pod.mount_of(path)
    if place.key == "output_dir":
        if mount is None or not mount.writable:
            raise UserError(f"{where} is not writable in the pods; use --set output_dir={RUNS}/NAME")
        if not mount.kept and any(other.kept and other.writable for other in pod.mounts):
            raise UserError(f"{where} is deleted with the pods; use --set output_dir={RUNS}/NAME, in the output claim")
    elif place.written:
        if mount is None or not mount.writable:
            state = "is not in the pods" if mount is None else "is read-only in the pods"
            raise UserError(
                f"{where} {state}; use --set {place.key}={RUNS}/NAME (--output-claim NAME) or an address such as "
                f"s3://bucket/folder"
            )
        if not mount.kept:
            raise UserError(
                f"{where}: checkpoints would be deleted with the pods; give --output-claim NAME, or an object store: "
                f"--set {place.key}=s3://bucket/folder"
            )
    elif mount is None or not mount.kept:
        address = "" if place.path_only else " or an address such as s3://bucket/folder"
        raise UserError(
            f"{where} is not in the pods; use --set {place.key}={DATA}/... (--data-claim NAME), {RUNS}/... "
            f"(--output-claim NAME){address}"
        )


def _check_device(config: RunConfig, pod: PodView) -> None:
    if config.device == "cuda" and pod.device != "cuda":
        raise UserError("device: cuda needs --gpus-per-worker")
    if config.device == "cpu" and pod.device == "cuda":
        raise UserError("--gpus-per-worker: the run file has device: cpu")


def _check_ports(config: RunConfig, pod: PodView) -> None:
    first = config.monitor.metrics_port
    if first is None:
        return
    wanted = metrics_ports(config, pod.ranks)
    if first not in PORTS or wanted[-1] not in PORTS:
        raise UserError(
            f"monitor.metrics_port: {first}: the {pod.ranks} rank(s) of a pod listen on consecutive ports from there, "
            f"which must all be in {PORTS[0]} .. {PORTS[-1]}; set another one, such as 9400"
        )
    for ports, what in pod.taken:
        both = range(max(wanted[0], ports[0]), min(wanted[-1], ports[-1]) + 1)
        if both:
            raise UserError(
                f"monitor.metrics_port: {first}: a rank would listen on port {both[0]}, but {what}; set another one, "
                f"such as 9400"
            )


def metrics_ports(config: RunConfig, ranks: int) -> range:
    """The metrics ports of a pod's ranks; empty without `monitor.metrics_port`."""
    first = config.monitor.metrics_port
    return range(0) if first is None else range(first, first + ranks)


def _check_parts(config: RunConfig, pod: PodView) -> None:
    """Build the model and plan the sharding, as a rank does before any communication."""
    from rechub_dist.assembly.code import dense_optimizer, table_optimizers  # noqa: PLC0415 - torch takes seconds to import
    from rechub_dist.assembly.parts import build  # noqa: PLC0415
    from rechub_dist.embedding.planning import (  # noqa: PLC0415
        Cluster,
        kind_of,
        make_plan,
        memory_for_tables,
    )
    from rechub_dist.embedding.sharding import mark_optimizers  # noqa: PLC0415

    world = pod.pods * pod.ranks
    parts = build(config, device=pod.device, world_size=world)
    dense_optimizer(config)
    table_optimizers(config)
    given = config.embedding.memory_per_rank_gb
    share = memory_for_tables(pod.memory, pod.ranks)
    if given is None:
        memory = share if pod.device == "cpu" else _UNKNOWN
    else:
        memory = int(given * 1024**3)
        if pod.device == "cpu" and memory * pod.ranks > pod.memory:
            raise UserError(
                f"embedding.memory_per_rank_gb: {given:g} GiB for each of {pod.ranks} rank(s) is more than the pod has "
                f"({pod.memory / 1024**3:.3g} GiB); raise --memory"
            )
    mark_optimizers(parts.train_module, parts.layout)
    skips = config.train.on_non_finite == "skip"
    kind = kind_of(config.distributed.pipeline, parts.layout, pod.device, skips=skips)
    cluster = Cluster(world, pod.ranks, pod.device, memory, host_memory=share)
    make_plan(parts.train_module, parts.layout, cluster, config.data.batch_size, kind)
