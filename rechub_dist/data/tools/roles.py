"""What the columns of a data set are to a recommender: users, items, times, labels, histories."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from rechub_dist.config import StorageConfig, parse_yaml
from rechub_dist.data.parquet.storage import join, read_bytes
from rechub_dist.data.prepare.writer import SCHEMA_FILE
from rechub_dist.data.tools.guess import LABEL_NAME, TIME_NAME, time_unit
from rechub_dist.data.tools.tables import NUMBERS, Column, Tables, kind_of
from rechub_dist.errors import UserError, one_line
from rechub_dist.features import FeatureSchema, SequenceFeature, SparseFeature, StoredFeature, TimeGapFeature
from rechub_dist.schema import parse_schema

# In the order of preference; compared without case, separators and an ending such as `_id`.
_USERS = ("user", "u", "customer", "member", "visitor", "reviewer", "account", "client", "person", "profile", "session")
_ITEMS = (
    *("item", "i", "movie", "video", "product", "article", "news", "ad", "song", "track", "book", "business", "sku"),
    *("asin", "goods", "game", "artist", "photo", "post", "content", "document", "doc", "restaurant", "recipe"),
)
_TIMES = ("timestamp", "time", "ts", "datetime", "eventtime", "eventtimestamp", "date", "unixtime")
_ENDING = re.compile(r"(id|idx|index|key|hash|code|no)$")
_TIMES_OF_LIST = re.compile(r"time|(^|_)ts(_|$)", re.IGNORECASE)


@dataclass
class Roles:
    """The columns that have a role, each by name.

    Attributes:
        user, item, time: None if there is no such column.
        labels: the columns of labels.
        why: by column with a role, where that is known from: an option, dataset.yaml or its name.
        features: by column, what it is in the schema: `sparse`, `sequence`, `dense`, `label`, `weight` ...; empty
            without a schema.
        vocabularies: by column that holds the ids of a vocabulary, that file.
        histories: columns of lists of items.
        history_times: (column of times of a history's items, column of the row's time).
        note: why dataset.yaml is not used, if it cannot be.
    """

    user: str | None = None
    item: str | None = None
    time: str | None = None
    labels: tuple[str, ...] = ()
    why: dict[str, str] = field(default_factory=dict)
    features: dict[str, tuple[str, ...]] = field(default_factory=dict)
    vocabularies: dict[str, str] = field(default_factory=dict)
    histories: tuple[str, ...] = ()
    history_times: tuple[tuple[str, str], ...] = ()
    note: str | None = None


def find_roles(
    tables: Tables,
    *,
    user: str | None = None,
    item: str | None = None,
    time: str | None = None,
    labels: tuple[str, ...] = (),
    settings: StorageConfig | None = None,
) -> Roles:
    """The roles of the columns: as given, else by dataset.yaml, else by the columns' names and values.

    Raises:
        UserError: a column that is given does not exist.
    """
    roles = Roles()
    schema = _schema(tables.root, settings or StorageConfig(), roles)
    columns = {column.name: column for column in tables.columns}
    if schema is not None:
        _from_schema(schema, columns, roles)
    for option, given in (("--user", user), ("--item", item), ("--time", time)):
        if given is not None:
            roles.why[tables.column(given, option).name] = option
    roles.user, roles.item, roles.time = user, item, time or roles.time
    if labels:
        roles.labels = tuple(tables.column(label, "--label").name for label in labels)
        roles.why |= dict.fromkeys(labels, "--label")
    features = {} if schema is None else {f.name: f.source for f in schema.features if isinstance(f, StoredFeature)}
    if roles.user is None:
        roles.user = _by_name(_USERS, columns, features, roles)
    if roles.item is None:
        roles.item = _by_name(_ITEMS, columns, features, roles) or _of_histories(schema, columns, roles)
    if roles.time is None:
        roles.time = _time(tables, roles)
    if not roles.labels and schema is None:
        roles.labels = tuple(
            name
            for name, column in columns.items()
            if column.kind in ("integer", "float", "decimal", "bool")
            and LABEL_NAME.fullmatch(name)
            and name not in (roles.user, roles.item, roles.time)
        )
        roles.why |= dict.fromkeys(roles.labels, "its name")
    _find_histories(schema, columns, roles)
    return roles


def _schema(root: str, settings: StorageConfig, roles: Roles) -> FeatureSchema | None:
    path = join(root, SCHEMA_FILE)
    try:
        text = read_bytes(path, settings)
        return None if text is None else parse_schema(parse_yaml(text, path), root)
    except UserError as error:
        roles.note = f"{SCHEMA_FILE} is not used: {one_line(error)}"
        return None


def _from_schema(schema: FeatureSchema, columns: dict[str, Column], roles: Roles) -> None:
    kinds: dict[str, list[str]] = {}
    for feature in schema.features:
        if isinstance(feature, TimeGapFeature):
            kinds.setdefault(feature.times, []).append("times")
            kinds.setdefault(feature.now, []).append("time")
            if {feature.times, feature.now} <= columns.keys():
                roles.history_times += ((feature.times, feature.now),)
                if roles.time is None:
                    roles.time = feature.now
                    roles.why[feature.now] = f"{SCHEMA_FILE}: {feature.name}"
        elif (source := getattr(feature, "source", None)) is not None:
            kinds.setdefault(source, []).append(feature.kind)
        if isinstance(feature, SparseFeature) and feature.weights is not None:
            kinds.setdefault(feature.weights, []).append("weights")
        if isinstance(feature, StoredFeature) and getattr(feature, "encoded", False) and feature.vocabulary is not None:
            roles.vocabularies[feature.source] = feature.vocabulary
    for label in schema.labels:
        kinds.setdefault(label.source, []).append("label")
    if schema.weight is not None:
        kinds.setdefault(schema.weight, []).append("weight")
    roles.labels = tuple(label.source for label in schema.labels if label.source in columns)
    roles.why |= dict.fromkeys(roles.labels, SCHEMA_FILE)
    roles.features = {name: tuple(dict.fromkeys(found)) for name, found in kinds.items() if name in columns}


def _stem(name: str) -> str:
    plain = re.sub(r"[\W_]+", "", name).casefold()
    return _ENDING.sub("", plain) or plain


def _by_name(stems: tuple[str, ...], columns: dict[str, Column], features: dict[str, str], roles: Roles) -> str | None:
    """The scalar column whose name (or whose feature's name) is the first of `stems` that any has."""
    taken = {roles.user, roles.item, roles.time, *roles.labels}
    names = {name: name for name in columns} | features
    for stem in stems:
        for name, source in names.items():
            column = columns.get(source)
            if column is None or source in taken or column.kind not in ("integer", "text", "binary", "float"):
                continue
            if _stem(name) == stem:
                roles.why[source] = "its name" if name == source else f"{SCHEMA_FILE}: {name}"
                return source
    return None


def _of_histories(schema: FeatureSchema | None, columns: dict[str, Column], roles: Roles) -> str | None:
    """The only column of single ids that shares its table with a history."""
    features = () if schema is None else schema.features
    shared = {feature.table.name for feature in features if isinstance(feature, SequenceFeature)}
    found = [f.source for f in features if isinstance(f, SparseFeature) and f.table.name in shared]
    found = [name for name in found if name in columns and columns[name].kind in ("integer", "text")]
    if len(found) != 1 or found[0] == roles.user:
        return None
    roles.why[found[0]] = f"{SCHEMA_FILE}: shares its table with a history"
    return found[0]


def _time(tables: Tables, roles: Roles) -> str | None:
    """The column of times: by name, or the only one whose values are."""
    taken = {roles.user, roles.item, *roles.labels}
    columns = [column for column in tables.columns if column.name not in taken]
    columns = [column for column in columns if column.kind in ("time", "integer", "float")]
    for wanted in _TIMES:
        for column in columns:
            if re.sub(r"[\W_]+", "", column.name).casefold() == wanted:
                roles.why[column.name] = "its name"
                return column.name
    times = [column.name for column in columns if column.kind == "time"]
    if len(times) != 1:
        times = [name for name in times if TIME_NAME.search(name)]
    if not times:
        named = [column for column in columns if column.kind != "time" and TIME_NAME.search(column.name)]
        times = [column.name for column in named if _holds_times(tables, column)]
    if len(times) != 1:
        return None
    roles.why[times[0]] = "its values"
    return times[0]


def _holds_times(tables: Tables, column: Column) -> bool:
    condition = "isfinite(v)" if column.kind == "float" else "true"
    [(low, high)] = tables.rows(f"SELECT min(v), max(v) FROM ({tables.values(column)}) WHERE {condition}")
    return low is not None and time_unit(low, high) is not None


def _find_histories(schema: FeatureSchema | None, columns: dict[str, Column], roles: Roles) -> None:
    """The lists of items: of the schema, or those whose elements are of the item's type and that are named so."""
    lists = {name: column for name, column in columns.items() if column.kind == "list"}
    item = columns.get(roles.item or "")
    if schema is not None and item is not None:
        tables = {f.table.name for f in schema.features if isinstance(f, StoredFeature) and f.source == item.name}
        sequences = [f for f in schema.features if isinstance(f, SequenceFeature) and f.table.name in tables]
        roles.histories = tuple(
            f.source for f in sequences if f.source in lists and comparable(lists[f.source].element, item.type)
        )
    elif item is not None:
        stem = _stem(item.name)
        named = re.compile(rf"hist|behaviou?r|sequence|(^|_)seq|clicked|viewed|{re.escape(stem)}s?", re.IGNORECASE)
        roles.histories = tuple(
            name for name, column in lists.items() if named.search(name) and comparable(column.element, item.type)
        )
    if not roles.history_times and roles.time is not None:
        now: Any = columns[roles.time]
        roles.history_times = tuple(
            (name, now.name)
            for name, column in lists.items()
            if _TIMES_OF_LIST.search(name) and comparable(column.element, now.type)
        )


def comparable(one: str, other: str) -> bool:
    """Whether values of two DuckDB types can be equal: both are numbers, both text, or both times."""
    kinds = ["number" if kind_of(type_) in NUMBERS else kind_of(type_) for type_ in (one, other)]
    return kinds[0] == kinds[1] and kinds[0] in ("number", "text", "time")
