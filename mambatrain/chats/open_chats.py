"""From the conversations of a recipe to their tokens: which tokenizer, which template, and where they are kept."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from mambatrain.chats.chat_corpus import tokenize_chats
from mambatrain.chats.template_files import SHIPPED, find_template
from mambatrain.data.token_corpus import TokenCorpus
from mambatrain.data.tokenizer import LoadedTokenizer, end_token_of_folder, load_tokenizer, with_special_tokens
from mambatrain.errors import UserError
from mambatrain.recipe.chat_section import PAIRS, ChatSection
from mambatrain.recipe.sections import Recipe

_TOKEN_NAMES = re.compile(r"<\|[^\s|<>']+\|>")
"""How special tokens of chats are spelled nearly everywhere; what a template spells so has to be a token."""


def open_chats(recipe: Recipe, tokenizer_file: Path | None, out: Path) -> TokenCorpus:
    """The recipe's conversations in tokens: found in `out`, or put there.

    Args:
        recipe: with `data.chats`.
        tokenizer_file: of the weights that training starts from; None: they have none.
        out: the folder.

    Raises:
        UserError: there is no tokenizer, it lacks tokens of the template, or a conversation cannot be used.
    """
    section = recipe.data.chats
    assert section is not None, "the recipe has conversations"
    loaded = chat_tokenizer(section, tokenizer_file)
    if section.template in SHIPPED:
        refuse_missing_tokens(SHIPPED[section.template], section.template, loaded)
    template = find_template(None if section.template == "auto" else section.template, loaded, "data.chats.template")
    template.refuse_wrong()
    refuse_missing_tokens(template.source, template.name, loaded)
    return tokenize_chats(section, loaded, template, recipe.data.row_tokens, out)


def chat_tokenizer(section: ChatSection, tokenizer_file: Path | None) -> LoadedTokenizer:
    """The tokenizer of the weights, else the one that the recipe names, and its new tokens.

    Raises:
        UserError: there is none.
    """
    where = tokenizer_file if section.tokenizer is None else section.tokenizer
    if where is None:
        raise UserError(
            "no tokenizer lies beside the weights, so conversations cannot be tokenized",
            "--set data.chats.tokenizer=FILE names the one that they were trained with",
        )
    folder = Path(where) if Path(where).is_dir() else Path(where).parent
    return with_special_tokens(load_tokenizer(where, end_token_of_folder(folder)), section.new_tokens)


def refuse_missing_tokens(source: str, name: str, loaded: LoadedTokenizer) -> None:
    """
    Raises:
        UserError: the template writes what looks like a token, and the tokenizer has no such token.
    """
    known = {token.content for token in loaded.tokenizer.get_added_tokens_decoder().values()}
    missing = [token for token in dict.fromkeys(_TOKEN_NAMES.findall(source)) if token not in known]
    if missing:
        spelled = ", ".join(f'"{token}"' for token in missing)
        raise UserError(
            f"the chat template {name} writes tokens that {loaded.file} does not have: {', '.join(missing)}",
            f"data.chats.new_tokens: [{spelled}] adds them; template: plain needs none",
        )


def chat_lines(corpus: TokenCorpus) -> Iterator[str]:
    """What was read and what became of it, for people."""
    record = corpus.manifest.chats
    assert record is not None
    are_pairs = record.options.format == PAIRS
    what, each = ("preference pairs", 2) if are_pairs else ("conversations", 1)
    formats = ", ".join(f"{count:,} {what if are_pairs else name}" for name, count in record.formats.items())
    train, held_out = corpus.manifest.train, corpus.manifest.held_out
    yield f"{formats} in the template {record.template}; {held_out.num_documents // each:,} are held out"
    share = record.num_counted["train"] / max(train.num_tokens, 1)
    roles = ", ".join(record.options.count) + (", last turn alone" if record.options.turns == "last" else "")
    yield f"{record.num_counted['train']:,} of {train.num_tokens:,} training tokens count ({share:.0%}): {roles}"
    if record.num_truncated:
        yield (
            f"{record.num_truncated:,} {what} were longer than a row of {record.row_tokens:,} and lost their "
            f"ends with {record.num_counted_cut:,} counted tokens; the first: {record.first_too_long}"
        )
    if record.num_too_long:
        yield f"{record.num_too_long:,} {what} were left out for length; the first: {record.first_too_long}"
    if corpus.manifest.num_skipped_bad:
        yield f"{corpus.manifest.num_skipped_bad:,} {what} were left out as bad; the first: {record.bad[0]}"
