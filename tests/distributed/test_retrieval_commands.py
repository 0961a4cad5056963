"""Vectors, indexes and retrieval from a bundle, held against `predict`, which ranks the whole catalogue by torch."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from rechub_dist.cli.main import app
from rechub_dist.errors import UserError
from rechub_dist.inference.bundle.bundle import Bundle
from rechub_dist.inference.bundle.manifest import ITEMS
from rechub_dist.inference.check import as_values, check_bundle
from rechub_dist.inference.export import export_bundle
from rechub_dist.inference.from_checkpoint import open_run
from rechub_dist.inference.index import Wanted as WantedIndex
from rechub_dist.inference.index import make_index
from rechub_dist.inference.retrieve import Wanted as WantedItems
from rechub_dist.inference.retrieve import write_retrieved
from rechub_dist.inference.run import load
from rechub_dist.inference.vectors import Wanted as WantedVectors
from rechub_dist.inference.vectors import write_vectors
from rechub_tests.shop import DSSM, KINDS, MIND, SASREC, import_shop, trained

ROOT = Path(__file__).parents[2]
MODELS = {"DSSM": DSSM, "MIND": MIND, "SASRec": SASREC}
ALL = 45  # things that have an id of their own


class Shop(NamedTuple):
    root: Path
    runs: dict[str, Path]
    bundles: dict[str, Path]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    folder = tmp_path_factory.mktemp("shop")
    root = import_shop(folder / "data")
    runs = {name: trained(folder / name, root, model) for name, model in MODELS.items()}
    for name, run in runs.items():
        export_bundle(str(run), folder / name / "bundle")
    return Shop(root, runs, {name: folder / name / "bundle" for name in runs})


def rows_of(folder: Path) -> list[dict[str, Any]]:
    assert (folder / "_SUCCESS").exists()
    table = pq.read_table(folder)
    return sorted(table.to_pylist(), key=lambda row: (row["source_file"], row["source_row"]))


def assert_alike(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    """The same items in the same order, but for those whose scores are equal."""
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        scores = np.array(other["predicted_scores"])
        np.testing.assert_allclose(one["predicted_scores"], scores, rtol=1e-4, atol=1e-5)
        assert len(set(one["predicted_items"])) == len(one["predicted_items"]) == len(scores)
        score_of = dict(zip(other["predicted_items"], scores, strict=True))
        last = scores.min(initial=np.inf)
        for item, score in zip(one["predicted_items"], one["predicted_scores"], strict=True):
            assert abs(score_of.get(item, last) - score) < 1e-4  # an item that is not there ties with the last


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("k", [5, 1000])
def test_retrieve_is_predict(shop: Shop, tmp_path: Path, model: str, k: int) -> None:
    run = load(shop.runs[model])
    wanted = run.predict(shop.root / "now", top_k=k)
    write_retrieved(WantedItems(str(shop.bundles[model]), str(shop.root / "now"), str(tmp_path / "out"), k))
    found = rows_of(tmp_path / "out")
    assert_alike(found, wanted.sort_by([("source_file", "ascending"), ("source_row", "ascending")]).to_pylist())
    assert all(len(row["predicted_items"]) == min(k, len(row["predicted_items"])) > 0 for row in found)


@pytest.mark.parametrize("model", MODELS)
def test_the_unknown_item_is_recommended_by_nobody(shop: Shop, tmp_path: Path, model: str) -> None:
    run, bundle, now = load(shop.runs[model]), Bundle(shop.bundles[model]), shop.root / "now"
    assert bundle.catalogue.item.table.rows == ALL + 1
    users = as_values(pq.read_table(now), bundle.schema)
    for found in (run.predict(now, top_k=1000), run.top_k(users, 1000), bundle.retrieve(users, 1000)):
        lists = found["predicted_items"].to_pylist()
        assert None not in {item for items in lists for item in items}
        assert {item for items in lists for item in items} == {f"thing {i}" for i in range(ALL)}
    write_vectors(WantedVectors(str(shop.bundles[model]), "items", str(tmp_path / "items")))
    for table in (pq.read_table(tmp_path / "items"), run.vectors("item")):
        assert sorted(table["item"].to_pylist()) == sorted(f"thing {i}" for i in range(ALL))


@pytest.mark.slow
def test_a_run_of_ids_alone_has_all_of_them(shop: Shop, tmp_path: Path) -> None:
    """Without a vocabulary every id is an item, id 0 too."""
    schema = yaml.safe_load((shop.root / "dataset.yaml").read_text())
    for feature in schema["features"].values():
        feature.pop("vocabulary", None)
        feature.pop("encoded", None)
    root = tmp_path / "data"
    shutil.copytree(shop.root, root)
    (root / "dataset.yaml").write_text(yaml.safe_dump(schema))
    shutil.rmtree(root / "items")
    run = trained(tmp_path / "run", root, SASREC)
    export_bundle(str(run), tmp_path / "bundle")
    bundle = Bundle(tmp_path / "bundle")
    assert ITEMS not in bundle.manifest.files
    assert bundle.catalogue.ids.tolist() == list(range(ALL + 1))
    users = pq.read_table(root / "now")
    assert_alike(bundle.retrieve(users, 9).to_pylist(), load(run).top_k(users, 9).to_pylist())
    with pytest.raises(UserError, match="has no table of items to filter by"):
        bundle.retrieve(users, 9, where="category = 'book'")


def test_items_with_columns_of_their_own(shop: Shop) -> None:
    bundle, run = Bundle(shop.bundles["DSSM"], check=True), load(shop.runs["DSSM"])
    items = pq.read_table(shop.bundles["DSSM"] / ITEMS)
    assert set(items["category"].to_pylist()) <= {*KINDS, None}
    assert items.num_rows == ALL
    found = check_bundle(run, bundle, str(shop.root / "valid"))
    assert found.differences["item vectors"] < 1e-5
    assert found.metrics["overlap@10"] == (1.0, 1.0)
    assert check_bundle(open_run(str(shop.runs["DSSM"])), bundle, str(shop.root / "valid")) == found
    mine = dict(zip(*(bundle_items(bundle)[name] for name in ("item", "vector")), strict=True))
    theirs = run.vectors("item")
    for item, vector in zip(theirs["item"].to_pylist(), theirs["vector"].to_pylist(), strict=True):
        np.testing.assert_allclose(mine[item], vector, rtol=1e-4, atol=1e-5)


def bundle_items(bundle: Bundle) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = pa.concat_tables(bundle.catalogue.batches(("category", "price"))).to_pydict()
    return found


@pytest.mark.parametrize("kind", [None, "flat", "hnsw", "ivf"])
@pytest.mark.parametrize("model", MODELS)
def test_filters_leave_the_best_of_what_they_let_through(
    shop: Shop, tmp_path: Path, model: str, kind: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind is not None:  # even where few items pass
        monkeypatch.setattr("rechub_dist.inference.bundle.catalogue._FEW", 0)
        monkeypatch.setattr("rechub_dist.inference.bundle.catalogue._SHARE", 0.0)
        make_index(str(shop.bundles[model]), tmp_path / "index", WantedIndex(kind, aim=1.0))  # type: ignore[arg-type]
    bundle = Bundle(shop.bundles[model], index=tmp_path / "index" if kind else None)
    users = as_values(pq.read_table(shop.root / "now"), bundle.schema)
    sorts = dict(zip(*(bundle_items(bundle)[name] for name in ("item", "category")), strict=True))
    assert Bundle(shop.bundles[model]).catalogue.columns
    everything = bundle_best(Bundle(shop.bundles[model]), users, 1000)
    hits = total = 0
    for where, passes in (
        ("category = 'book'", lambda category: category == "book"),
        ("category = 'it''s' and price >= 0", lambda category: category == "it's"),
        ("category in ('lamp', 'book')", lambda category: category in ("lamp", "book")),
        ("category = 'none'", lambda _sort: False),
    ):
        found = bundle.retrieve(users, 4, where=where).to_pylist()
        for one, whole in zip(found, everything, strict=True):
            best = [pair for pair in whole if passes(sorts[pair[0]])][:4]
            assert [passes(sorts[item]) for item in one["predicted_items"]] == [True] * len(best)
            if kind != "hnsw":
                np.testing.assert_allclose(one["predicted_scores"], [score for _, score in best], rtol=1e-4, atol=1e-5)
            hits += len({item for item, _ in best} & set(one["predicted_items"]))
            total += len(best)
    assert hits >= (0.95 if kind == "hnsw" else 0.999) * total > 0


def bundle_best(bundle: Bundle, users: pa.Table, k: int) -> list[list[tuple[str, float]]]:
    found = bundle.retrieve(users, k).to_pylist()
    return [list(zip(row["predicted_items"], row["predicted_scores"], strict=True)) for row in found]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("colour = 'red'", "where: \"?colour = 'red'\"?: there is no column 'colour'"),
        ("price", "is FLOAT, not true or false; compare it with something"),
        ("price > (select 1)", "a subquery reads other rows"),
        ("1 = 1) union select (1 = 1", "syntax|not one expression"),
        ("price > 0; drop view items", "syntax|not one expression"),
    ],
)
def test_what_is_no_filter(shop: Shop, where: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Bundle(shop.bundles["DSSM"]).catalogue.where(where)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf"])
def test_an_index_finds_what_exact_search_finds(shop: Shop, tmp_path: Path, model: str, kind: str) -> None:
    bundle, data = str(shop.bundles[model]), str(shop.root / "now")
    make_index(bundle, tmp_path / "index", WantedIndex(kind, aim=1.0, k=10))  # type: ignore[arg-type]
    write_retrieved(WantedItems(bundle, data, str(tmp_path / "exact"), 10))
    write_retrieved(WantedItems(bundle, data, str(tmp_path / "indexed"), 10, index=str(tmp_path / "index")))
    assert_alike(rows_of(tmp_path / "indexed"), rows_of(tmp_path / "exact"))


@pytest.mark.parametrize("model", MODELS)
def test_users_without_a_history(shop: Shop, model: str) -> None:
    """What `predict` has for them; of SASRec, which knows nothing else of them, any items."""
    users = {"user": ["u1", "nobody"], "seen": pa.array([[], []], pa.list_(pa.string()))}
    bundle = Bundle(shop.bundles[model])
    found = bundle.retrieve(pa.table(users), 5).to_pylist()
    assert_alike(found, load(shop.runs[model]).top_k(pa.table(users), 5).to_pylist())
    assert [len(row["predicted_items"]) for row in found] == [5, 5]


@pytest.mark.slow
def test_vectors_of_users_and_items(shop: Shop, tmp_path: Path) -> None:
    for model in ("DSSM", "MIND"):
        run, bundle = load(shop.runs[model]), str(shop.bundles[model])
        for processes in (1, 2):
            out = tmp_path / f"{model}{processes}"
            wanted = WantedVectors(bundle, "users", str(out), str(shop.root / "now"), ("user",), processes=processes)
            rows = write_vectors(wanted)
            found = rows_of(out)
            assert len(found) == rows == 30
            assert pq.read_table(out).schema.field("vectors").type.value_type == pa.list_(pa.float32(), 8)
            opened = Bundle(bundle)  # which keeps the vocabularies that its schema names
            users = as_values(pq.read_table(shop.root / "now"), opened.schema)
            theirs = run.vectors("user", users)["vectors"].to_pylist()
            for one, other in zip(found, theirs, strict=True):
                np.testing.assert_allclose(one["vectors"], other, rtol=1e-4, atol=1e-5)
    write_vectors(WantedVectors(str(shop.bundles["DSSM"]), "items", str(tmp_path / "items"), None, ("category",)))
    table = pq.read_table(tmp_path / "items")
    assert table.schema.names == ["item", "category", "vector"]
    assert table.schema.field("vector").type == pa.list_(pa.float32(), 8)


def test_of_many_row_groups_each_process_writes_its_own(shop: Shop, tmp_path: Path) -> None:
    folder = tmp_path / "users"
    folder.mkdir()
    now = pq.read_table(shop.root / "now")
    pq.write_table(now, folder / "a.parquet", row_group_size=7)
    pq.write_table(now, folder / "b.parquet", row_group_size=11)
    for processes in (1, 3):
        out = str(tmp_path / f"by-{processes}")
        write_vectors(WantedVectors(str(shop.bundles["MIND"]), "users", out, str(folder), processes=processes))
    assert rows_of(tmp_path / "by-3") == rows_of(tmp_path / "by-1")
    assert len(list((tmp_path / "by-3").glob("part-*.parquet"))) == 3


def test_queries_of_ones_own(shop: Shop, tmp_path: Path) -> None:
    bundle = str(shop.bundles["MIND"])
    write_vectors(WantedVectors(bundle, "users", str(tmp_path / "users"), str(shop.root / "now")))
    made = make_index(bundle, tmp_path / "index", WantedIndex("flat", k=5, queries=str(tmp_path / "users")))
    assert (made.measured.queries_of, made.measured.recall) == ("given", 1.0)


def test_damage_to_an_index_is_told(shop: Shop, tmp_path: Path) -> None:
    bundle, folder = shop.bundles["DSSM"], tmp_path / "index"
    make_index(str(bundle), folder, WantedIndex("flat", k=5))
    for name in ("index.faiss", "items.parquet", "index.json"):
        whole = (folder / name).read_bytes()
        middle = len(whole) // 2
        (folder / name).write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        with pytest.raises(UserError, match=rf"{name}.*(is damaged|cannot be read)"):
            Bundle(bundle, index=folder)
        (folder / name).unlink()
        with pytest.raises(UserError, match=rf"(has no|{name} is missing)"):
            Bundle(bundle, index=folder)
        (folder / name).write_bytes(whole)
    Bundle(bundle, index=folder)
    with pytest.raises(UserError, match="is an index of other items, or of another model"):
        Bundle(shop.bundles["MIND"], index=folder)


def test_a_cut_off_output_is_written_anew(shop: Shop, tmp_path: Path) -> None:
    wanted = WantedItems(str(shop.bundles["DSSM"]), str(shop.root / "now"), str(tmp_path / "out"), 3)
    write_retrieved(wanted)
    first = rows_of(tmp_path / "out")
    with pytest.raises(UserError, match="already holds _SUCCESS"):
        write_retrieved(wanted)
    (tmp_path / "out" / "_SUCCESS").unlink()
    (tmp_path / "out" / "part-00000.parquet").write_bytes(b"half")
    write_retrieved(wanted)
    assert rows_of(tmp_path / "out") == first
    (tmp_path / "out" / "_SUCCESS").unlink()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(UserError, match=r"already holds mine\.txt"):
        write_retrieved(wanted)


@pytest.mark.slow
def test_the_export_refuses_items_that_are_not_there(shop: Shop, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(shop.root, root)
    [part] = (root / "items").glob("*.parquet")
    pq.write_table(pq.read_table(part).slice(0, 20), part)
    with pytest.raises(UserError, match="holds item 20 0 times; each of the 45 items needs one row"):
        export_bundle(str(shop.runs["DSSM"]), tmp_path / "bundle", overrides=[f"data.root={root}"])
    shutil.rmtree(root / "items")
    with pytest.raises(UserError, match="items"):
        export_bundle(str(shop.runs["DSSM"]), tmp_path / "bundle", overrides=[f"data.root={root}"])
    assert not (tmp_path / "bundle").exists()
    export_bundle(str(shop.runs["MIND"]), tmp_path / "bundle", overrides=[f"data.root={root}"])
    assert ITEMS not in Bundle(tmp_path / "bundle").manifest.files


@pytest.mark.slow
def test_the_commands_of_the_page(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line of docs/retrieval.md, in its order; then its Python."""
    text = (ROOT / "docs" / "retrieval.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    assert len(lines) == 8
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "dssm").symlink_to(shop.runs["DSSM"])
    (tmp_path / "data").symlink_to(shop.root)
    monkeypatch.chdir(tmp_path)
    for line in lines:
        name, *arguments = shlex.split(line)
        assert name == "rechub-dist"
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, f"{line}: {done.output} {done.exception}"
        assert Path(arguments[arguments.index("--out") + 1]).is_dir()
    for out, wanted in (("exact", 100), ("books", 100), ("indexed", 100)):
        rows = rows_of(Path("retrieved") / out)
        assert all(0 < len(row["predicted_items"]) <= wanted for row in rows)
    exact, indexed = (rows_of(Path("retrieved") / out) for out in ("exact", "indexed"))
    assert_alike(indexed, exact)
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(code, "docs/retrieval.md", "exec"), {})


