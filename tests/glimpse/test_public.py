"""The public names of the room, and what they cost."""

import pytest
from helpers import run_python

from lightning_eff import glimpse


@pytest.mark.parametrize("name", glimpse.__all__)
def test_public_name_resolves_and_is_listed(name):
    assert getattr(glimpse, name) is not None
    assert name in dir(glimpse)


def test_table_of_places_has_every_public_name_that_is_not_an_option():
    options = {"AgentConfig", "GlimpseConfig", "ReplayOptions", "RewardOptions", "TrainingPlan", "ViTSize"}
    assert {*glimpse._PLACE_OF, *options} == set(glimpse.__all__)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"'lightning_eff\.glimpse' has no attribute 'Nothing'"):
        _ = glimpse.Nothing


def test_options_need_no_torch_and_backbones_tasks_and_policies_no_stable_baselines():
    told = run_python(
        """
import sys, lightning_eff.glimpse
print("torch" in sys.modules)
import lightning_eff.glimpse.backbones, lightning_eff.glimpse.tasks, lightning_eff.glimpse.policies
import lightning_eff.glimpse.exploration, lightning_eff.glimpse.evaluation, lightning_eff.glimpse.figures
print("torch" in sys.modules, "stable_baselines3" in sys.modules, "gymnasium" in sys.modules)
""",
        fresh=True,
    ).stdout.split()
    assert told == ["False", "True", "False", "False"]
