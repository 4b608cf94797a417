import copy
import math
import pickle
import struct

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from synthesis.private_records import CountedData, records, small, trainer
from torch import nn

from lightning_eff.synthesis import DPNTKGenerator, FCFeatureNet, FeatureOptions, MLPGenerator, SynthesisFigures

SCHEMA = {
    "label": "income",
    "label_categories": ["<=50K", ">50K"],
    "columns": [{"name": "age", "low": 17, "high": 90, "bins": 8}, {"name": "sex", "categories": ["Male", "Female"]}],
}


def saving(folder, **arguments):
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **arguments)


@pytest.fixture
def trained(tmp_path):
    data = CountedData(records())
    run = trainer(max_epochs=2, enable_checkpointing=True, callbacks=[saving(tmp_path)])
    run.fit(module := small(), datamodule=data)
    return module, data, tmp_path / "step=14.ckpt"


def test_a_loaded_generator_needs_no_data_and_generates_the_same(trained):
    module, data, path = trained
    data.train.reads.clear()
    again = DPNTKGenerator.load_from_checkpoint(path)
    assert torch.equal(again.generate(20, seed=1).x, module.generate(20, seed=1).x)
    assert torch.equal(again.embedding.flatten(), module.embedding.flatten())
    assert torch.equal(again.features.dense(records()[0]), module.features.dense(records()[0]))
    assert again.ledger.state_dict() == module.ledger.state_dict()
    assert str(again.privacy_report()) == str(module.privacy_report())
    assert not data.train.reads


def test_a_checkpoint_holds_plain_values_and_tensors_only(trained):
    torch.load(trained[2], weights_only=True)


def test_resuming_reads_nothing_spends_nothing_and_ends_where_an_uninterrupted_run_ends(tmp_path):
    def run(epochs, folder, path=None):
        torch.manual_seed(0)
        data = CountedData(records())
        module = small(release_options={"noise_seed": 0}, matching={"lr_schedule": "step", "lr_period": 5})
        callbacks = [saving(folder, every_n_train_steps=5)]
        trainer(max_epochs=epochs, enable_checkpointing=True, callbacks=callbacks).fit(
            module, datamodule=data, ckpt_path=path
        )
        return module, data

    whole, _ = run(3, tmp_path / "whole")
    first, _ = run(2, tmp_path / "part")
    for path in (tmp_path / "part/step=10.ckpt", tmp_path / "whole/step=5.ckpt"):  # in the middle of an epoch
        module, data = run(3, tmp_path / "resumed", path)
        assert not data.train.reads
        assert data.asked == 0
        assert module.ledger.steps == 1
        assert module.steps_trained == 21
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(module.state_dict()[name], value, rtol=0, atol=0)
    assert first.steps_trained == 14


def test_what_a_checkpoint_holds_of_the_data_are_noisy_sums_alone(tmp_path):
    # a pattern that no arithmetic makes by chance: in every record, and as the only record of a class
    pattern = [0.123456789, 0.987654321, 0.192837465, 0.564738291]
    x, _ = records(60)
    x[::2] = torch.tensor(pattern)
    y = torch.arange(60) % 3
    module = small(release_options={"label_prior": "uniform"})
    kept = []
    make = module.features.sums

    def keeping(*arguments, **options):
        sums = make(*arguments, **options)
        sums.add(x, y)
        kept.append(copy.deepcopy(sums.embedding().flatten()))
        return make(*arguments, **options)

    module.features.sums = keeping
    module.release((x, y))
    del module.features.sums
    trainer(enable_checkpointing=True, callbacks=[saving(tmp_path)]).fit(module)
    clean = kept[0]
    assert not torch.allclose(module.embedding.flatten(), clean.float(), atol=0.1)
    held = _numbers(torch.load(tmp_path / "step=14.ckpt", weights_only=True))
    for tensor in held:
        flat = tensor.double().flatten()
        for value in pattern:
            assert not bool((flat - value).abs().lt(1e-7).any())
        for scale in (1.0, 1 / 20):  # class sums and class means
            assert not _runs_in(scale * clean.flatten(), flat)
    noisy = module.embedding.flatten().double().flatten()
    assert any(_runs_in(noisy, tensor.double().flatten()) for tensor in held)  # the search finds what is there
    data = (tmp_path / "step=14.ckpt").read_bytes()
    for value in pattern:
        for kind in ("<f", "<d"):
            packed = struct.pack(kind, value)
            assert packed not in data
    assert struct.pack("<f", float(module.embedding.flatten()[0, 0])) in data


def _runs_in(wanted, flat):
    """Whether four numbers that follow each other in ``wanted``, none of them zero, do so in ``flat``."""
    if flat.numel() < 4:
        return False
    runs = wanted.unfold(0, 4, 4)
    runs = runs[(runs.abs() > 1e-3).all(dim=1)]
    return bool((flat.unfold(0, 4, 1)[None] - runs[:, None]).abs().lt(1e-5).all(dim=2).any())


def _numbers(tree):
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        return [tensor for value in tree.values() for tensor in _numbers(value)]
    if isinstance(tree, list | tuple):
        return [tensor for value in tree for tensor in _numbers(value)]
    return []


