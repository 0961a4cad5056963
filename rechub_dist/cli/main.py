"""The command `rechub-dist`."""

from __future__ import annotations

import os
import platform
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Annotated

import typer
from rich.console import Console

from rechub_dist import __version__
from rechub_dist.builds import require_builds, versions
from rechub_dist.cli.checkpoint import checkpoint_app
from rechub_dist.cli.convert import convert_app
from rechub_dist.cli.data import data_app
from rechub_dist.cli.doctor import doctor
from rechub_dist.cli.entry import AllowCode, Overrides, is_main, run_app
from rechub_dist.cli.export import export, fold, publish
from rechub_dist.cli.init import init
from rechub_dist.cli.keys import config
from rechub_dist.cli.kubernetes import k8s_app
from rechub_dist.cli.plan import plan
from rechub_dist.cli.report import report
from rechub_dist.cli.retrieval import index, retrieve, vectors
from rechub_dist.cli.serve import serve
from rechub_dist.cli.simulate import simulate
from rechub_dist.distributed.process import AGENT_PID, PREEMPTED, die_with_agent, preempted_exit_code, quiet_libraries
from rechub_dist.errors import UserError
from rechub_dist.launch.ray_import import main as ray_import
from rechub_dist.launch.ray_train import main as ray_train
from rechub_dist.launch.ray_tune import main as ray_tune
from rechub_dist.launching.ports import RENDEZVOUS
from rechub_dist.redaction import redacted
from rechub_dist.reporting.strict_json import dumps

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(convert_app, name="convert")
app.add_typer(k8s_app, name="k8s")
ray_app = typer.Typer(no_args_is_help=True, help="Import tables, train, and search hyperparameters, on a Ray cluster.")
ray_app.command("import")(ray_import)
ray_app.command("train")(ray_train)
ray_app.command("tune")(ray_tune)
app.add_typer(ray_app, name="ray")

Nproc = Annotated[int | None, typer.Option(min=1, help="Ranks to start on this machine.")]
_HOSTS = "Several hosts"
_RUN = "A run's output folder or checkpoint folder; path or address."


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
    """Train Torch-RecHub's recommender models at scale: sharded embedding tables, DDP, streaming Parquet."""


@app.command()
def train(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="Run file.")],
    set_: Overrides = None,
    nproc: Nproc = None,
    nnodes: Annotated[
        str, typer.Option(metavar="N | MIN:MAX", help="Number of hosts, or a range.", rich_help_panel=_HOSTS)
    ] = "1",
    rdzv: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Rendezvous address: one of the hosts.", rich_help_panel=_HOSTS),
    ] = None,
    rdzv_id: Annotated[
        str, typer.Option(help="Distinguishes runs that share a rendezvous store.", rich_help_panel=_HOSTS)
    ] = "rechub-dist",
    rdzv_external: Annotated[
        bool, typer.Option(help="--rdzv is the address of a `rechub-dist store`.", rich_help_panel=_HOSTS)
    ] = False,
    max_restarts: Annotated[int, typer.Option(min=0, help="Restarts of failed workers.")] = 3,
    grace: Annotated[int, typer.Option(min=1, help="Seconds between SIGTERM and SIGKILL.")] = 30,
    join: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Seconds to wait for missing hosts (default: 600); if given, also for the rendezvous to be reachable.",
            rich_help_panel=_HOSTS,
        ),
    ] = None,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Take the output folders over from a running run, which then ends.")
    ] = False,
    profile: Annotated[
        int | None,
        typer.Option(min=1, max=1000, metavar="N", help="Trace N steps, and print where their time goes."),
    ] = None,
    show_torchrun: Annotated[bool, typer.Option(help="Print the equivalent torchrun command first.")] = False,
) -> None:
    """Train, evaluate and save as RUN.yaml says; resume if its output folder has a checkpoint.

    Example: rechub-dist train configs/runs/deepfm_synthetic.yaml --nproc 2 --set train.epochs=3

    On several hosts, run the same command on each: rechub-dist train RUN.yaml --nnodes 1:3 --nproc 8 --rdzv host0:29400
    """
    die_with_agent()
    require_builds()
    from rechub_dist.data.run_file import load_run  # noqa: PLC0415 - torch takes seconds to import; --help should not

    set_ = [*(set_ or []), *([] if profile is None else [f"monitor.profile_steps={profile}"])]
    config = load_run(run_file, set_)
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
    data: Annotated[str, typer.Option(help="Data to evaluate on: Parquet file, folder, glob or address.")],
    set_: Overrides = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME | YAML",
            help="Metric to report as well: rmse, or '{name: grouped_auc, group: user_id}'; repeatable.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    nproc: Nproc = None,
    allow_code: AllowCode = None,
) -> None:
    """Evaluate a run's best checkpoint (the newest if none is marked best) on data with the same schema.

    The configuration comes from the checkpoint. If the data set has moved, use --set data.root=/new/place.

    Example: rechub-dist evaluate runs/deepfm --data data/test --metric '{name: grouped_auc, group: user_id}'
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
    data: Annotated[
        str, typer.Option(help="Rows to predict: Parquet file, folder, glob or address; no labels needed.")
    ],
    out: Annotated[str, typer.Option(help="New or empty folder or address for the Parquet output.")],
    set_: Overrides = None,
    keep: Annotated[list[str] | None, typer.Option(help="Input column to copy to the output; repeatable.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Recall models: number of items per row.")] = 100,
    nproc: Nproc = None,
    allow_code: AllowCode = None,
) -> None:
    """Predict every row of a data set with a run's best checkpoint (the newest if none is marked best).

    Ranking and multi-task models give a probability (or value) per label, recall models the best items with scores.
    The columns source_file and source_row identify the input row. A file _SUCCESS marks the output as complete.

    The configuration comes from the checkpoint. If the data set has moved, use --set data.root=/new/place.

    Example: rechub-dist predict runs/deepfm --data data/test --out predictions --keep user_id --nproc 2
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


