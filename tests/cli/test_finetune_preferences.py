"""Learning from preference pairs as a user goes: look at them, train, look at the curves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

Run = Callable[..., CompletedProcess[str]]
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
PAIRS = [{"prompt": f"say {a} {b}", "chosen": f"yes, {b}", "rejected": f"no, {a}"} for a in WORDS for b in WORDS]
SMALL = [
    "data.chats.files=[pairs.jsonl]",
    "data.row_tokens=96",
    "training.rows_per_step=6",
    "training.total_steps=20",
    "training.precision=fp32",
    "optimizer.learning_rate=0.01",
]


def test_pairs_are_shown_learned_from_and_judged(
    run_mambatrain: Run, write_tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    def done(*arguments: str | Path) -> CompletedProcess[str]:
        result = run_mambatrain(*arguments)
        assert result.returncode == 0, result.stderr
        return result

    settings = [part for setting in SMALL for part in ("--set", setting)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    done("pretrain", write_tiny_recipe(training__total_steps=3), "--run", "base", "--quiet")

    shown = done("data", "show", "dpo", "--from", "base", *settings, "--conversations", "1", "--json", "a.json").stdout
    assert "36 preference pairs in the template plain; 2 are held out" in shown
    answers = shown.partition("\nchosen:\n")[2].partition("\nrejected:\n")
    assert shown.count("say ") == 1 and answers[0].startswith("yes, ") and answers[2].startswith("no, ")
    assert "\x1b" not in shown
    both = json.loads((tmp_path / "a.json").read_text())["conversations"]
    assert len(both) == 2 and all(any(one["counted"]) and not one["counted"][0] for one in both)

    told = done("finetune", "dpo", "--from", "base", "--run", "run", *settings).stderr
    assert "pair 1: " in told and "reference    log-probabilities of 36 pairs, kept in run/chats/references-" in told
    assert "step 0: held out loss 0.6931, reward margin " in told and "margin" in told.partition("step 1/20")[2]
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    margins = [line["held_out_reward_margin"] for line in log if line["event"] == "held_out"]
    assert len(margins) == 2 and margins[-1] > 0.1 > abs(margins[0])
    assert (tmp_path / "run" / "loss.png").stat().st_size > 10_000
    # The same command again finds all done; what came out is weights like any others.
    assert "is finished" in done("finetune", "dpo", "--from", "base", "--run", "run", *settings).stderr
    assert "training loss, nats per pair, 20 steps" in done("runs", "show", "run").stdout
    done("export", "run", "exported")
    assert "held-out reward margin" in (tmp_path / "exported" / "README.md").read_text()
    assert done("chat", "run", "--temperature", "0", "--max-new-tokens", "5").returncode == 0

    for arguments, problem in (
        (("evaluate", "run"), "run/chats holds preference pairs: half of its answers are those that were rejected"),
        (
            ("finetune", "chat", "--from", "base", "--run", "x", "--set", "data.chats.files=[pairs.jsonl]"),
            "pairs.jsonl:1 is a preference pair (chosen, rejected), not a conversation",
        ),
    ):
        refused = run_mambatrain(*arguments)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert problem in refused.stderr and "Traceback" not in refused.stderr
    bad = {**PAIRS[1], "rejected": "yes, beta"}
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in (PAIRS[1], bad)))
    refused = run_mambatrain("finetune", "dpo", "--from", "base", "--run", "x", *settings)
    assert refused.stderr == (
        "error: pairs.jsonl:2 has equal answers: chosen and rejected are the same\n\n"
        "hint: data.chats.skip_bad=true leaves such pairs out and counts them\n"
    )
