"""What the README shows is what the code does and what the benchmarks wrote."""

import re
from pathlib import Path

import lightning as L
import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text()
RESULTS = REPOSITORY / "examples" / "benchmarks" / "results.md"


def table(text: str) -> list[str]:
    """The first table of a Markdown text, line by line."""
    found = re.search(r"(^\|.*\n)+", text, re.M)
    assert found is not None
    return found.group(0).splitlines()


def test_first_block_prints_the_tables_shown_below_it(tmp_path, monkeypatch, capsys):
    block = re.findall(r"```python\n(.*?)```", README, re.S)[0]
    short = {
        "max_epochs=12": "max_epochs=2, enable_progress_bar=False",
        "start=8": "start=1",
        "amount=0.5": "0.5, budget='2n'",
    }
    for long, fast in short.items():
        assert long in block
        block = block.replace(long, fast)
    monkeypatch.chdir(tmp_path)
    state = L.fabric.utilities.seed._collect_rng_states()
    exec(compile(block, "README.md", "exec"), {})
    L.fabric.utilities.seed._set_rng_states(state)
    printed, shown = capsys.readouterr().out, re.findall(r"```text\n(.*?)```", README, re.S)[0]
    for line in (line for line in shown.splitlines() if line.startswith(("layer ", "stage ", "net.layers", "whole"))):
        assert line.split()[0] in printed
    assert [line for line in shown.splitlines() if line.startswith("stage")] == [
        line for line in printed.splitlines() if line.startswith("stage")
    ]


def test_performance_table_is_the_one_the_benchmarks_wrote():
    assert table(README.split("## How fast", 1)[1]) == table(RESULTS.read_text())


@pytest.mark.parametrize("page", sorted({*REPOSITORY.glob("*.md"), *REPOSITORY.glob("[el]*/**/README.md")}))
def test_links_and_pictures_lead_to_files_and_headings(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name) if name else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name}: {target}"
