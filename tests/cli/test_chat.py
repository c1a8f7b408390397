"""`chat` as a user runs it, on random weights: piped, and on a terminal with Ctrl-C and Ctrl-D."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from mambatrain.chats.template import ChatTemplate
from mambatrain.data.tokenizer import load_tokenizer
from mambatrain.export.exporting import export_weights
from mambatrain.export.transformers_folder import TRANSFORMERS
from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import initialise
from mambatrain.models.state import TextState
from mambatrain.ops.backends import choose_backend
from mambatrain.recipe import ModelSection
from mambatrain.runs.state_file import facts_of, read_state_file, write_state_file
from mambatrain.runs.weights import Weights, build_model, read_weights

Run = Callable[..., CompletedProcess[str]]
CPU = torch.device("cpu")
SHORT = ["--temperature", "0", "--max-new-tokens", "8"]


@pytest.fixture(scope="module")
def weights(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    section = ModelSection(
        block="mamba2", d_model=16, num_layers=2, vocab_size=512, d_state=8, head_dim=8, tie_embeddings=False
    )
    model = LanguageModel(section, choose_backend("torch", CPU))
    initialise(model, section, seed=1)
    end = load_tokenizer(tiny_shards / "tokenizer.json").end_of_document_id
    with torch.no_grad():
        torch.nn.init.normal_(model.lm_head.weight, generator=torch.Generator().manual_seed(4))  # logits far apart
        model.lm_head.weight[end] = 0.0  # some other is always likelier: answers have no end of their own
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            parameter.data *= 10  # what was read weighs as much as the last token
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    folder = tmp_path_factory.mktemp("export") / "weights"
    export_weights(Weights(section, tensors, tiny_shards / "tokenizer.json", "a test", "0" * 64), folder, TRANSFORMERS)
    return folder


@pytest.fixture
def chat(run_mambatrain: Run, weights: Path) -> Run:
    def chat(*arguments: str | Path, lines: list[str]) -> CompletedProcess[str]:
        result = run_mambatrain("chat", weights, *SHORT, *arguments, stdin="".join(f"{line}\n" for line in lines))
        assert "Traceback" not in result.stderr
        return result

    return chat


def test_a_piped_conversation_its_answers_alone_on_stdout(chat: Run) -> None:
    done = chat("--seed", "5", lines=["hello", "", "/quit", "never read"])
    assert done.returncode == 0
    assert done.stdout.endswith("\n") and len(done.stdout) > 1
    assert "template plain\nseed     5; /help lists the commands" in done.stderr
    assert done.stderr.count("(--max-new-tokens reached)") == 1
    assert "\x1b" not in done.stdout + done.stderr
    assert chat("--seed", "5", lines=["hello"]).stdout == done.stdout  # the end of the input ends it, too


def test_saved_and_loaded_it_goes_on_as_it_would_have(chat: Run, tmp_path: Path) -> None:
    whole = chat(lines=["one", "two", "/save two.state", "three"])
    assert whole.returncode == 0
    head = chat(lines=["one", "/save one.state"])
    tail = chat("--state", "one.state", lines=["two", "three"])
    assert head.stdout + tail.stdout == whole.stdout
    loaded = chat(lines=["something else", "/load two.state", "three"])
    assert loaded.stdout.endswith(tail.stdout[len(chat("--state", "one.state", lines=["two"]).stdout) :])
    kept = read_state_file(tmp_path / "two.state").facts
    assert kept.chat is not None
    assert [one["role"] for one in kept.chat.messages] == ["user", "assistant"] * 2
    assert kept.text == "a chat of 4 messages"


def test_reset_and_system_begin_again(chat: Run, tmp_path: Path) -> None:
    once = chat(lines=["one"]).stdout
    assert chat(lines=["one", "/reset", "one"]).stdout == once + once
    done = chat(
        "--system", "be brief", lines=["one", "/save a", "/system", "one", "/save b", "/system be long", "/quit"]
    )
    assert done.stdout.endswith(once)
    kept = [read_state_file(tmp_path / name).facts for name in "ab"]
    assert [facts.chat.messages[0] for facts in kept if facts.chat] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
    ]
    assert kept[0].num_tokens > kept[1].num_tokens
    assert "the conversation begins with the system message: be long" in done.stderr


def test_behind_a_text(chat: Run, run_mambatrain: Run, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("import os\n" * 20)
    assert run_mambatrain("state", "make", weights, "--text", "notes.txt", "-o", "notes").returncode == 0
    done = chat("--state", "notes", lines=["one", "/reset", "one", "/save kept"])
    first, again = done.stdout[: len(done.stdout) // 2], done.stdout[len(done.stdout) // 2 :]
    assert first == again
    kept, notes = (read_state_file(tmp_path / name).facts for name in ("kept", "notes"))
    assert notes.num_tokens < kept.num_tokens < notes.num_tokens + 40  # once, though there were two conversations
    assert kept.text == "notes.txt, a chat of 2 messages"
    told = chat("--state", "kept", lines=["/system x", "/reset", "/quit"])
    assert "the state is in the middle of a conversation" in told.stderr


def test_behind_a_trained_state_the_template_is_the_one_it_was_trained_with(
    chat: Run, weights: Path, tmp_path: Path
) -> None:
    source = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}[assistant]"
    source = source.replace("[assistant]", "{% if add_generation_prompt %}[assistant]{% endif %}")
    opened, end = read_weights(str(weights)), "<|endoftext|>"
    layers = build_model(opened, choose_backend("torch", CPU), CPU).init_state(1)
    state, template = TextState(layers, None, 0, frozenset()), ChatTemplate(source, "brackets", end, end)
    write_state_file(tmp_path / "tuned", state, facts_of(opened, "", "trained", state, template=template))
    done = chat("--state", "tuned", lines=["/save early", "one", "/save kept", "two"])
    assert "template brackets\n" in done.stderr and "there is nothing to save yet" in done.stderr
    kept = read_state_file(tmp_path / "kept").facts
    assert kept.template == template and kept.chat is not None and kept.chat.unread == end
    assert done.stdout.endswith(chat("--state", "kept", lines=["two"]).stdout)
    refused = chat("--state", "tuned", "--template", "plain", lines=["one"])
    assert refused.returncode == 1
    assert "error: the state was trained with another chat template (brackets) than plain\n\nhint: " in refused.stderr


def test_a_mistake_costs_its_line_and_not_the_conversation(chat: Run, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("text")
    lines = ["/save x", "/sav x", "/load nowhere", "/load text.txt", "/save", "one", "/save text.txt", "/help", "//x"]
    done = chat(lines=lines)
    assert done.returncode == 0
    assert done.stderr.count("(--max-new-tokens reached)") == 2
    for problem in (
        "error: there is nothing to save yet",
        "error: there is no command /sav\nhint: did you mean /save?",
        "error: there is no file nowhere",
        "error: text.txt is not a whole safetensors file",
        "error: /save needs the name of a file",
        "error: text.txt is there and is no state file",
        "  /reset        begin again",
    ):
        assert problem in done.stderr
    assert (tmp_path / "text.txt").read_text() == "text"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--template", "chatml"], "error: the template chatml needs tokens"),
        (["--template", "bad.jinja"], "error: the chat template bad.jinja is wrong in line 2"),
        (["--state", "nowhere"], "error: there is no file nowhere"),
    ],
)
def test_what_cannot_begin_is_told_before_the_first_turn(
    chat: Run, tmp_path: Path, arguments: list[str], problem: str
) -> None:
    (tmp_path / "bad.jinja").write_text("{{ bos_token }}\n{% for %}")
    done = chat(*arguments, lines=["one"])
    assert (done.returncode, done.stdout) == (1, "")
    assert problem in done.stderr and "\n\nhint: " in done.stderr


def test_usage(run_mambatrain: Run) -> None:
    for option, problem in (("--stop=", "'--stop': an empty text"), ("--top-p=7", "'--top-p': 7.0 is not above 0")):
        done = run_mambatrain("chat", "weights", option)
        assert done.returncode == 2 and problem in done.stderr


def test_a_stop_text_ends_an_answer(chat: Run) -> None:
    whole = chat(lines=["one"]).stdout
    found = re.search(r"\w\w", whole[1:])
    assert found is not None
    stop = found[0]
    done = chat("--stop", stop, lines=["one", "two"])
    assert done.stdout.startswith(whole[: whole.index(stop)] + "\n")


class Terminal:
    """A chat on a pseudo-terminal."""

    def __init__(self, *arguments: str | Path) -> None:
        self.ours, theirs = pty.openpty()
        command = [Path(sys.executable).with_name("mambatrain"), "chat", *arguments]
        environment = {**os.environ, "TERM": "dumb"}
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509  (no threads here)
        )  # fmt: skip
        os.close(theirs)
        os.set_blocking(self.ours, False)
        self.shown = ""

    def wait_for(self, text: str, seconds: float = 300) -> None:
        """Reads until the text is shown behind what was waited for before."""
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < deadline, f"{text!r} did not come: {self.shown[-500:]!r}"
            self.read()
        self.shown = self.shown[self.shown.index(text) + len(text) :]

    def wait_for_anything(self) -> None:
        while not self.shown:
            self.read()

    def read(self) -> None:
        try:
            self.shown += os.read(self.ours, 10_000).decode(errors="replace")
        except BlockingIOError:
            time.sleep(0.05)

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())


def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(weights: Path) -> None:
    terminal = Terminal(weights, "--max-new-tokens", "1000000000", "--temperature", "0")
    try:
        terminal.wait_for("> ")
        terminal.type("hello\n")
        terminal.wait_for("hello\r\n")
        terminal.wait_for_anything()  # of the answer, which has no end
        terminal.process.send_signal(signal.SIGINT)
        terminal.wait_for("(stopped)")
        terminal.wait_for("> ")
        terminal.process.send_signal(signal.SIGINT)
        terminal.wait_for("(Ctrl-D or /quit leaves)")
        terminal.wait_for("> ")
        terminal.type("/help\n")
        terminal.wait_for("/save FILE")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.ours)
