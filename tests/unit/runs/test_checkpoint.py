import errno
from pathlib import Path

import pytest
import torch

from mambatrain.errors import UserError
from mambatrain.recipe import CheckpointSection
from mambatrain.runs import checkpoint as checkpoints
from mambatrain.runs.checkpoint import (
    Progress,
    find_damage,
    list_checkpoints,
    newest_valid_checkpoint,
    prune_checkpoints,
    read_progress,
    save_checkpoint,
)
from mambatrain.runs.checkpoint_tensors import read_extra, read_into


def save(run: Path, step: int) -> Path:
    tensors = {"weight": torch.arange(1000.0) + step}
    return save_checkpoint(
        run / "checkpoints", Progress(step=step, draw=step), tensors, {"weight.exp_avg": torch.ones(3)}
    )


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    progress = Progress(7, 9, 1234, 0, 5, 1.25, 17)
    folder = save_checkpoint(tmp_path / "checkpoints", progress, {"w": torch.ones(2)}, {"w.step": torch.tensor(7.0)})
    assert find_damage(folder) is None
    assert read_progress(folder) == progress


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "progress.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_found_named_and_an_older_checkpoint_is_used(tmp_path: Path, name: str, damage: str) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    file = newer / name
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[:-2])
    else:
        file.unlink()
    found: list[str] = []
    assert newest_valid_checkpoint(tmp_path, found) == older
    assert len(found) == 1
    assert name in found[0] or damage == "flip"  # a flipped manifest shows in the file it describes


def test_a_flipped_bit_anywhere_in_the_manifest_is_found(tmp_path: Path) -> None:
    file = save(tmp_path, 1) / "manifest.json"
    content = file.read_bytes()
    for position in range(len(content)):
        for bit in (0x01, 0x20):
            flipped = bytearray(content)
            flipped[position] ^= bit
            file.write_bytes(flipped)
            assert find_damage(file.parent) is not None, (position, flipped)


def test_what_else_is_saved_comes_back_and_is_no_parameter(tmp_path: Path) -> None:
    extra = {"carried": torch.arange(4.0), "slots": torch.tensor([3, 1])}
    weight, moment = torch.arange(3.0), torch.ones(3)
    folder = save_checkpoint(
        tmp_path / "checkpoints", Progress(), {"weight": weight}, {"weight.exp_avg": moment}, extra
    )
    assert find_damage(folder) is None
    assert {name: value.tolist() for name, value in read_extra(folder).items()} == {
        "carried": [0.0, 1.0, 2.0, 3.0],
        "slots": [3, 1],
    }
    parameter = torch.zeros(3)
    assert list(read_into(folder, {"weight": parameter})) == ["weight.exp_avg"]
    assert torch.equal(parameter, weight)
    assert read_extra(save(tmp_path, 5)) == {}


def test_a_file_left_by_a_crash_in_mid_save_is_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    unfinished = tmp_path / "checkpoints" / ".writing-step-00000002"
    unfinished.mkdir()
    (unfinished / "model.safetensors").write_bytes(b"half")
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-00000001"]
    assert save(tmp_path, 2).is_dir()  # and it does not stand in the way


def test_a_full_disk_is_a_sentence_and_earlier_checkpoints_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = save(tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "fsync_file", full)
    with pytest.raises(UserError, match="disk is full"):
        save(tmp_path, 2)
    assert newest_valid_checkpoint(tmp_path) == earlier
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [earlier.name]


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step)
    prune_checkpoints(tmp_path, CheckpointSection(keep_newest=2, keep_best=True), best_step=2)
    assert [folder.name[-1] for folder in list_checkpoints(tmp_path)] == ["2", "4", "5"]
    assert not list((tmp_path / "checkpoints").glob(".*"))
    prune_checkpoints(tmp_path, CheckpointSection(keep_newest=1, keep_best=False), best_step=2)
    assert [folder.name[-1] for folder in list_checkpoints(tmp_path)] == ["5"]


def test_every_kth_of_the_interval_is_kept_for_ever(tmp_path: Path) -> None:
    for step in (3, 4, 8, 9, 12, 16, 20):
        save(tmp_path, step)
    keep = CheckpointSection(every_steps=4, keep_newest=1, keep_best=True, keep_every=2)
    prune_checkpoints(tmp_path, keep, best_step=9)
    assert [int(folder.name[5:]) for folder in list_checkpoints(tmp_path)] == [8, 9, 16, 20]


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    suffixes = {file.suffix for file in save(tmp_path, 1).iterdir()}
    assert suffixes == {".safetensors", ".json"}
