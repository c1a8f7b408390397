"""Asked to stop at any moment, a run loses nothing and does nothing twice; also in the middle of an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mambatrain.evaluation.held_out import HeldOutLoss
from mambatrain.recipe import Recipe, read_recipe
from mambatrain.runs.checkpoint import list_checkpoints, read_progress
from mambatrain.runs.folder import read_log
from mambatrain.training import measuring
from mambatrain.training.assemble import Where
from mambatrain.training.start import run_training
from mambatrain.training.stop import StopRequest

WHERE = Where(device="cpu", kernels="torch", quiet=True)
FILES = ("model.safetensors", "optimizer.safetensors", "progress.json")
OF_A_CLOCK = {"seconds", "data_seconds", "tokens_per_second", "model_flops_utilisation", "memory_bytes"}


class AskedInEvaluation(StopRequest):
    """Is asked when the n-th micro-batch of held-out text is about to be read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
        super().__init__()
        measure, seen = measuring.measure_held_out, 0

        def measure_until_asked(model: Any, batches: Any, *rest: Any) -> HeldOutLoss:
            def counted() -> Any:
                nonlocal seen
                for batch in batches:
                    seen += 1
                    yield batch
                    if seen == nth:
                        self.asked = True

            return measure(model, counted(), *rest)

        monkeypatch.setattr(measuring, "measure_held_out", measure_until_asked)


def outcome(run: Path) -> tuple[list[dict[str, Any]], list[bytes]]:
    log = [{key: line[key] for key in line.keys() - OF_A_CLOCK} for line in read_log(run / "log.jsonl")]
    return log, [(list_checkpoints(run)[-1] / name).read_bytes() for name in FILES]


# 5 steps, evaluated at 0, 2, 4 and 5; at 4 the best checkpoint is made or not, at 5 the run is done.
@pytest.mark.parametrize("nth_evaluation", [0, 1, 2, 3])
def test_an_evaluation_that_is_interrupted_is_made_after_the_resume(
    nth_evaluation: int, monkeypatch: pytest.MonkeyPatch, write_tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = read_recipe(
        str(
            write_tiny_recipe(
                training={"rows_per_step": 4, "total_steps": 5, "precision": "fp32", "micro_batch_rows": 1},
                evaluation={"every_steps": 2, "max_tokens": 200},
            )
        )
    )
    assert run_training(recipe, tmp_path / "whole", WHERE, "if-possible", StopRequest()) == 0
    num_batches = len(list(held_out_batches(recipe)))
    assert num_batches > 3
    run = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        asked = AskedInEvaluation(patch, nth_evaluation * num_batches + 2)
        assert run_training(recipe, run, WHERE, "if-possible", asked) == 75
    stopped_at = [0, 2, 4, 5][nth_evaluation]
    progress = read_progress(list_checkpoints(run)[-1])
    assert (progress.step, progress.held_out_pending) == (stopped_at, True)
    assert sum(line["event"] == "held_out" for line in read_log(run / "log.jsonl")) == nth_evaluation
    assert (run / "stopped").exists()
    assert run_training(recipe, run, WHERE, "if-possible", StopRequest()) == 0
    assert outcome(run) == outcome(tmp_path / "whole")
    assert not (run / "stopped").exists()


def held_out_batches(recipe: Recipe) -> Any:
    from mambatrain.data.training_data import open_training_data

    held_out = open_training_data(recipe).held_out
    assert held_out is not None
    return held_out.micro_batches(1, 0, 1)


def test_a_run_that_is_asked_to_stop_evaluates_no_more(
    write_tiny_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("held-out text was read")

    stop = StopRequest()
    stop.asked = True
    monkeypatch.setattr("mambatrain.models.language_model.LanguageModel.summed_loss", never)
    recipe = read_recipe(str(write_tiny_recipe()))
    assert run_training(recipe, tmp_path / "run", WHERE, "if-possible", stop) == 75
    assert read_progress(list_checkpoints(tmp_path / "run")[-1]).draw == 0


@pytest.mark.parametrize(("resume", "how"), [("if-possible", ""), ("fresh", " without --fresh")])
def test_it_says_which_command_goes_on(
    resume: Any, how: str, write_tiny_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --fresh the same command would move away what it had done."""
    asked = StopRequest()
    asked.asked = True
    assert run_training(read_recipe(str(write_tiny_recipe())), tmp_path / "run", WHERE, resume, asked) == 75
    assert f"the same command{how} continues from here" in capsys.readouterr().err
    assert (tmp_path / "run" / "stopped").read_text() == f"asked to stop; the same command{how} continues\n"
