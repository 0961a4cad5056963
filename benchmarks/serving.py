"""What a served bundle takes for a request, beside other scorers of such a model behind the same server, in one run.

    python benchmarks/serving.py
    python benchmarks/serving.py --rounds 9 --requests 400 --rechub PYTHON_THAT_HAS_TORCH_RECHUB

The model is a DIN with ten sparse features, four dense ones, a target item and a history of at most 20, tables of
100,000 rows of width 16 and layers of 200 and 80, briefly trained. The servers run at once, of the same code, with the
same settings and one thread a core: `bundle` is `rechub-dist serve`; `torch` answers with the trained run in this
package's own torch modules (`rechub_dist.load`), which gets its rows by the same conversion; `torch-rechub`, with
`--rechub`, is a DIN of torch-rechub of the same sizes, exported by its own exporter, with its tables, to ONNX, and run
by onnxruntime. A request is a user with 1, 16 or 200 candidates, as JSON; the client, in a process of its own, keeps
its connections.

Not counted for `torch-rechub`, whose inputs are ids: that values become ids (here they are the same numbers), that
missing ones are told from others, and the four dense features, for which its DIN has no room. Histories are padded,
and the user's columns repeated for each candidate, since its graph takes whole rows.

Reported are the median and the 99th percentile of the time of a request when one client asks at a time, and requests a
second when eight do. Rounds are interleaved, and the order in a round turns, so that what else the machine does hits
both alike; the figures are the medians of the rounds, the ratio is the median of the rounds' ratios. Before anything is
measured, `bundle` and `torch` must answer the same; `torch-rechub` has weights of its own.
"""

from __future__ import annotations

import http.client
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer
import yaml
from rich.console import Console
from rich.table import Table as Screen

CANDIDATES = (1, 16, 200)
CLIENTS = 8
PATH = "/bundles/ctr/score"
MODEL = {
    "name": "DIN", "features": [*(f"sparse_{i}" for i in range(10)), *(f"dense_{i}" for i in range(4))],
    "behavior_features": ["history"], "target_features": ["item"], "attention_units": [64, 16],
    "hidden_units": [200, 80],
}  # fmt: skip


class OtherScorer:
    """Answers with something else; the rest is the bundle's."""

    def __init__(self, folder: Path, predict: Callable[[pa.Table], pa.Table]) -> None:
        from rechub_dist.inference.bundle.bundle import Bundle  # noqa: PLC0415

        bundle = Bundle(folder, threads=1)
        self.folder, self.manifest, self.spec, self._predict = folder, bundle.manifest, bundle.spec, predict

    def score(self, rows: pa.Table) -> pa.Table:
        """The predictions."""
        return self._predict(rows)

    def score_candidates(self, user: pa.Table, candidates: pa.Table) -> pa.Table:
        """The same, of the user's columns repeated."""
        index = pa.array(np.zeros(candidates.num_rows, np.int64))
        for name in user.column_names:
            candidates = candidates.append_column(name, user[name].take(index))
        return self._predict(candidates)

    def retrieve(self, users: Any, k: int = 10, *, where: str | None = None) -> Any:
        """Of recall models alone."""
        raise NotImplementedError

    def vectors(self, side: str, rows: Any) -> Any:
        """Of recall models alone."""
        raise NotImplementedError

    def use_index(self, index: Path) -> Any:
        """Of recall models alone."""
        raise NotImplementedError


def serve_torch(output_dir: str, bundle: Path) -> None:
    """Serve a run as `rechub-dist serve` serves its bundle."""
    import torch  # noqa: PLC0415

    import rechub_dist  # noqa: PLC0415

    torch.set_num_threads(1)  # as the bundle's: many requests at once, each by one thread
    serve_other(bundle, rechub_dist.load(output_dir).predict)


def serve_rechub(graph: str, bundle: Path) -> None:
    """Serve a graph that torch-rechub has exported."""
    import onnxruntime  # noqa: PLC0415

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def predict(rows: pa.Table) -> pa.Table:
        columns = {name: rows[name].combine_chunks() for name in names}
        inputs = {n: padded(c) if pa.types.is_list(c.type) else c.to_numpy() for n, c in columns.items()}
        return pa.table({"predicted_label_0": session.run(None, inputs)[0]})

    serve_other(bundle, predict)


