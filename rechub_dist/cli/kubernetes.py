"""The commands `rechub-dist k8s ...`."""

from __future__ import annotations

import re
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from rechub_dist.config.code import named_code
from rechub_dist.distributed.process import quiet_libraries
from rechub_dist.errors import UserError
from rechub_dist.launching.kubernetes.settings import HEAD, SUBMITTER, TENSORBOARD, Settings, Size

k8s_app = typer.Typer(no_args_is_help=True, help="Train and serve on Kubernetes.")


class Kind(StrEnum):
    """Kinds of job, and a server of bundles."""

    JOB = "job"
    JOBSET = "jobset"
    PYTORCHJOB = "pytorchjob"
    TRAINJOB = "trainjob"
    RAYJOB = "rayjob"
    SERVE = "serve"


_PODS, _BESIDE, _STORAGE, _FAILURES = "Pods", "Containers that do not train: requests and limits", "Storage", "Failures"
_NETWORK = "Network"
_SERVER = "Server of bundles (--kind serve)"
# Options that mean nothing to a server, and those that mean nothing to a job.
_OF_JOBS = (
    "set_", "nproc_per_node", "gpus_per_worker", "shared_memory", "tensorboard", "output_claim", "egress_port",
    "max_restarts", "backoff_limit", "liveness", "take_over", "ttl_seconds",
)  # fmt: skip
_OF_SERVERS = ("token_env", "no_token", "watch")


@k8s_app.callback()
def k8s() -> None:
    """Train and serve on Kubernetes."""


