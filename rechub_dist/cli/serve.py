"""The command `rechub-dist serve`."""

from __future__ import annotations

import ipaddress
import os
import re
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rechub_dist.errors import UserError, shown

if TYPE_CHECKING:
    from rechub_dist.inference.bundle.bundle import Bundle

_ACCESS, _LOAD = "Who may", "How much"


def serve(
    bundles: Annotated[
        list[str],
        typer.Argument(
            metavar="FOLDER | NAME=FOLDER...",
            help="Bundles, or folders to `publish` to; the name is else the folder's.",
        ),
    ],
    address: Annotated[
        str, typer.Option(help="Address of this host to listen on.", rich_help_panel=_ACCESS)
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any free one.", rich_help_panel=_ACCESS)] = 8000,
    token_env: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Environment variable with the token to ask for.", rich_help_panel=_ACCESS),
    ] = None,
    no_token: Annotated[
        bool, typer.Option("--no-token", help="Ask for none on other addresses than loopback.", rich_help_panel=_ACCESS)
    ] = False,
    watch: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=0.1, help="Reload folders that were replaced or published to."),
    ] = None,
    shadow: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FOLDER", help="Bundle that gets NAME's requests too, to be compared; repeatable."),
    ] = None,
    index: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FOLDER", help="Index that NAME's `retrieve` searches; repeatable."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Compare tables with their checksums, which reads them whole.")
    ] = True,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads that score; default: one a core.", rich_help_panel=_LOAD)
    ] = None,
    batch_rows: Annotated[int, typer.Option(min=1, help="Rows scored at once.", rich_help_panel=_LOAD)] = 1024,
    batch_wait_ms: Annotated[
        float, typer.Option(min=0, max=1000, help="How long a batch waits to be full.", rich_help_panel=_LOAD)
    ] = 0.0,
    deadline_ms: Annotated[
        float | None,
        typer.Option(min=1, help="Time a request may take, else it gets 504; default: any.", rich_help_panel=_LOAD),
    ] = None,
    queue: Annotated[
        int, typer.Option(min=1, help="Requests in the server at once; others get 503.", rich_help_panel=_LOAD)
    ] = 256,
    max_rows: Annotated[int, typer.Option(min=1, help="Rows of one request.", rich_help_panel=_LOAD)] = 4096,
    max_mb: Annotated[int, typer.Option(min=1, max=1024, help="MiB of one request.", rich_help_panel=_LOAD)] = 16,
    grace: Annotated[int, typer.Option(min=1, help="Seconds between SIGTERM and the end.", rich_help_panel=_LOAD)] = 30,
) -> None:
    """Serve bundles over HTTP: scores, items and vectors of rows, as JSON or Arrow.

    A folder that a later export has replaced is opened anew on SIGHUP, POST /admin/reload or by --watch; no request
    fails meanwhile. See docs/serving.md.

    Example: rechub-dist serve ctr=bundles/deepfm recall=bundles/sasrec --port 8000 --watch 5
    """
    for name in ("fastapi", "uvicorn", "httptools", "onnxruntime"):
        if find_spec(name) is None:
            raise UserError(f"serve needs the package {name}: pip install 'rechub-dist[serve]'")
    found = _named(bundles, "BUNDLE")
    shadows = _named(shadow or [], "--shadow", name_needed=True)
    for name in shadows:
        if name not in found:
            raise UserError(f"--shadow: {name} is no bundle that is served; they are {', '.join(found)}")
    indexes = _indexes(index or [], found)
    loopback = _is_loopback(address)
    token = _token(token_env)
    if not loopback and token is None and not no_token:
        raise UserError(
            f"--address: {address} can be reached by others; name a variable with a token, --token-env NAME, or say "
            "--no-token"
        )
    from rechub_dist.inference.bundle.bundle import Bundle  # noqa: PLC0415 - --help is quick
    from rechub_dist.inference.server.run import serve as run  # noqa: PLC0415
    from rechub_dist.inference.server.serving import Serving  # noqa: PLC0415
    from rechub_dist.inference.server.settings import MIB, Settings  # noqa: PLC0415
    from rechub_dist.inference.server.versions import Served  # noqa: PLC0415

    cores = len(os.sched_getaffinity(0))
    defaults = Settings()
    settings = Settings(
        address=address, port=port, token=token,
        trusted_hosts=(*defaults.trusted_hosts, address, f"[{address}]") if loopback else (),
        threads=threads or cores, batch_rows=batch_rows, batch_wait=batch_wait_ms / 1000, queue=queue,
        memory=max(defaults.memory, 2 * max_mb * MIB), max_rows=max_rows, max_bytes=max_mb * MIB, watch=watch,
        grace=grace, deadline=None if deadline_ms is None else deadline_ms / 1000,
    )  # fmt: skip

    former: dict[Path, Bundle] = {}

    def opened(folder: Path) -> Bundle:
        # many requests at once, each by one thread
        former[folder] = Bundle(folder, threads=1, check=check, former=former.get(folder))
        return former[folder]

    served = [Served(name, folder, opened, max_rows, indexes.get(name)) for name, folder in found.items()]
    beside = {name: Served(f"{name}.shadow", folder, opened, max_rows) for name, folder in shadows.items()}
    for one in (*served, *beside.values()):
        manifest = one.current.manifest
        print(f"{one.name}: {manifest.model}, step {manifest.step}, version {one.current.label}", file=sys.stderr)
        if one.name in indexes and manifest.kind != "recall":
            raise UserError(f"--index: {one.name} is of {manifest.model}, which is no recall model: leave it out")
        if one.current.unindexed is not None:
            print(f"{one.name}: {one.current.unindexed}; search is exact", file=sys.stderr)
    run(Serving(served, beside, settings), lambda where: print(f"serving at {where}", file=sys.stderr, flush=True))


def _named(arguments: list[str], where: str, *, name_needed: bool = False) -> dict[str, Path]:
    """Folders by name. Raises UserError for a name that cannot be, or one that is given twice."""
    found: dict[str, Path] = {}
    for argument in arguments:
        name, separator, folder = argument.partition("=")
        if not separator:
            if name_needed:
                raise UserError(f"{where}: write NAME=FOLDER, got {shown(argument)}")
            name, folder = Path(argument).resolve().name, argument
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) or not folder:
            raise UserError(f"{where}: {shown(name)} is no name for a bundle (letters, digits, _, -, .): NAME=FOLDER")
        if name in found:
            raise UserError(f"{where}: two are named {name}; name them apart: NAME=FOLDER")
        found[name] = Path(folder)
    return found


def _indexes(arguments: list[str], served: Iterable[str]) -> dict[str, Path]:
    """Folders of indexes by bundle. Raises UserError where there is none, or no such bundle."""
    found = _named(arguments, "--index", name_needed=True)
    if not found:
        return {}
    from rechub_dist.inference.bundle.index import faiss_module, read_index_manifest  # noqa: PLC0415

    faiss_module()
    for name, folder in found.items():
        if name not in served:
            raise UserError(f"--index: {name} is no bundle that is served; they are {', '.join(served)}")
        read_index_manifest(folder)
    return found


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        if address == "localhost":
            return True
        raise UserError(f"--address: {shown(address)} is no address; 0.0.0.0 is every one of this host") from None


def _token(variable: str | None) -> str | None:
    if variable is None:
        return None
    token = os.environ.get(variable, "").strip()
    if not token:
        raise UserError(f"--token-env: the environment variable {variable} is not set, or empty; put the token there")
    return token
