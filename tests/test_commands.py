"""What READMEs, YAML comments and scripts tell a reader to type: it parses, and names files that are there."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml
from helpers import EXAMPLES, REPOSITORY, own_setup, run_here

from lightning_eff import cli

READMES = [REPOSITORY / "README.md", *sorted(REPOSITORY.glob("examples/**/README.md"))]
READMES += sorted(REPOSITORY.glob("lightning_eff/**/README.md"))
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
CONFIGS = [*sorted((EXAMPLES / "configs").glob("*.yaml")), *sorted((REPOSITORY / "tests/conf").glob("*.yaml"))]
COMMAND = re.compile(r"(lightning-eff|python examples/\S+\.py)(?=\s|$)")
BLOCK = re.compile(r"(?ms)^```(\w*)\n(.*?)^```$")
OF_THE_READER = ("my_package.", " config.yaml", "...")  # files and modules that only the reader has


def _lines(path: Path) -> list[str]:
    """What stands in code of a README, in the comments of a YAML, or in the docstring of a script."""
    text = path.read_text()
    if path.suffix == ".md":
        blocks = [block for language, block in BLOCK.findall(text) if language == "bash"]
        return [*re.findall(r"`([^`\n]+)`", BLOCK.sub("", text)), *"".join(blocks).replace("\\\n", " ").splitlines()]
    if path.suffix == ".yaml":
        return re.sub(r"(?m)^# ?", "", text).replace("\\\n", " ").splitlines()
    return [line.removeprefix("Run:") for line in text.split('"""')[1].splitlines()]


def _commands() -> list[str]:
    """Each command once, without what explains it."""
    found = {}
    for path in (*READMES, *CONFIGS, *SCRIPTS):
        for line in _lines(path):
            for part in line.split("&&"):
                command = re.sub(r"\s+(#.*|\([^()]*\))$", "", part.strip())
                if COMMAND.match(command) and not any(own in command for own in OF_THE_READER):
                    found[command] = None
    return list(found)


COMMANDS = _commands()
FITS = {f"lightning-eff fit --config {path.relative_to(REPOSITORY)}" for path in CONFIGS}
SHELL = sorted(FITS | {command for command in COMMANDS if command.startswith("lightning-eff ")})
# what a longer command reads as well is read once
SHELL = [command for command in SHELL if not any(other.startswith(f"{command} ") for other in SHELL)]


def parser_of(script: Path) -> argparse.ArgumentParser:
    """The parser a script makes for itself, caught before it runs."""

    class CaughtError(Exception):
        pass

    def catch(self: argparse.ArgumentParser, *_: object) -> None:
        raise CaughtError(self)

    with patch.object(argparse.ArgumentParser, "parse_args", catch), pytest.raises(CaughtError) as caught:
        run_here(script)
    parser = caught.value.args[0]
    assert isinstance(parser, argparse.ArgumentParser)
    return parser


def read_by_the_command_line(
    args: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Print the configuration of a command, in the root of the repository; it must be one."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.syspath_prepend(REPOSITORY / "tests" / "early_exit")  # data of tests/conf/early_exit.yaml
    with own_setup("lightning-eff"), pytest.raises(SystemExit) as ended:
        cli.main([*args, *(() if "--print_config" in args else ("--print_config",))])
    assert ended.value.code == 0, capsys.readouterr().err
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]


def test_there_are_commands_of_every_kind() -> None:
    for begins in ("lightning-eff fit", "lightning-eff test", "python examples/benchmarks/", "python examples/f"):
        assert any(command.startswith(begins) for command in COMMANDS), begins


@pytest.mark.parametrize("command", [command for command in SHELL if len(command.split()) > 2])
def test_command_line_reads(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    read_by_the_command_line(shlex.split(command)[1:], monkeypatch, capsys)


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.parent.relative_to(REPOSITORY)))
def test_configurations_in_readmes_are_read(
    readme: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    others = {"model": ["--model=ImageClassifier", "--model.net=SmallCNN"], "data": ["--data=DigitsDataModule"]}
    for block in re.findall(r"```yaml\n(.*?)```", readme.read_text(), re.DOTALL):
        config = yaml.safe_load(block)
        if {"trainer", "model", "data"} & set(config):  # others are no configurations
            (tmp_path / "block.yaml").write_text(block)
            missing = [arg for key, args in others.items() if key not in config for arg in args]
            args = ["fit", *missing, "--config", str(tmp_path / "block.yaml")]
            read_by_the_command_line(args, monkeypatch, capsys)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script_takes_the_arguments_of_all_scripts_and_those_it_is_called_with(script: Path) -> None:
    parser = parser_of(script)
    for command in COMMANDS:
        if command.startswith(f"python examples/{script.name}"):
            parser.parse_args(shlex.split(command)[2:])
    given = parser.parse_args(["--fast", "--seed", "7"])
    assert (given.fast, given.seed, given.out) == (True, 7, Path("runs") / script.stem)
    assert {"-h", "--fast", "--seed", "--out"} == {action.option_strings[0] for action in parser._actions[:4]}
    assert re.search(rf"python examples/{script.name} .*--fast", str(parser.description)), (
        "the docstring must name --fast"
    )


def test_benchmarks_are_there_and_know_the_options_they_are_called_with() -> None:
    shared = (EXAMPLES / "benchmarks" / "harness.py").read_text()
    for command in COMMANDS:
        if command.startswith("python examples/benchmarks/"):
            program, *args = shlex.split(command)[1:]
            source = (REPOSITORY / program).read_text() + shared
            for option in (arg.partition("=")[0] for arg in args if arg.startswith("--")):
                assert f'"{option}"' in source, command


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.parent.relative_to(REPOSITORY)))
def test_tables_in_readmes_are_whole(readme: Path) -> None:
    """An empty line within a table makes text of the rows behind it."""
    text = re.sub(r"```.*?```", "", readme.read_text(), flags=re.DOTALL)
    for table in re.findall(r"(?m)(?:^\|.*\n?)+", text):
        assert re.match(r".*\n\|[\s:|-]+\n", table), table
        assert len({row.replace(r"\|", "").count("|") for row in table.splitlines()}) == 1, table


def test_scripts_that_are_named_are_there() -> None:
    for command in COMMANDS:
        if command.startswith("python "):
            assert (REPOSITORY / command.split()[1]).is_file(), command


def test_the_table_of_the_examples_has_a_row_for_each_of_them() -> None:
    rows = re.findall(r"(?m)^\| `(.*)$", (EXAMPLES / "README.md").read_text())
    told = {re.search(r"examples/(?:configs/)?(\w+\.(?:py|yaml))", row.split("`")[0]).group(1): row for row in rows}
    assert sorted(told) == sorted(path.name for path in (*SCRIPTS, *(EXAMPLES / "configs").glob("*.yaml")))
    for name, row in told.items():
        assert len(re.split(r"(?<!\\)\|", row)) == 5, f"{name}: command, what it shows, time in full, time when fast"