def test_no_state_of_a_random_generator_is_in_a_checkpoint(trained):
    # mt19937 has 2,496 bytes of state and torch keeps it in tensors of 5,056
    state = torch.load(trained[2], weights_only=True)
    assert not [tensor for tensor in _numbers(state) if tensor.dtype == torch.uint8]


def test_the_number_of_records_is_not_in_a_checkpoint_where_it_is_private(tmp_path):
    x, y = records(7_919)
    module = small(release_options={"adjacency": "add_remove"})
    module.release((x, y))
    trainer(enable_checkpointing=True, callbacks=[saving(tmp_path)]).fit(module)
    state = torch.load(tmp_path / "step=14.ckpt", weights_only=True)
    assert "7919" not in str({name: value for name, value in state["dp_ntk"].items() if name != "embedding"})
    assert state["dp_ntk"]["embedding"]["num_records"] is None
    assert "7919" not in str(state["dp_ntk"]["embedding"]["meta"])


def test_the_loaders_of_a_data_module_are_never_pickled_with_the_module(trained):
    module, _, _ = trained
    module._shadow = object()
    assert pickle.loads(pickle.dumps(module))._shadow is None


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"input_shape": (5,)}, "input_shape"),
        ({"num_classes": 4}, "num_classes"),
        ({"feature_widths": (9,)}, "feature network"),
        ({"epsilon": 2.0}, "epsilon"),
        ({"delta": 1e-6}, "delta"),
        ({"release_options": {"adjacency": "add_remove"}}, "adjacency"),
        ({"release_options": {"max_contributions": 50}}, "max_contributions"),
        ({"release_options": {"label_prior": "uniform"}}, "label_prior"),
        ({"release_options": {"count_weight": 0.5}}, "count_weight"),
        ({"generator": MLPGenerator(3, 3, (4,), output="tanh")}, None),
    ],
)
def test_a_checkpoint_of_another_module_names_the_first_difference(trained, arguments, field):
    other = small(**{"epsilon": 5.0, **arguments})
    data = CountedData(records())
    run = trainer(max_epochs=3)
    if field is None:
        with pytest.raises(RuntimeError, match="size mismatch"):
            run.fit(other, datamodule=data, ckpt_path=trained[2])
    else:
        with pytest.raises(ValueError, match=f"made with (another {field}: expected|{field} = .*leave {field} out)"):
            run.fit(other, datamodule=data, ckpt_path=trained[2])
    assert not data.train.reads


def test_a_release_is_not_loaded_under_promises_that_it_did_not_keep(trained):
    for options in ({"max_contributions": 50}, {"label_prior": "uniform"}, {"adjacency": "add_remove"}):
        with pytest.raises(ValueError, match=f"made with another {next(iter(options))}"):
            DPNTKGenerator.load_from_checkpoint(trained[2], release_options=options)


def test_validation_that_is_allowed_on_loading_is_in_the_report(trained):
    again = DPNTKGenerator.load_from_checkpoint(trained[2], release_options={"allow_nonprivate_validation": True})
    assert any("val/mmd2" in sentence for sentence in again.privacy_report().not_covered)
    assert again.privacy_report().facts["nonprivate_validation"] is True
    assert trained[0].privacy_report().facts["nonprivate_validation"] is False


def test_an_older_checkpoint_takes_no_release_out_of_the_ledger(trained):
    module, _, path = trained
    module.release(records())
    module.release(records(), epsilon=4.0)
    spent = module.ledger.epsilon()
    trainer(max_epochs=3).fit(module, ckpt_path=path)
    assert module.ledger.steps == 3
    assert module.ledger.epsilon() == spent
    # a later checkpoint of the same history goes on with it
    later = path.with_name("later.ckpt")
    module.trainer.save_checkpoint(later)
    again = DPNTKGenerator.load_from_checkpoint(later)
    trainer(max_epochs=3).fit(DPNTKGenerator.load_from_checkpoint(path), ckpt_path=later)
    assert again.ledger.state_dict() == module.ledger.state_dict()
    trainer(max_epochs=4).fit(again, ckpt_path=path)
    assert again.ledger.steps == 3


def test_a_checkpoint_of_other_releases_is_refused_also_where_they_cost_the_same(trained):
    module = small()
    module.release(records())
    before = module.ledger.state_dict(), module.embedding
    with pytest.raises(ValueError, match=r"made 1 releases and the checkpoint tells of 1, not all of them the same"):
        trainer(max_epochs=3).fit(module, ckpt_path=trained[2])
    assert (module.ledger.state_dict(), module.embedding) == before


