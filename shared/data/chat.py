"""Rows -> the text that a model reads -> token ids of prompt and answers.

A chat goes through the model's own template. What is encoded is prompt and answer together, cut
where the prompt's tokens end, as TRL's trainers do; an answer ends with its first EOS and not with
what the template puts behind it. Exactly one BOS where the tokenizer or the template has one.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from shared.config import InputError
from shared.data.rows import Message, Messages, Row, Unusable


class Encoded(NamedTuple):
    """A row as the model reads it; `rejected` is None of a row with one answer at most."""

    prompt: str  # with its special tokens
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int] | None
    notes: tuple[str, ...]  # of NOTES


NOTES = {
    "boundary": "a token spans the end of the prompt",
    "rendered-otherwise": "the template renders the prompt otherwise before an answer",
    "no-generation-prompt": "the template opens no answer",
    "without-bos": "the prompt lacks the BOS that the tokenizer puts before texts",
    "without-end": "an answer holds no token that ends it",
    "two-ends": "an answer holds a token that ends it before its end",
    "control-tokens": "a message holds special tokens as text",
    "control-tokens-in-prompts": "a prompt that is no chat holds special tokens as text",
    "unknown-tokens": "a prompt or an answer holds unknown tokens",
    "cut": "an answer was cut at max_completion_tokens",
}


# A chat template is a program of the user's: what it raises is told in the words of its rows.
TEMPLATE_FAULTS = (
    TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError,
    RecursionError,
)  # fmt: skip


class Rendered(NamedTuple):
    """A row's texts: of a chat what its template makes of the prompt and of both together."""

    prompt: str
    whole: tuple[str, ...]  # prompt + answer, an answer each


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    *,
    open_answer: bool = False,
    tools: list[Any] | None = None,
    template: dict[str, Any] | None = None,
) -> str:
    """The text of a chat; `open_answer` ends it where the policy's answer begins.

    Raises Unusable (`refused`) where the template does not take these messages.
    """
    try:
        return tokenizer.apply_chat_template(  # pyright: ignore[reportReturnType]
            messages,
            tools=tools or None,  # some templates write a header for an empty list
            tokenize=False,
            add_generation_prompt=open_answer,
            **(template or {}),
        )
    except TEMPLATE_FAULTS as error:
        raise Unusable("refused", f"the chat template refuses it: {error}") from error


def require_words(tokenizer: PreTrainedTokenizerBase) -> None:
    """InputError if the chat template leaves out what messages say, as those do that want
    `content` as a list of parts.
    """
    said = {"user": "klash asks", "assistant": "klash answers"}
    try:
        text = render(tokenizer, [{"role": who, "content": words} for who, words in said.items()])
    except Unusable:  # it wants words that only real rows bring
        return
    for who, words in said.items():
        if words not in text:
            raise InputError(
                f"{tokenizer.name_or_path}: its chat template leaves out what a message of the "
                f"{who} says: let it write message['content'] as a text, and save it"
            )


def answer_text(answer: str | Message) -> str:
    """What an answer says."""
    return answer if isinstance(answer, str) else str(answer["content"])


def said_by(tokenizer: PreTrainedTokenizerBase, prompt: list[int], completion: list[int]) -> str:
    """What a completion adds to the prompt's text: some tokenizers drop a first blank otherwise."""
    before = str(tokenizer.decode(prompt, skip_special_tokens=True))
    whole = str(tokenizer.decode([*prompt, *completion], skip_special_tokens=True))
    if whole.startswith(before):
        return whole[len(before) :]
    return str(tokenizer.decode(completion, skip_special_tokens=True))


