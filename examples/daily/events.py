"""Writes days of made-up events, a file a day: users click on items of the categories they like; items come and go.

python events.py EVENTS 3    writes EVENTS/2024-05-01.csv to EVENTS/2024-05-03.csv
"""

import sys
from pathlib import Path

import numpy as np

USERS, NEW_ITEMS, CATEGORIES, EVENTS = 200, 60, 8, 20_000


def write_days(folder: Path, days: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    likes = rng.normal(size=(USERS, CATEGORIES))  # of users for categories
    for day in range(1, days + 1):
        # the items of this day and of the two before
        item = rng.integers(max(0, day - 3) * NEW_ITEMS, day * NEW_ITEMS, EVENTS)
        user = rng.integers(0, USERS, EVENTS)
        category = item % CATEGORIES
        click = rng.random(EVENTS) < 1 / (1 + np.exp(1 - 2 * likes[user, category]))
        second = np.sort(rng.integers(0, 86_400, EVENTS))
        lines = [
            f"u{u},i{i},c{c},2024-05-{day:02d} {s // 3600:02d}:{s // 60 % 60:02d}:{s % 60:02d},{int(y)}"
            for u, i, c, s, y in zip(user, item, category, second, click, strict=True)
        ]
        text = "\n".join(["user,item,category,time,click", *lines]) + "\n"
        (folder / f"2024-05-{day:02d}.csv").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_days(Path(sys.argv[1]), int(sys.argv[2]))
