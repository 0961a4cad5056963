"""Run files, schemas and YAML of any content: a run that is built, or one line that says what is wrong."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rechub_dist.assembly import parts
from rechub_dist.assembly.examples import example_run, example_schema
from rechub_dist.assembly.parts import build
from rechub_dist.config import parse_yaml, run_from, stored_run
from rechub_dist.config.strict_yaml import dump_yaml
from rechub_dist.data.prepare.writer import schema_text
from rechub_dist.data.run_file import load_run
from rechub_dist.models import catalogue
from rechub_dist.schema import parse_schema
from rechub_tests.mutations import MUTATIONS, VALUES, Mutation, Place, cut, cuts, fuzz, mutated, outcome, places
from rechub_tests.runs import SCHEMA

EXAMPLE = yaml.safe_load(schema_text("example", example_schema()))
MODELS = sorted(catalogue())


@cache
def run_of(model: str) -> tuple[dict[str, Any], list[Place]]:
    """The run file that `rechub-dist models` prints, with its data set, and every key that a run file may have."""
    tree: dict[str, Any] = yaml.load(example_run(catalogue()[model]), Loader=yaml.CSafeLoader)
    tree["data"]["dataset"] = EXAMPLE
    whole = run_from(tree).model_dump(mode="json", by_alias=True)
    return tree, list(places(whole))


@pytest.fixture(autouse=True)
def _small_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is too large for a small host is refused before it is made."""
    monkeypatch.setattr(parts, "host_memory", lambda: 2**30)


@fuzz()
@given(st.sampled_from(MODELS), MUTATIONS)
def test_run_files(folder: Path, model: str, mutations: list[Mutation]) -> None:
    tree, known = run_of(model)
    check_run(folder, mutated(tree, mutations, known))


def check_run(folder: Path, tree: Any, settings: Iterable[str] = ()) -> None:
    """Load and build a run, as `train` does before there are ranks."""
    path = folder / "run.yaml"
    path.write_text(yaml.dump(tree, Dumper=yaml.CSafeDumper, sort_keys=False, allow_unicode=True), encoding="utf-8")
    outcome(lambda: build(load_run(path, settings), device="cpu", world_size=1))


@fuzz()
@given(st.sampled_from(MODELS), MUTATIONS)
def test_stored_configurations(model: str, mutations: list[Mutation]) -> None:
    """Of checkpoints: what has been stored is read more freely than what people write."""
    tree, known = run_of(model)
    text = dump_yaml(mutated(tree, mutations, known), 110)
    outcome(lambda: build(stored_run(text, "step 8"), device="cpu", world_size=1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@fuzz()
@given(st.sampled_from([EXAMPLE, SCHEMA]), MUTATIONS)
def test_schemas(tree: dict[str, Any], mutations: list[Mutation]) -> None:
    changed = mutated(tree, mutations)
    text = yaml.dump(changed, Dumper=yaml.CSafeDumper, sort_keys=False, allow_unicode=True)
    outcome(lambda: parse_schema(parse_yaml(text, "dataset.yaml")))


PIECES = [
    "&a ", "*a", "*a, *a, *a", "<<: *a\n", "!!binary ", "!!set ", "!!python/name:os.system ", "!!int ", "!!str ", "!x ",
    "{", "}", "[", "]", "[" * 200, "{a: " * 70, ", ", ": ", "- ", "? ", "\n", "\n  ", "\t", "---\n", "...\n", "|\n",
    ">-\n", "'", '"', "\\u0000", "\\ud800", "\\x1b", "#", "%YAML 9.9\n", "%TAG ! x:\n", "0x", "0x_", "1:30", "0777",
    ".nan", "-.inf", "1e999",
    "9" * 400, "9" * 5000, "~", "on", "yes", "=", "2022-02-30", "2022-04-25", "\x00", "\x1b", "\x85",
    "\u2028", "\ufeff", "é", "a: 1\na: 2\n", "[1]: 2\n", "{a: 1}: 2\n", "? [1]\n: 2\n",
]  # fmt: skip
TEXTS = [
    dump_yaml(run_of("DeepFM")[0], 110).encode(),
    dump_yaml(SCHEMA, 110).encode(),
    b"a: &a [1, 2]\nb: {<<: {c: 1}}\n",
]


@fuzz()
@given(st.sampled_from(TEXTS), cuts(st.one_of(st.sampled_from(PIECES).map(str.encode), st.binary(max_size=3)), 5))
def test_yaml(text: bytes, changes: list[Any]) -> None:
    outcome(lambda: parse_yaml(cut(text, changes), "run.yaml"))


def in_one_line(value: Any) -> str:
    """A value as one writes it on the command line."""
    text: str = yaml.dump(value, Dumper=yaml.CSafeDumper, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("...\n").strip()


SETTINGS = st.lists(
    st.tuples(
        st.integers(0, 10**6),
        st.sampled_from(["", "", "", "", ".x", ".0", ".", " ", "\n", "=", ".name"]),
        st.one_of(VALUES.map(in_one_line), VALUES.map(in_one_line), st.sampled_from(PIECES), st.text(max_size=20)),
    ),
    min_size=1,
    max_size=3,
)


@fuzz()
@given(st.sampled_from(MODELS), SETTINGS)
def test_settings(folder: Path, model: str, settings: list[tuple[int, str, str]]) -> None:
    """`--set KEY=VALUE`, of any key that a run file may have, or something like it."""
    tree, known = run_of(model)
    check_run(
        folder,
        tree,
        [f"{'.'.join(map(str, known[place % len(known)]))}{more}={value}" for place, more, value in settings],
    )


@fuzz()
@given(st.text(max_size=60), st.sampled_from(["utf-8", "utf-16", "utf-32", "utf-8-sig"]))
def test_any_text(text: str, encoding: str) -> None:
    data = text.encode(encoding, errors="surrogatepass")
    outcome(lambda: parse_yaml(data, "run.yaml"))
