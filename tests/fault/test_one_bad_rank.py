"""What befalls one rank of two is met by both alike."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launches import losses, write_case
from safetensors.numpy import load_file

from mambatrain.runs.checkpoint import list_checkpoints, read_progress
from mambatrain.runs.checkpoint_tensors import read_model_tensors
from mambatrain.runs.folder import read_log


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> tuple[Path, str]:
    """FOLDER/CASE of each case in one_bad_rank.py, and what was said."""
    folder = tmp_path_factory.mktemp("bad-rank")
    changes = {"evaluation__every_steps": 100, "checkpoint": {"every_steps": 2, "keep_newest": 9}}
    recipe = write_case(folder / "recipe.yaml", tiny_shards, changes)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, "-P", *torchrun, Path(__file__).with_name("one_bad_rank.py"), recipe, folder],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, done.stderr


@pytest.mark.parametrize("shard", ["no", "full"])
@pytest.mark.parametrize(("fault", "said"), [("nan", "the loss is nan"), ("inf", "the gradient norm is")])
def test_a_fault_of_one_rank_is_a_draw_that_all_skip(runs: tuple[Path, str], fault: str, said: str, shard: str) -> None:
    folder, stderr = runs
    run = folder / f"{fault}-{shard}"
    log = [line for line in read_log(run / "log.jsonl") if line["event"] != "held_out"]
    assert [line["draw"] for line in log] == list(range(10)), "the data goes on"
    assert [line["draw"] for line in log if line["event"] == "skipped"] == [2, 3]
    assert all(said in line["reason"] for line in log if line["event"] == "skipped")
    assert all(line["gradients"] for line in log if line["event"] == "skipped"), "nobody was blamed"
    assert f"draw 2 was skipped: {said}" in stderr
    progress = read_progress(list_checkpoints(run)[-1])
    assert (progress.step, progress.draw) == (8, 10)
    names = load_file(list_checkpoints(folder / "whole")[-1] / "model.safetensors").keys()
    weights = read_model_tensors(list_checkpoints(run)[-1], names)
    assert weights.keys() == names
    assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.parametrize("fault", ["nan", "inf"])
def test_ranks_stay_level_behind_it(runs: tuple[Path, str], fault: str) -> None:
    """Had one rank applied what the other skipped, copies would go apart and shards would not."""
    folder, _ = runs
    assert losses_of_steps(folder / f"{fault}-no") == pytest.approx(losses_of_steps(folder / f"{fault}-full"), rel=1e-5)


def losses_of_steps(run: Path) -> list[float]:
    return [line["loss"] for line in read_log(run / "log.jsonl") if line["event"] == "step"]


def test_a_rank_that_sees_an_older_state_of_the_folder_resumes_where_rank_0_does(runs: tuple[Path, str]) -> None:
    folder, stderr = runs
    assert "resumed at step 6" in stderr
    assert losses(folder / "old-state") == losses(folder / "whole")
