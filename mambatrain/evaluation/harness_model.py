"""Our language model as lm-evaluation-harness sees one; importing this file needs lm_eval.

Every rule about tokens (what precedes a text, where it is cut, which spaces belong to the continuation) is that of
lm-eval's own `hf` model, so that a run and its export have the same scores.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm  # type: ignore[import-untyped]

from mambatrain.errors import UserError
from mambatrain.evaluation.held_out import evaluating
from mambatrain.models.language_model import LanguageModel
from mambatrain.ops.reference import computing_dtype

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

CHUNK_TOKENS = 1024  # logits of at most so many tokens are held at once
MAX_NEW_TOKENS = 256  # where a task does not say; lm-eval's own default
WITHOUT_EFFECT = {"temperature", "top_p", "top_k", "min_p", "num_beams"}  # on greedy generation

Request = tuple[Any, list[int], list[int]]  # a key, the context's ids, the continuation's ids
Score = tuple[float, bool]  # log-likelihood in nats; whether greedy decoding gives the continuation


class HarnessModel(TemplateLM):  # type: ignore[misc]  # lm_eval is untyped
    """Scores and greedy continuations of texts."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        end_of_document: int,
        vocab_size: int,
        max_length: int = 2048,
        batch_rows: int = 16,
    ) -> None:
        """
        Args:
            model: in the dtype and on the device to evaluate with.
            tokenizer: the model's own.
            end_of_document: precedes a text that has no context, and ends generation.
            vocab_size: ids from here on are padding rows of the embedding and are never generated.
            max_length: tokens the model reads at most; what is longer loses its beginning.
            batch_rows: texts at once; changes speed and memory, results only in the last bits.
        """
        super().__init__()
        self.model = model
        # Not `self.tokenizer`, which lm-eval takes for one of transformers. A copy: here, as there, a special token's
        # name in a text is that token, while the trainer's tokenizer takes it for plain text.
        self.text_tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self.end_of_document = end_of_document
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.batch_rows = batch_rows
        self._device = model.head_weight.device

    @property
    def eot_token_id(self) -> int:
        return self.end_of_document

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:  # a text that already opens with the prefix does not get it again
            add_special_tokens = not string.startswith(self.tok_decode([self.prefix_token_id]))
        return self.text_tokenizer.encode(string, add_special_tokens=add_special_tokens).ids

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        return self.text_tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Score]:
        """The log-likelihood of each continuation behind its context."""
        scores: list[Score] = super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text behind one end-of-document token.

        A text longer than max_length is cut into windows, each of which predicts its tokens once.
        """
        windows: list[Request] = []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            cuts = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            windows += [(index, *make_disjoint_window(window)) for window in cuts]
        totals = [0.0] * len(requests)
        for (index, _, _), (nats, _) in zip(windows, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[index] += nats
        return totals

    def _loglikelihood_tokens(self, requests: list[Request], disable_tqdm: bool = False, **kwargs: Any) -> list[Score]:
        # Requests that read the same tokens share a row: the choices of a question that are one token long.
        readers: dict[tuple[tuple[int, ...], int], list[int]] = defaultdict(list)
        for index, (key, context, continuation) in enumerate(requests):
            self._check_continuation(key, continuation)
            readers[self._inputs(context, continuation), len(continuation)].append(index)
        scores: dict[int, Score] = {}
        with evaluating(self.model), _progress("scoring", len(requests), disable_tqdm) as progress:
            for rows in _batched(sorted(readers, key=_longest_first), self.batch_rows):
                hidden, _ = self.model.hidden_states(self._padded([inputs for inputs, _ in rows]))
                for (inputs, num_scored), states in zip(rows, hidden, strict=True):
                    indices = readers[inputs, num_scored]
                    targets = torch.tensor([requests[index][2] for index in indices], device=self._device)
                    results = self._score(states[len(inputs) - num_scored : len(inputs)], targets)
                    scores.update(zip(indices, results, strict=True))
                    progress.update(len(indices))
        return [scores[index] for index in range(len(requests))]

    def _inputs(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[int, ...]:
        """What the model reads: all but the last token, without its beginning where that is too long."""
        return (*context, *continuation)[-(self.max_length + 1) :][:-1]

    def _check_continuation(self, key: Any, continuation: Sequence[int]) -> None:
        if not 0 < len(continuation) <= self.max_length:
            raise UserError(
                f"the continuation {key[1]!r} has {len(continuation)} tokens, not 1 to {self.max_length}",
                "give a larger --max-length" if continuation else "the tokenizer melts it into the end of its context",
            )

    def _padded(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """(B, L), padded on the right: what follows a token does not reach it in a causal model."""
        length = max(map(len, rows))
        padded = [[*row, *[self.end_of_document] * (length - len(row))] for row in rows]
        return torch.tensor(padded, device=self._device)

    def _score(self, hidden: Tensor, targets: Tensor) -> list[Score]:
        """hidden (T, d_model) in which position t predicts targets[:, t] of (R, T): R scores."""
        nats = torch.zeros(len(targets), dtype=torch.float64)
        greedy = torch.ones(len(targets), dtype=torch.bool, device=targets.device)
        for part, expected in zip(
            torch.split(hidden, CHUNK_TOKENS), torch.split(targets, CHUNK_TOKENS, dim=1), strict=True
        ):
            logits = self._logits(part)  # (T, V), over all V: the padding rows are part of the distribution
            chosen = logits.gather(1, expected.T) - logits.logsumexp(1, keepdim=True)  # (T, R)
            nats += chosen.cpu().double().sum(0)
            greedy &= (logits.argmax(1) == expected).all(1)
        return list(zip(nats.tolist(), greedy.tolist(), strict=True))

    def _logits(self, hidden: Tensor) -> Tensor:
        weight = self.model.head_weight
        logits = F.linear(hidden.to(weight.dtype), weight)
        return logits.to(computing_dtype(logits))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, each up to its first stop sequence.

        Raises:
            UserError: a task that draws at random, or one that leaves no room for its context.
        """
        groups: dict[str, list[int]] = defaultdict(list)  # requests of the same arguments run together
        for index, request in enumerate(requests):
            groups[repr(sorted(request.args[1].items()))].append(index)
        texts: dict[int, str] = {}
        with evaluating(self.model), _progress("generating", len(requests), disable_tqdm) as progress:
            for indices in groups.values():
                stops, max_new_tokens = self._generation_limits(requests[indices[0]].args[1])
                contexts = {
                    index: self._generation_context(requests[index].args[0], max_new_tokens) for index in indices
                }
                for batch in _batched(sorted(indices, key=lambda index: -len(contexts[index])), self.batch_rows):
                    generated = self._continue_greedily([contexts[index] for index in batch], stops, max_new_tokens)
                    for index, tokens in zip(batch, generated, strict=True):
                        text = self.tok_decode(tokens, skip_special_tokens=True)
                        texts[index] = postprocess_generated_text(text, stops, think_end_token=None)
                    progress.update(len(batch))
        return [texts[index] for index in range(len(requests))]

    def _generation_limits(self, arguments: dict[str, Any]) -> tuple[list[str], int]:
        """Stop sequences, the end-of-document token's text among them, and the most tokens to generate."""
        known = normalize_gen_kwargs(arguments, MAX_NEW_TOKENS)
        if known.pop("do_sample", False):
            raise UserError(
                f"a task asks for random sampling: {arguments}", "leave that task out; only greedy ones run"
            )
        stops = handle_stop_sequences(known.pop("until"), eos=self.tok_decode([self.end_of_document]))
        max_new_tokens = known.pop("max_gen_toks")
        unknown = known.keys() - WITHOUT_EFFECT
        if unknown or known.get("num_beams", 1) != 1:
            raise UserError(f"a task asks for more than greedy generation: {arguments}", "leave that task out")
        if max_new_tokens >= self.max_length:
            raise UserError(
                f"a task generates up to {max_new_tokens} tokens, which leaves no room for its context",
                f"give more than --max-length {self.max_length}",
            )
        return stops, max_new_tokens

    def _generation_context(self, text: str, max_new_tokens: int) -> list[int]:
        return self.tok_encode(text)[-(self.max_length - max_new_tokens) :] or [self.prefix_token_id]

    def _continue_greedily(
        self, contexts: Sequence[Sequence[int]], stops: list[str], max_new_tokens: int
    ) -> list[list[int]]:
        """The likeliest next token, again and again, for each row until it meets a stop.

        The rows are padded on the left, and a boundary at the first real token drops what the padding left behind.
        """
        length = max(map(len, contexts))
        tokens = torch.full((len(contexts), length), self.end_of_document)
        boundaries = torch.zeros(tokens.shape, dtype=torch.bool)
        for row, context in enumerate(contexts):
            tokens[row, length - len(context) :] = torch.tensor(context)
            boundaries[row, length - len(context)] = True
        hidden, state = self.model.hidden_states(tokens.to(self._device), boundaries.to(self._device))
        # A stop sequence may be spelt with more tokens than its own encoding has: two more are looked at.
        window = 2 + max(len(self.tok_encode(stop, add_special_tokens=False)) for stop in stops)
        generated: list[list[int]] = [[] for _ in contexts]
        running = set(range(len(contexts)))
        for _ in range(max_new_tokens):
            chosen = self._logits(hidden[:, -1])[:, : self.vocab_size].argmax(1)  # (B,)
            ids = chosen.tolist()
            for row in sorted(running):
                generated[row].append(ids[row])
                tail = self.tok_decode(generated[row][-window:])
                if generated[row][-1] == self.end_of_document or any(stop in tail for stop in stops):
                    running.discard(row)
            if not running:
                break
            hidden, state = self.model.hidden_states(chosen[:, None], None, state)
        return generated


def _longest_first(row: tuple[tuple[int, ...], int]) -> tuple[int, tuple[int, ...], int]:
    """Rows of one batch are of similar length, and what does not fit in memory fails at once."""
    inputs, num_scored = row
    return -len(inputs), inputs, num_scored


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    listed = list(items)
    for first in range(0, len(listed), size):
        yield listed[first : first + size]


def _progress(what: str, total: int, disable: bool) -> Any:
    """On stderr, and only where somebody watches."""
    return tqdm(total=total, desc=what, disable=disable or None)
