"""Publishing: into one folder by one process, whole or not at all, wherever it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rechub_dist.data.parquet.outputs import MARK
from rechub_dist.errors import UserError
from rechub_dist.inference.bundle.bundle import Bundle
from rechub_dist.inference.bundle.deltas import places, publications, read_state
from rechub_dist.inference.bundle.manifest import check_content, read_manifest
from rechub_dist.inference.export import export_bundle
from rechub_dist.inference.publish import Wanted, publish
from rechub_tests.runs import run_file, train, write_data
from rechub_tests.serving import wait_until


class Stream:
    """A run that goes on by a step whenever it is asked."""

    def __init__(self, folder: Path, **sections: Any) -> None:
        self.folder, self.run, self.step = folder, folder / "out", 0
        self._sections = sections
        write_data(folder / "data")
        tree = yaml.safe_load((folder / "data" / "dataset.yaml").read_text())
        tree["features"]["user"]["rows"] = 40_000  # beside which the graph is small
        (folder / "data" / "dataset.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))

    def go_on(self) -> None:
        self.step += 1
        data, steps = {"batch_size": 8, "valid": None}, {"max_steps": self.step}
        train(run_file(self.folder, self.folder / "data", "DeepFM", data=data, train=steps, **self._sections))


def told(wanted: Wanted) -> list[str]:
    said: list[str] = []
    publish(wanted, said.append)
    return said


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
def test_a_bundle_then_deltas_then_a_bundle(tmp_path: Path) -> None:
    stream, folder = Stream(tmp_path), tmp_path / "published"
    wanted = Wanted(str(stream.run), folder, deltas=2)
    for number in range(1, 8):
        stream.go_on()
        [text] = told(wanted)
        kind = "bundle" if number % 3 == 1 else "delta"
        assert text.startswith(f"{folder}/{number:06d}-{kind}: version {number}-")
        assert [one.number for one in publications(folder)] == list(range(4 if number == 7 else 1, number + 1))
        if number in (1, 3):
            export_bundle(str(stream.run), tmp_path / "full")
            found = Bundle(folder, check=True).manifest
            assert found == read_manifest(tmp_path / "full")
            assert told(wanted) == [f"{folder}: version {found.label} is what was published last"]
    assert names(folder) == ["000004-bundle", "000005-delta", "000006-delta", "000007-bundle", MARK]


@pytest.mark.slow
def test_where_no_delta_can_lead_there_is_a_bundle(tmp_path: Path) -> None:
    stream, folder = Stream(tmp_path), tmp_path / "published"
    stream.go_on()
    told(Wanted(str(stream.run), folder))
    [text] = told(Wanted(str(stream.run), folder, tables="int8"))
    assert "000002-bundle: version 1-" in text
    assert "in full (no delta leads here: table 'user' is 40000 x 6 in fp16, and 40000 x 6 in fp32 in version" in text
    (folder / "000002-bundle" / "score.onnx").unlink()  # nobody can go on from there
    [text] = told(Wanted(str(stream.run), folder, tables="int8"))
    assert "000003-bundle: version 1-" in text
    assert "score.onnx is missing" in text
    assert read_state(folder).base == folder / "000003-bundle"


def test_a_folder_of_somebody_elses_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("one")
    with pytest.raises(UserError, match=r"--to: .*thesis already holds chapter, and is not an output \(publications\)"):
        told(Wanted("nowhere", tmp_path / "thesis"))
    assert names(tmp_path / "thesis") == ["chapter"]


_KILLED = """
import os, shutil, signal, sys
from pathlib import Path
import rechub_dist.inference.publish as module
from rechub_dist.data.parquet.outputs import whole_folder

full, folder = Path(sys.argv[1]), Path(sys.argv[2])

def export(run, out, **_):
    # what it writes is as whole as a real one, without torch
    with whole_folder(out, "bundle", replace=True) as work:
        shutil.copytree(run, work, dirs_exist_ok=True, ignore=shutil.ignore_patterns("_rechub*"))
    return module.read_state(Path(run)).manifest

