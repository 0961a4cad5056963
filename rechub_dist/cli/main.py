"""The command `rechub-dist`."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rechub_dist import __version__
from rechub_dist.builds import require_builds, versions
from rechub_dist.cli.checkpoint import checkpoint_app
from rechub_dist.cli.data import data_app
from rechub_dist.cli.entry import AllowCode, Overrides, is_main, run_app
from rechub_dist.cli.kubernetes import k8s_app
from rechub_dist.distributed.process import AGENT_PID, PREEMPTED, die_with_agent, preempted_exit_code, quiet_libraries
from rechub_dist.launch.ray_train import main as ray_train
from rechub_dist.launch.ray_tune import main as ray_tune
from rechub_dist.launching.ports import RENDEZVOUS
from rechub_dist.reporting.strict_json import dumps

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(k8s_app, name="k8s")
ray_app = typer.Typer(no_args_is_help=True, help="Train and search on a Ray cluster.")
ray_app.command("train")(ray_train)
ray_app.command("tune")(ray_tune)
app.add_typer(ray_app, name="ray")

Nproc = Annotated[int | None, typer.Option(min=1, help="Start this many ranks on this machine.")]
_HOSTS = "Several hosts"
_RUN = "Output folder of a run, or its folder of checkpoints; path or address."


def _print_version(wanted: bool) -> None:
    if wanted:
        found = [f"Python {platform.python_version()}", *(f"{name} {known}" for name, known in versions().items())]
        print(f"rechub-dist {__version__} ({', '.join(found)})")
        raise typer.Exit


@app.callback()
def options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print versions and exit.")
    ] = False,
) -> None:
    """Train Torch-RecHub's recommender models at scale: sharded tables, DDP towers, streaming Parquet."""


@app.command()
def train(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml")],
    set_: Overrides = None,
    nproc: Nproc = None,
    nnodes: Annotated[str, typer.Option(metavar="N | MIN:MAX", help="Hosts of the run.", rich_help_panel=_HOSTS)] = "1",
    rdzv: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Address of the rendezvous store, on one of the hosts.", rich_help_panel=_HOSTS
        ),
    ] = None,
    rdzv_id: Annotated[
        str, typer.Option(help="Tells runs that share a rendezvous store apart.", rich_help_panel=_HOSTS)
    ] = "rechub-dist",
    rdzv_external: Annotated[
        bool, typer.Option(help="A `rechub-dist store` listens there.", rich_help_panel=_HOSTS)
    ] = False,
    max_restarts: Annotated[int, typer.Option(min=0, help="Times that failed workers are started again.")] = 3,
    grace: Annotated[int, typer.Option(min=1, help="Seconds from SIGTERM to SIGKILL.")] = 30,
    join: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Seconds to wait for missing hosts (default: 600), and, if given, for the rendezvous store too.",
            rich_help_panel=_HOSTS,
        ),
    ] = None,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Take the folders from a run that holds them; that one ends.")
    ] = False,
    show_torchrun: Annotated[bool, typer.Option(help="Print the equivalent torchrun command first.")] = False,
) -> None:
    """Train, evaluate and save as RUN.yaml says; go on by itself where its output folder holds a checkpoint.

    Example: rechub-dist train configs/runs/deepfm_synthetic.yaml --nproc 2 --set train.epochs=3

    On several hosts, the same on each: rechub-dist train RUN.yaml --nnodes 1:3 --nproc 8 --rdzv host0:29400
    """
    die_with_agent()
    require_builds()
    from rechub_dist.data.run_file import load_run  # noqa: PLC0415 - torch takes seconds to import; --help should not

    config = load_run(run_file, set_ or [])
    if (nproc is not None or rdzv is not None or nnodes != "1") and not _is_worker():
        from rechub_dist.launching.launcher import Launch, launch  # noqa: PLC0415

        wanted = Launch(nproc or 1, nnodes, rdzv, rdzv_id, rdzv_external, max_restarts, grace, join)
        arguments = ["train", str(run_file), *_overrides(set_), *(["--take-over"] if take_over else [])]
        raise typer.Exit(launch(wanted, arguments, show=show_torchrun))
    from rechub_dist.reporting.summary import show_training  # noqa: PLC0415
    from rechub_dist.training.trainer import run  # noqa: PLC0415

    quiet_libraries()
    summary = run(config, take_over=take_over)
    if summary.preempted:
        raise typer.Exit(PREEMPTED if AGENT_PID in os.environ else preempted_exit_code())
    if not is_main():
        return
    show_training(Console(), config, summary)


@app.command()
def evaluate(
    output_dir: Annotated[str, typer.Argument(metavar="OUTPUT_DIR", help=_RUN)],
    data: Annotated[str, typer.Option(help="Parquet file, folder, glob or address to evaluate on.")],
    set_: Overrides = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME | YAML",
            help="Report this as well, rmse or '{name: grouped_auc, group: user}' for one; may be given many times.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    nproc: Nproc = None,
    allow_code: AllowCode = None,
) -> None:
    """Evaluate a run's best checkpoint (the newest, where none is best) on data of the same schema.

    The configuration is the checkpoint's own. Where the data set has moved since, say --set data.root=/new/place.

    Example: rechub-dist evaluate runs/deepfm --data data/test --metric '{name: grouped_auc, group: user}'
    """
    require_builds()
    from rechub_dist.checkpoint.trained import trained_config  # noqa: PLC0415
    from rechub_dist.config.run import with_metrics  # noqa: PLC0415

    config = with_metrics(trained_config(output_dir, set_ or [], allowed_code=allow_code or []), metric or [])
    if nproc is not None and not _is_worker():
        from rechub_dist.launching.launcher import Launch, launch  # noqa: PLC0415

        options = [*_overrides(set_), *_repeated("--metric", metric), *_repeated("--allow-code", allow_code)]
        arguments = ["evaluate", output_dir, "--data", data, *options, *(["--json"] if as_json else [])]
        raise typer.Exit(launch(Launch(nproc, max_restarts=0), arguments))
    from rechub_dist.evaluation.evaluate import evaluate_run  # noqa: PLC0415
    from rechub_dist.reporting.reporter import show_summary  # noqa: PLC0415

    quiet_libraries()
    step, found = evaluate_run(config, data)
    if not is_main():
        return
    if as_json:
        print(dumps({"step": step, **found.counts, **found.metrics}))
    else:
        show_summary(Console(), f"{config.model.name} on {data}", {"step": step, **found.counts, **found.metrics})