@k8s_app.command()
def render(
    context: typer.Context,
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN.yaml | [NAME=]FOLDER...",
            help="Run file; of a server the bundles, as its pods see them.",
            show_default=False,
        ),
    ],
    kind: Annotated[
        Kind, typer.Option(help="Kind of job: Kubernetes' own Job, or that of another controller; or a server.")
    ],
    image: Annotated[str, typer.Option(help="Image of the pods (docker/Dockerfile).")],
    name: Annotated[
        str | None, typer.Option(help="Name of the job or server; default: that of the run file, or of the bundle.")
    ] = None,
    namespace: Annotated[
        str | None, typer.Option(help="Namespace of all objects; default: kubectl's current one.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a configuration key; repeatable."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Output file; default: stdout.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Number of pods.", rich_help_panel=_PODS)] = 1,
    nproc_per_node: Annotated[
        int | None,
        typer.Option(min=1, help="Ranks per pod; default: its number of GPUs, else 1.", rich_help_panel=_PODS),
    ] = None,
    gpus_per_worker: Annotated[int, typer.Option(min=0, help="NVIDIA GPUs per pod.", rich_help_panel=_PODS)] = 0,
    cpu: Annotated[str, typer.Option(help="CPU cores per pod.", rich_help_panel=_PODS)] = "2",
    memory: Annotated[str, typer.Option(help="Memory per pod.", rich_help_panel=_PODS)] = "8Gi",
    shared_memory: Annotated[
        str | None,
        typer.Option(help="Size of /dev/shm, part of --memory; default: 1Gi, at most half.", rich_help_panel=_PODS),
    ] = None,
    node_selector: Annotated[
        list[str] | None,
        typer.Option(metavar="LABEL=VALUE", help="Label that nodes must have; repeatable.", rich_help_panel=_PODS),
    ] = None,
    spread: Annotated[
        str, typer.Option(help="Whether each pod gets a node of its own: preferred or required.", rich_help_panel=_PODS)
    ] = "preferred",
    service_account: Annotated[
        str | None, typer.Option(help="ServiceAccount of the pods.", rich_help_panel=_PODS)
    ] = None,
    tensorboard: Annotated[
        bool,
        typer.Option("--tensorboard", help="Add a TensorBoard that reads the output claim.", rich_help_panel=_PODS),
    ] = False,
    head_cpu: Annotated[
        str, typer.Option(help="CPU cores of Ray's head node (rayjob).", rich_help_panel=_BESIDE)
    ] = HEAD.cpu,
    head_memory: Annotated[
        str, typer.Option(help="Memory of Ray's head node (rayjob).", rich_help_panel=_BESIDE)
    ] = HEAD.memory,
    submitter_cpu: Annotated[
        str,
        typer.Option(help="CPU cores of the container that submits the job to Ray (rayjob).", rich_help_panel=_BESIDE),
    ] = SUBMITTER.cpu,
    submitter_memory: Annotated[
        str, typer.Option(help="Memory of the container that submits the job (rayjob).", rich_help_panel=_BESIDE)
    ] = SUBMITTER.memory,
    tensorboard_cpu: Annotated[
        str, typer.Option(help="CPU cores of TensorBoard.", rich_help_panel=_BESIDE)
    ] = TENSORBOARD.cpu,
    tensorboard_memory: Annotated[
        str, typer.Option(help="Memory of TensorBoard.", rich_help_panel=_BESIDE)
    ] = TENSORBOARD.memory,
    output_claim: Annotated[
        str | None,
        typer.Option(
            metavar="PVC", help="Claim mounted at /runs; ReadWriteMany for several pods.", rich_help_panel=_STORAGE
        ),
    ] = None,
    data_claim: Annotated[
        str | None, typer.Option(metavar="PVC", help="Claim mounted read-only at /data.", rich_help_panel=_STORAGE)
    ] = None,
    env_secret: Annotated[
        str | None,
        typer.Option(
            metavar="SECRET", help="Secret with environment variables, such as credentials.", rich_help_panel=_STORAGE
        ),
    ] = None,
    network_policy: Annotated[
        bool,
        typer.Option(help="Add NetworkPolicies that let in and out only what a run needs.", rich_help_panel=_NETWORK),
    ] = True,
    egress_port: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            max=65535,
            help="TCP port of storage, besides 443, 80 and those that the run file names; repeatable.",
            rich_help_panel=_NETWORK,
        ),
    ] = None,
    grace_seconds: Annotated[
        int,
        typer.Option(
            min=1,
            help="Seconds a stopping rank has to save a checkpoint, or a server to answer what it has begun.",
            rich_help_panel=_FAILURES,
        ),
    ] = 120,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="Restarts of the ranks before the pod fails.", rich_help_panel=_FAILURES)
    ] = 3,
    backoff_limit: Annotated[int, typer.Option(min=0, help="Restarts of a failed pod.", rich_help_panel=_FAILURES)] = 3,
    liveness: Annotated[
        int | None,
        typer.Option(
            metavar="SECONDS",
            min=60,
            help="Restart a pod without progress for so long; default: never.",
            rich_help_panel=_FAILURES,
        ),
    ] = None,
    take_over: Annotated[
        bool,
        typer.Option(
            "--take-over",
            help="Take the output folders over from a running run, which then ends.",
            rich_help_panel=_FAILURES,
        ),
    ] = False,
    ttl_seconds: Annotated[
        int | None,
        typer.Option(min=0, help="Seconds after which a finished job is deleted.", rich_help_panel=_FAILURES),
    ] = None,
    token_env: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Variable of --env-secret with the token to ask for.", rich_help_panel=_SERVER
        ),
    ] = None,
    no_token: Annotated[
        bool,
        typer.Option("--no-token", help="Answer every pod of the cluster, without a token.", rich_help_panel=_SERVER),
    ] = False,
    watch: Annotated[
        float,
        typer.Option(min=0, help="Seconds between looks for replaced bundles; 0: never.", rich_help_panel=_SERVER),
    ] = 10.0,
) -> None:
    """Write a Kubernetes manifest: of a training job, with RUN.yaml in a ConfigMap, or of a server of bundles.

    Example: rechub-dist k8s render run.yaml --kind job --workers 4 --image registry.example/rechub-dist:cpu
    --output-claim runs --set output_dir=/runs/deepfm --set data.root=s3://bucket/criteo | kubectl apply -f -

    Example: rechub-dist k8s render ctr=/data/bundles/ctr --kind serve --workers 3 --image
    registry.example/rechub-dist:serve --data-claim data --env-secret serving --token-env SERVING_TOKEN
    """
    from rechub_dist.launching.kubernetes.kinds import as_text  # noqa: PLC0415 - slow to import
    from rechub_dist.launching.kubernetes.kinds import render as rendered  # noqa: PLC0415
    from rechub_dist.launching.kubernetes.run_file import run_for_pods  # noqa: PLC0415
    from rechub_dist.launching.kubernetes.serving import Bundles  # noqa: PLC0415
    from rechub_dist.launching.kubernetes.serving import serve as server  # noqa: PLC0415
    from rechub_dist.launching.kubernetes.view import pod_view  # noqa: PLC0415

    given = {option for option in context.params if _is_given(context, option)}
    _check_options(kind, given)
    if kind is not Kind.SERVE and len(what) > 1:
        raise UserError(f"{what[1]}: a job has one run file")
    settings = Settings(
        name=_name_of(what[0]) if name is None else name,
        image=image,
        workers=workers,
        nproc_per_node=nproc_per_node or gpus_per_worker or 1,
        namespace=namespace,
        cpu=cpu,
        memory=memory,
        gpus=gpus_per_worker,
        shared_memory=shared_memory,
        output_claim=output_claim,
        data_claim=data_claim,
        env_secret=env_secret,
        service_account=service_account,
        node_selector=_selector(node_selector or []),
        spread=_spread(spread),
        grace_seconds=grace_seconds,
        max_restarts=max_restarts,
        backoff_limit=backoff_limit,
        ttl_seconds=ttl_seconds,
        liveness_seconds=liveness,
        take_over=take_over,
        tensorboard=tensorboard,
        network_policy=network_policy,
        egress_ports=tuple(egress_port or ()),
        head=Size(head_cpu, head_memory),
        submitter=Size(submitter_cpu, submitter_memory),
        board=Size(tensorboard_cpu, tensorboard_memory),
    )
    if kind is Kind.SERVE:
        if (token_env is None) != no_token:
            raise UserError("--token-env NAME: name the variable of --env-secret with the token, or say --no-token")
        bundles = Bundles(tuple(what), token_env, watch or None)
        text = as_text(server(settings, bundles))
        if in_image := bundles.in_image():
            print(f"note: {', '.join(in_image)}: not of the data claim, so the image must contain it", file=sys.stderr)
    else:
        quiet_libraries()
        config = run_for_pods(Path(what[0]), set_ or [], pod_view(kind.value, settings))
        text = rendered(kind.value, settings, config)
        if code := named_code(config.model_dump()):
            named = ", ".join(f"{key}: {name}" for key, name in code.items())
            print(
                f"note: {named}: the image must contain this code: installed, in its working directory or in the "
                f"folder that `code` names",
                file=sys.stderr,
            )
    if out is None:
        print(text, end="")
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror}; name another folder") from error


