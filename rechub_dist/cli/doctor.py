"""The command `rechub-dist doctor`."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from rechub_dist import __version__
from rechub_dist.builds import require_builds, versions
from rechub_dist.distributed.host import SHARED, free_memory, host_memory
from rechub_dist.errors import UserError, one_line
from rechub_dist.launching.ports import RENDEZVOUS

if TYPE_CHECKING:
    from rechub_dist.config.data import Selection, StorageConfig

State = Literal["ok", "note", "fault"]
_STYLE: Final = {"ok": "green", "note": "yellow", "fault": "red"}
_PYTHONS: Final = ((3, 11), (3, 13))

# What an extra is for, and the modules that it brings.
FEATURES: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "ray": ("rechub-dist ray", ("ray",)),
    "export": ("rechub-dist export", ("onnx", "onnxscript", "onnxruntime")),
    "index": ("rechub-dist index, and retrieve by one", ("faiss",)),
    "serve": ("rechub-dist serve", ("fastapi", "uvicorn", "onnxruntime")),
}


@dataclass(frozen=True)
class Finding:
    """What was found of one thing.

    Attributes:
        state: `fault`: training, or what was asked for, fails; `note`: something else does, or will.
        area: what it belongs to.
        text: what was found.
        fix: what to do about it, if anything.
    """

    state: State
    area: str
    text: str
    fix: str = ""


def doctor(
    run_file: Annotated[
        Path | None, typer.Argument(metavar="[RUN.yaml]", help="A run that is to work here: its data and its output.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH | ADDRESS", help="Data to be read: is it there, and can it be? Repeatable."),
    ] = None,
    out: Annotated[
        list[Path] | None, typer.Option(metavar="FOLDER", help="Where runs are to write: can they? Repeatable.")
    ] = None,
    rdzv: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="The rendezvous of several hosts: how is it reached?")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Look at what is installed, at this host and its network, and say what is missing for what, with the fix.

    Exits with 1 if training would fail here.

    Example: rechub-dist doctor --data s3://bucket/data/train --out runs --rdzv host0:29400
    """
    found = [*look(), *(() if run_file is None else of_run(run_file))]
    found += [*(at_data(one) for one in data or []), *(at_output(one) for one in out or [])]
    found += [] if rdzv is None else [at_rendezvous(rdzv)]
    if as_json:
        for one in found:
            print(json.dumps(asdict(one)))
    else:
        _show(Console(), found)
    if any(one.state == "fault" for one in found):
        raise typer.Exit(1)


def look() -> Iterator[Finding]:
    """All that needs no argument."""
    yield of_python()
    yield of_builds()
    yield from of_devices()
    yield of_memory()
    yield from of_limits()
    yield from of_network()
    yield from of_features(lambda name: importlib.util.find_spec(name) is not None)


def of_python() -> Finding:
    """The interpreter."""
    first, last = (".".join(map(str, one)) for one in _PYTHONS)
    text = f"Python {platform.python_version()}, rechub-dist {__version__}, {platform.system()} {platform.machine()}"
    if sys.platform != "linux":
        return Finding("fault", "versions", text, "torchrec and fbgemm are built for Linux")
    if not _PYTHONS[0] <= sys.version_info[:2] <= _PYTHONS[1]:
        return Finding("note", "versions", text, f"tested with {first} to {last}")
    return Finding("ok", "versions", text)


def of_builds() -> Finding:
    """torch, torchrec and fbgemm: whether they match, and can be imported."""
    text = ", ".join(f"{name} {found}" for name, found in versions().items()) or "no torch"
    try:
        require_builds()
    except UserError as error:
        return Finding("fault", "versions", text, str(error))
    for name in ("torch", "fbgemm_gpu", "torchrec"):
        try:
            importlib.import_module(name)
        except (ImportError, OSError) as error:  # OSError: a shared library of theirs
            return Finding("fault", "versions", f"{name} cannot be imported: {one_line(error)}", f"reinstall {name}")
    return Finding("ok", "versions", f"{text}: they match, and can be imported")


