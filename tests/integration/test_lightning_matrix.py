"""The table of `lightning_eff/README.md`, "With Lightning": every cell stands on a test that is there.

`python tests/integration/test_lightning_matrix.py` prints the section.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parents[1]
README = TESTS.parent / "lightning_eff" / "README.md"
HERE = "integration/test_lightning_"
TECHNIQUES = [
    "ShapleyPruningCallback",
    "DirichletPruneCallback",
    "RandomChannelPruningCallback",
    "EarlyExitModule",
    "DPGradientDropStrategy",
    "DPPrePruneCallback",
    "DPNTKGenerator",
    "MoEScalingModule",
    "ReplaceFFN",
    "AdaGlimpseModule",
    "LidarSaSSelector",
    "LidarSaSCallback",
]
WITH_OTHERS = {"DPPrePruneCallback": "with DPGradientDropStrategy", "LidarSaSCallback": "with DepthCompletionModule"}
PRIVATE = TECHNIQUES[4:6]
MANUAL = ["AdaGlimpseModule", "LidarSaSSelector"]

# column -> the test that shows that it works, of every technique not named below
WORKS = {
    "EMAWeightAveraging": "averages.py::test_exponential_averages_are_those_of_the_closed_form",
    "StochasticWeightAveraging": "averages.py::test_stochastic_averages_are_means_over_epochs",
    "ModelCheckpoint": "checkpoints.py::test_the_best_and_the_last_checkpoint_give_the_answers_of_their_time",
    "save_checkpoint": "checkpoints.py::test_what_is_saved_by_hand_after_a_fit_gives_the_same_answers",
    "OnExceptionCheckpoint": "checkpoints.py::test_a_run_that_breaks_leaves_a_checkpoint_that_goes_on",
    "EarlyStopping": "checkpoints.py::test_a_fit_that_is_stopped_early_ends_like_one_of_so_many_epochs",
    "Timer": "checkpoints.py::test_a_timer_goes_on_in_a_resumed_run",
    "LearningRateMonitor, CSVLogger": "steps.py::test_learning_rates_are_monitored_at_every_step",
    "accumulate_grad_batches": "steps.py::test_accumulated_batches_equal_large_ones",
    "GradientAccumulationScheduler": "steps.py::test_a_schedule_of_accumulation_equals_a_growing_batch",
    "gradient_clip_val": "steps.py::test_gradients_are_clipped_also_after_what_changes_parameters",
    "bf16-mixed": "precision.py::test_weights_stay_in_single_precision_under_autocast",
    "bf16-true": "precision.py::test_everything_that_is_trained_is_rounded_where_that_is_asked_for",
    "torch.compile": "compile.py::test_a_compiled_module_ends_like_any_other",
    "BatchSizeFinder": "tuners.py::test_a_fit_whose_batch_size_was_searched_is_the_fit_of_that_batch_size",
    "LearningRateFinder": "tuners.py::test_a_fit_whose_learning_rate_was_searched_is_the_fit_of_that_learning_rate",
    "validate, test, predict without fit": "trainers.py::test_without_a_fit_the_module_is_evaluated_as_it_is",
    "fast_dev_run": "trainers.py::test_one_batch_of_everything_runs_and_leaves_no_file",
    "limit_*_batches": "trainers.py::test_limits_of_batches_are_kept_and_the_work_is_done",
    "barebones": "trainers.py::test_a_bare_run_ends_with_the_same_bits",
    "RichProgressBar, RichModelSummary": "trainers.py::test_callbacks_that_look_on_change_no_bit",
}
LENGTH = HERE + "checkpoints.py::test_a_fit_whose_course_depends_on_its_length_stops_early_too"
COSINE = HERE + "steps.py::test_a_cosine_ends_with_the_last_of_the_steps_of_accumulated_batches"
OTHER_TESTS = {
    ("EarlyStopping", "EarlyExitModule"): LENGTH,
    ("EarlyStopping", "DPNTKGenerator"): LENGTH,
    ("EarlyStopping", "MoEScalingModule"): LENGTH,
    ("EarlyStopping", "AdaGlimpseModule"): LENGTH,
    ("EarlyStopping", "LidarSaSSelector"): (
        "lidar/test_selector.py::test_early_stopping_ends_a_fit_whose_values_are_sure_enough"
    ),
    ("accumulate_grad_batches", "EarlyExitModule"): (
        "early_exit/test_composition.py::test_accumulated_batches_equal_large_ones"
    ),
    ("accumulate_grad_batches", "DPNTKGenerator"): COSINE,
    ("accumulate_grad_batches", "MoEScalingModule"): (
        "moe/test_module.py::test_a_step_of_several_batches_is_one_loss_of_the_window"
    ),
    ("accumulate_grad_batches", "ReplaceFFN"): (
        "moe/test_aux_scale.py::test_a_trainer_ends_with_the_weights_of_added_losses"
    ),
    ("GradientAccumulationScheduler", "EarlyExitModule"): (
        HERE + "steps.py::test_a_schedule_of_a_phase_counts_the_steps_of_a_schedule_of_accumulation"
    ),
    ("GradientAccumulationScheduler", "DPNTKGenerator"): COSINE,
    ("GradientAccumulationScheduler", "MoEScalingModule"): COSINE,
    ("GradientAccumulationScheduler", "ReplaceFFN"): (
        "moe/test_aux_scale.py::test_scale_follows_a_schedule_of_accumulation_and_manual_optimization"
    ),
    ("LearningRateFinder", "DPNTKGenerator"): HERE + "tuners.py::test_a_generator_is_searched_for_after_its_release",
    ("validate, test, predict without fit", "DPNTKGenerator"): (
        HERE + "trainers.py::test_a_generator_is_asked_for_records_without_data"
    ),
}
# (columns, techniques, test, what the error says): the error comes before any work
REFUSED: list[tuple[list[str], list[str], str, str]] = [
    (
        ["StochasticWeightAveraging"],
        ["AdaGlimpseModule"],
        "averages.py::test_averages_of_an_agent_and_its_backbone_by_epoch_are_refused",
        "agent and backbone have optimizers of their own: use EMAWeightAveraging",
    ),
    (
        ["StochasticWeightAveraging"],
        ["LidarSaSSelector"],
        "averages.py::test_averages_of_what_trains_nothing_are_refused",
        "LidarSaSSelector trains nothing that could be averaged: leave it out",
    ),
    (
        ["accumulate_grad_batches", "GradientAccumulationScheduler"],
        PRIVATE,
        "steps.py::test_accumulation_is_refused_where_somebody_else_makes_the_steps",
        "take the batch size you want to train with and max_physical_batch_size=",
    ),
    (
        ["accumulate_grad_batches", "GradientAccumulationScheduler"],
        MANUAL,
        "steps.py::test_accumulation_is_refused_where_somebody_else_makes_the_steps",
        r"not supported for\s+manual optimization",
    ),
    (
        ["gradient_clip_val"],
        MANUAL,
        "steps.py::test_gradients_that_the_trainer_never_sees_are_not_clipped_by_it",
        "gradient clipping is not supported for manual optimization",
    ),
    (
        ["bf16-mixed", "bf16-true"],
        ["LidarSaSSelector"],
        "precision.py::test_precisions_that_would_round_what_must_not_be_are_refused",
        "metres must not be rounded",
    ),
    (
        ["bf16-true"],
        ["AdaGlimpseModule"],
        "precision.py::test_precisions_that_would_round_what_must_not_be_are_refused",
        "the agent learns in single precision",
    ),
    (
        ["bf16-true"],
        ["LidarSaSCallback"],
        "precision.py::test_precisions_that_would_round_what_must_not_be_are_refused",
        "rounds before they are seen: use 'bf16-mixed'",
    ),
    (
        ["torch.compile"],
        PRIVATE,
        "compile.py::test_private_training_of_compiled_modules_is_refused",
        "train it without torch.compile, and compile it for inference",
    ),
    (
        ["BatchSizeFinder", "LearningRateFinder"],
        PRIVATE,
        "tuners.py::test_searches_that_no_epsilon_covers_are_refused",
        "a tuner chooses by training losses that epsilon does not cover",
    ),
    (
        ["LearningRateFinder"],
        ["EarlyExitModule", "MoEScalingModule", *MANUAL],
        "tuners.py::test_a_search_names_the_learning_rate_that_is_missing",
        "should have one of these fields: .'lr', 'learning_rate'",
    ),
    (
        ["validate, test, predict without fit"],
        ["LidarSaSSelector"],
        "trainers.py::test_lines_are_measured_after_a_fit_or_from_a_checkpoint",
        "no lines are selected yet: call trainer.fit first, or give ckpt_path",
    ),
]
IDLE = [("LearningRateMonitor, CSVLogger", "LidarSaSSelector"), ("BatchSizeFinder", "DPNTKGenerator")]
NOTES = """\
Pruning callbacks stand behind callbacks that average weights, `ReplaceFFN` before them; the other order is refused.
`torch.compile` means both `module.compile()` and `torch.compile(module)` handed to the Trainer; steps of
`LidarSaSSelector` and the loss of `DPNTKGenerator` run as they are all the same. Where the network has BatchNorm,
Lightning's `StochasticWeightAveraging` makes one more optimizer step in the pass that estimates its statistics (2.6.6).
`DPNTKGenerator` is searched for a learning rate, and validated, as its errors say: after `release`, without private
data. Nothing is to be told of learning rates where nothing is trained, nor of batches where training reads none."""


def refusal(column: str, technique: str) -> int | None:
    """Number of the error of a cell."""
    found = [i for i, (columns, names, *_) in enumerate(REFUSED, 1) if column in columns and technique in names]
    return found[0] if found else None


def cell(column: str, technique: str) -> str:
    if (column, technique) in IDLE:
        return "not meaningful"
    number = refusal(column, technique)
    return "works" if number is None else f"refused ({number})"


def shown(message: str) -> str:
    """What is matched, as it is read."""
    return message.replace(r"\s+", " ").replace(" .'lr', 'learning_rate'", " ('lr', 'learning_rate')")


def section() -> str:
    """The section of the README."""
    lines = ["## With Lightning", "", f"| technique | {' | '.join(f'`{one}`' for one in WORKS)} |"]
    lines.append("|---" * (len(WORKS) + 1) + "|")
    for technique in TECHNIQUES:
        other = WITH_OTHERS.get(technique)
        name = f"`{technique}`" + (f" {other.replace('with ', 'with `')}`" if other else "")
        lines.append(f"| {name} | {' | '.join(cell(column, technique) for column in WORKS)} |")
    lines += ["", "What is refused is refused before any work, by an error that says:", ""]
    lines += [f"{number}. {shown(message)}" for number, (*_, message) in enumerate(REFUSED, 1)]
    lines += ["", NOTES, "", "Every cell stands on a test that `tests/integration/test_lightning_matrix.py` names."]
    return "\n".join(lines) + "\n"


@cache
def module_of(file: str) -> Any:
    """A file of tests, imported."""
    path = TESTS / file
    sys.path[:0] = [str(path.parent), str(TESTS)]
    try:
        spec = importlib.util.spec_from_file_location(f"matrix_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        del sys.path[:2]
    return module


def covered(test: Any) -> set[str] | None:
    """Names of techniques that a test is run for; None for a test of one."""
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            names = [mark.args[0]] if isinstance(mark.args[0], str) else list(mark.args[0])
            if "name" in names:
                values = [getattr(one, "values", one) for one in mark.args[1]]
                return {one if isinstance(one, str) else one[names.index("name")] for one in values}
    return None


def test_the_table_in_the_readme_is_this_one() -> None:
    assert section() in README.read_text()


@pytest.mark.parametrize("column", WORKS)
def test_every_cell_stands_on_a_test(column: str) -> None:
    for technique in TECHNIQUES:
        number = refusal(column, technique)
        if (column, technique) in IDLE:
            continue
        where = OTHER_TESTS.get((column, technique), HERE + WORKS[column])
        if number is not None:
            where = HERE + REFUSED[number - 1][2]
        file, name = where.split("::")
        test = getattr(module_of(file), name)
        if file.startswith(HERE):
            assert technique in (covered(test) or {technique} & set(_told_in(test))), (technique, where)
        if number is not None:
            assert REFUSED[number - 1][3] in inspect.getsource(test), (technique, where)


def _told_in(test: Any) -> list[str]:
    return [technique for technique in TECHNIQUES if technique in inspect.getsource(test)]


if __name__ == "__main__":
    print(section(), end="")
