"""Bytes of files as windows: where they begin, how they are dealt out, and what is refused."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_eff.data import ByteTextDataModule
from lightning_eff.data.text import ByteText, ByteWindows, WindowSampler

TEXT = bytes(range(250)) * 8  # a byte tells where it stands, modulo 250


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(TEXT)
    return str(file)


def made(path, **options) -> ByteTextDataModule:
    data = ByteTextDataModule(path, **{"seq_len": 20, "batch_size": 4, **options})
    data.setup()
    return data


def test_targets_are_the_bytes_that_follow(path) -> None:
    data = made(path)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for inputs, targets in loader:
            assert inputs.shape == targets.shape == (4, 20)
            assert inputs.dtype == targets.dtype == torch.int64
            assert torch.equal(inputs[:, 1:], targets[:, :-1])
            assert torch.equal(targets, (inputs + 1) % 250)


def test_validation_windows_lie_side_by_side_in_the_last_bytes(path) -> None:
    data = made(path, val_fraction=0.25, batch_size=5)
    seen = torch.cat([inputs.flatten() for inputs, _ in data.val_dataloader()])
    assert seen.numel() == 4 * 5 * 20  # 24 windows fit into 500 bytes, 20 of them into whole batches
    assert torch.equal(seen, torch.arange(1500, 1900) % 250)


def test_a_single_small_batch_of_validation_is_kept(path) -> None:
    batches = list(made(path, val_fraction=0.05, batch_size=64).val_dataloader())
    assert [len(inputs) for inputs, _ in batches] == [4]


@pytest.mark.parametrize(("processes", "dropped"), [(2, True), (3, False)])
def test_every_process_has_a_batch_of_validation(path, processes: int, dropped: bool) -> None:
    data = made(path, val_fraction=0.25, batch_size=9)  # 24 windows, of which a process has 12 or 8
    data.trainer = SimpleNamespace(world_size=processes)
    loader = data.val_dataloader()
    mine = DistributedSampler(data.val_set, processes, 0, shuffle=False)
    assert len(DataLoader(data.val_set, 9, sampler=mine, drop_last=loader.drop_last)) == 1
    assert loader.drop_last is dropped


def test_training_windows_never_reach_into_validation(tmp_path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(b"a" * 900 + b"b" * 100)
    data = made(str(file), seq_len=99)
    assert len(data.train_set) == 801
    for index in (0, 800):
        inputs, targets = data.train_set[index]
        assert {*inputs.tolist(), *targets.tolist()} == {ord("a")}
    for inputs, targets in data.val_dataloader():
        assert {*inputs.flatten().tolist(), *targets.flatten().tolist()} == {ord("b")}


def test_training_windows_begin_everywhere(path) -> None:
    data = made(path)
    sampler = WindowSampler(data.train_set, None, 0, 20, 4)
    drawn = []
    for epoch in range(200):
        sampler.set_epoch(epoch)
        drawn += list(sampler)
    assert set(drawn) == set(range(len(data.train_set)))


def test_an_epoch_is_as_long_as_the_text_in_whole_batches(path) -> None:
    data = made(path)  # 1800 bytes hold 89 windows
    assert [len(inputs) for inputs, _ in data.train_dataloader()] == [4] * 22
    assert len(data.train_dataloader()) == 22
    assert len(made(path, batch_size=512).train_dataloader()) == 1  # never none


def test_an_epoch_is_made_of_whole_optimizer_steps(path) -> None:
    data = made(path)
    data.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, accumulate_grad_batches=5)
    assert len(data.train_dataloader()) == 20  # of 22
    data.trainer.accumulate_grad_batches = 23
    assert len(data.train_dataloader()) == 23  # one step at least


def test_windows_depend_on_seed_and_epoch_alone(path) -> None:
    def drawn(seed: int, epoch: int) -> list[int]:
        sampler = WindowSampler(made(path).train_set, None, seed, 20, 4)
        sampler.set_epoch(epoch)
        torch.manual_seed(seed + epoch + 1)
        return list(sampler)

    assert drawn(0, 3) == drawn(0, 3)
    assert len({tuple(drawn(*at)) for at in ((0, 0), (0, 1), (1, 0), (1, 1))}) == 4


def test_processes_share_out_the_windows_of_one(path) -> None:
    class Processes:
        def __init__(self, size: int, rank: int) -> None:
            self.world_size, self.global_rank, self.current_epoch = size, rank, 0

    windows = made(path).train_set
    alone = list(WindowSampler(windows, Processes(1, 0), 0, 20, 8))
    first, second = (list(WindowSampler(windows, Processes(2, rank), 0, 20, 4)) for rank in (0, 1))
    assert alone == [window for pair in zip(first, second, strict=True) for window in pair]


def test_files_are_read_as_one_text(tmp_path, path) -> None:
    paths = []
    for i, (start, end) in enumerate([(0, 3), (3, 3), (3, 700), (700, 700), (700, 1999), (1999, 2000), (2000, 2000)]):
        paths.append(str(tmp_path / f"{i}.txt"))
        (tmp_path / f"{i}.txt").write_bytes(TEXT[start:end])
    whole, parts = ByteText([path]), ByteText(paths)
    assert len(whole) == len(parts) == 2000
    for start, length in [(0, 2000), (2, 2), (1, 10), (699, 3), (1990, 10), (1999, 1), (3, 697), (5, 0)]:
        assert parts.read(start, length).tolist() == list(TEXT[start : start + length])
        assert whole.read(start, length).tolist() == list(TEXT[start : start + length])
    one, other = made(path), made(paths)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one.train_dataloader(), other.train_dataloader(), strict=True))


def test_more_files_than_are_mapped_at_a_time(tmp_path) -> None:
    paths = []
    for i in range(150):
        paths.append(str(tmp_path / f"{i:03}.txt"))
        (tmp_path / f"{i:03}.txt").write_bytes(bytes([i]) * 3)
    text = ByteText(paths)
    assert text.read(0, 450).tolist() == [i for i in range(150) for _ in range(3)]
    assert len(text._maps) <= 64
    assert text.largest() == 149


def test_a_copy_for_another_process_holds_no_text(path) -> None:
    windows = ByteWindows(ByteText([path]), range(100), 20)
    before = windows[5]
    copy = pickle.dumps(windows)
    assert len(copy) < 1000 + len(path)
    assert torch.equal(pickle.loads(copy)[5][0], before[0])


def test_workers_read_the_same_windows(path) -> None:
    alone, helped = made(path), made(path, num_workers=1)
    pairs = zip(alone.train_dataloader(), helped.train_dataloader(), strict=True)
    assert all(torch.equal(one[0], other[0]) for one, other in pairs)


def test_a_pattern_stands_for_the_files_that_match(tmp_path) -> None:
    for name in ("b/2.txt", "a/1.txt", "a/deep/3.txt", "a/1.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode() * 10)
    data = made(str(tmp_path / "**" / "*.txt"), seq_len=5)
    assert [path.removeprefix(f"{tmp_path}/") for path in data.train_set.text.paths] == [
        "a/1.txt",
        "a/deep/3.txt",
        "b/2.txt",
    ]
    odd = tmp_path / "[draft].txt"  # a name is a name
    odd.write_bytes(TEXT)
    assert len(made(str(odd)).train_set.text) == len(TEXT)
    with pytest.raises(FileNotFoundError, match=r"no text file .*\*.csv"):
        made(str(tmp_path / "*.csv"))


def test_a_missing_file_is_told_by_name(tmp_path, path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no text file .*missing.txt"):
        made([path, str(tmp_path / "missing.txt")])


@pytest.mark.parametrize(
    ("size", "told"),
    [
        (0, "of 0 bytes gives 0 to training and 0"),
        (21, "of 21 bytes"),
        (209, "of 209 bytes gives 189 to training and 20"),
    ],
)
def test_a_text_shorter_than_windows_is_told_with_sizes(tmp_path, size: int, told: str) -> None:
    file = tmp_path / "short.txt"
    file.write_bytes(TEXT[:size])
    with pytest.raises(ValueError, match=f"seq_len \\+ 1 = 21 bytes, but .*short.txt {told}"):
        made(str(file))


def test_the_shortest_text_that_works_gives_one_window_of_validation(tmp_path) -> None:
    file = tmp_path / "short.txt"
    file.write_bytes(TEXT[:210])
    data = made(str(file))
    assert len(data.val_set) == 1
    assert data.largest_byte() == 209


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 0}, "seq_len must be a whole number >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be a whole number >= 1"),
        ({"val_fraction": 1.0}, r"val_fraction must lie in \(0, 1\), got 1.0"),
        ({"val_fraction": 0}, r"val_fraction must lie in \(0, 1\), got 0"),
        ({"seed": -1}, "seed must be a whole number >= 0"),
        ({"path": []}, "expected path to name a file, got an empty list"),
    ],
)
def test_arguments_out_of_range_are_told_before_anything_is_read(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ByteTextDataModule(**{"path": "missing.txt", **options})
