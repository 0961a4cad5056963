"""What a file is that was named as Parquet and is none: told by its first and last bytes, with what to do about it."""

from __future__ import annotations

import posixpath
import zlib
from collections.abc import Callable

HEAD = 512  # bytes that tell
_MAGIC = b"PAR1"
_DELIMITERS = {"\t": "TSV", ",": "CSV", ";": "CSV with semicolons", "|": "CSV with bars"}


def _by_arrow(module: str, call: str) -> str:
    code = f"import pyarrow.{module} as r, pyarrow.parquet as p; p.write_table(r.{call}, 'converted.parquet')"
    return f'convert it: python -c "{code}"'


def _by_pandas(call: str) -> str:
    return f"convert it: python -c \"import pandas; pandas.{call}.to_parquet('converted.parquet')\""


_UNPACK = "unpack it first"
_BY_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "compressed by gzip", f"{_UNPACK} (gunzip)"),
    (b"PK\x03\x04", "a ZIP archive", f"{_UNPACK} (unzip)"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", f"{_UNPACK} (unzstd)"),
    (b"BZh", "compressed by bzip2", f"{_UNPACK} (bunzip2)"),
    (b"\xfd7zXZ\x00", "compressed by xz", f"{_UNPACK} (unxz)"),
    (b"ARROW1", "an Arrow (Feather) file", _by_arrow("feather", "read_table('NAME')")),
    (b"FEA1", "a Feather file", _by_arrow("feather", "read_table('NAME')")),
    (b"ORC", "an ORC file", _by_arrow("orc", "read_table('NAME')")),
    (b"Obj\x01", "an Avro file", "convert it, by Spark for one"),
    (b"\x89HDF\r\n", "an HDF5 file", _by_pandas("read_hdf('NAME')")),
    (b"\x93NUMPY", "a NumPy array", "write the columns as Parquet"),
    (b"\x80\x04\x95", "a Python pickle", "write the columns as Parquet"),
    (b"\x80\x05\x95", "a Python pickle", "write the columns as Parquet"),
    (b"SQLite format 3", "an SQLite database", "export its table as Parquet"),
    (b"version https://git-lfs", "the pointer of Git LFS to a file", "fetch the file itself: git lfs pull"),
)
_PAGE = "download the file again, and look at what the server says"
_BY_TEXT: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("<!doctype html", "<html"), "an HTML page, as a server answers instead of a file", _PAGE),
    (("<?xml", "<error"), "XML, as a store answers instead of a file", _PAGE),
    (("/annex/objects/", "../.git/annex/"), "the pointer of git-annex to a file", "fetch the file: git annex get"),
    (("{",), "JSON", _by_arrow("json", "read_json('NAME')")),
    (("[",), "JSON", _by_pandas("read_json('NAME')")),
)


def what_else(head: bytes, tail: bytes, path: str) -> str | None:
    """What a file is instead of Parquet, and what to do; None where it begins as Parquet or nothing can be told.

    Args:
        head: its first bytes, `HEAD` of them where there are as many; none of an empty file.
        tail: its last bytes, 4 at least where there are as many.
        path: by which name commands are told.
    """
    if not head:
        return "is empty (0 bytes); write it again, or remove it"
    if tail[-4:] == b"PARE":
        return "is Parquet with an encrypted footer, for which there are no keys here; write it without encryption"
    found = None if head.startswith(_MAGIC[: len(head)]) else looks_like(head)
    if found is None:
        return None
    what, fix = found
    return f"is {what}, not Parquet; {fix.replace('NAME', posixpath.basename(path.partition('?')[0]))}"


def looks_like(head: bytes) -> tuple[str, str] | None:
    """What the first bytes of a file that is not Parquet tell that it is, and what to do; None if nothing."""
    for magic, what, fix in _BY_MAGIC:
        if head.startswith(magic):
            inner = _unzipped(head) if magic == b"\x1f\x8b" else b""
            within = ("Parquet", "") if inner.startswith(_MAGIC) else looks_like(inner) if inner else None
            return (f"{within[0]} {what}", fix) if within else (what, fix)
    if not head.strip(b"\x00"):
        return "zero bytes where it begins", "it was copied or allocated in part only: write it again"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "text in UTF-16", "write it as Parquet"
    text = _text(head)
    return None if text is None else _kind_of_text(text)


def _kind_of_text(text: str) -> tuple[str, str]:
    for starts, what, fix in _BY_TEXT:
        if text.lower().startswith(starts):
            return what, fix
    first = text.splitlines()[0] if text else ""
    count: Callable[[str], int] = first.count
    delimiter = max(_DELIMITERS, key=count)
    if not count(delimiter):
        return "text", "name the Parquet file, or write its columns as Parquet"
    sign = delimiter.replace("\t", "\\t")
    options = "" if delimiter == "," else f", parse_options=r.ParseOptions(delimiter='{sign}')"
    return f"{_DELIMITERS[delimiter]} text", _by_arrow("csv", f"read_csv('NAME'{options})")


def _unzipped(head: bytes) -> bytes:
    try:
        return zlib.decompressobj(wbits=31).decompress(head, HEAD)
    except zlib.error:
        return b""


def _text(head: bytes) -> str | None:
    """The text in UTF-8 that a file begins with, without signs that are not seen; None where it is no text."""
    try:
        text = head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # else a sign that is cut in two
            return None
        text = head[: error.start].decode("utf-8-sig")
    printable = all(sign.isprintable() or sign in "\t\r\n" for sign in text)
    return text.lstrip() if printable else None