def _check_options(kind: Kind, given: set[str]) -> None:
    """Refuse options that mean nothing to what is rendered."""
    server = kind is Kind.SERVE
    for option in _OF_JOBS if server else _OF_SERVERS:
        if option in given:
            raise UserError(f"{_spelt(option)}: {'a server has none' if server else 'needs --kind serve'}")
    if kind is Kind.RAYJOB and "liveness" in given:
        raise UserError("--liveness: Ray watches its workers itself; leave it out for --kind rayjob")
    for part, needs, there in (
        ("head", "--kind rayjob", kind is Kind.RAYJOB),
        ("submitter", "--kind rayjob", kind is Kind.RAYJOB),
        ("tensorboard", "--tensorboard", "tensorboard" in given),
    ):
        for option in (f"{part}_cpu", f"{part}_memory"):
            if option in given and not there:
                raise UserError(f"{_spelt(option)}: needs {needs}")


def _is_given(context: typer.Context, option: str) -> bool:
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def _spelt(option: str) -> str:
    return f"--{option.rstrip('_').replace('_', '-')}"


def _name_of(what: str) -> str:
    """The name of a run file or bundle as an object of the cluster may have it."""
    name, equals, folder = what.partition("=")
    return re.sub(r"[^a-z0-9]+", "-", (name if equals else Path(folder or what).stem).lower()).strip("-")


def _selector(items: list[str]) -> dict[str, str]:
    found = {}
    for item in items:
        label, equals, value = item.partition("=")
        if not equals or not label:
            raise UserError(f"--node-selector {item}: write LABEL=VALUE")
        if label in found:
            raise UserError(f"--node-selector {item}: {label} is given twice, but a node has one value of it")
        found[label] = value
    return found


def _spread(value: str) -> Literal["preferred", "required"]:
    match value:
        case "preferred" | "required":
            return value
        case _:
            raise UserError(f"--spread {value}: must be preferred or required")