def test_a_checkpoint_of_another_schema_names_it(tmp_path):
    rows = {"age": [20.0, 60.0] * 50, "sex": ["Male"] * 100, "income": ["<=50K", ">50K"] * 50}
    arguments = {"feature_widths": (8,), "steps_per_epoch": 2, "samples_per_class": 4}
    module = DPNTKGenerator(1.0, schema=SCHEMA, **arguments)
    module.release(rows)
    trainer(max_epochs=1, enable_checkpointing=True, callbacks=[saving(tmp_path)]).fit(module)
    again = DPNTKGenerator.load_from_checkpoint(tmp_path / "step=2.ckpt")
    assert again.schema == module.schema
    assert again.generate(9, seed=0).rows == module.generate(9, seed=0).rows
    renamed = {**SCHEMA, "columns": [{"name": "years", "low": 17, "high": 90, "bins": 8}, SCHEMA["columns"][1]]}
    with pytest.raises(ValueError, match="made with another schema"):
        trainer().fit(DPNTKGenerator(1.0, schema=renamed, **arguments), ckpt_path=tmp_path / "step=2.ckpt")


class Plain(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)


def test_a_checkpoint_without_a_release_is_refused(tmp_path):
    run = trainer()
    run.strategy.connect(Plain())
    run.save_checkpoint(tmp_path / "plain.ckpt")
    data = CountedData(records())
    with pytest.raises(ValueError, match="expected a checkpoint of DPNTKGenerator"):
        trainer().fit(small(), datamodule=data, ckpt_path=tmp_path / "plain.ckpt")
    assert not data.train.reads


def test_where_a_checkpoint_gave_no_release_back_the_data_are_not_read_a_second_time(trained):
    class Late(DPNTKGenerator):
        def on_load_checkpoint(self, checkpoint):
            """As with strategies that restore after on_fit_start."""

    data = CountedData(records())
    module = Late(5.0, num_classes=3, input_shape=(4,), feature_widths=(8,), latent_dim=3, steps_per_epoch=7)
    with pytest.raises(RuntimeError, match="has not given its release back yet"):
        trainer(max_epochs=3).fit(module, datamodule=data, ckpt_path=trained[2])
    assert not data.train.reads


def test_networks_of_ones_own_are_handed_over_again_and_get_their_weights_back(tmp_path):
    def build():
        options = FeatureOptions(network=FCFeatureNet(4, (6,), seed=int(torch.randint(1_000, (1,)))))
        return {"feature_options": options, "generator": MLPGenerator(3, 3, (4,), (7,), output="identity")}

    module = small(**build())
    module.release(records())
    trainer(max_epochs=1, enable_checkpointing=True, callbacks=[saving(tmp_path)]).fit(module)
    again = DPNTKGenerator.load_from_checkpoint(tmp_path / "step=7.ckpt", **build())
    assert torch.equal(again.generate(5, seed=0).x, module.generate(5, seed=0).x)
    assert torch.equal(again.features.dense(records()[0]), module.features.dense(records()[0]))


def test_a_subclass_with_arguments_of_its_own_is_loaded_too(tmp_path):
    class Mine(DPNTKGenerator):
        def __init__(self, extra: int, **arguments):
            super().__init__(**arguments)
            self.save_hyperparameters()
            self.extra = extra

    arguments = {
        "num_classes": 3,
        "input_shape": (4,),
        "feature_options": FeatureOptions(seed=3),
        "samples_per_class": 3,
    }
    module = Mine(7, epsilon=2.0, **arguments, steps_per_epoch=2)
    module.release(records())
    trainer(max_epochs=1, enable_checkpointing=True, callbacks=[saving(tmp_path)]).fit(module)
    again = Mine.load_from_checkpoint(tmp_path / "step=2.ckpt")
    assert again.extra == 7
    assert again.feature_options == module.feature_options


def test_numbers_of_numpy_become_plain_ones_in_a_checkpoint(tmp_path):
    module = small(
        np.float64(5.0),
        num_classes=np.int64(3),
        feature_widths=(np.int64(8),),
        latent_dim=np.int64(3),
        release_options={"max_contributions": np.int64(2)},
    )
    module.release(records())
    run = trainer(max_steps=2, max_epochs=None)
    run.fit(module)
    run.save_checkpoint(tmp_path / "numpy.ckpt")
    torch.load(tmp_path / "numpy.ckpt", weights_only=True)
    assert DPNTKGenerator.load_from_checkpoint(tmp_path / "numpy.ckpt").noise_dim == 3


def test_an_infinite_epsilon_survives_a_checkpoint(tmp_path):
    module = small(math.inf)
    with pytest.warns(UserWarning, match="NOT PRIVATE"):
        module.release(records())
    trainer(max_epochs=1, enable_checkpointing=True, callbacks=[saving(tmp_path)]).fit(module)
    again = DPNTKGenerator.load_from_checkpoint(tmp_path / "step=7.ckpt")
    assert not again.privacy_report().private


def test_pictures_go_on_after_a_resume(tmp_path):
    def run(epochs, path=None):
        figures = SynthesisFigures(tmp_path / "figures", every_n_steps=10)
        callbacks = [saving(tmp_path), figures]
        run = trainer(max_epochs=epochs, enable_checkpointing=True, callbacks=callbacks)
        run.fit(small(), datamodule=CountedData(records()), ckpt_path=path)
        return figures

    first = run(1)
    again = run(2, tmp_path / "step=7.ckpt")
    assert again.state_dict()["steps"] == list(range(1, 15))
    assert again.state_dict()["losses"][:7] == first.state_dict()["losses"]
