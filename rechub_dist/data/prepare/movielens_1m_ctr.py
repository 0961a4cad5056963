"""MovieLens-1M as click prediction: would this user rate this movie above 3?

The protocol is RecBole's for its context-aware models: ratings of 3 are dropped, the label is `rating > 3` (739,012
rows), and the rows are split at random into 8 : 1 : 1, here with a fixed seed; valid and test have floor(n / 10) rows
each. Features are those of the user and the movie: ids, age, gender, occupation, release year and genres. Order and
time of the ratings are not features.

The vocabularies are those of the published files before ratings of 3 are dropped: every user, every movie with a
rating, every age group, occupation, year and genre.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rechub_dist.data.prepare.source import array, encode, read_delimited, source_file, vocabulary
from rechub_dist.data.prepare.writer import prepared_folder, write_schema, write_split
from rechub_dist.errors import UserError
from rechub_dist.features import FeatureSchema, Label, SparseFeature, Table

NAME = "movielens_1m_ctr"
SUMMARY = "MovieLens-1M, rating above 3 or below, random 8:1:1 (ratings.dat, users.dat, movies.dat)"
ORIGIN = "MovieLens 1M: https://grouplens.org/datasets/movielens/1m/"
SEED = 2020


def prepare(source: Path, out: Path) -> None:
    """Prepare `ratings.dat`, `users.dat` and `movies.dat` in the folder `source` in the folder `out`."""
    i32, text = pa.int32(), pa.string()
    ratings = read_delimited(
        source_file(source, "ratings.dat", ORIGIN),
        {"user": i32, "movie": i32, "rating": i32, "order": pa.int64()},
        delimiter="::",
    )
    users = read_delimited(
        source_file(source, "users.dat", ORIGIN),
        {"user": i32, "gender": text, "age": i32, "occupation": i32, "zip": text},
        delimiter="::",
    )
    movies = read_delimited(
        source_file(source, "movies.dat", ORIGIN),
        {"movie": i32, "title": text, "genre": text},
        delimiter="::",
        encoding="latin1",
    )
    movies = movies.filter(pc.is_in(movies["movie"], value_set=vocabulary(ratings["movie"])))

    columns: dict[str, pa.Array] = {}
    features: list[SparseFeature] = []

    def add(name: str, values: Any, of: Any, at: pa.Array, **options: Any) -> None:
        """Add a feature of users or movies (`of` gives its vocabulary), at the indices `at` of the ratings."""
        words = vocabulary(of)
        columns[name] = encode(values, words).take(at)
        features.append(SparseFeature(name, Table(name, len(words)), **options))

    ratings = ratings.filter(pc.not_equal(ratings["rating"], 3))
    by_user = _places(ratings["user"], users["user"], "users.dat")
    by_movie = _places(ratings["movie"], movies["movie"], "movies.dat")
    years = pc.struct_field(pc.extract_regex(movies["title"], r"\((?P<year>\d{4})\)\s*$"), "year")
    genres = array(pc.split_pattern(movies["genre"], "|"))

    add("user_id", users["user"], users["user"], by_user)
    add("item_id", movies["movie"], movies["movie"], by_movie)
    add("age", users["age"], users["age"], by_user)
    add("gender", users["gender"], users["gender"], by_user)
    add("occupation", users["occupation"], users["occupation"], by_user)
    add("release_year", years, years, by_movie)
    add("genre", genres, genres.flatten(), by_movie, pooling="mean")
    columns["label"] = array(pc.greater(ratings["rating"], 3).cast(pa.int8()))

    table = pa.table(columns)
    order = np.random.default_rng(SEED).permutation(table.num_rows)
    tenth = table.num_rows // 10
    ends = {"train": table.num_rows - 2 * tenth, "valid": table.num_rows - tenth, "test": table.num_rows}
    with prepared_folder(out, NAME, [source]) as folder:
        start = 0
        for split, end in ends.items():
            write_split(folder, split, table.take(order[start:end]))
            start = end
        write_schema(folder, NAME, FeatureSchema(tuple(features), (Label("label"),)))


def _places(values: Any, keys: Any, file: str) -> pa.Array:
    """The index of each value among the unsorted `keys`."""
    places = pc.index_in(array(values), value_set=array(keys))
    if places.null_count:
        raise UserError(f"ratings.dat names {array(values).filter(pc.is_null(places))[0]}, which {file} does not hold")
    return places
