"""The documentation as a site and on GitHub: every page is in the navigation, and every link leads somewhere."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
CODE = re.compile(r"^([ \t]*)(`{3,})[^\n]*\n.*?^\1\2[ \t]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")


class Loader(yaml.SafeLoader):
    """mkdocs.yml names functions by tags, which nothing here needs."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)  # type: ignore[no-untyped-call]


def without_code(page: Path) -> str:
    return CODE.sub("", page.read_text(encoding="utf-8"))


def anchors(text: str) -> set[str]:
    """Those of the headings, named as GitHub and the site do."""
    found: Counter[str] = Counter()
    names = set()
    for heading in re.findall(r"^#{1,6} +(.*)$", text, re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", re.sub(LINK, lambda link: link[0].split("]")[0], heading).lower())
        name = plain.strip().replace(" ", "-")
        names.add(f"{name}-{found[name]}" if found[name] else name)
        found[name] += 1
    return names


def entries(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    for below in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from entries(below)


def broken(page: Path, text: str) -> list[str]:
    """The links of a page that lead to no file, or to no heading of one."""
    wrong = []
    for target in LINK.findall(re.sub(r"`[^`\n]*`", "", text)):
        name, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (page.parent / name).resolve() if name else page
        if not file.is_file() or (anchor and anchor not in anchors(without_code(file))):
            wrong.append(target)
    return wrong


def test_every_page_is_in_the_navigation_once() -> None:
    site = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)
    assert sorted(entries(site["nav"])) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert broken(page, without_code(page)) == []


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_stay_within_the_site(page: Path) -> None:
    local = [target for target in LINK.findall(without_code(page)) if not re.match(r"[a-z]+:|#", target)]
    assert [target for target in local if DOCS not in (page.parent / target).resolve().parents] == []


def test_what_the_check_finds() -> None:
    page = DOCS / "index.md"
    assert broken(page, "[a](order.md#the-order-of-rows) [b](https://a.b/c) `[c](nowhere.md)`") == []
    assert broken(page, "[a](nowhere.md) [b](order.md#nowhere) [c](#nowhere)") == [
        *("nowhere.md", "order.md#nowhere", "#nowhere"),
    ]
    assert anchors("# Other forms: `--format`\n## A\n## A\n") == {"other-forms---format", "a", "a-1"}