def padded(lists: pa.ListArray, length: int = 20) -> np.ndarray:
    """The last ids of each row, padded with zeros, int64 [B, length]."""
    counts = np.diff(lists.offsets.to_numpy())
    ids = np.zeros((len(lists), length), np.int64)
    place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    skipped = np.repeat(np.maximum(counts - length, 0), counts)
    kept = place >= skipped
    ids[np.repeat(np.arange(len(lists)), counts)[kept], (place - skipped)[kept]] = lists.flatten().to_numpy()[kept]
    return ids


def serve_other(bundle: Path, predict: Callable[[pa.Table], pa.Table]) -> None:
    """Serve something else as `rechub-dist serve` serves a bundle."""
    from rechub_dist.inference.server.run import serve  # noqa: PLC0415
    from rechub_dist.inference.server.serving import Serving  # noqa: PLC0415
    from rechub_dist.inference.server.settings import Settings  # noqa: PLC0415
    from rechub_dist.inference.server.versions import Served  # noqa: PLC0415

    settings = Settings(port=0, threads=len(os.sched_getaffinity(0)))
    served = Served("ctr", bundle, lambda folder: OtherScorer(folder, predict), settings.max_rows)
    serve(Serving([served], {}, settings), lambda where: print(f"serving at {where}", file=sys.stderr, flush=True))


def prepare(root: Path) -> None:
    """Data, a briefly trained run, and its bundle."""

    def command(*arguments: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "rechub_dist", *arguments], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(done.stderr)

    size = ("--rows", "40000", "--sequence", "--dense", "4", "--sparse", "10", "--vocabulary", "100000")
    command("data", "synthesize", "--out", str(root / "data"), *size)
    run = {
        "output_dir": str(root / "run"), "data": {"root": str(root / "data"), "batch_size": 1024},
        "model": MODEL, "embedding": {"dim": 16},
        "train": {"epochs": 1},
    }  # fmt: skip
    (root / "run.yaml").write_text(yaml.safe_dump(run))
    command("train", str(root / "run.yaml"))
    command("export", str(root / "run"), "--out", str(root / "bundle"))


@contextmanager
def server(log: Path, line: list[str]) -> Iterator[tuple[int, int]]:
    """A server's port and process."""
    with log.open("wb") as file:
        process = subprocess.Popen([sys.executable, *line], stderr=file)
    try:
        while "serving at" not in log.read_text():
            if process.poll() is not None:
                raise SystemExit(log.read_text())
            time.sleep(0.05)
        yield int(log.read_text().strip().rpartition(":")[2]), process.pid
    finally:
        process.terminate()
        process.wait()


def bodies(rows: pa.Table, candidates: int) -> list[bytes]:
    """Requests of different users."""
    of_candidate = ["item", "sparse_0", "sparse_1"]
    of_user = [name for name in rows.column_names if name not in of_candidate and not name.startswith("label")]
    found = []
    for user in range(50):
        asked = rows.select(of_candidate).slice(50 + 200 * (user % 4), candidates).to_pylist()
        found.append(
            json.dumps({"user": rows.select(of_user).slice(user, 1).to_pylist()[0], "candidates": asked}).encode()
        )
    return found