class Encoder:
    """What a tokenizer does beside encoding, found out once; and how rows are encoded by it.

    `ends`: ids of the tokens that end an answer; the tokenizer's EOS is put behind texts.
    Raises InputError for a tokenizer that cannot encode the kind of rows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: frozenset[int]):
        self.tokenizer = tokenizer
        eos, unk = tokenizer.eos_token_id, tokenizer.unk_token_id
        self.eos = eos if isinstance(eos, int) else None
        self.ends = ends | ({self.eos} if self.eos is not None else frozenset())
        self.unknown = unk if isinstance(unk, int) and unk not in self.ends else None
        self.before = self._before()
        self.special = _pattern(tokenizer)
        self.opens: bool | None = None  # whether the template has a generation prompt, once known
        self._says = False  # whether the template is known to write what messages say
        self._ends_in: dict[str, int] = {}  # of what templates put behind an answer

    def _before(self) -> list[int]:
        """The tokens that the tokenizer puts before a text, such as BOS."""
        bare = self._ids(["a"])[0]
        added: list[int] = self.tokenizer("a").input_ids  # pyright: ignore[reportAssignmentType]
        at = next(n for n in range(len(added)) if added[n : n + len(bare)] == bare)
        return added[:at]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(list(texts), add_special_tokens=False).input_ids  # pyright: ignore

    def render(self, row: Row) -> Rendered:
        """The texts that are encoded; Unusable where the chat template refuses them."""
        answers = [answer for answer in (row.chosen, row.rejected) if answer is not None]
        if isinstance(row.prompt, str):
            return Rendered(row.prompt, tuple(row.prompt + answer_text(a) for a in answers))
        if self.tokenizer.chat_template is None:
            raise InputError(
                "chat messages, but the model's tokenizer has no chat template; set "
                "tokenizer.chat_template and save it, or give texts"
            )
        if not self._says:
            require_words(self.tokenizer)
            self._says = True
        words = {"tools": row.tools, "template": row.template}
        prompt = render(self.tokenizer, row.prompt, open_answer=True, **words)
        whole = (render(self.tokenizer, [*row.prompt, a], **words) for a in answers)  # pyright: ignore
        return Rendered(prompt, tuple(whole))

    def encode(self, rows: Sequence[Row], texts: Sequence[Rendered]) -> list[Encoded]:
        """Token ids of rows and their texts, encoded together."""
        prompts = self._ids([text.prompt for text in texts])
        whole = iter(self._ids([one for text in texts for one in text.whole]))
        return [
            self._cut(row, text, prompt, [next(whole) for _ in text.whole])
            for row, text, prompt in zip(rows, texts, prompts, strict=True)
        ]

    def _cut(self, row: Row, text: Rendered, prompt: list[int], whole: list[list[int]]) -> Encoded:
        """Prompt and answers out of the tokens of both together."""
        notes: set[str] = set()
        ends_with_prompt = all(one.startswith(text.prompt) for one in text.whole)
        if not ends_with_prompt:
            notes.add("rendered-otherwise")
            length = min(_shared(prompt, ids) for ids in whole)
            prompt = prompt[:length]
        sides = []
        for ids, one in zip(whole, text.whole, strict=True):
            if ids[: len(prompt)] == prompt:
                sides.append(ids[len(prompt) :])
            else:  # the policy goes on from the prompt's own tokens
                notes.add("boundary")
                sides.append(self._ids([one[len(text.prompt) :]])[0])
        chat = not isinstance(row.prompt, str)
        if chat and self._lacks_bos(prompt):
            notes.add("without-bos")
        if not chat and prompt[: len(self.before)] != self.before:
            prompt = [*self.before, *prompt]
        answers = [answer for answer in (row.chosen, row.rejected) if answer is not None]
        for n, (side, answer) in enumerate(zip(sides, answers, strict=True)):
            behind = self._ends_behind(answer_text(answer), text.whole[n]) if chat else 1
            sides[n] = self._ended(side, behind, chat)
        for ids in sides:
            notes |= self._found_in(ids)
        if self.unknown is not None and any(self.unknown in ids for ids in (prompt, *sides)):
            notes.add("unknown-tokens")
        notes |= self._special_in(row)
        if chat and not self._opens_answers(row, text.prompt):
            notes.add("no-generation-prompt")
        chosen, rejected = [*sides, None, None][:2]
        return Encoded(text.prompt, prompt, chosen or [], rejected, tuple(sorted(notes)))

    def _opens_answers(self, row: Row, prompt: str) -> bool:
        """Whether the template ends a prompt with the answer's header; the first row tells."""
        if self.opens is None and not isinstance(row.prompt, str):
            words = {"tools": row.tools, "template": row.template}
            self.opens = prompt != render(self.tokenizer, row.prompt, **words)  # pyright: ignore
        return self.opens is not False

    def _lacks_bos(self, prompt: list[int]) -> bool:
        return bool(self.before) and prompt[: len(self.before)] != self.before

    def _ended(self, ids: list[int], behind: int, chat: bool) -> list[int]:
        """An answer up to its one EOS: a text gets it, a template may put more behind it."""
        if not chat:
            if ids[-1:] and ids[-1] in self.ends:
                return ids
            return [*ids, self.eos] if ids and self.eos is not None else ids
        places = [place for place, one in enumerate(ids) if one in self.ends]
        return ids[: places[-behind] + 1] if 0 < behind <= len(places) else ids

    def _ends_behind(self, said: str, whole: str) -> int:
        """How many ends a template puts behind an answer: the first of them is its EOS."""
        said = said.strip()
        behind = whole[whole.rfind(said) + len(said) :] if said and said in whole else None
        if behind is None:
            return 1
        if behind not in self._ends_in:
            found = self._ids([behind])[0]
            self._ends_in[behind] = sum(one in self.ends for one in found)
        return self._ends_in[behind]

    def _found_in(self, ids: list[int]) -> set[str]:
        inner = ids[:-1]
        found = {
            "without-end": bool(ids) and ids[-1] not in self.ends,
            "two-ends": not self.ends.isdisjoint(inner),
        }
        return {name for name, there in found.items() if there}

    def _special_in(self, row: Row) -> set[str]:
        """Special tokens that stand in texts: they would be read as control tokens."""
        if self.special is None:
            return set()
        answers = [answer for answer in (row.chosen, row.rejected) if answer is not None]
        if not isinstance(row.prompt, str):
            said = texts_in([row.prompt, answers, row.tools, row.template])
            return {"control-tokens"} if any(map(self.special.search, said)) else set()
        found = {"control-tokens-in-prompts"} if self.special.search(row.prompt) else set()
        for answer in map(answer_text, answers):
            places = list(self.special.finditer(answer))
            if places and not (len(places) == 1 and self._is_its_end(places[0], answer)):
                found.add("control-tokens")
        return found

    def _is_its_end(self, place: re.Match[str], answer: str) -> bool:
        """Whether a special token is the EOS that stands behind an answer."""
        known = self.tokenizer.convert_tokens_to_ids(place[0]) in self.ends
        return known and place.end() == len(answer.rstrip())


def texts_in(value: Any) -> Iterator[str]:
    """Every text in messages, tools and what is inside of them; of a message not its role."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key != "role":
                yield from texts_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts_in(inner)


def _shared(first: list[int], second: list[int]) -> int:
    """How many tokens two sequences begin with together."""
    return next(
        (n for n, (a, b) in enumerate(zip(first, second)) if a != b),  # noqa: B905
        min(len(first), len(second)),
    )


def _pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """The texts of all special tokens, None where there are none."""
    added = tokenizer.added_tokens_decoder.values()
    texts = {str(one.content) for one in added if one.special and one.content.strip()}
    texts |= {text for text in tokenizer.all_special_tokens if text.strip()}
    return (
        re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))
        if texts
        else None
    )
