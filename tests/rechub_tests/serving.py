"""Bundles to serve, and servers in processes of their own."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from rechub_dist.data.parquet.outputs import whole_folder
from rechub_dist.inference.bundle.bundle import Bundle
from rechub_dist.inference.bundle.manifest import TABLES, read_manifest, record, write_manifest
from rechub_dist.inference.export import export_bundle
from rechub_tests.runs import SCHEMA, run_file, train, write_data

ITEMS = 61
VARIANTS = 5
TOKEN = "correct horse battery staple"
ARROW = "application/vnd.apache.arrow.stream"


def write_worded(root: Path) -> Path:
    """The small data set with words for items, alone and in lists, and values that may be missing."""
    write_data(root)
    for part in root.glob("*/*.parquet"):
        table = pq.read_table(part)
        words = pa.array([f"item {i}" for i in table["item"].to_pylist()])
        lists = pa.array([[f"item {i}" for i in row] for row in table["history"].to_pylist()], pa.list_(pa.string()))
        for name, column in {"item": words, "history": lists}.items():
            table = table.set_column(table.column_names.index(name), name, column)
        pq.write_table(table, part, row_group_size=70)
    ids = np.random.default_rng(0).permutation(ITEMS)
    pq.write_table(pa.table({"value": [f"item {i}" for i in range(ITEMS)], "id": ids}), root / "_items.parquet")
    schema = {**SCHEMA, "features": {name: dict(feature) for name, feature in SCHEMA["features"].items()}}  # type: ignore[attr-defined]
    schema["features"]["item"] |= {"vocabulary": "_items.parquet"}
    schema["features"]["history"] |= {"vocabulary": "_items.parquet", "out_of_range": "unknown", "missing": "unknown"}
    schema["features"]["age"] |= {"missing": "fill", "fill": 0.5}
    schema["features"]["user"] |= {"missing": "unknown"}
    (root / "dataset.yaml").write_text(yaml.safe_dump(schema, sort_keys=False))
    return root


def make_bundle(folder: Path, data: Path, model: str, /, **sections: Any) -> Path:
    """A bundle of a short run."""
    train(run_file(folder, data, model, **{"train": {"epochs": 1}, **sections}))
    export_bundle(str(folder / "out"), folder / "bundle")
    return folder / "bundle"


def make_bundles(root: Path) -> dict[str, Path]:
    """Bundles by name: `din` with a history and words, `wide` with a cross, `sas`, a recall model; `rows`, a file."""
    data = write_worded(root / "data")
    models = {"din": "DIN", "wide": "WideDeep", "sas": "SASRec"}
    found = {name: make_bundle(root / name, data, model) for name, model in models.items()}
    return {**found, "rows": next((data / "test").glob("*.parquet"))}


def variant(bundle: Path, folder: Path, step: int) -> Path:
    """A bundle with other weights, another vocabulary and another step: what a later export could be."""
    with whole_folder(folder, "bundle", replace=True) as work:
        manifest = read_manifest(bundle)
        for name in manifest.files:
            (work / name).parent.mkdir(exist_ok=True)
            (work / name).write_bytes((bundle / name).read_bytes())
        tables = bytearray((bundle / TABLES).read_bytes())
        first = 8 + int.from_bytes(tables[:8], "little")
        numbers = np.frombuffer(tables, "<f4", offset=first) * np.float32(1 + step / 7)
        tables[first:] = numbers.astype("<f4").tobytes()
        (work / TABLES).write_bytes(tables)
        for file in (work / "_vocabularies").glob("*.parquet"):
            words = pq.read_table(file)
            pq.write_table(words.set_column(1, "id", pa.array(np.roll(words["id"].to_numpy(), step))), file)
        files = {name: record(work / name) for name in manifest.files}
        write_manifest(work, manifest.model_copy(update={"step": step, "files": files}))
    return folder


def label(folder: Path) -> str:
    """How answers name the version of a bundle."""
    manifest = read_manifest(folder)
    return f"{manifest.step}-{manifest.seal[:12]}"


def rows_of(path: Path, bundle: Path, count: int, part: str | None = None) -> list[dict[str, Any]]:
    """Rows with the columns that a bundle reads."""
    found = Bundle(bundle)
    names = found.columns if part is None else found.columns_of(part)
    rows: list[dict[str, Any]] = pq.read_table(path).select(list(names)).slice(0, count).to_pylist()
    return rows


@dataclass
class Server:
    """A server process that listens."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def client(self, token: str | None = None) -> httpx.Client:
        """A client of it, with connections that are kept."""
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def stop(self) -> int:
        """Ask it to stop; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def wait_for(self, text: str) -> None:
        """Until it has said something on stderr."""
        wait_until(lambda: text in self.log.read_text() or self.process.poll() is not None)
        assert text in self.log.read_text(), self.log.read_text()

    def metric(self, name: str, **labels: str) -> float:
        """The value of a metric, 0 if it is not there yet."""
        wanted = {f'{key}="{value}"' for key, value in labels.items()}
        for line in httpx.get(f"{self.url}/metrics", headers={"Authorization": f"Bearer {TOKEN}"}).text.splitlines():
            head, _, value = line.rpartition(" ")
            given, _, rest = head.partition("{")
            if given == name and wanted <= set(rest.rstrip("}").split(",")):
                return float(value)
        return 0.0


@contextmanager
def serving(log: Path, *arguments: str, env: Mapping[str, str] = {}) -> Iterator[Server]:
    """`rechub-dist serve` on any free port, killed in the end."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "rechub_dist", "serve", "--port", "0", *arguments],
            stderr=file, env={**os.environ, **env}, start_new_session=True,
        )  # fmt: skip
    try:
        server = Server(process, "", log)
        server.wait_for("serving at ")
        server.url = log.read_text().rpartition("serving at ")[2].strip().replace("0.0.0.0", "127.0.0.1")
        yield server
    except BaseException as error:
        error.add_note(f"the server said: {log.read_text()[-4000:]}")
        raise
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until(condition: Any, seconds: float = 60) -> None:
    """Until something holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


class Exports:
    """Later exports of a bundle, and what each makes of the same rows."""

    def __init__(self, bundle: Path, rows: list[dict[str, Any]], folder: Path) -> None:
        self.rows, self._base = rows, bundle
        self.folders = [variant(bundle, folder / str(step), step) for step in range(1, VARIANTS + 1)]
        self.labels = [label(one) for one in self.folders]
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        self.scores = {label(one): Bundle(one).score(columns)["predicted_click"] for one in self.folders}
        scores = list(self.scores.values())
        assert min(np.abs(one - two).max() for one, two in itertools.pairwise(scores)) > 1e-3

    def put(self, number: int, target: Path) -> str:
        """Replace a folder as an export does; the version that it then holds."""
        variant(self._base, target, number + 1)
        assert label(target) == self.labels[number]
        return self.labels[number]

    def check(self, answer: httpx.Response) -> str:
        """An answer is wholly of the version that it names."""
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert found["version"] == answer.headers["x-rechub-version"]
        assert str(found["step"]) == found["version"].partition("-")[0]
        wanted = self.scores[found["version"]]
        np.testing.assert_allclose(found["columns"]["predicted_click"], wanted, rtol=1e-5, atol=1e-6)
        return str(found["version"])


@contextmanager
def load(server: Server, exports: Exports, clients: int = 4) -> Iterator[list[str]]:
    """Clients that ask all the time; every answer is checked. Their versions, by the time of the answer."""
    seen: list[str] = []
    failures: list[BaseException] = []
    done = threading.Event()

    def ask() -> None:
        with server.client(TOKEN) as client:
            while not done.is_set():
                try:
                    seen.append(exports.check(client.post("/score", json={"rows": exports.rows})))
                except BaseException as error:
                    failures.append(error)
                    return

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        done.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
