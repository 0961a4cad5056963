"""What fuzzers do to trees, texts and bytes, and what must come of it: a value, or one line that says what is wrong."""

from __future__ import annotations

import contextlib
import copy
import os
import resource
import signal
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import hypothesis
from hypothesis import HealthCheck
from hypothesis import strategies as st

from rechub_dist.config import RunConfig
from rechub_dist.errors import LONGEST, UserError

T = TypeVar("T")
EXAMPLES = 150  # of a fuzzer in the normal suite; FUZZ=20000 asks for more, FUZZ_SEED=1 for others
SECONDS = 60  # an example, however busy the machine is
GIB = 8  # of address space that an example may take
_OF_CODE = ("Table(", "Feature(", "Config(", "<class ", "object at 0x", "Traceback")


def fuzz(examples: int = EXAMPLES) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Settings of a fuzzer: the same examples each time; `examples` of them, or as many as FUZZ says."""
    wanted = int(os.environ.get("FUZZ", examples))

    def with_settings(test: Callable[..., None]) -> Callable[..., None]:
        settings = hypothesis.settings(
            max_examples=wanted,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        return hypothesis.seed(int(os.environ.get("FUZZ_SEED", "0")))(settings(test))

    return with_settings


def outcome(work: Callable[[], T]) -> T | None:
    """What a work gives, None where it refuses its input as it should; anything else is raised."""
    try:
        with bounded():
            return work()
    except UserError as error:
        message = str(error)
        assert message, "an empty message"
        assert message.isprintable(), message
        assert len(message) <= LONGEST, message
        assert not any(part in message for part in _OF_CODE), message
        return None


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """End what takes too long, and let no allocation succeed that takes too much."""
    pages = int(open("/proc/self/statm").read().split()[0])  # noqa: SIM115
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, _expired)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + GIB * 2**30, hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _expired(*_: object) -> None:
    raise TimeoutError(f"an example that takes more than {SECONDS} seconds")


def _choices(schema: Any) -> Iterator[Any]:
    """Every word that the schema of the configuration has a meaning for."""
    if isinstance(schema, dict):
        yield from schema.get("enum", ())
        yield from schema.get("properties", ())
        for value in schema.values():
            yield from _choices(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _choices(value)


WORDS = sorted({word for word in _choices(RunConfig.model_json_schema()) if isinstance(word, str)})
NUMBERS = [
    0, 1, 2, 3, 7, -1, 0.0, -0.0, 0.5, 1.0, 1.5, -0.5, 1e-300, 1e-8, 1e30, 1e39, 1e300, -1e300, 255, 2**16, 2**16 + 1,
    2**24, 2**31 - 1, 2**31, 2**32, 2**40, 2**40 + 1, 10**12, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64,
    -(2**63), 10**30, 10**400, float("nan"), float("inf"), float("-inf"),
]  # fmt: skip
TEXTS = [
    "", " ", "x", "*", "a.b", "a:b", "os:path", "math:sqrt", "torch.optim:RAdam", "../x", "/", "s3://bucket/x", "a/b",
    "\x1b[31mred", "a\nb", "\u202e", "é", "\U0001f600", "\x00", "a" * 3000, "1", "true", "null", "NaN", "2022-04-25",
    "1:30", "deepfm", "default", "%", "{}", "[", "https://", "file:///x",
]  # fmt: skip
SHAPES: list[Any] = [
    None, True, False, [], {}, [[]], [{}], {"": {}}, [None], [0], [-1], [1, 2], [10**12], [1e300], [2**24, 2**24],
    [16] * 50, ["x"], ["user", "user"], {"a": 1}, {"name": "x"}, {"kind": "sparse"}, {"kind": "sparse", "rows": 10**12},
    {1: 2}, {None: 1}, {True: 1}, [["a", "=", 1]], [["a", "in", 3]],
]  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(TEXTS),
    st.sampled_from(SHAPES),
    st.sampled_from(WORDS),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
)


class Mutation(NamedTuple):
    """One change of a tree: what is done at which place, and with what."""

    kind: str
    place: int
    other: int
    value: Any


KINDS = ("like", "like", "like", "like", "replace", "replace", "remove", "add", "rename", "copy", "wrap", "repeat")
MUTATIONS = st.lists(
    st.builds(Mutation, st.sampled_from(KINDS), st.integers(0, 10**6), st.integers(0, 10**6), VALUES),
    min_size=1,
    max_size=3,
)

Place = tuple[Any, ...]


def places(tree: Any, path: Place = ()) -> Iterator[Place]:
    """Every place in a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def mutated(tree: dict[str, Any], mutations: list[Mutation], known: list[Place] | None = None) -> dict[str, Any]:
    """A changed copy of a tree; `known` are places that may be changed though the tree lacks them."""
    found = copy.deepcopy(tree)
    for mutation in mutations:
        there = [*(known or ()), *places(found)]
        path = there[mutation.place % len(there)]
        _apply(found, path, there[mutation.other % len(there)], mutation)
    return found