module.export_bundle = export
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.copyfile", "os.scandir"}

def published(number, last):
    "Publish one of the exports in a process that is killed before what it does last; how that ended."
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        return {0: "done", signal.SIGKILL: "killed"}.get(status, "failed")
    left = last

    def count(event, arguments):
        nonlocal left
        if event in EVENTS and arguments and ("published" in str(arguments[0]) or event in ("os.remove", "os.rmdir")):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    if last:
        sys.addaudithook(count)
    wanted = module.Wanted(str(full / f"full-{number}"), folder, deltas=1)
    try:
        module.publish(wanted, lambda text: None)
    except BaseException as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)

for line in sys.stdin:
    print(published(*map(int, line.split())), flush=True)
"""


@pytest.mark.slow
def test_a_killed_publisher_leaves_what_was_there_or_what_is_new(tmp_path: Path) -> None:
    """Killed before each thing that it does to the folder: the first bundle, deltas, a bundle that removes others."""
    stream, folder = Stream(tmp_path), tmp_path / "published"
    seals = {}
    for number in range(1, 6):
        stream.go_on()
        export_bundle(str(stream.run), tmp_path / f"full-{number}")
        seals[number] = read_manifest(tmp_path / f"full-{number}").seal
    line = [sys.executable, "-c", _KILLED, str(tmp_path), str(folder)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def published(number: int, last: int = 0) -> bool:
            print(number, last, file=process.stdin, flush=True)
            how = process.stdout.readline().strip()  # type: ignore[union-attr]
            assert how in ("done", "killed"), f"step {number}, after one that was killed before {last - 1}"
            return how == "done"

        points = 0
        for number in range(1, 6):
            before = seals.get(number - 1)
            last = 1
            while not published(number, last):
                found = seal_in(folder)
                assert found in (before, seals[number]), f"killed before {last}"
                before = found
                points, last = points + 1, last + 1
            assert published(number)
            assert seal_in(folder) == seals[number]
            assert not [name for name in names(folder) if name.startswith(".")], f"killed before {last}"
        assert points > 100
        process.stdin.close()
    assert names(folder) == ["000003-bundle", "000004-delta", "000005-bundle", MARK]


def seal_in(folder: Path) -> str | None:
    """The seal of what a server finds, whole; None if nothing was published yet."""
    if not publications(folder):
        return None
    state = read_state(folder)
    for path, file in state.records.items():
        check_content(path, file)
    return state.manifest.seal


@pytest.mark.slow
def test_the_command_follows_a_training(tmp_path: Path) -> None:
    stream, folder = Stream(tmp_path), tmp_path / "published"
    line = [sys.executable, "-m", "rechub_dist", "publish", str(stream.run), "--to", str(folder), "--no-check"]

    def follower() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*line, "--every", "0.1"], stdout=(tmp_path / "said").open("a"), stderr=subprocess.STDOUT, text=True
        )

    def published(step: int) -> bool:
        assert process.poll() is None, (tmp_path / "said").read_text()
        base, deltas = places(folder)
        return base != folder and read_state(base, deltas).manifest.step == step

    process = follower()
    try:
        wait_until(lambda: "waiting for a checkpoint" in (tmp_path / "said").read_text(), 300)
        refused = subprocess.run(line, capture_output=True, text=True, check=False)
        assert refused.returncode == 2
        assert f"--to: another process is writing to {folder}: wait until it has ended" in refused.stderr
        for _ in range(3):
            stream.go_on()
            wait_until(lambda: published(stream.step), 300)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        stream.go_on()
        process = follower()
        wait_until(lambda: published(stream.step), 300)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
    assert names(folder) == ["000001-bundle", "000002-delta", "000003-delta", "000004-delta", MARK]
    export_bundle(str(stream.run), tmp_path / "full")
    assert Bundle(folder, check=True).manifest == read_manifest(tmp_path / "full")
