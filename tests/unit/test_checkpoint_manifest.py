"""A checkpoint's manifest is what its bytes are, whoever has rendered them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rechub_dist.checkpoint.folder import Folder, step_folder
from rechub_dist.checkpoint.inspect import list_checkpoints
from rechub_dist.checkpoint.load import read_manifest
from rechub_dist.checkpoint.manifest import DamagedError, NewerError, parse, render, seal
from rechub_dist.config import StorageConfig

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("format-*/*/out/checkpoints/*/manifest.json"))


def tree_of(path: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads(path.read_bytes())["manifest"]
    return found


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.parts[-5])
def test_other_renderings_of_the_same_values_are_as_good(path: Path) -> None:
    text = path.read_bytes()
    wanted = parse(text, str(path))
    tree = tree_of(path)
    others = [
        json.dumps(tree).encode(),  # spaces, 1e-08 for 1e-8
        json.dumps(tree, indent=2).encode(),
        json.dumps(dict(reversed(tree.items()))).encode(),
        json.dumps({key: value for key, value in tree.items() if key != "format"}).encode(),
        json.dumps(tree).replace('"lr": 0.001', '"lr": 1.0E-3').encode(),
    ]
    for body in others:
        assert seal(body) != text
        assert parse(seal(body), "here") == wanted
    assert parse(render(wanted), "here") == wanted


def test_any_other_byte_is_damage() -> None:
    text = GOLDEN[0].read_bytes()
    for at in [*range(60), *range(60, len(text), 97), len(text) - 1]:
        spoiled = text[:at] + bytes([text[at] ^ 1]) + text[at + 1 :]
        with pytest.raises(DamagedError, match=r"^here is damaged: its bytes do not match its checksum$"):
            parse(spoiled, "here")
    for spoiled in (b"", text[:-1], text + b" ", b" " + text):
        with pytest.raises(DamagedError, match="is damaged"):
            parse(spoiled, "here")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"format":1', b'"format":2', r"\(format 2\); this one reads formats up to 1: upgrade"),
        (b'"format":1', b'"format":1,"lease":{}', r"\(format 1\); this one does not know the key 'lease': upgrade"),
        (b'"run":{', b'"run":{"lease":1,', "this one does not know the key 'run.lease': upgrade"),
        (b'"size":', b'"codec":"zstd","size":', "does not know the key 'files.*codec': upgrade"),
    ],
)
def test_what_a_newer_version_has_written_is_told_apart(tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    body = GOLDEN[0].read_bytes().split(b'"manifest":', 1)[1][:-1]
    assert old in body
    text = seal(body.replace(old, new, 1))
    with pytest.raises(NewerError, match=message) as error:
        parse(text, "here")
    assert "remove" not in str(error.value)
    (tmp_path / "step-0000000005").mkdir()
    (tmp_path / "step-0000000005" / "manifest.json").write_bytes(text)
    (line,) = list_checkpoints(Folder(str(tmp_path), StorageConfig()))
    assert "upgrade rechub_dist" in line["newer"]


def test_a_sealed_text_that_is_no_manifest_is_damage() -> None:
    for body in (b"{}", b"[]", b"{", b'{"format":"x"}', b'{"format":0}', b"\xff"):
        with pytest.raises(DamagedError, match="here is not a manifest"):
            parse(seal(body), "here")


FILE, TENSOR = "rank-00000-64dc57ad.safetensors", "dense/mlp.layers.0.bias"  # of the first golden checkpoint


def changed(*path: Any, value: Any) -> Callable[[Any], None]:
    """Put a value at a path of keys."""

    def work(tree: Any) -> None:
        for key in path[:-1]:
            tree = tree[key]
        tree[path[-1]] = value

    return work


def renamed(name: str) -> Callable[[Any], None]:
    """Call the file by another name."""

    def work(tree: Any) -> None:
        tree["files"][name] = tree["files"].pop(FILE)

    return work


def doubled(tree: Any) -> None:
    """Have a piece twice."""
    tree["tensors"][TENSOR]["pieces"] *= 2


def without(key: str) -> Callable[[Any], None]:
    """Remove what is recorded of the run."""
    return lambda tree: tree["run"].pop(key)


PIECE = ("tensors", TENSOR, "pieces", 0)
HOSTILE: dict[str, tuple[Callable[[Any], None], str]] = {
    "absolute": (renamed("/etc/passwd"), "files./etc/passwd.*should match pattern"),
    "above": (renamed("../rank-00000.safetensors"), "files.../rank.*should match pattern"),
    "hidden": (renamed(".lease"), "files..lease.*should match pattern"),
    "piece elsewhere": (changed(*PIECE, "file", value="../../x"), "pieces.0.file: String should match pattern"),
    "piece in no file": (changed(*PIECE, "file", value="other"), "has a piece in other, which is none of the check"),
    "no checksum": (changed("files", FILE, "checksums", value=[]), "0 checksums, but 17732 bytes are 1 blocks"),
    "odd checksum": (changed("files", FILE, "checksums", value=["xyz"]), "checksums.0: String should match pattern"),
    "checksum of a number": (
        changed("files", FILE, "checksums", value=[7]),
        "checksums.0: Input should be a valid str",
    ),
    "negative size": (changed("files", FILE, "size", value=-1), "size: Input should be greater than or equal to 0"),
    "huge size": (changed("files", FILE, "size", value=10**30), "size: .*less than or equal to"),
    "size that is none": (changed("files", FILE, "size", value="17732"), "size: Input should be a valid integer"),
    "huge offset": (changed(*PIECE, "offset", value=2**62), "has a piece up to byte .* which has 17732"),
    "negative offset": (changed(*PIECE, "offset", value=-64), "offset: Input should be greater than or equal to 0"),
    "piece to 2^63": (changed(*PIECE, "row", value=2**63 - 1), "row: Input should be less than or equal to"),
    "huge piece": (changed(*PIECE, "rows", value=10**30), "rows: .*less than or equal to"),
    "piece outside": (changed(*PIECE, "row", value=1), "a piece of dense/mlp.* is outside its 16 x 1 elements"),
    "doubled piece": (doubled, "rows 0 to 15 of dense/mlp.layers.0.bias are duplicated"),
    "no piece": (changed("tensors", TENSOR, "pieces", value=[]), "lacks 16 elements of dense/mlp"),
    "negative shape": (changed("tensors", TENSOR, "shape", value=[-16]), "shape.0: Input should be greater"),
    "huge shape": (changed("tensors", TENSOR, "shape", value=[2**40, 2**40]), "more elements than any tensor"),
    "dtype": (changed("tensors", TENSOR, "dtype", value="F128"), "dtype: Input should be 'F64', "),
    "negative step": (changed("step", value=-9), "step: Input should be greater"),
    "huge step": (changed("step", value=10**30), "step: .*less than or equal to"),
    "step of two minds": (changed("step", value=10), "it is of step 10, but run.position.step is 9"),
    "step that is none": (changed("step", value=9.5), "step: Input should be a valid integer"),
    "huge best step": (changed("run", "position", "best_step", value=10**30), "position.best_step: "),
    "best metrics": (changed("run", "position", "best_metrics", value=[1]), "position.best_metrics: Input should be"),
    "best mode": (changed("run", "position", "best_mode", value="best"), "position.best_mode: Input should be 'max'"),
    "no position": (without("position"), "run.position: Field required"),
    "no configuration": (without("config"), "run.config: Field required"),
    "no identity": (without("identity"), "run.identity: Field required"),
    "no model": (changed("run", "identity", "model", value=None), "run.identity.model: Input should be"),
    "tables": (changed("run", "tables", value=[]), "run.tables: Input should be an object"),
    "rows of a table": (changed("run", "tables", "user", "rows", value=102), "has 101 rows; its table has 102"),
    "optimizer of a table": (
        changed("run", "tables", "user", "optimizer", value="x"),
        "optimizer: String should match",
    ),
    "world size": (changed("run", "world_size", value=0), "run.world_size: Input should be greater"),
}


@pytest.mark.parametrize(("work", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_checkpoint_from_elsewhere_is_refused_by_name(
    tmp_path: Path, work: Callable[[Any], None], message: str
) -> None:
    folder = shutil.copytree(GOLDEN[0].parent, tmp_path / step_folder(9))
    tree = tree_of(GOLDEN[0])
    work(tree)
    (folder / "manifest.json").write_bytes(seal(json.dumps(tree).encode()))
    with pytest.raises(DamagedError, match=message) as error:
        read_manifest(Folder(str(tmp_path), StorageConfig()), 9)
    assert re.match(rf"{tmp_path}/step-0000000009(/manifest.json)?( is not a manifest)?: ", str(error.value))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) - len(str(tmp_path)) < 300


def test_a_checkpoint_is_of_the_step_that_its_folder_names(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN[0].parent, tmp_path / step_folder(12))
    with pytest.raises(DamagedError, match=r"step-0000000012/manifest.json is of step 9, not of step 12"):
        read_manifest(Folder(str(tmp_path), StorageConfig()), 12)


def test_a_file_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN[0].parent, tmp_path / "there" / step_folder(9))
    (tmp_path / "run").symlink_to("there")  # a folder of checkpoints may be anywhere
    store = Folder(str(tmp_path / "run"), StorageConfig())
    read_manifest(store, 9)
    (folder / FILE).rename(tmp_path / "secret")
    (folder / FILE).symlink_to(tmp_path / "secret")
    with pytest.raises(DamagedError, match=f"{FILE} is a link to another folder"):
        read_manifest(store, 9)


def test_deep_nesting_is_damage() -> None:
    with pytest.raises(DamagedError, match="here is not a manifest"):
        parse(seal(b"[" * 200_000), "here")
