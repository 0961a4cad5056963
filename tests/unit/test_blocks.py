"""Every block of code in the documentation: its commands can be parsed, its YAML and Python mean something, and either
a test runs it or it is listed with the reason why none does.
"""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from rechub_dist.cli.main import app
from rechub_dist.config import RunConfig, parse_yaml, run_from
from rechub_dist.data.importing.plan import Plan, plan_of
from rechub_dist.launching.search import read_space
from rechub_dist.schema import parse_schema
from rechub_tests.blocks import (
    ROOT,
    Block,
    Command,
    begins,
    blocks,
    checked,
    commands,
    every_block,
    in_words,
    own_test,
    pages,
    reason,
    unrun,
)
from rechub_tests.runs import SCHEMA
from rechub_tests.unrun import BLOCKS, CHECKED, COMMANDS, PROGRAMS, RUN_BY

EVERY = every_block()
SHELL = [command for block in EVERY if block.is_shell for command in commands(block)]
BASE: dict[str, Any] = {
    "output_dir": "out",
    "data": {"root": "data", "dataset": SCHEMA, "labels": ["click"]},
    "model": {"name": "DeepFM", "features": ["user"], "hidden_units": [8], "dropout_rates": 0.0, "embedding_dim": 8},
}
PLAN: dict[str, Any] = {"user": "u", "item": "i", "time": "t", "features": {"user_id": {"kind": "sparse"}}}
TARGETS = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
# our program, also by other names, with the command that they pass their arguments to
ALIASES = {"rechub-dist": [], ".venv/bin/rechub-dist": []}
ALIASES |= {"launch/torchrun.sh": ["train"], "launch/slurm/train.sbatch": ["train"]}
PROGRAM = get_command(app)


def named(one: Block | Command) -> str:
    return one.name if isinstance(one, Block) else f"{one.block.name} {' '.join(one.words[:3])}"


def of(language: str) -> list[Block]:
    return [block for block in EVERY if block.language == language]


def ours(words: tuple[str, ...]) -> list[str] | None:
    """The arguments of `rechub-dist`, if a command is one of ours; also below another program."""
    for i, word in enumerate(words):
        if word in ALIASES:
            end = next((j for j, other in enumerate(words) if j > i and other in {"|", ">", "&", "&&"}), len(words))
            return [*ALIASES[word], *words[i + 1 : end]]
    return None


def parse(arguments: list[str]) -> None:
    """As the command line would, without running it."""
    command: Any = PROGRAM
    context = None
    while hasattr(command, "commands"):
        context = command.make_context(command.name, arguments, parent=context)
        _, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])
    command.make_context(command.name, list(arguments), parent=context)


@pytest.mark.parametrize("command", [one for one in SHELL if ours(one.words)], ids=named)
def test_a_command_of_ours_can_be_parsed(command: Command) -> None:
    page = [one for block in blocks(command.block.page) if block.is_shell for one in commands(block)]
    variables = dict(one.words[-1].split("=", 1) for one in page if one.is_setting)
    text = re.sub(r"\$(\w+)", lambda found: variables.get(found[1], found[0]), command.text)
    arguments = ours(in_words(re.sub(r"--outer-restarts \d+", "", text)))  # torchrun.sh's own option
    assert arguments is not None
    parse(arguments)


@pytest.mark.parametrize(
    "arguments", [["train"], ["train", "run.yaml", "--nprocs", "2"], ["trian", "run.yaml"], ["data", "inspect"]]
)
def test_what_cannot_be_parsed_is_found(arguments: list[str]) -> None:
    with pytest.raises(Exception, match=r"(?i)missing|no such option|no such command"):
        parse(arguments)


@pytest.mark.parametrize("command", [one for one in SHELL if one.words[0] == "make"], ids=named)
def test_a_target_of_make_is_there(command: Command) -> None:
    assert {word for word in command.words[1:] if "=" not in word} <= TARGETS


