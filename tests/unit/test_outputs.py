"""Outputs: what may be written over, and what is refused with everything left as it was."""

import os
import shutil
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from rechub_dist.config import StorageConfig
from rechub_dist.data.parquet import outputs
from rechub_dist.data.parquet.outputs import MARK, claim, scratch_folder, whole_file, whole_folder
from rechub_dist.data.parquet.overlap import refuse_overlap
from rechub_dist.data.parquet.storage import locate
from rechub_dist.errors import UserError

SETTINGS = StorageConfig()


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write(path: Path, text: str = "mine") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("out", "source", "how"),
    [
        ("data/train", "data/train", "is the input"),
        ("data/train/../train/", "data/train", "is the input"),
        ("data", "data/train", "holds the input"),
        ("data", "data/train/part.parquet", "holds the input"),
        ("data/train/part.parquet", "data/train/part.parquet", "is the input"),
        ("data/train/new.parquet", "data/train", "lies in the input"),
        ("data/train/out", "data", "lies in the input"),
        ("link", "data/train", "is the input"),
        ("link/out", "data/train", "lies in the input"),
        ("data/train", "link", "is the input"),
        ("data/train/out", "link", "lies in the input"),
        ("data/day=3", "data/day=*", "lies in the input"),
        ("data", "data/day=*/*.parquet", "may hold the input"),
        ("data/day=3", "data/*/part-*.parquet", "may hold the input"),
        ("data/x/y", "data/**", "lies in the input"),
        ("file://{here}/data/train", "data/train", "is the input"),
        ("s3://bucket/data/train", "s3a://bucket/data/train/?region=x", "is the input"),
        ("s3://bucket/data", "s3://bucket/data/train", "holds the input"),
        ("gs://bucket/data/out", "gs://bucket/./data", "lies in the input"),
        ("abfs://box@account.dfs.core.windows.net/data/out", "abfss://box/data", "lies in the input"),
        ("memory://data/out", "memory://data", "lies in the input"),
    ],
)
def test_an_output_that_meets_an_input_is_refused(
    out: str, source: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data/train/part.parquet")
    (tmp_path / "link").symlink_to("data/train")
    with pytest.raises(UserError, match=how):
        refuse_overlap(out.format(here=tmp_path), [source])


@pytest.mark.parametrize(
    ("out", "source"),
    [
        ("data/out", "data/train"),
        ("data/train2", "data/train"),
        ("data/_words/city.parquet", "data"),
        ("data/predicted", "data/day=*"),
        ("data/day=3", "data/day=[12]"),
        ("s3://bucket/out", "s3://bucket/data"),
        ("s3://other/data/out", "s3://bucket/data"),
        ("s3://data/train", "gs://data/train"),
        ("/data", "s3://data"),
    ],
)
def test_an_output_beside_the_input_is_fine(
    out: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data/train/part.parquet")
    refuse_overlap(out, [source])


def test_a_path_that_is_there_is_no_pattern(tmp_path: Path) -> None:
    write(tmp_path / "data [1]/part.parquet")
    with pytest.raises(UserError, match="lies in the input"):
        refuse_overlap(str(tmp_path / "data [1]/out"), [str(tmp_path / "data [1]")])
    refuse_overlap(str(tmp_path / "data 1/out"), [str(tmp_path / "data [1]")])


@pytest.fixture(params=["local", "fsspec"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "out") if request.param == "local" else f"memory://{uuid.uuid4().hex}/out"


def names(address: str) -> list[str]:
    store, inside = locate(address, SETTINGS)
    from pyarrow.fs import FileSelector  # noqa: PLC0415

    return sorted(entry.base_name for entry in store.filesystem.get_file_info(FileSelector(inside)))


def put(address: str, name: str) -> None:
    store, inside = locate(address, SETTINGS)
    store.filesystem.create_dir(inside, recursive=True)
    with store.filesystem.open_output_stream(f"{inside}/{name}") as sink:
        sink.write(b"x")


def test_a_claimed_folder_is_cleared_of_its_own_files(address: str) -> None:
    claim(address, "predictions", ["part-0", "part-1"])
    assert names(address) == [MARK]
    put(address, "part-0")
    put(address, "part-1")
    claim(address, "predictions", ["part-0"])
    assert names(address) == [MARK]


@pytest.mark.parametrize("foreign", ["part-1", "_SUCCESS", "notes.txt"])
def test_a_folder_with_anything_else_is_not_claimed(address: str, foreign: str) -> None:
    claim(address, "predictions", ["part-0"])
    put(address, "part-0")
    put(address, foreign)
    with pytest.raises(UserError, match=f"already holds {foreign}"):
        claim(address, "predictions", ["part-0", "part-1"])
    assert names(address) == sorted([MARK, "part-0", foreign])


def test_a_folder_of_another_kind_or_without_a_mark_is_not_claimed(address: str) -> None:
    put(address, "part-0")
    with pytest.raises(UserError, match="already holds part-0"):
        claim(address, "predictions", ["part-0"])
    put(address, MARK)  # which says nothing
    with pytest.raises(UserError, match="already"):
        claim(address, "predictions", ["part-0"])
    assert names(address) == sorted([MARK, "part-0"])


def test_a_file_is_not_claimed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a file"):
        claim(str(write(tmp_path / "out")), "predictions", [])


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with whole_folder(out, "rows") as work:
        write(work / "train/part-0", "a")
        assert not out.exists()
    assert set(tree(out)) == {MARK, "train/part-0"}
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "other", "rows") as work:
        raise ZeroDivisionError(write(work / "part-0"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_earlier_output_is_replaced_where_that_is_wanted(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "link").symlink_to(out)
    for text in ("first", "second"):
        with whole_folder(tmp_path / "link", "rows", replace=True) as work:
            write(work / "part-0", text)
    assert (out / "part-0").read_text() == "second"
    assert (tmp_path / "link").is_symlink()
    with pytest.raises(UserError, match="already holds part-0"), whole_folder(out, "rows"):
        pass
    with pytest.raises(UserError, match="already holds part-0"), whole_folder(out, "others", replace=True):
        pass


@pytest.mark.parametrize("case", ["changed", "added", "link", "unmarked"])
def test_what_a_user_has_put_into_an_output_stays(tmp_path: Path, case: str) -> None:
    out = tmp_path / "out"
    with whole_folder(out, "rows", replace=True) as work:
        write(work / "schema.yaml", "rows: 10")
        write(work / "train/part-0")
    if case == "changed":
        write(out / "schema.yaml", "rows: 20")
    elif case == "added":
        write(out / "train/part-1")
    elif case == "link":
        (out / "train/more").symlink_to(tmp_path)
    else:
        (out / MARK).unlink()
    before = tree(out)
    with pytest.raises(UserError, match=r"since|already"), whole_folder(out, "rows", replace=True):
        pass
    assert tree(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", [".out.writing", ".out.replaced"])
def test_a_folder_of_the_hidden_names_that_is_not_ours_stays(tmp_path: Path, name: str) -> None:
    write(tmp_path / name / "thesis")
    before = tree(tmp_path)
    with pytest.raises(UserError, match="is not ours"), whole_folder(tmp_path / "out", "rows"):
        pass
    assert tree(tmp_path) == before


_WRITING = """
import sys, time
from pathlib import Path
from rechub_dist.data.parquet.outputs import whole_folder
with whole_folder(Path(sys.argv[1]), "rows") as work:
    (work / "part-0").write_text("half")
    print("ready", flush=True)
    time.sleep(600)
"""


def test_two_writers_do_not_meet_and_a_killed_one_is_forgotten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", _WRITING, str(out)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "ready\n"
            with pytest.raises(UserError, match="another process is writing"), whole_folder(out, "rows"):
                pass
        finally:
            other.send_signal(signal.SIGKILL)
    assert (tmp_path / ".out.writing/part-0").exists()
    with whole_folder(out, "rows") as work:
        write(work / "part-1")
    assert set(tree(out)) == {MARK, "part-1"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_that_was_cut_off_while_it_was_replaced_is_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with whole_folder(out, "rows", replace=True) as work:
        write(work / "part-0", "first")
    os.rename(out, tmp_path / ".out.replaced")
    with pytest.raises(ZeroDivisionError), whole_folder(out, "rows", replace=True):
        raise ZeroDivisionError
    assert (out / "part-0").read_text() == "first"


def test_a_file_is_replaced_only_if_it_is_ours(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"

    def ours(found: Path) -> bool:
        return found.read_text().startswith("ours")

    for text in ("ours 1", "ours 2", "foreign"):
        with whole_file(path, ours) as work:
            work.write_text(text)
    with pytest.raises(UserError, match="is not one of ours"), whole_file(path, ours):
        pass
    assert tree(tmp_path) == {"new/file": b"foreign"}
    with pytest.raises(UserError, match="is a folder"), whole_file(tmp_path, ours):
        pass
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "other", ours) as work:
        raise ZeroDivisionError(work.write_text("half"))
    assert tree(tmp_path) == {"new/file": b"foreign"}


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    write(tmp_path / "file")
    for attempt in (lambda p: whole_folder(p, "rows"), lambda p: whole_file(p, lambda _: True)):
        with (
            pytest.raises(UserError, match=r"/file.*(Not a directory|File exists)"),
            attempt(tmp_path / "file" / "out"),
        ):
            pass
    assert outputs.Mark.of(b"[]") is None


def test_a_signal_while_scratch_is_removed_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = shutil.rmtree
    signals = [SystemExit(0)]

    def removed(path: Path) -> None:
        if signals:
            raise signals.pop()
        whole(path)

    monkeypatch.setattr(outputs.shutil, "rmtree", removed)
    with pytest.raises(SystemExit), scratch_folder(tmp_path) as work:
        shutil.copytree(Path(__file__).parent, work / "bundle")
    assert list(tmp_path.iterdir()) == []
