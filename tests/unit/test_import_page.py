"""docs/import.md: its commands run, its examples are plans, and it has every key as the code describes it."""

from __future__ import annotations

import inspect
import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rechub_dist.config.section import Section
from rechub_dist.config.strict_yaml import parse_yaml
from rechub_dist.data.importing import plan as plans
from rechub_dist.data.importing.plan import Plan, plan_of

PAGE = Path(__file__).parents[2] / "docs" / "import.md"
TEXT = PAGE.read_text(encoding="utf-8")
SECTIONS = [
    cls
    for _, cls in inspect.getmembers(plans, inspect.isclass)
    if issubclass(cls, Section) and cls.__module__ == plans.__name__
]
[RUN, *EXAMPLES] = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
BASE: dict[str, Any] = {"user": "u", "item": "i", "time": "t", "features": {"user_id": {"kind": "sparse"}}}


def table_of(cls: type[Section]) -> str:
    """The keys of a section as the page has them; those of the section that it extends are not repeated."""
    inherited = {name for base in cls.__mro__[1:] for name in getattr(base, "model_fields", {})}
    lines = ["| key | default | |", "|---|---|---|"]
    for name, field in cls.model_fields.items():
        if name in inherited:
            continue
        assert field.description, f"{cls.__name__}.{name} has no description"
        if field.is_required():
            default = "needed"
        else:
            value = field.get_default(call_default_factory=True)
            default = "" if value is None or value in ((), {}) or isinstance(value, Section) else f"`{shown(value)}`"
        lines.append(f"| `{name}` | {default} | {field.description.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def shown(value: Any) -> str:
    """A value as YAML writes it."""
    value = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()


@pytest.mark.parametrize("cls", SECTIONS, ids=lambda cls: cls.__name__)
def test_every_key_is_there(cls: type[Section]) -> None:
    assert table_of(cls) in TEXT


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_is_a_plan(example: str) -> None:
    assert isinstance(plan_of(BASE | parse_yaml(example, "docs/import.md")), Plan)


@pytest.mark.slow
def test_the_ten_minute_way(tmp_path: Path) -> None:
    draw = random.Random(0)
    (tmp_path / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n"
        + "".join(
            f"{draw.randrange(60)},{draw.randrange(40)},{draw.choice([1.0, 3.5, 4.0, 5.0])},{1_600_000_000 + i * 500}\n"
            for i in range(3000)
        )
    )
    (tmp_path / "movies.csv").write_text(
        "movieId,title,genres\n"
        + "".join(f'{i},"Film, {i}",{draw.choice(["Drama|War", "War", "Comedy"])}\n' for i in range(40))
    )
    way = TEXT.partition("## The ten-minute way")[2].partition("\n## ")[0]
    assert RUN in way
    (tmp_path / "run.yaml").write_text(RUN)
    commands = [line for block in re.findall(r"```sh\n(.*?)```", way, re.DOTALL) for line in block.splitlines()]
    assert len(commands) == 4
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "200"}
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "rechub-dist"
        done = subprocess.run(
            [sys.executable, "-c", "from rechub_dist.cli.main import main; main()", *arguments],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "first" / "metrics.jsonl").is_file()
