"""From a base model to one that talks, as a user goes, and the same chat in transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch

Run = Callable[..., CompletedProcess[str]]
NEW = ["<|im_start|>", "<|im_end|>"]
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"say {a} {b}"},
            {"role": "assistant", "content": f"{b} {a} {b} {a} " * 4},
        ]
    }
    for a in WORDS
    for b in WORDS
]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of conversations without a model of its own."""
    import yaml

    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    content = {
        "data": {
            "chats": {"files": ["chats.jsonl"], "template": "chatml", "new_tokens": NEW, "held_out": 0.1},
            "row_tokens": 128,
        },
        "training": {"rows_per_step": 8, "total_steps": 30, "precision": "fp32"},
        "optimizer": {"learning_rate": 0.01},
        "evaluation": {"every_steps": 15},
        "checkpoint": {"every_steps": 15},
    }
    file = tmp_path / "talk.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def held_out_losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["held_out_loss"] for line in lines if line["event"] == "held_out"]


def test_pretrain_finetune_evaluate_export_and_the_same_chat_in_transformers(
    run_mambatrain: Run, write_tiny_recipe: Callable[..., Path], recipe: Path, tmp_path: Path
) -> None:
    def done(*arguments: str | Path, **how: Any) -> CompletedProcess[str]:
        result = run_mambatrain(*arguments, **how)
        assert result.returncode == 0, result.stderr
        return result

    done("pretrain", write_tiny_recipe(), "--run", "base", "--quiet")
    told = done("finetune", recipe, "--from", "base", "--run", "talk", "--quiet").stderr
    # However quiet it is, the mask is shown; without colour, too.
    assert "chats        64 messages in the template chatml; 7 are held out" in told
    assert len(re.findall(r"^conversation \d+: \d+ of \d+ tokens count; what is read and not", told, re.M)) == 2
    shown = re.findall(r"assistant\n⟧([^⟦]+)⟦", told)
    assert len(shown) == 2 and all(text.endswith("<|im_end|>") and "user" not in text for text in shown)
    assert "\x1b" not in told
    losses = held_out_losses(tmp_path / "talk")
    assert len(losses) == 3 and losses[-1] < 0.5 * losses[0]
    # The same command again finds all done, and its conversations in tokens.
    before = (tmp_path / "talk" / "chats" / "manifest.json").stat().st_mtime_ns
    assert "is finished" in done("finetune", recipe, "--from", "base", "--run", "talk").stderr
    assert (tmp_path / "talk" / "chats" / "manifest.json").stat().st_mtime_ns == before

    scores = json.loads(done("evaluate", "talk", "--json", "-", "--kernels", "native").stdout)["held_out"]
    assert scores["nats_per_token"] == pytest.approx(losses[-1], rel=1e-5)
    assert (scores["num_documents"], scores["data"]) == (7, "talk/chats")
    rows = json.loads(done("data", "show", "talk", "--json", "-").stdout)["conversations"]
    assert len(rows) == 2 and all(any(row["counted"]) and not row["counted"][0] for row in rows)
    assert "draw 0: 8 rows" in done("data", "show", "talk", "--step", "1", "--rows", "1").stdout

    done("export", "talk", "exported")
    ours = done(
        "chat", "talk", "--temperature", "0", "--max-new-tokens", "50", stdin="say alpha beta\nsay eta zeta\n"
    ).stdout
    assert ours == chat_of_transformers(tmp_path / "exported", ["say alpha beta", "say eta zeta"])
    again = done("chat", "exported", "--temperature", "0", "--max-new-tokens", "50", stdin="say alpha beta\n").stdout
    assert ours.startswith(again)


def chat_of_transformers(folder: Path, turns: list[str]) -> str:
    """Greedy answers of at most 50 tokens, and of 50 in all, a line each, by transformers' own template and loop."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    assert tokenizer.convert_tokens_to_ids(NEW) == [512, 513]
    messages: list[dict[str, str]] = []
    answers, num_new = [], 0
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=50, do_sample=False)
        answer = tokenizer.decode(out[0, ids.shape[1] :].tolist(), skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
        answers.append(answer)
        num_new += out.shape[1] - ids.shape[1]
    assert num_new >= 50, "too little was said to compare"
    return "".join(f"{answer}\n" for answer in answers)


def test_what_is_wrong_is_told_before_a_run_begins(
    run_mambatrain: Run, write_tiny_recipe: Callable[..., Path], recipe: Path, tmp_path: Path
) -> None:
    done = run_mambatrain("pretrain", write_tiny_recipe(training__total_steps=1), "--run", "base", "--quiet")
    assert done.returncode == 0
    for overrides, problem in (
        (
            ["data.chats.new_tokens=[]"],
            "writes tokens that base/tokenizer.json does not have: <|im_start|>, <|im_end|>",
        ),
        (
            ["parameters.frozen=[layer.0]"],
            "parameters.frozen: no parameter fits layer.0\n\nhint: did you mean layers.0",
        ),
        (["data.packing=windows"], "data: packing windows, which cuts conversations anywhere, does not go with chats"),
    ):
        told = run_mambatrain("finetune", recipe, "--from", "base", "--run", "talk", "--set", *overrides)
        assert (told.returncode, told.stdout) == (1, "")
        assert problem in told.stderr and "Traceback" not in told.stderr
        assert not (tmp_path / "talk" / "recipe.yaml").exists()
    (tmp_path / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n' + json.dumps(CHATS[0]))
    told = run_mambatrain("finetune", recipe, "--from", "base", "--run", "talk")
    assert told.stderr == (
        "error: chats.jsonl:1 has no turn of the assistant\n\n"
        "hint: data.chats.skip_bad=true leaves such conversations out and counts them\n"
    )
    told = run_mambatrain(
        "data", "show", recipe, "--from", "base", "--set", "data.chats.skip_bad=true", "--conversations", "1"
    )
    assert told.returncode == 0
    assert "1 conversations were left out as bad; the first: chats.jsonl:1" in told.stdout
    assert "⟧alpha alpha alpha" in told.stdout
