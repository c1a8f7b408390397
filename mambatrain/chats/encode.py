"""Conversations into token ids and the mask of those that count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, processors

from mambatrain.chats.counted import Spans
from mambatrain.data.tokenizer import LoadedTokenizer


@dataclass(frozen=True)
class EncodedChat:
    """A conversation in tokens.

    Attributes:
        ids: (num_tokens,) int32.
        counted: (num_tokens,) bool, the tokens that are trained on. The first never is: nothing stands before it.
        num_counted_bytes: UTF-8 bytes of the text of the counted tokens, special tokens left out.
        num_cut: tokens that were cut off, and how many of them would have counted.
    """

    ids: NDArray[np.int32]
    counted: NDArray[np.bool_]
    num_counted_bytes: int
    num_cut: tuple[int, int] = (0, 0)


class ChatEncoder:
    """Encodes rendered conversations: names of special tokens in them are special tokens, whoever wrote them.

    Args:
        loaded: of the model.
    """

    def __init__(self, loaded: LoadedTokenizer) -> None:
        self._tokenizer = Tokenizer.from_str(loaded.tokenizer.to_str())  # the other takes no text for special tokens
        self._tokenizer.encode_special_tokens = False
        # A post-processor that trims offsets would hide the space of " word"; nothing else of it is used.
        self._tokenizer.post_processor = processors.Sequence([])
        self._special = frozenset(self._tokenizer.get_added_tokens_decoder())
        self.special_texts = [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]

    def encode(self, texts: Sequence[str], spans: Sequence[Spans], max_tokens: int | None = None) -> list[EncodedChat]:
        """Encodes each text as a whole; a token counts where one of its characters does.

        Args:
            texts: rendered conversations.
            spans: of each, the characters that count.
            max_tokens: what is longer loses its end; None: nothing does.
        """
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [
            self._encoded(text, here, np.array(encoding.ids, dtype=np.int32), encoding.offsets, max_tokens)
            for text, here, encoding in zip(texts, spans, encodings, strict=True)
        ]

    def _encoded(
        self, text: str, spans: Spans, ids: NDArray[np.int32], offsets: list[tuple[int, int]], max_tokens: int | None
    ) -> EncodedChat:
        counts = np.zeros(len(text) + 1, dtype=np.int64)
        for start, stop in spans:
            counts[start:stop] = 1
        before = np.concatenate([[0], np.cumsum(counts)])  # counted characters before each
        places = np.array(offsets, dtype=np.int64).reshape(-1, 2)
        counted: NDArray[np.bool_] = before[places[:, 1]] > before[places[:, 0]]
        counted[:1] = False
        num_all, num_counted = len(ids), int(counted.sum())
        if max_tokens is not None:
            ids, counted, places = ids[:max_tokens], counted[:max_tokens], places[:max_tokens]
        cut = num_all - len(ids), num_counted - int(counted.sum())
        return EncodedChat(ids, counted, self._num_bytes(text, ids, counted, places), cut)

    def _num_bytes(
        self, text: str, ids: NDArray[np.int32], counted: NDArray[np.bool_], places: NDArray[np.int64]
    ) -> int:
        """Each character once: several tokens may share one."""
        num_bytes, done = 0, 0
        for token, (start, stop) in zip(ids[counted].tolist(), places[counted].tolist(), strict=True):
            if token not in self._special:
                num_bytes += len(text[max(start, done) : stop].encode())
            done = max(done, stop)
        return num_bytes