@pytest.mark.parametrize("command", SHELL, ids=named)
def test_a_file_of_the_checkout_is_there(command: Command) -> None:
    files = [word for word in command.words if re.match(r"(benchmarks|configs|docker|examples|launch)/", word)]
    assert [file for file in files if not (ROOT / file).exists()] == []


def merged(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    both = {key: merged(base[key], value) for key, value in more.items() if isinstance(base.get(key), dict)}
    return base | more | both


@pytest.mark.parametrize("block", of("yaml"), ids=named)
def test_yaml_is_what_it_is_said_to_be(block: Block, tmp_path: Path) -> None:
    tree = parse_yaml(block.text, block.name)
    if block.page == "docs/import.md" and "output_dir" not in tree:
        assert isinstance(plan_of(PLAN | tree), Plan)
    elif tree.keys() <= RunConfig.model_fields.keys():
        run_from(merged(BASE, tree))
    elif "features" in tree:
        parse_schema(tree, block.name)
    elif "resources" in tree:
        for path in (*tree["resources"], *tree["components"]):
            assert (ROOT / "docs" / path / "kustomization.yaml").is_file()
    else:
        (tmp_path / "space.yaml").write_text(block.text)
        assert read_space(tmp_path / "space.yaml", run_from(BASE), 1).keys() == tree.keys()


@pytest.mark.parametrize("block", of("python"), ids=named)
def test_python_compiles_and_finds_what_it_imports(block: Block) -> None:
    imports = [node for node in ast.walk(ast.parse(block.text, block.name)) if isinstance(node, ast.ImportFrom)]
    for node in imports:
        module = importlib.import_module(str(node.module))
        assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_the_site_knows_every_language() -> None:
    """With more than a word after the backticks it shows no block, and headings are lost."""
    assert [block.name for block in EVERY if not re.fullmatch(r"[a-z]+", block.language)] == []


@pytest.mark.parametrize("block", EVERY, ids=named)
def test_it_is_run_or_listed(block: Block) -> None:
    """Commands and Python are run unless they are listed, and configuration is read above."""
    if block.is_shell or block.language in ("python", "yaml"):
        return
    ways = [way for way in (own_test(block), unrun(block), checked(block)) if way]
    assert len(ways) == 1, f"{block.name}: {ways}; see tests/rechub_tests/unrun.py"


def test_what_is_listed_is_there() -> None:
    assert [one for one in RUN_BY if not any(b.page == one[0] and begins(b, one[1]) for b in EVERY)] == []
    assert [one for one in BLOCKS if not any(b.page == one[0] and begins(b, one[1]) for b in EVERY)] == []
    found = {
        (page, start)
        for page, start, _ in COMMANDS
        for c in SHELL
        if (c.block.page, c.text[: len(start)]) == (page, start)
    }
    assert {(page, start) for page, start, _ in COMMANDS} == found
    assert {command.words[0] for command in SHELL} >= PROGRAMS.keys()
    assert [one for one in CHECKED if not any(checked(block) == one[2] for block in EVERY)] == []


@pytest.mark.parametrize(("page", "test"), sorted({(page, test) for page, _, test in RUN_BY}))
def test_the_test_that_runs_a_page_reads_it(page: str, test: str) -> None:
    text = (ROOT / test).read_text(encoding="utf-8")
    assert Path(page).name in text
    assert page in pages()


def test_how_commands_are_found() -> None:
    text = "a 1 \\\n  --b # c's\ncurl -d '{\n  x}' # d\n# e\n\nA=1\nexport B=2\n"
    found = list(commands(Block("p", 1, "sh", text)))
    assert [one.words for one in found] == [("a", "1", "--b"), ("curl", "-d", "{\n  x}"), ("A=1",), ("export", "B=2")]
    assert [one.is_setting for one in found] == [False, False, True, True]


def test_a_reason_is_given_for_what_is_not_run() -> None:
    block = Block("docs/launch.md", 1, "sh", "kubectl get pods\nrechub-dist models\n")
    first, second = commands(block)
    assert "cluster" in str(reason(first))
    assert reason(second) is None
