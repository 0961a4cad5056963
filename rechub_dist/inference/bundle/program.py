"""Programs of torch.export: written without pickles, and read only if they have none and call torch's operators alone.

`torch.export.load` unpickles example inputs and constants, looks names up in torch and evaluates expressions of sizes:
a file may run any code. Ours need none of that, so that a file with more than this is refused before torch sees it:
tensors as bytes, JSON, operators of `aten` and of arithmetic, and sums, products and the like of sizes.
"""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, Final

import torch

from rechub_dist.errors import UserError, one_line, shown

_FILES: Final = re.compile(
    r"[^/]+/(?:data/(?:weights/(?:weight_\d+|model_weights_config\.json)"
    r"|constants/(?:tensor_\d+|model_constants_config\.json)|sample_inputs/model\.pt)"
    r"|models/model\.json|archive_format|archive_version|byteorder|\.data/(?:version|serialization_id))"
)
_OPERATORS: Final = re.compile(
    r"torch\.ops\.aten\.(?!from_file)\w+\.\w+|_operator\.(?:add|sub|mul|floordiv|mod|neg|truediv|pow|eq|ne|lt|le|gt|ge)"
    r"|torch\.sym_(?:int|float|max|min|not|ite|sqrt)|math\.(?:floor|ceil|trunc)"
)
_EXPRESSION: Final = re.compile(
    r"(?:Symbol\('[a-z]+\d+'(?:, (?:positive|nonnegative|integer)=True)*\)"
    r"|Integer\(-?\d+\)|Rational\(-?\d+, \d+\)|true|false"
    r"|(?:Add|Mul|Max|Min|Pow|Mod|PythonMod|FloorDiv|CleanDiv|CeilDiv|IntTrueDiv|ModularIndexing|Where"
    r"|Eq|Equality|Ne|Unequality|Lt|StrictLessThan|Le|LessThan|Gt|StrictGreaterThan|Ge|GreaterThan|And|Or|Not)(?=\()"
    r"|[(), ])*"
)
_PLAIN: Final = re.compile(r"[\w.]*")  # what calls nothing, wherever torch writes it into code
_SPEC: Final = re.compile(
    r'(?:"(?:type|context|children_spec|builtins\.(?:tuple|list|dict)|null|\[\])"|null|1|[\[\]{}:, ])*'
)  # of inputs and outputs: lists in tuples
_VALUES: Final = {
    "target": _OPERATORS,
    "expr_str": _EXPRESSION,
    "in_spec": _SPEC,
    "out_spec": _SPEC,
    "torch_version": re.compile(r"[\w.+-]*"),
    "as_string": re.compile(r".*", re.DOTALL),  # an operator's argument: an equation of einsum
}
_LONGEST: Final = 64 << 20  # bytes of the description of a program
_META: Final = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")  # of whoever traced it


def save_program(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write a program without example inputs and without names of source files."""
    program._example_inputs = None  # they would be pickled; there is no public way
    program._guards_code = []  # Python about shapes, which is run; a bundle gives what fits
    for node in program.graph.nodes:
        for key in _META:
            node.meta.pop(key, None)
    torch.export.save(program, str(path))


def read_program(path: Path) -> torch.export.ExportedProgram:
    """A program that `save_program` has written.

    Raises:
        UserError: it cannot be read, or has more in it than such a program.
    """
    try:
        _check(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(str(path))
    except UserError:
        raise
    except Exception as error:  # whatever torch's readers raise
        raise UserError(f"{path} cannot be read: {one_line(error)}; export the bundle again") from None


def _check(path: Path) -> None:
    """Raise UserError for a file that has more in it than our programs."""
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        for info in infos:
            if not _FILES.fullmatch(info.filename) or (info.filename.endswith(".pt") and info.file_size):
                raise _more(path, info.filename)
        if len({info.filename for info in infos}) < len(infos) or len({i.filename.split("/")[0] for i in infos}) != 1:
            raise _more(path, "files of one name")
        for info in infos:
            if info.filename.endswith(".json"):
                if info.file_size > _LONGEST:
                    raise _more(path, f"{info.file_size} bytes of {info.filename}")
                _check_tree(path, json.loads(archive.read(info)))


def _check_tree(path: Path, tree: Any) -> None:
    waiting = [("", tree)]
    while waiting:
        key, one = waiting.pop()
        if isinstance(one, dict):
            waiting += one.items()
            waiting += [("", name) for name in one]
        elif isinstance(one, list):
            waiting += [(key, value) for value in one]
        elif isinstance(one, str) and not _VALUES.get(key, _PLAIN).fullmatch(one):
            raise _more(path, f"{key or 'a key'} {shown(one)}")
        elif key == "use_pickle" and one is not False:
            raise _more(path, "a pickle")


def _more(path: Path, what: str) -> UserError:
    return UserError(f"{path} holds {what}, which no program of rechub_dist has; it is not loaded: export it again")
