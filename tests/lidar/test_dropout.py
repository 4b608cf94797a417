from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_eff.data import ResumableLoader
from lightning_eff.lidar.batches import LidarKeys
from lightning_eff.lidar.dropout import LineDropout, drop_lines

LINES = 12


def frame(index: int) -> dict[str, Any]:
    """One row a line, every third pixel a return; depth in metres names frame and line."""
    line_idx = torch.arange(LINES, dtype=torch.uint8).view(1, LINES, 1).expand(1, LINES, 6).clone()
    sparse = 1 + index + line_idx.float() / 100
    sparse[..., 1::3] = 0
    line_idx[..., 1::3] = 255
    return {"rgb": torch.zeros(3, LINES, 6), "sparse": sparse, "gt": sparse + 0.0, "line_idx": line_idx}


class Recorder(LightningModule):
    """Writes down what its training steps see; batches are dicts or tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[dict[str, Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not isinstance(batch, dict):
            batch = dict(zip(("rgb", "sparse", "gt", "line_idx"), batch, strict=True))
        self.seen.append({key: value.clone() for key, value in batch.items()})
        return self.weight * 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def lines_seen(module: Recorder) -> list[list[int]]:
    return [sorted(set(b["line_idx"][b["line_idx"] < 255].tolist())) for b in module.seen]


def trainer(tmp_path, *callbacks: Callback, max_epochs: int = 2) -> Trainer:
    return Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        enable_checkpointing=len(callbacks) > 1,
        max_epochs=max_epochs,
    )


def loader(frames: list[Any], batch_size: int = 1) -> DataLoader[Any]:
    return DataLoader(frames, batch_size)  # type: ignore[arg-type]


def drop(count: int = 200, **options: Any) -> tuple[Tensor, Tensor]:
    one = frame(0)
    sparse, line_idx = (one[key].expand(count, 1, LINES, 6) for key in ("sparse", "line_idx"))
    return drop_lines(sparse, line_idx, torch.Generator().manual_seed(0), **options)


def rows_kept(sparse: Tensor) -> Tensor:
    """Which lines are left, ``[B, LINES]``; a line is left whole or not at all."""
    returns = sparse[:, 0, :, [0, 2, 3, 5]] > 0
    assert torch.equal(returns.any(-1), returns.all(-1))
    return returns.any(-1)


def test_depth_and_lines_go_together_and_what_is_kept_is_unchanged():
    sparse, line_idx = drop()
    one = frame(0)
    assert torch.equal(sparse > 0, line_idx < 255)
    assert ((sparse == 0) | (sparse == one["sparse"])).all()
    assert ((line_idx == 255) | (line_idx == one["line_idx"])).all()


def test_a_share_of_the_frames_keeps_a_number_of_lines_drawn_evenly():
    counts = rows_kept(drop(2600, p=0.5, max_lines=11)[0]).sum(1)
    assert (counts == LINES).float().mean().item() == pytest.approx(0.5, abs=0.04)  # four standard deviations
    dropped = torch.bincount(counts[counts < LINES], minlength=LINES) / (counts < LINES).sum()
    assert dropped.tolist() == pytest.approx([1 / 12] * 12, abs=0.035)


def test_every_line_is_kept_as_often_as_any_other():
    for mode in ("uniform", "block"):
        share = rows_kept(drop(2600, p=1, mode=mode)[0]).float().mean(0)
        assert share.tolist() == pytest.approx([0.5] * LINES, abs=0.04), mode


def test_number_of_lines_stays_within_its_bounds():
    assert sorted(set(rows_kept(drop(p=1, min_lines=3, max_lines=5)[0]).sum(1).tolist())) == [3, 4, 5]
    assert (rows_kept(drop(p=1, min_lines=50)[0]).sum(1) == LINES).all()
    assert (drop(p=1, max_lines=0)[0] == 0).all()
    assert torch.equal(drop(p=0)[1], frame(0)["line_idx"].expand(200, 1, LINES, 6))


def test_blocks_are_kept_or_dropped_whole():
    kept = rows_kept(drop(p=1, mode="block")[0])
    changes = (kept != kept.roll(1, 1)).sum(1)  # round from the last line to the first
    assert set(changes.tolist()) == {0, 2}
    assert (rows_kept(drop(p=1)[0]) != rows_kept(drop(p=1)[0]).roll(1, 1)).sum(1).max() > 2


def test_lines_are_counted_in_the_frame_and_depth_without_a_line_goes_with_the_others():
    one = frame(0)
    sparse, line_idx = one["sparse"].expand(300, 1, LINES, 6).clone(), one["line_idx"].expand(300, 1, LINES, 6).clone()
    sparse[:, :, 4:] = 0  # four lines are left
    line_idx[:, :, 3] = 255  # of which one was not found
    kept, lines = drop_lines(sparse, line_idx, torch.Generator().manual_seed(0), p=0.5, max_lines=2)
    counts = (kept[:, 0, :4, 0] > 0).sum(1)
    assert set(counts.tolist()) == {0, 1, 2, 4}  # 4: nothing was dropped, depth without a line included
    assert (lines[counts < 4][:, :, 3] == 255).all()


def test_an_empty_frame_stays_empty():
    nothing = torch.zeros(4, 1, 3, 3), torch.full((4, 1, 3, 3), 255, dtype=torch.uint8)
    assert (drop_lines(*nothing, torch.Generator(), p=1)[0] == 0).all()


def test_training_step_sees_dict_batches_without_the_dropped_lines(tmp_path):
    frames = [frame(i) for i in range(8)]
    module = Recorder()
    trainer(tmp_path, LineDropout(p=1)).fit(module, loader(frames))
    seen = lines_seen(module)
    assert len(seen) == 16
    assert len({tuple(lines) for lines in seen}) > 10  # frames and epochs draw anew
    for i, batch in enumerate(module.seen):
        assert torch.equal(batch["gt"][0], frames[i % 8]["gt"])
        assert torch.equal(batch["sparse"] > 0, batch["line_idx"] < 255)


def test_keys_are_renamed_and_the_data_set_stays_whole(tmp_path):
    frames = [{"d": f["sparse"][None], "rgb": f["rgb"][None], "rings": f["line_idx"][None]} for f in map(frame, [0, 1])]
    module = Recorder()
    keys = LidarKeys(sparse="d", line_idx="rings")
    trainer(tmp_path, LineDropout(p=1, max_lines=2, split_batch=keys)).fit(module, DataLoader(frames, batch_size=None))
    assert all(batch["d"].count_nonzero() <= 2 * 4 for batch in module.seen)
    assert all(f["d"].count_nonzero() == LINES * 4 for f in frames)


def test_tuple_batches_are_edited_in_place(tmp_path):
    frames = [tuple(frame(i)[key] for key in ("rgb", "sparse", "gt", "line_idx")) for i in range(4)]

    def split(batch):
        return {"sparse": batch[1], "line_idx": batch[3]}, batch[2]

    module, as_dicts = Recorder(), Recorder()
    trainer(tmp_path, LineDropout(p=1, split_batch=split)).fit(module, loader(frames, 2))
    trainer(tmp_path, LineDropout(p=1)).fit(as_dicts, loader([frame(i) for i in range(4)], 2))
    for ours, theirs in zip(module.seen, as_dicts.seen, strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert any(len(lines) < LINES for lines in lines_seen(module))


def test_ground_truth_that_is_the_sparse_depth_itself_is_not_edited(tmp_path):
    frames = [(f["sparse"], f["line_idx"]) for f in map(frame, range(2))]

    def split(batch):
        return {"sparse": batch[0], "line_idx": batch[1]}, batch[0]

    with pytest.raises(ValueError, match="expected sparse depth and ground truth to be two tensors"):
        trainer(tmp_path, LineDropout(split_batch=split)).fit(Recorder(), loader(frames))


def test_a_resumed_run_drops_what_an_unbroken_one_drops(tmp_path):
    frames = [frame(i) for i in range(6)]

    def run(*callbacks: Callback, ckpt_path: Any = None) -> list[Tensor]:
        module = Recorder()
        batches = ResumableLoader(frames, sampler=DistributedSampler(frames, 1, 0))
        trainer(tmp_path, LineDropout(), *callbacks).fit(module, batches, ckpt_path=ckpt_path, weights_only=True)
        return [batch["sparse"] for batch in module.seen]

    unbroken = run(ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1))
    assert not torch.equal(torch.cat(unbroken[:6]) > 0, torch.cat(unbroken[6:]) > 0)
    for step in (4, 6, 9):
        resumed = run(ckpt_path=tmp_path / f"step={step}.ckpt")
        assert torch.equal(torch.cat(resumed), torch.cat(unbroken[step:])), step


def test_processes_and_seeds_drop_differently_and_random_numbers_of_the_run_stay(tmp_path):
    class Process:
        def __init__(self, rank: int) -> None:
            self.global_rank, self.current_epoch = rank, 0

    def lines(seed: int, rank: int) -> list[int]:
        batch = {key: value[None] for key, value in frame(0).items()}
        LineDropout(p=1, min_lines=4, max_lines=8, seed=seed).on_train_batch_start(Process(rank), None, batch, 0)
        return sorted(set(batch["line_idx"].flatten().tolist()))

    state = torch.get_rng_state()
    drawn = [lines(0, 0), lines(0, 1), lines(1, 0), lines(1, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert lines(0, 0) == drawn[0]
    assert len({tuple(one) for one in drawn}) == 4


def test_validation_sees_all_lines(tmp_path):
    class Validated(Recorder):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            assert batch["sparse"].count_nonzero() == LINES * 4

    frames = [frame(i) for i in range(2)]
    trainer(tmp_path, LineDropout(p=1, max_lines=1), max_epochs=1).fit(Validated(), loader(frames), loader(frames))


def test_mistakes_are_told_before_training():
    with pytest.raises(ValueError, match=r"p must lie in \[0, 1\], got 75"):
        LineDropout(p=75)
    with pytest.raises(ValueError, match="max_lines must be at least min_lines, got 4 and 8"):
        LineDropout(min_lines=8, max_lines=4)
    with pytest.raises(ValueError, match="mode must be one of uniform, block, got 'rows'"):
        LineDropout(mode="rows")
    with pytest.raises(ValueError, match="seed must be a whole number >= 0, got -1"):
        LineDropout(seed=-1)