def ask(connection: http.client.HTTPConnection, body: bytes) -> bytes:
    """One request."""
    connection.request("POST", PATH, body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    found = answer.read()
    if answer.status != 200:
        raise SystemExit(f"{answer.status}: {found.decode()}")
    return found


@dataclass
class Figures:
    """Of one scorer and one number of candidates: milliseconds, requests a second, and the server's CPU per request."""

    p50: float
    p99: float
    rate: float
    cpu: float


def measure(port: int, pid: int, requests: list[bytes], count: int) -> Figures:
    """One round."""
    connection, times, before = http.client.HTTPConnection("127.0.0.1", port), [], cpu_seconds(pid)
    for number in range(count):
        began = time.perf_counter()
        ask(connection, requests[number % len(requests)])
        times.append(1000 * (time.perf_counter() - began))
    connection.close()

    def client(first: int) -> None:
        own = http.client.HTTPConnection("127.0.0.1", port)
        for number in range(first, count, CLIENTS):
            ask(own, requests[number % len(requests)])
        own.close()

    threads = [threading.Thread(target=client, args=(first,)) for first in range(CLIENTS)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rate = count / (time.perf_counter() - began)
    cpu = 1000 * (cpu_seconds(pid) - before) / (2 * count)
    return Figures(statistics.median(times), float(np.percentile(times, 99)), rate, cpu)


def cpu_seconds(pid: int) -> float:
    """What a process has computed so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main(
    rounds: Annotated[int, typer.Option(help="Rounds.")] = 7,
    requests: Annotated[int, typer.Option(help="Requests a measurement.")] = 200,
    folder: Annotated[Path | None, typer.Option(help="To keep data, run and bundle in.")] = None,
    rechub: Annotated[
        Path | None, typer.Option(help="Python that has torch-rechub and onnx: measures its own export, too.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures of all rounds to a file.")] = None,
) -> None:
    """Measure them, and print the table."""
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        root = folder or Path(scratch)
        if not (root / "bundle").exists():
            root.mkdir(parents=True, exist_ok=True)
            prepare(root)
        torch = [__file__, "serve-torch", str(root / "run"), str(root / "bundle")]
        bundle = ["-m", "rechub_dist", "serve", f"ctr={root / 'bundle'}", "--port", "0"]
        lines = {"bundle": bundle, "torch": torch}
        if rechub is not None:
            graph = root / "rechub.onnx"
            if not graph.exists():
                script = Path(__file__).with_name("serving_rechub.py")
                subprocess.run([rechub, script, graph], check=True, capture_output=True)
            lines["torch-rechub"] = [__file__, "serve-rechub", str(graph), str(root / "bundle")]
        ports = {n: stack.enter_context(server(root / f"{n}.log", line)) for n, line in lines.items()}
        rows = pq.read_table(root / "data" / "test")
        asked = {size: bodies(rows, size) for size in CANDIDATES}
        for size, wanted in asked.items():
            for body in wanted[:5]:
                one, other = (
                    json.loads(ask(http.client.HTTPConnection("127.0.0.1", port), body))["columns"]
                    for port, _ in (ports["bundle"], ports["torch"])
                )
                for name, values in one.items():
                    assert len(values) == size
                    np.testing.assert_allclose(values, other[name], rtol=1e-4, atol=1e-5)
        found: dict[tuple[int, str], list[Figures]] = {}
        for number in range(rounds + 1):  # the first warms up
            for size, wanted in asked.items():
                names = [*ports][number % len(ports) :] + [*ports][: number % len(ports)]
                for name in names:
                    figures = measure(*ports[name], wanted, requests)
                    if number:
                        found.setdefault((size, name), []).append(figures)
    if json_file is not None:
        keys = [each.name for each in fields(Figures)]
        rows_of = [
            {"candidates": size, "scorer": name, **{key: [getattr(one, key) for one in rounds_of] for key in keys}}
            for (size, name), rounds_of in found.items()
        ]
        json_file.write_text(json.dumps(rows_of), encoding="utf-8")
    show(found)


def show(found: dict[tuple[int, str], list[Figures]]) -> None:
    """Print the table."""
    cores = len(os.sched_getaffinity(0))
    model = next(
        (x.partition(":")[2].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
    )
    load = " ".join(f"{x:.1f}" for x in os.getloadavg())
    title = f"{cores} cores, {model or platform.processor()}, Python {platform.python_version()}, load average {load}"
    screen = Screen(title=title)
    for heading in (
        "candidates",
        "scorer",
        "p50 ms",
        "p99 ms",
        "requests/s",
        "cpu ms",
        "p50 ratio",
        "rate ratio",
        "cpu ratio",
    ):
        screen.add_column(heading, justify="right")
    for (size, name), rounds in found.items():
        ours = found[size, "bundle"]
        medians = [statistics.median(getattr(one, key) for one in rounds) for key in ("p50", "p99", "rate", "cpu")]
        ratios = [
            statistics.median(getattr(a, key) / getattr(b, key) for a, b in zip(rounds, ours, strict=True))
            for key in ("p50", "rate", "cpu")
        ]
        screen.add_row(
            str(size),
            name,
            *(f"{x:.2f}" for x in medians[:2]),
            f"{medians[2]:.0f}",
            f"{medians[3]:.2f}",
            *(f"{x:.2f}" for x in ratios),
        )
    Console(width=120).print(screen)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve-torch"]:
        serve_torch(sys.argv[2], Path(sys.argv[3]))
    elif sys.argv[1:2] == ["serve-rechub"]:
        serve_rechub(sys.argv[2], Path(sys.argv[3]))
    else:
        typer.run(main)