def _apply(tree: dict[str, Any], path: Place, other: Place, mutation: Mutation) -> None:
    node: Any = tree
    for key in path[:-1]:
        if isinstance(node, dict):
            node = node.setdefault(key, {})
        elif _has(node, key):
            node = node[key]
    key = path[-1]
    old = _at(node, (key,))
    changed = {
        "like": _like(old, mutation),
        "replace": mutation.value,
        "copy": _at(tree, other),
        "wrap": [old] if mutation.other % 2 else {str(other[-1]): old},
    }
    if mutation.kind in changed:
        if isinstance(node, dict) or _has(node, key):
            node[key] = copy.deepcopy(changed[mutation.kind])
    elif isinstance(node, dict):
        if mutation.kind != "add":
            node.pop(key, None)
        if mutation.kind != "remove":
            name = mutation.value if isinstance(mutation.value, str | int) else other[-1]
            node[name] = copy.deepcopy(mutation.value if mutation.kind == "add" else old)
    elif _has(node, key):
        if mutation.kind == "remove":
            del node[key]
        else:
            node.insert(mutation.other % (len(node) + 1), copy.deepcopy(old))


def _has(node: Any, key: Any) -> bool:
    return isinstance(node, list) and isinstance(key, int) and key < len(node)


def _like(old: Any, mutation: Mutation) -> Any:
    """Another value of the same type."""
    if isinstance(old, bool):
        return not old
    if isinstance(old, int | float):
        alike = [number for number in NUMBERS if isinstance(number, type(old)) and abs(number) < 2**63]
        return alike[mutation.other % len(alike)]
    if isinstance(old, str):
        return WORDS[mutation.other % len(WORDS)]
    return [*old, *old[:1]] if isinstance(old, list) else mutation.value


def _at(tree: Any, path: Place) -> Any:
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else tree[key] if _has(tree, key) else None
    return tree


class Cut(NamedTuple):
    """One change of bytes: what stands at a place, of so many bytes, becomes something else."""

    place: int
    length: int
    new: bytes


BYTES = st.one_of(
    st.binary(max_size=4),
    st.sampled_from([b"\x00" * 4, b"\xff" * 4, b"\x80", b"\x7f", b"\x00" * 64, b"\xff" * 64]),
)


def cuts(new: st.SearchStrategy[bytes], most: int = 3) -> st.SearchStrategy[list[Cut]]:
    """Changes of bytes, at most so many."""
    lengths = st.one_of(st.integers(0, 4), st.integers(0, 10**6))
    return st.lists(st.builds(Cut, st.integers(0, 10**9), lengths, new), min_size=1, max_size=most)


def cut(data: bytes, changes: list[Cut]) -> bytes:
    """The bytes, changed. Half of the changes keep the length."""
    for change in changes:
        start = change.place % (len(data) + 1)
        length = len(change.new) if change.place % 2 else change.length
        data = data[:start] + change.new + data[start + length :]
    return data
