"""Which chat template is used: one asked for, the tokenizer's own, or a shipped one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mambatrain.chats.template import ChatTemplate
from mambatrain.data.tokenizer import LoadedTokenizer
from mambatrain.errors import UserError

CHATML = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{- message['content'] + '<|im_end|>' }}{% endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
# For any tokenizer: an answer ends with the token that ends a document.
PLAIN = """\
{{- bos_token }}
{%- for message in messages %}
{{- message['role'] | capitalize + ':\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] + eos_token }}{% endgeneration %}
{%- else %}{{- message['content'] }}{% endif %}
{{- '\\n\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'Assistant:\\n' }}{%- endif %}
"""
# Nothing around the texts: for prompts that are spelled out in the data.
RAW = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] + eos_token }}{% endgeneration %}
{%- else %}{{- message['content'] }}{% endif %}
{%- endfor %}
"""
SHIPPED = {"chatml": CHATML, "plain": PLAIN, "raw": RAW}
_NEEDED_TOKENS = {"chatml": ("<|im_start|>", "<|im_end|>")}
_PLAIN_STOPS = ("\nUser:", "\nSystem:")  # a model that was not trained on chats goes on with the other's part


def find_template(asked: str | None, tokenizer: LoadedTokenizer, option: str = "--template") -> ChatTemplate:
    """The template that was asked for (a shipped one's name or a file), else the tokenizer's own, else a shipped one.

    The tokenizer's own lies beside it, in `chat_template.jinja` or `tokenizer_config.json`. Without one it is ChatML
    where the tokenizer has its tokens, else plain.

    Args:
        asked: a name or a file; None: nothing was asked for.
        tokenizer: of the model.
        option: what the user says it with.

    Raises:
        UserError: there is no such template, or the tokenizer lacks its tokens.
    """
    vocabulary = tokenizer.tokenizer.get_vocab(with_added_tokens=True)
    bos, eos = _text_ends(tokenizer)
    if asked is None:
        if (own := own_template(tokenizer)) is not None:
            return own
        asked = "chatml" if all(token in vocabulary for token in _NEEDED_TOKENS["chatml"]) else "plain"
    if asked in SHIPPED:
        missing = [token for token in _NEEDED_TOKENS.get(asked, ()) if token not in vocabulary]
        if missing:
            raise UserError(
                f"the template {asked} needs tokens that {tokenizer.file} does not have: {', '.join(missing)}",
                f"{option} plain needs none",
            )
        return ChatTemplate(SHIPPED[asked], asked, bos, eos, _PLAIN_STOPS if asked == "plain" else ())
    try:
        return ChatTemplate(Path(asked).read_text(encoding="utf-8"), asked, bos, eos)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(
            f"{option} {asked} cannot be read: {reason}", f"name a Jinja file, or one of {', '.join(SHIPPED)}"
        ) from error


def own_template(tokenizer: LoadedTokenizer) -> ChatTemplate | None:
    """What lies beside a tokenizer; the file of its own goes before the configuration."""
    folder = tokenizer.file.parent
    bos, eos = _text_ends(tokenizer)
    file = folder / "chat_template.jinja"
    if file.is_file():
        return ChatTemplate(file.read_text(encoding="utf-8"), str(file), bos, eos)
    config_file = folder / "tokenizer_config.json"
    found = _read_config(config_file).get("chat_template")
    if isinstance(found, list):  # several by name, in the older way
        found = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}.get("default")
    return ChatTemplate(found, str(config_file), bos, eos) if isinstance(found, str) else None


def _text_ends(tokenizer: LoadedTokenizer) -> tuple[str, str]:
    """What a template calls bos_token and eos_token; the end of a document where nothing is said."""
    config = _read_config(tokenizer.file.parent / "tokenizer_config.json")
    bos, eos = (_token_name(config.get(key)) or tokenizer.end_of_document for key in ("bos_token", "eos_token"))
    return bos, eos


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _token_name(token: Any) -> str | None:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
