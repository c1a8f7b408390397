"""A conversation from the state equals one that reads everything again for each token."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mambatrain.chats.template import ChatTemplate, Message
from mambatrain.chats.template_files import CHATML, PLAIN
from mambatrain.data.tokenizer import LoadedTokenizer, load_tokenizer
from mambatrain.errors import UserError
from mambatrain.generation.conversation import Conversation, Place
from mambatrain.generation.reading import Reader
from mambatrain.generation.sampling import SamplingSettings
from mambatrain.models.language_model import LanguageModel
from mambatrain.models.parameters import initialise
from mambatrain.ops.backends import choose_backend
from mambatrain.recipe import ModelSection

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
HEAD_SEED = 17  # answers that differ by what was read; some end themselves, some do not
GREEDY = SamplingSettings(temperature=0.0)
CHAT = ChatTemplate(CHATML, "chatml", END, END)
TURNS = ("hello there", "how are you?\n\nwell", "naïve 日本", "bye")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> LoadedTokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=[END, START, STOP], show_progress=False
    )
    tokenizer.train_from_iterator(["the user and the assistant then say hello, how are you, well, bye\n\n"], trainer)
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(file))
    return load_tokenizer(file)


@pytest.fixture(scope="module", params=["mamba1", "mamba2"])
def model(request: pytest.FixtureRequest, tokenizer: LoadedTokenizer) -> LanguageModel:
    widths = {"head_dim": 8, "d_state": 8} if request.param == "mamba2" else {}
    section = ModelSection(
        block=request.param,
        d_model=16,
        num_layers=2,
        vocab_size=tokenizer.vocab_size,
        tie_embeddings=False,
        **widths,
    )
    model = LanguageModel(section, choose_backend("torch", torch.device("cpu")))
    initialise(model, section, seed=1)
    with torch.no_grad():
        torch.nn.init.normal_(
            model.lm_head.weight, generator=torch.Generator().manual_seed(HEAD_SEED)
        )  # logits far apart
        model.lm_head.weight[tokenizer.tokenizer.token_to_id(STOP)] *= 2  # drawn now and then
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                parameter *= 10  # what was read weighs as much as the last token
    return model.double()


Make = Callable[..., Conversation]


@pytest.fixture
def make(model: LanguageModel, tokenizer: LoadedTokenizer) -> Make:
    def make(
        template: ChatTemplate = CHAT,
        settings: SamplingSettings = GREEDY,
        max_new_tokens: int = 12,
        stops: tuple[str, ...] = (),
    ) -> Conversation:
        return Conversation(model, tokenizer, template, settings, max_new_tokens, stops)

    return make


def say(conversation: Conversation, *turns: str, system: str | None = None) -> list[str]:
    return ["".join(conversation.ask(turn, system)) for turn in turns]


@torch.no_grad()
def read_all(
    model: LanguageModel, tokenizer: LoadedTokenizer, turns: tuple[str, ...], stop: str | None, num: int = 12
) -> tuple[list[str], list[int], torch.Tensor]:
    """Greedy ChatML in which the model reads the whole conversation again for each token: answers, ids, logits."""
    special = Tokenizer.from_file(str(tokenizer.file))
    end_ids = {special.token_to_id(END), special.token_to_id(STOP)}
    ids: list[int] = []
    answers, unread = [], END
    for turn in turns:
        asked = f"{unread}{START}user\n{turn}{STOP}\n{START}assistant\n"
        ids += special.encode(asked, add_special_tokens=False).ids
        new: list[int] = []
        while len(new) < num and (stop is None or stop not in special.decode(new)):
            token = int(model(torch.tensor([ids + new]))[0][0, -1, : tokenizer.vocab_size].argmax())
            if token in end_ids:
                break
            new.append(token)
        text, rest = special.decode(new), ""
        if stop is not None and stop in text:
            text = text[: text.index(stop)]
            heads = [special.decode(new[:size]) for size in range(len(new))]
            kept = max(
                size for size, head in enumerate(heads) if len(head) <= len(text) and not head.endswith("\ufffd")
            )
            new, rest = new[:kept], text[len(heads[kept]) :]
        ids += new
        answers.append(text)
        unread = f"{rest}{STOP}\n"
    return answers, ids, model(torch.tensor([ids]))[0][0, -1]


def assert_read(conversation: Conversation, model: LanguageModel, ids: list[int], logits: torch.Tensor) -> None:
    state = conversation.place.state
    assert state is not None
    assert (state.num_tokens, state.seen_ids) == (len(ids), set(ids))
    torch.testing.assert_close(Reader(model, None, state).logits(), logits, rtol=1e-9, atol=1e-9)


def test_a_conversation_is_as_if_all_had_been_read_again(
    model: LanguageModel, tokenizer: LoadedTokenizer, make: Make
) -> None:
    conversation = make()
    answers, ids, logits = read_all(model, tokenizer, TURNS, stop=None)
    endings = []
    for turn, answer in zip(TURNS, answers, strict=True):
        assert say(conversation, turn) == [answer]
        endings.append(conversation.ending)
    assert_read(conversation, model, ids, logits)
    assert set(endings) == {"turn", "length"}, "both should occur, or this test shows less than it says"
    assert [one["content"] for one in conversation.place.messages if one["role"] == "assistant"] == answers


def test_a_stop_text_is_no_part_of_the_answer_wherever_it_starts_and_ends(
    model: LanguageModel, tokenizer: LoadedTokenizer, make: Make
) -> None:
    (whole,), _, _ = read_all(model, tokenizer, TURNS[:1], stop=None)
    assert len(whole) > 8
    for start in range(len(whole) - 1):
        for size in (1, 2, 5):
            stop = whole[start : start + size]
            if "\ufffd" in stop:  # bytes that are no character, or not yet
                continue
            conversation = make(stops=(stop,))
            answers, ids, logits = read_all(model, tokenizer, TURNS[:2], stop)
            assert say(conversation, TURNS[0]) == answers[:1]
            assert conversation.ending == "stop" and stop not in answers[0]
            assert say(conversation, TURNS[1]) == answers[1:]
            assert_read(conversation, model, ids, logits)


def test_the_history_is_never_read_again(model: LanguageModel, make: Make) -> None:
    conversation = make()
    say(conversation, *TURNS[:3])
    assert conversation.place.state is not None
    num_read = conversation.place.state.num_tokens
    lengths: list[int] = []
    hook = model.embedding.register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
    say(conversation, "x")
    hook.remove()
    assert sum(lengths) == conversation.place.state.num_tokens - num_read < 40


def test_a_kept_place_goes_on_as_the_conversation_itself(make: Make) -> None:
    first = make()
    say(first, *TURNS[:2])
    kept = first.place
    rest = say(first, *TURNS[2:])
    again = make()
    chat = first.chat_of(kept)
    assert chat is not None and kept.unread
    again.place = again.place_of(kept.state, chat, CHAT)
    assert say(again, *TURNS[2:]) == rest
    assert again.place.messages == first.place.messages
    assert make(ChatTemplate(PLAIN, "plain", END, END)).chat_of(Place()) is None
    for what, said in ((chat, "the conversation was held"), (None, "the state was trained")):
        with pytest.raises(UserError, match=rf"{said} with another chat template \(chatml\) than plain"):
            make(ChatTemplate(PLAIN, "plain", END, END)).place_of(kept.state, what, CHAT)


def test_behind_a_document_the_opening_token_is_left_out(
    model: LanguageModel, tokenizer: LoadedTokenizer, make: Make
) -> None:
    end = tokenizer.end_of_document_id
    document = [end, *tokenizer.tokenizer.encode("well well").ids]
    reader = Reader(model, end)
    reader.add(document)
    num_ends = []
    for start in (None, reader.state()):
        conversation = make(max_new_tokens=1)
        conversation.place = conversation.place_of(start, None, None) if start else Place()
        read: list[int] = []
        hook = model.embedding.register_forward_hook(lambda _, inputs, __: read.extend(inputs[0].flatten().tolist()))  # noqa: B023
        say(conversation, "x")
        hook.remove()
        num_ends.append(read.count(end))
    assert num_ends == [1, 0]


def test_an_end_token_between_turns_forgets_nothing(model: LanguageModel, make: Make) -> None:
    logits = []
    for first in ("one", "two"):
        conversation = make(ChatTemplate(PLAIN, "plain", END, END), max_new_tokens=1)
        assert END in conversation.template.tail(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]
        )
        say(conversation, first, "the same")
        logits.append(Reader(model, None, conversation.place.state).logits())
    assert (logits[0] - logits[1]).abs().max() > 1e-10  # forgotten, it would be exactly 0


def test_a_system_message_stands_before_all(make: Make) -> None:
    conversation = make()
    say(conversation, "a", "b", system="be brief")
    assert [one["role"] for one in conversation.place.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert conversation.place.messages[0]["content"] == "be brief"


def test_an_interrupted_answer_is_kept_as_far_as_it_came(make: Make) -> None:
    whole = make()
    (answer,) = say(whole, TURNS[0])
    asked = iter([False, False, True])
    conversation = make()
    pieces = list(conversation.ask(TURNS[0], interrupted=lambda: next(asked)))
    assert conversation.ending == "interrupted"
    assert answer.startswith("".join(pieces).rstrip("\ufffd")) and "".join(pieces) != answer
    assert conversation.place.messages[-1]["content"] == "".join(pieces)
    say(conversation, "go on")


def test_a_turn_that_is_left_was_never_there(make: Make) -> None:
    conversation = make()
    say(conversation, "a")
    before = conversation.place
    turn = conversation.ask("b")
    next(turn)
    turn.close()
    assert conversation.place is before


def test_pieces_come_as_soon_as_they_are_known(make: Make) -> None:
    assert len([piece for piece in make().ask(TURNS[0]) if piece]) > 3


def test_the_end_of_a_turn_is_no_repetition(make: Make) -> None:
    settings = replace(GREEDY, repetition_penalty=1.5)
    endings = []
    conversation = make(settings=settings)
    for turn in TURNS * 2:
        say(conversation, turn)
        endings.append(conversation.ending)
    assert "turn" in endings[1:], "the token that ended an answer before is drawn again"


def test_an_end_that_is_no_special_token_becomes_a_stop_text(make: Make) -> None:
    source = "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/{{ m.role }}]{% endfor %}"
    source += "{% if add_generation_prompt %}[assistant]{% endif %}"
    conversation = make(ChatTemplate(source, "brackets", END, END))
    assert "[/assistant]" in conversation._stops


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{% for m in messages[-1:] %}{{ m.content }}{% endfor %}", "changes earlier turns|elsewhere"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "puts an answer elsewhere than asked for"),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "elsewhere than asked for"),
        ("{{ raise_exception('no chats') }}", "failed in line 1: no chats"),
        ("line one\n{% for %}", "is wrong in line 2"),
    ],
)
def test_a_template_that_does_not_go_on_by_adding_text_is_refused(make: Make, source: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        make(ChatTemplate(source, "bad.jinja", END, END))


def test_a_template_that_changes_its_mind_later_costs_the_turn_alone(make: Make) -> None:
    # As those that drop what a model thought: found out only when it happens.
    source = "{% for m in messages %}[{{ m.role }}]{{ m.content.replace('ANGRY', '') if not loop.last else m.content }}"
    source += "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    conversation = make(ChatTemplate(source, "moody.jinja", END, END))
    say(conversation, "a")
    messages: tuple[Message, ...] = (*conversation.place.messages[:-1], {"role": "assistant", "content": "ANGRY"})
    conversation.place = before = Place(conversation.place.state, messages, "")
    with pytest.raises(UserError, match="changes earlier turns once another follows"):
        say(conversation, "b")
    assert conversation.place is before
