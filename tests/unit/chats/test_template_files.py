import json
import os
from pathlib import Path

import pytest

from mambatrain.chats.template import ChatTemplate, Message
from mambatrain.chats.template_files import CHATML, PLAIN, RAW, find_template
from mambatrain.data.tokenizer import LoadedTokenizer, load_tokenizer
from mambatrain.errors import UserError

END = "<|endoftext|>"
MESSAGES: list[Message] = [
    {"role": "system", "content": 'be <b>brief</b> & "kind"'},
    {"role": "user", "content": " hi\n"},
    {"role": "assistant", "content": "naïve 🐈"},
    {"role": "user", "content": "more"},
]
# Has all that templates of known models use: white-space control, loops, namespaces, marks, filters.
RICH = """
{% set ns = namespace(first=true) %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {% generation %}{{ message['content'] | trim }}{% endgeneration %}
    {{- {'a': message.content} | tojson }}
    {%- if ns.first %}{{ bos_token }}{% set ns.first = false %}{% endif %}
{% endfor %}
{{ strftime_now('%Y') }}{{ 'go' if add_generation_prompt }}
"""


@pytest.fixture
def tokenizer(tiny_shards: Path, tmp_path: Path) -> LoadedTokenizer:
    (tmp_path / "tokenizer.json").write_bytes((tiny_shards / "tokenizer.json").read_bytes())
    return load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("source", [CHATML, PLAIN, RAW, RICH], ids=["chatml", "plain", "raw", "rich"])
@pytest.mark.parametrize("prompt", [False, True])
def test_it_renders_as_transformers_does(source: str, prompt: bool, tokenizer: LoadedTokenizer) -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer.tokenizer, bos_token=END, eos_token=END)
    expected = theirs.apply_chat_template(MESSAGES, chat_template=source, add_generation_prompt=prompt, tokenize=False)
    assert ChatTemplate(source, "a test", END, END).render(MESSAGES, prompt) == expected


def test_what_the_shipped_ones_look_like() -> None:
    plain, chatml = (ChatTemplate(source, "", "<b>", "<e>") for source in (PLAIN, CHATML))
    assert plain.render(MESSAGES[2:], True) == "<b>Assistant:\nnaïve 🐈<e>\n\nUser:\nmore\n\nAssistant:\n"
    assert chatml.render(MESSAGES[2:], True) == (
        "<b><|im_start|>assistant\nnaïve 🐈<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_tokenizers_own_goes_before_a_shipped_one_and_its_file_before_its_settings(
    tokenizer: LoadedTokenizer, tmp_path: Path
) -> None:
    assert find_template(None, tokenizer).name == "plain"
    config = {"chat_template": [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert find_template(None, tokenizer).source == "d"
    config_now = {"chat_template": "c", "bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config_now))
    found = find_template(None, tokenizer)
    assert (found.source, found.bos_token, found.eos_token) == ("c", "<s>", "</s>")
    (tmp_path / "chat_template.jinja").write_text("f")
    assert find_template(None, tokenizer).source == "f"
    assert find_template("plain", tokenizer).source == PLAIN


def test_one_that_cannot_be_used_is_refused(tokenizer: LoadedTokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"chatml needs tokens that .* does not have: <\|im_start\|>, <\|im_end\|>"):
        find_template("chatml", tokenizer)
    with pytest.raises(UserError, match="--template nowhere cannot be read: No such file") as told:
        find_template("nowhere", tokenizer)
    assert "chatml, plain" in str(told.value.hint)
    (tmp_path / "latin").write_bytes(b"\xe9")
    with pytest.raises(UserError, match="it is not UTF-8"):
        find_template(str(tmp_path / "latin"), tokenizer)


@pytest.mark.parametrize(
    "source", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ cycler.__init__.__globals__ }}"]
)
def test_it_runs_no_code(source: str) -> None:
    with pytest.raises(UserError, match="failed"):
        ChatTemplate(source, "evil.jinja", END, END).render(MESSAGES)