def of_devices() -> Iterator[Finding]:
    """Processors and GPUs."""
    cores = len(os.sched_getaffinity(0))
    yield Finding("ok", "devices", f"{cores} CPU core(s) for this process, of {os.cpu_count()}{_threads()}")
    try:
        import torch  # noqa: PLC0415 - slow to import
    except (ImportError, OSError):
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for number in range(count):
        device: Any = torch.cuda.get_device_properties(number)
        yield Finding("ok", "devices", f"GPU {number}: {device.name}, {_gb(device.total_memory)}")
    if not count and Path("/dev/nvidiactl").exists():
        built = "is a build for CPUs" if torch.version.cuda is None else f"finds none ({_why_no_gpu(torch)})"
        fix = "pip install 'rechub-dist[cuda]' in a new environment; see nvidia-smi for the driver"
        yield Finding("fault", "devices", f"this host has GPUs, and torch {torch.__version__} {built}", fix)
    elif not count:
        yield Finding("ok", "devices", "no GPU: training runs on the CPU, over gloo")


def of_memory() -> Finding:
    """Memory of the host, or of the container."""
    size, machine = host_memory(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    text = f"{_gb(size)} of memory, {_gb(free_memory())} of it free"
    if size < machine:
        text += f"; a limit of its control group: the machine has {_gb(machine)}"
    if size < 2 << 30:
        return Finding("note", "memory", text, "a rank takes about 1 GB before its tables; give it more")
    return Finding("ok", "memory", text)


def of_limits() -> Iterator[Finding]:
    """Open files and shared memory."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    many = hard == resource.RLIM_INFINITY or hard >= 4096
    fix = "" if many else "ulimit -Hn 65536, LimitNOFILE=, docker run --ulimit nofile=65536"
    yield Finding("ok" if many else "note", "limits", f"{hard} open files a process", fix)
    with suppress(OSError):
        found = os.statvfs("/dev/shm")
        size = found.f_blocks * found.f_frsize
        enough = size >= SHARED
        fix = "" if enough else "several GPUs of a host need it: docker --shm-size 1g, k8s render --shared-memory 1Gi"
        yield Finding("ok" if enough else "note", "limits", f"{_gb(size)} of shared memory (/dev/shm)", fix)


def of_network() -> Iterator[Finding]:
    """What other hosts would reach this one by."""
    name, families = socket.gethostname(), {socket.AF_INET: "IPv4", socket.AF_INET6: "IPv6"}
    try:
        addresses = sorted({str(found[4][0]) for found in socket.getaddrinfo(name, None) if found[0] in families})
    except OSError:
        yield Finding("note", "network", f"the host's name {name!r} does not resolve", "several hosts: give --rdzv one")
    else:
        local = all(one.startswith("127.") or one == "::1" for one in addresses)
        text = f"the host's name {name!r} is {', '.join(addresses)}"
        fix = "several hosts: other hosts must not use that name, but one or an address that they reach"
        yield Finding("note" if local else "ok", "network", text, fix if local else "")
    others = [found for _, found in socket.if_nameindex() if found != "lo"]
    yield Finding("ok", "network", f"interfaces besides loopback: {', '.join(others) or 'none'}{_chosen()}")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", RENDEZVOUS))
        except OSError as error:
            fix = "only for runs on several hosts: choose another port in --rdzv, or stop what listens there"
            yield Finding("note", "network", f"port {RENDEZVOUS} (the rendezvous): {error.strerror}", fix)
    if "WORLD_SIZE" in os.environ and "MASTER_ADDR" not in os.environ:
        fix = "unset WORLD_SIZE, or start by torchrun"
        yield Finding("fault", "network", "WORLD_SIZE is set in the environment, and MASTER_ADDR is not", fix)


def of_features(importable: Callable[[str], bool]) -> Iterator[Finding]:
    """Packages that only some commands need."""
    for extra, (use, modules) in FEATURES.items():
        missing = [name for name in modules if not importable(name)]
        if missing:
            fix = f"pip install 'rechub-dist[{extra}]'"
            yield Finding("note", "features", f"{use}: {', '.join(missing)} not installed", fix)
        else:
            yield Finding("ok", "features", use)


def of_run(path: Path) -> Iterator[Finding]:
    """What a run file names: its data and its output folder."""
    from rechub_dist.assembly.readers import below_root  # noqa: PLC0415 - slow to import
    from rechub_dist.data.run_file import load_run  # noqa: PLC0415

    try:
        config = load_run(path, [])
    except UserError as error:
        yield Finding("fault", "run file", str(path), str(error))
        return
    yield Finding("ok", "run file", f"{path}: {config.model.name}")
    data = config.data
    train = [data.train] if data.mix is None else [source.path for source in data.mix]
    for split in (*train, data.valid, data.test):
        for source in () if split is None else below_root(config, split):
            yield at_data(source, data.storage)
    yield at_output(config.output_dir)


def at_data(source: str | Selection, storage: StorageConfig | None = None) -> Finding:
    """Data at a path or address, or a selection of its rows: its footers are read, as training reads them."""
    from rechub_dist.config.data import StorageConfig  # noqa: PLC0415 - slow to import
    from rechub_dist.data.parquet.manifest import Manifest  # noqa: PLC0415

    address = source if isinstance(source, str) else source.path
    try:
        found = Manifest.read(source, storage or StorageConfig())
    except UserError as error:
        return Finding("fault", "data", f"{address} cannot be read", str(error))
    return Finding("ok", "data", f"{address}: {found.rows:,} rows in {len(found.files):,} files")


def at_output(folder: Path) -> Finding:
    """A folder that runs write to, or its nearest that exists."""
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    if not there.is_dir():
        return Finding("fault", "output", f"{folder}: {there} is a file", "choose another folder")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        text = f"{folder}: user {os.getuid()} cannot write in {there}: {error.strerror}"
        return Finding("fault", "output", text, "chown or chmod it, or choose another folder")
    return Finding("ok", "output", f"{folder}: can be written, {_gb(shutil.disk_usage(there).free)} free")


def at_rendezvous(address: str) -> Finding:
    """The rendezvous of several hosts, from here."""
    from rechub_dist.launching.rendezvous import interface, is_here, listens, parse_address  # noqa: PLC0415 - torch

    try:
        host, port = parse_address(address)
        name, own = interface(host, port, others=True)
        way = f"by {name or 'an unknown interface'}, from {own or 'an unknown address'}"
        if listens(host, port):
            return Finding("ok", "rendezvous", f"{address}: a store listens; reached {way}")
        if is_here(host, port):
            return Finding("ok", "rendezvous", f"{address}: is this host, which will hold the store; others see {own}")
    except UserError as error:
        return Finding("fault", "rendezvous", address, str(error))
    fix = "right as long as no host has started; else check its name, port and firewall"
    return Finding("note", "rendezvous", f"{address}: nothing listens; reached {way}", fix)


def _show(console: Console, found: list[Finding]) -> None:
    table = Table(Column(""), Column(""), Column("", overflow="fold"), box=None, show_header=False, pad_edge=False)
    area = ""
    for one in found:
        text = escape(one.text) + (f"\n[bold]{escape(one.fix)}[/bold]" if one.fix else "")
        table.add_row(f"[{_STYLE[one.state]}]{one.state}[/]", "" if one.area == area else one.area, text)
        area = one.area
    console.print(table)


def _threads() -> str:
    given = os.environ.get("OMP_NUM_THREADS")
    return "" if given is None else f"; OMP_NUM_THREADS={given}"


def _chosen() -> str:
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    given = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    return f"; {', '.join(given)}" if given else ""


def _why_no_gpu(torch: Any) -> str:
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return one_line(error)
    return "none is visible: CUDA_VISIBLE_DEVICES"


def _gb(size: float) -> str:
    return f"{size / (1 << 30):.3g} GB"