app.command()(doctor)
app.command()(init)
app.command()(config)
app.command()(plan)
app.command()(simulate)
app.command()(report)
app.command()(export)
app.command()(fold)
app.command()(publish)
app.command()(vectors)
app.command()(index)
app.command()(retrieve)
app.command()(serve)


@app.command()
def models(
    name: Annotated[str | None, typer.Argument(help="A model's class name.")] = None,
    run_file: Annotated[bool, typer.Option("--run-file", help="Print only a complete run file.")] = False,
    data: Annotated[
        str | None, typer.Option(help="With --run-file: the prepared data set to train on; default: the example's.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write a page of documentation for each model.")
    ] = None,
) -> None:
    """List the models by family, or describe one: parameters, lookups, outputs, paper and a complete run file.

    Example: rechub-dist models DCNv2 --run-file --data data/mine > dcnv2.yaml
    """
    from rechub_dist.cli.describe import describe_model, list_models, print_run_file  # noqa: PLC0415

    if data is not None and not (run_file and name):
        raise UserError("--data: is for a run file: rechub-dist models NAME --run-file --data FOLDER")
    if markdown is not None and (name or run_file):
        raise UserError("--markdown: writes the pages of all models; leave NAME and --run-file out")
    console = Console()
    if markdown is not None:
        from rechub_dist.cli.model_pages import write_pages  # noqa: PLC0415

        write_pages(markdown)
    elif name is None:
        list_models(console)
    elif run_file:
        print_run_file(name, data)
    else:
        describe_model(console, name)


@app.command()
def examples(
    name: Annotated[str | None, typer.Argument(help="File to print.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="New or empty folder to copy all files to, with launch/'s scripts and manifests."),
    ] = None,
) -> None:
    """List the example run files, schemas and search spaces of the package, print one, or copy all.

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
def store(port: Annotated[int, typer.Option(min=0, help="Port to listen on; 0: any free port.")] = RENDEZVOUS) -> None:
    """Run a standalone rendezvous store, on a host that does not train.

    Runs use it with: rechub-dist train RUN.yaml --rdzv HOST:PORT --rdzv-external
    """
    from rechub_dist.launching.launcher import serve_store  # noqa: PLC0415

    serve_store(port)


def main() -> None:
    """Entry point of `rechub-dist`."""
    sys.excepthook = _show
    if not os.environ.get("RECHUB_DEBUG"):
        # Read when torch is loaded. Its warnings about broken connections are pages of C++ frames.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    code = run_app(app)
    sys.stdout.flush()
    sys.stderr.flush()
    if "torch.distributed" in sys.modules and "ray" not in sys.modules:  # Ray shuts its cluster down at exit
        # Ranks and agents skip interpreter shutdown: a gloo thread that releases a tensor of the last collective would
        # ask for the GIL meanwhile and abort the process. Agents interrupted by a signal in a store call aborted too.
        os._exit(code)
    sys.exit(code)


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an exception that nobody expected, without secrets: a client library may show an address."""
    print(redacted("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr, flush=True)


def _overrides(given: list[str] | None) -> list[str]:
    return _repeated("--set", given)


def _repeated(option: str, given: list[str] | None) -> list[str]:
    return [part for item in given or [] for part in (option, item)]


def _is_worker() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ
