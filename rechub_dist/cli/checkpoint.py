"""The commands `rechub-dist checkpoint ...`; one process, bounded memory, no torchrec."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from rechub_dist.cli.entry import AllowCode
from rechub_dist.errors import UserError
from rechub_dist.reporting.strict_json import dumps

if TYPE_CHECKING:
    from rechub_dist.checkpoint.folder import Folder
    from rechub_dist.checkpoint.manifest import CheckpointManifest
    from rechub_dist.config import StorageConfig

checkpoint_app = typer.Typer(no_args_is_help=True, help="List, inspect, verify, compare and export checkpoints.")

Address = Annotated[
    str, typer.Argument(help="A run's output folder, checkpoint folder or a single checkpoint; path or address.")
]
Step = Annotated[str, typer.Option(help="Which checkpoint of a run: best, newest or a step number.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Storage = Annotated[
    str | None,
    typer.Option(
        metavar="YAML", help="Storage settings, as in checkpoint.storage: '{endpoint: \"http://minio:9000\"}'."
    ),
]


@checkpoint_app.command(name="list")
def list_(address: Address, as_json: Json = False, storage: Storage = None) -> None:
    """List a run's checkpoints.

    Example: rechub-dist checkpoint list runs/deepfm
    """
    from rechub_dist.checkpoint.find import find_folder  # noqa: PLC0415 - torch is slow to import
    from rechub_dist.checkpoint.inspect import list_checkpoints  # noqa: PLC0415

    folder, _ = find_folder(address, _settings(storage))
    lines = list_checkpoints(folder)
    if as_json:
        print(dumps({"folder": folder.address, "checkpoints": lines}))
        return
    table = _table(folder.address, "step", "", "MB", "ranks", "saved at", "")
    for line in lines:
        unread = next((key for key in ("damage", "newer") if key in line), None)
        if unread is not None:
            table.add_row(f"{line['step']:,}", "damaged" if unread == "damage" else unread, "", "", "", line[unread])
            continue
        metrics = ", ".join(f"{name} {value:.5g}" for name, value in line["metrics"].items())
        size, ranks = f"{line['bytes'] / 1e6:,.1f}", str(line["world_size"])
        table.add_row(f"{line['step']:,}", "best" if line["best"] else "", size, ranks, line["saved_at"], metrics)
    Console().print(table)


@checkpoint_app.command()
def inspect(address: Address, step: Step = "best", as_json: Json = False, storage: Storage = None) -> None:
    """Show the content of a checkpoint: tensors, shapes, norms, training position and table sharding.

    Example: rechub-dist checkpoint inspect runs/deepfm --step newest
    """
    from rechub_dist.checkpoint.inspect import inspect_checkpoint  # noqa: PLC0415

    found = inspect_checkpoint(*_find(address, step, storage))
    if as_json:
        print(dumps(found))
        return
    console = Console()
    facts = _table(found["path"], "", "")
    position = found["position"]
    for name, value in {
        "model": found["model"],
        "step": f"{found['step']:,}",
        "best step": position["best_step"],
        "best metrics": ", ".join(f"{k} {v:.5g}" for k, v in position["best_metrics"].items()),
        "data": ", ".join(f"{k} {v}" for k, v in found["data"].items()),
        "seed": found["seed"],
        "saved": f"{found['saved_at']} by {found['world_size']} rank(s), {found['bytes'] / 1e6:,.1f} MB",
        "versions": ", ".join(f"{k} {v}" for k, v in found["versions"].items()),
    }.items():
        facts.add_row(name, str(value))
    console.print(facts)
    table = _table("", "tensor", "type", "shape", "sharding", "pieces", "norm")
    for tensor in found["tensors"]:
        shape = " x ".join(f"{n:,}" for n in tensor["shape"]) or "1"
        pieces, norm = str(tensor["pieces"]), f"{tensor['norm']:.5g}"
        table.add_row(tensor["name"], tensor["dtype"], shape, tensor["sharding"] or "", pieces, norm)
    console.print(table)
    if found["plan"] is not None:
        console.print(_plan_table(found["plan"]))


def _plan_table(plan: dict[str, Any]) -> Table:
    """How many shards of which sizes each table had, and on which ranks."""
    ranks, device = plan["world_size"], plan["device"]
    table = _table(
        f"plan of {ranks} rank(s), {device}", "table", "sharding", "kernel", "shards", "rows x width", "ranks"
    )
    for name, one in plan["tables"].items():
        shards = one["shards"]
        sizes = {f"{rows:,} x {columns}" for _, rows, columns, *_ in shards}
        on = ",".join(map(str, sorted({shard[0] for shard in shards})[:8]))
        more = ", ..." if len({shard[0] for shard in shards}) > 8 else ""
        table.add_row(name, one["sharding"], one["kernel"], str(len(shards)), ", ".join(sorted(sizes)[:3]), on + more)
    return table


@checkpoint_app.command()
def verify(address: Address, step: Step = "best", as_json: Json = False, storage: Storage = None) -> None:
    """Verify all checksums of a checkpoint, and that its pieces cover every tensor exactly once.

    Exit code 2 if it is damaged.

    Example: rechub-dist checkpoint verify runs/deepfm --step newest
    """
    from rechub_dist.checkpoint.coverage import check_coverage  # noqa: PLC0415
    from rechub_dist.checkpoint.folder import step_folder  # noqa: PLC0415
    from rechub_dist.checkpoint.load import blocks_of  # noqa: PLC0415
    from rechub_dist.checkpoint.load import verify as verify_blocks  # noqa: PLC0415
    from rechub_dist.checkpoint.manifest import no_other  # noqa: PLC0415

    folder, manifest = _find(address, step, storage)
    with no_other(), _progress() as progress:
        check_coverage(manifest, folder.path(step_folder(manifest.step)))
        task = progress.add_task("verifying", total=manifest.bytes)
        for size in verify_blocks(folder, manifest, blocks_of(manifest)):
            progress.advance(task, size)
    path = folder.path(step_folder(manifest.step))
    if as_json:
        print(dumps({"path": path, "step": manifest.step, "files": len(manifest.files), "bytes": manifest.bytes}))
    else:
        print(f"{path} is intact: {len(manifest.files)} file(s), {manifest.bytes:,} bytes")


@checkpoint_app.command()
def consolidate(
    address: Address,
    out: Annotated[
        str, typer.Option(help="Output .safetensors file; replaces only an earlier consolidated checkpoint.")
    ],
    step: Step = "best",
    optimizer: Annotated[bool, typer.Option("--optimizer", help="Include optimizer states.")] = False,
    storage: Storage = None,
) -> None:
    """Export a checkpoint as one safetensors file that a single process loads without torchrec.

    Example: rechub-dist checkpoint consolidate runs/deepfm --out deepfm.safetensors
    """
    from rechub_dist.checkpoint.consolidate import check_target  # noqa: PLC0415
    from rechub_dist.checkpoint.consolidate import consolidate as write  # noqa: PLC0415
    from rechub_dist.checkpoint.load import blocks_of, consume  # noqa: PLC0415
    from rechub_dist.checkpoint.load import verify as verify_blocks  # noqa: PLC0415
    from rechub_dist.checkpoint.manifest import no_other  # noqa: PLC0415

    if "://" in out:
        raise UserError(f"--out: {out} is an address; write a local file, then copy it there")
    folder, manifest = _find(address, step, storage)
    check_target(folder, manifest, Path(out))
    with no_other():
        consume(verify_blocks(folder, manifest, blocks_of(manifest)))
    with _progress() as progress:
        task = progress.add_task("writing", total=None)
        for size in write(folder, manifest, Path(out), optimizer=optimizer):
            progress.advance(task, size)
    print(f"{out}: step {manifest.step}, {Path(out).stat().st_size:,} bytes")


@checkpoint_app.command()
def diff(
    first: Address,
    second: Annotated[str, typer.Argument(help="The checkpoint to compare with.")],
    step: Annotated[str, typer.Option(help="Which checkpoint of the first: best, newest or a step number.")] = "best",
    second_step: Annotated[str, typer.Option(help="Which checkpoint of the second.")] = "best",
    as_json: Json = False,
    storage: Storage = None,
    allow_code: AllowCode = None,
) -> None:
    """Compare two checkpoints tensor by tensor, and the configuration keys that decide whether it is the same run.

    Example: rechub-dist checkpoint diff runs/a runs/b
    """
    from rechub_dist.assembly.identity import differences  # noqa: PLC0415
    from rechub_dist.checkpoint.inspect import diff_checkpoints  # noqa: PLC0415

    one, other = _find(first, step, storage), _find(second, second_step, storage)
    tensors = diff_checkpoints(one, other)
    identity = differences(_identity(*one, allow_code or []), _identity(*other, allow_code or []))
    if as_json:
        print(dumps({"steps": [one[1].step, other[1].step], "tensors": tensors, "identity": identity}))
        return
    for line in identity:
        print(line)
    if not tensors:
        print("all tensors are bitwise equal")
        return
    table = _table(f"{len(tensors)} tensors differ", "tensor", "difference", "elements", "largest")
    for found in tensors:
        largest = f"{found['largest']:.5g}" if "largest" in found else ""
        table.add_row(found["name"], found["difference"], f"{found['elements']:,}" if largest else "", largest)
    Console().print(table)


def _identity(folder: Folder, manifest: CheckpointManifest, allowed: list[str]) -> dict[str, Any]:
    """The identity of a checkpoint's run: resolved, or as recorded if torchrec is not installed."""
    from rechub_dist.checkpoint.folder import step_folder  # noqa: PLC0415
    from rechub_dist.config.versions import with_current_keys  # noqa: PLC0415

    try:
        from rechub_dist.assembly.identity import recorded  # noqa: PLC0415
    except ImportError:
        return with_current_keys(manifest.run["identity"])
    return recorded(manifest.run, folder.path(step_folder(manifest.step)), allowed)


def _find(address: str, step: str, storage: str | None) -> tuple[Folder, CheckpointManifest]:
    from rechub_dist.checkpoint.find import find_checkpoint  # noqa: PLC0415
    from rechub_dist.checkpoint.manifest import no_other  # noqa: PLC0415

    with no_other():
        if step in ("best", "newest"):
            return find_checkpoint(address, _settings(storage), "best" if step == "best" else "newest")
        if step.isdecimal():
            return find_checkpoint(address, _settings(storage), int(step))
    raise UserError(f"--step {step}: write best, newest or a step number")


def _settings(text: str | None) -> StorageConfig | None:
    if text is None:
        return None  # those of the run's config.yaml
    from rechub_dist.config import StorageConfig  # noqa: PLC0415
    from rechub_dist.config.secrets import refuse_secrets  # noqa: PLC0415
    from rechub_dist.config.strict_yaml import parse_yaml  # noqa: PLC0415
    from rechub_dist.typed import validated  # noqa: PLC0415

    tree = parse_yaml(text, "--storage")
    refuse_secrets(tree, "--storage")
    return validated(f"--storage {text}", StorageConfig, tree)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title or None, title_justify="left", show_header=any(columns))
    for name in columns:
        table.add_column(name, overflow="fold", justify="right" if name in _NUMBERS else "left")
    return table


_NUMBERS = ("step", "MB", "ranks", "pieces", "norm", "elements", "largest")


def _progress() -> Progress:
    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()]
    return Progress(*columns, console=Console(stderr=True), transient=True)
