"""What a run on conversations tells before it begins: what was read, and two of them with what counts."""

from __future__ import annotations

from rich.console import Console

from mambatrain.chats.open_chats import chat_lines
from mambatrain.data.tokenizer import load_tokenizer
from mambatrain.data.training_data import TrainingData
from mambatrain.report.chat_text import LEGEND, shown_chats
from mambatrain.training.metrics import print_fact

NUM_SHOWN = 2


def show_chats(data: TrainingData) -> None:
    """Prints it on stderr for each source of conversations, however quiet the run is: a wrong mask costs a run."""
    console = Console(stderr=True, highlight=False)
    for tokens in data.sources.values():
        if tokens.train.counted is None or tokens.corpus is None:
            continue
        for line in chat_lines(tokens.corpus):
            print_fact("chats", line)
        loaded = load_tokenizer(tokens.corpus.tokenizer_file, tokens.corpus.manifest.tokenizer.end_of_document)
        for title, text in shown_chats(tokens, loaded, NUM_SHOWN):
            console.print(f"\n{title}; {LEGEND}", style="bold", soft_wrap=True, markup=False)
            console.print(text, soft_wrap=True)
        console.print()