@app.command()
def predict(
    output_dir: Annotated[str, typer.Argument(metavar="OUTPUT_DIR", help=_RUN)],
    data: Annotated[str, typer.Option(help="Parquet file, folder, glob or address; labels are not needed.")],
    out: Annotated[str, typer.Option(help="Folder or address for Parquet files; new or empty.")],
    set_: Overrides = None,
    keep: Annotated[list[str] | None, typer.Option(help="Column to copy; may be given many times.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Items a row, of a recall model.")] = 100,
    nproc: Nproc = None,
    allow_code: AllowCode = None,
) -> None:
    """Predict each row of a data set by a run's best checkpoint (the newest, where none is best).

    A ranking or multi-task model gives a probability (or value) for each label; a recall model its best items and their
    scores. Each row says where it comes from: source_file, source_row. When all is written there is a file _SUCCESS.

    The configuration is the checkpoint's own. Where the data set has moved since, say --set data.root=/new/place.

    Example: rechub-dist predict runs/deepfm --data data/test --out predictions --keep user --nproc 2
    """
    require_builds()
    from rechub_dist.checkpoint.trained import trained_config  # noqa: PLC0415

    config = trained_config(output_dir, set_ or [], allowed_code=allow_code or [])
    if nproc is not None and not _is_worker():
        from rechub_dist.launching.launcher import Launch, launch  # noqa: PLC0415

        options = [*_overrides(set_), *_repeated("--allow-code", allow_code), *_repeated("--keep", keep)]
        arguments = ["predict", output_dir, "--data", data, "--out", out, *options, "--top-k", str(top_k)]
        raise typer.Exit(launch(Launch(nproc, max_restarts=0), arguments))
    from rechub_dist.inference.predict import Prediction, predict_run  # noqa: PLC0415
    from rechub_dist.reporting.reporter import show_summary  # noqa: PLC0415

    quiet_libraries()
    step, rows = predict_run(config, Prediction(data, out, tuple(keep or ()), top_k))
    if is_main():
        show_summary(Console(), f"{config.model.name} on {data}", {"step": step, "rows": rows, "predictions": out})


@app.command()
def models(
    name: Annotated[str | None, typer.Argument(help="A model's class name.")] = None,
    run_file: Annotated[bool, typer.Option("--run-file", help="Print nothing but a run file that works.")] = False,
) -> None:
    """List the models by family, or show one: parameters, lookups, outputs, paper, and a run file that works.

    Example: rechub-dist models DIEN --run-file > dien.yaml
    """
    from rechub_dist.cli.describe import describe_model, list_models, print_run_file  # noqa: PLC0415

    console = Console()
    if name is None:
        list_models(console)
    elif run_file:
        print_run_file(name)
    else:
        describe_model(console, name)


@app.command()
def examples(
    name: Annotated[str | None, typer.Argument(help="Print this file.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Copy all, and launch/'s scripts and manifests, into this folder; new or empty.")
    ] = None,
) -> None:
    """List the run files, schemas and search spaces that come with the package, print one, or copy all.

    Example: rechub-dist examples deepfm_synthetic > run.yaml
    """
    from rechub_dist.cli.example_files import copy_examples, list_examples, read_example  # noqa: PLC0415

    if out is not None:
        copy_examples(out)
    elif name is not None:
        print(read_example(name), end="")
    else:
        list_examples(Console())


@app.command()
def store(port: Annotated[int, typer.Option(min=0, help="Port to listen on; 0: any.")] = RENDEZVOUS) -> None:
    """Serve the rendezvous store of runs (--rdzv, --rdzv-external), on a host that trains nothing."""
    from rechub_dist.launching.launcher import serve_store  # noqa: PLC0415

    serve_store(port)


def main() -> None:
    """Entry point of `rechub-dist`."""
    if not os.environ.get("RECHUB_DEBUG"):
        # Read when torch is loaded. Its warnings on connections that break are pages of C++ frames.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    code = run_app(app)
    sys.stdout.flush()
    sys.stderr.flush()
    if "torch.distributed" in sys.modules and "ray" not in sys.modules:  # Ray ends its cluster as the interpreter ends
        # A rank ends here and now, and so does an agent. While the interpreter ends in its usual way, a thread of gloo
        # that lets go of a tensor of the last exchange would ask for the interpreter's lock, and abort the process; an
        # agent that a signal took out of a call of its store has been seen to abort, too.
        os._exit(code)
    sys.exit(code)


def _overrides(given: list[str] | None) -> list[str]:
    return _repeated("--set", given)


def _repeated(option: str, given: list[str] | None) -> list[str]:
    return [part for item in given or [] for part in (option, item)]


def _is_worker() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ
