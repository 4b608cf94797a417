import re

import yaml
from helpers import REPOSITORY

from lightning_eff.surgery.state import untouched_generators
from lightning_eff.synthesis import TableSchema


def test_the_block_of_the_readme_runs(tmp_path, monkeypatch):
    text = (REPOSITORY / "lightning_eff/synthesis/README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    quick = block.replace("max_epochs=4", 'max_epochs=1, accelerator="cpu"').replace(
        "samples_per_class=200", "samples_per_class=20, steps_per_epoch=3"
    )
    with untouched_generators():
        exec(quick, names := {})
    assert len((tmp_path / "synthetic.csv").read_text().splitlines()) == 1_001
    assert names["again"].schema == names["model"].schema


def test_the_schema_of_the_readme_is_one():
    text = (REPOSITORY / "lightning_eff/synthesis/README.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    schema = TableSchema.from_dict(yaml.safe_load(block))
    assert schema.label_categories == ("yes", "no")
    assert schema.columns[1].zero_inflated