def test_a_run_is_exported_for_its_vectors(shop: Shop, tmp_path: Path) -> None:
    line = ["vectors", str(shop.runs["MIND"]), "--of", "items", "--out", str(tmp_path / "items")]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.output
    assert f"vectors of {ALL} items" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["items"]
    bundle = Bundle(shop.bundles["MIND"])
    found, wanted = pq.read_table(tmp_path / "items"), bundle_items(bundle)
    assert found["item"].to_pylist() == wanted["item"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--of", "users"], "--of users: name their rows with --data"),
        (["--of", "items", "--keep", "colour"], "--keep colour: the bundle's items have no such column"),
        (["--of", "users", "--data", "{now}", "--keep", "vectors"], "a column of this name is what is written"),
        (["--of", "items", "--set", "seed=1"], "is a bundle: --set and --allow-code are for runs"),
        (["--of", "items", "--data", "{now}"], "leave --data and --values out"),
    ],
)
def test_mistakes(shop: Shop, tmp_path: Path, arguments: list[str], message: str) -> None:
    words = [word.format(now=shop.root / "now") for word in arguments]
    done = CliRunner().invoke(app, ["vectors", str(shop.bundles["DSSM"]), "--out", str(tmp_path / "out"), *words])
    assert isinstance(done.exception, UserError)
    assert message in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_none_of_it_needs_what_trains(shop: Shop, tmp_path: Path) -> None:
    bundle, now = str(shop.bundles["DSSM"]), str(shop.root / "now")
    code = f"""
import sys
from pathlib import Path
from rechub_dist.inference import index, retrieve, vectors
out = Path({str(tmp_path)!r})
vectors.write_vectors(vectors.Wanted({bundle!r}, "items", str(out / "items")))
index.make_index(str(out / "items"), out / "index", index.Wanted("flat"))
retrieve.write_retrieved(retrieve.Wanted(
    {bundle!r}, {now!r}, str(out / "retrieved"), 5, str(out / "index"), "category = 'book'"))
print([name for name in ("torch", "torchrec", "fbgemm_gpu", "ray") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
    assert len(rows_of(tmp_path / "retrieved")) == 30
