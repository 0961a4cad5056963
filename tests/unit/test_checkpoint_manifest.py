"""A checkpoint's manifest is what its bytes are, whoever has rendered them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rechub_dist.checkpoint.folder import Folder
from rechub_dist.checkpoint.inspect import list_checkpoints
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
