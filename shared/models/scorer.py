"""Reward-model inference: token ids of prompts and completions -> scores.

A reward model that reads the very tokens that were sampled is given them as they are. One with a
tokenizer of its own, or an encoder (BERT's kind), is given their text: decoded, rendered and
encoded as the reward model was trained, through its class's own forward pass.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shared.config import InputError
from shared.data.chat import Encoder, answer_text, render, require_words, said_by
from shared.data.rows import Message, Messages, Row, Unusable
from shared.models import ranks
from shared.models.cost import At, Work, count_pass
from shared.models.folders import places_of
from shared.models.load import (
    WeightDtype,
    load_scalar_model,
    load_tokenizer,
    sequence_scores,
    special_ids,
)
from shared.models.opening import open_tokenizer, require_embeddings
from shared.models.reward_files import Chats, read_chats, read_ends, read_normalisation
from shared.models.sequences import SCORING, Limit, Sequences, by_length, collate


class Answered(NamedTuple):
    """A prompt with one answer to it, before any tokenizer: texts, or messages and a message."""

    prompt: str | Messages
    answer: str | Message
    ended: bool = True  # False: cut where it stands, so that no EOS follows
    tools: list[Any] | None = None
    template: dict[str, Any] | None = None  # further words for the chat template


class Scorer:
    """`score` = (raw - offset) / scale, in SFT within-prompt deviations.

    `reader` is the tokenizer of the ids that come, the policy's; without one they are the reward
    model's own. `ends` are the tokens that end the policy's answers, by default the reader's
    special tokens. `chats` holds the messages of prompts that are chats, which then go through the
    reward model's own template; by default those in its folder's `chats.jsonl`. Without any,
    prompts are scored as the text that they are.
    """

    def __init__(
        self,
        folder: Path,
        *,
        reader: PreTrainedTokenizerBase | None = None,
        ends: frozenset[int] | None = None,
        chats: Chats | None = None,
        dtype: WeightDtype = "float32",
    ):
        model = load_scalar_model(folder, dtype)
        self.folder, self.chats = folder, read_chats(folder) if chats is None else chats
        self.model: PreTrainedModel = model.eval().requires_grad_(False)
        self.decoder = isinstance(getattr(model, "score", None), nn.Linear)
        self.tokenizer = open_tokenizer(folder)
        require_embeddings(folder, self.tokenizer, model)
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        fill = eos if pad is None and self.decoder else pad
        if not isinstance(fill, int):
            raise InputError(f"{folder}: its tokenizer needs a pad token to fill batches with")
        self.pad_id, self.reader = fill, reader or self.tokenizer
        self.ends = frozenset(self.reader.all_special_ids) if ends is None else ends
        # TRL makes EOS the pad token of a tokenizer without one, and scores are read before it
        self.unread = fill if pad == eos else None
        self.by_text = (
            not self.decoder
            or self.unread is not None
            or not same_tokens(self.reader, self.tokenizer)
        )
        self.model.config.get_text_config().pad_token_id = fill  # where its class reads a score
        self.offset, self.scale = read_normalisation(folder)
        self.room = context_length(self.model, self.tokenizer)
        self._says = False  # whether the template is known to write what messages say
        trained_by = read_ends(folder)  # of one that was trained here: as our trainers encode rows
        self.own = None if trained_by is None else Encoder(self.tokenizer, trained_by)

    @torch.no_grad()
    def score(self, batch: Sequences) -> Tensor:
        """Normalised scores of one batch of the reward model's own tokens, (B,)."""
        return (sequence_scores(self.model, batch.to(self.model.device)) - self.offset) / self.scale

    def score_all(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        limit: Limit = SCORING,
        *,
        finite: bool = True,
    ) -> Tensor:
        """Normalised scores of any number of rows, in their order, (N,), on the CPU.

        InputError where one is not a number, unless `finite` is False and the caller looks.
        """
        if self.by_text:
            scores = self._score_texts(prompts, completions, limit)
        else:
            scores = self._score_tokens(prompts, completions, limit)
        return self._finite(scores) if finite else scores

    def score_said(self, rows: Sequence[Answered], limit: Limit = SCORING) -> Tensor:
        """Normalised scores of answers that are texts or messages, in order, (N,), on the CPU.

        InputError where one is more than it reads, or where a score is not a number.
        """
        return self._finite(self.score_inputs([self.fitting(row) for row in rows], limit))

    def _finite(self, scores: Tensor) -> Tensor:
        if broken := int((~scores.isfinite()).sum()):
            raise InputError(
                f"{self.folder}: the reward model's score of {broken} of {len(scores)} completions "
                "is not a number: it diverged in training, or `dtype` is too narrow for it"
            )
        return scores

    def _score_tokens(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], limit: Limit
    ) -> Tensor:
        scores, own = torch.zeros(len(prompts)), ranks.mine(range(len(prompts)))
        lengths = [len(completions[i]) for i in own], [len(prompts[i]) for i in own]
        for group in by_length(*lengths, limit):
            rows = [own[i] for i in group]
            batch = collate([prompts[i] for i in rows], [completions[i] for i in rows], self.pad_id)
            scores[torch.tensor(rows)] = self.score(batch).cpu()
        return ranks.total(scores)

    def _score_texts(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], limit: Limit
    ) -> Tensor:
        rows = zip(prompts, completions, strict=True)
        return self.score_inputs([self.encode(p, c) for p, c in rows], limit)

    def score_inputs(
        self, encoded: Sequence[dict[str, list[int]]], limit: Limit = SCORING
    ) -> Tensor:
        """Normalised scores of what `inputs` made, in order, (N,), on the CPU; finite or not."""
        ids = [self._read(row["input_ids"]) for row in encoded]
        if self.decoder and all(len(row) > 1 for row in ids):  # where prompts end changes nothing
            return self._score_tokens([row[:1] for row in ids], [row[1:] for row in ids], limit)
        scores, own = torch.zeros(len(encoded)), ranks.mine(range(len(encoded)))
        for group in by_length([len(ids[i]) for i in own], [0] * len(own), limit):
            rows = [own[i] for i in group]
            scores[torch.tensor(rows)] = self._score_encoded([encoded[i] for i in rows])
        return (ranks.total(scores) - self.offset) / self.scale

    @torch.no_grad()
    def _score_encoded(self, rows: list[dict[str, list[int]]]) -> Tensor:
        """Raw scores by the classifier's own forward pass, on rows padded on the right, (B,)."""
        lengths = [len(row["input_ids"]) for row in rows]
        width, fill = max(lengths), {"input_ids": self.pad_id}
        inputs = {
            name: torch.tensor(
                [row[name] + [fill.get(name, 0)] * (width - len(row[name])) for row in rows],
                device=self.model.device,
            )
            for name in rows[0]
        }
        scores = self.model(**inputs).logits.squeeze(-1).float()
        real = sum(lengths)
        count_pass(self.model, Work(lengths, At(real, real, len(rows)), real), scores)
        return scores.cpu()

    def _read(self, ids: list[int]) -> list[int]:
        """The row as far as transformers reads it: it looks for the last token that is no pad."""
        length = len(ids)
        while length > 1 and ids[length - 1] == self.unread:
            length -= 1
        return ids[:length]

    def encode(self, prompt: Sequence[int], completion: Sequence[int]) -> dict[str, list[int]]:
        """The reward model's inputs for one row of the reader's tokens: their text, or chat.

        InputError where they are more than it reads.
        """
        if self.chats and tuple(prompt) not in self.chats:
            raise InputError(
                f"{self.folder}: a prompt of {len(prompt)} tokens is none of the chats whose "
                f"messages are known ({len(self.chats)}): give it those of these prompts"
            )
        chat = self.chats.get(tuple(prompt))
        prompt, completion = list(prompt), list(completion)
        before = str(self.reader.decode(prompt, skip_special_tokens=True)) if chat is None else chat
        ended = bool(completion) and completion[-1] in self.ends
        return self.fitting(Answered(before, said_by(self.reader, prompt, completion), ended))

    def fitting(self, row: Answered) -> dict[str, list[int]]:
        """`inputs`; InputError where the model cannot read the row, or where it is too long."""
        try:
            found = self.inputs(row)
        except Unusable as fault:
            raise InputError(f"{self.folder}: {fault}") from fault
        if self.room and (length := len(found["input_ids"])) > self.room:
            raise InputError(
                f"{self.folder}: a completion with its prompt has {length} tokens of the reward "
                f"model's, which reads {self.room}: shorten prompts or lower "
                "`sampling.max_new_tokens`"
            )
        return found

    def inputs(self, row: Answered) -> dict[str, list[int]]:
        """The reward model's inputs for one row, however long, as its training had them.

        One that was trained here reads a row as our trainers encode it, another one its text.
        Raises Unusable where the chat template refuses the messages.
        """
        return self._text_inputs(row) if self.own is None else self._own_inputs(self.own, row)

    def _text_inputs(self, row: Answered) -> dict[str, list[int]]:
        """A chat as the template renders it, or as text where there is none.

        Texts: a decoder reads prompt + answer, and EOS unless the answer was cut, as TRL's
        RewardTrainer has it; an encoder reads the two as its tokenizer's pair, the prompt cut on
        the left to fit.
        """
        answer, before = answer_text(row.answer), row.prompt
        if not isinstance(before, str):
            if self.tokenizer.chat_template:
                return self._plain(self.tokenizer(self._rendered(row), add_special_tokens=False))
            before = "\n\n".join(str(message["content"]) for message in before)
        if not self.decoder:
            alone = self._plain(self.tokenizer("", answer))
            if not self.room or len(alone["input_ids"]) > self.room:
                return alone if self.room else self._plain(self.tokenizer(before, answer))
            self.tokenizer.truncation_side = "left"
            pair = {"truncation": "only_first", "max_length": self.room}
            return self._plain(self.tokenizer(before, answer, **pair))
        found = self._plain(self.tokenizer(before + answer))
        eos = self.tokenizer.eos_token_id
        if row.ended and eos is not None and found["input_ids"][-1:] != [eos]:
            found = {**found, "input_ids": [*found["input_ids"], eos]}
            found["attention_mask"] = [*found["attention_mask"], 1]
        return found

    def _rendered(self, row: Answered) -> str:
        """A chat in the reward model's template; an answer that was cut ends with its last word."""
        if not self._says:
            require_words(self.tokenizer)
            self._says = True
        words: dict[str, Any] = {"tools": row.tools, "template": row.template}
        prompt: Messages = row.prompt  # pyright: ignore[reportAssignmentType]
        if not row.ended:
            opened = render(self.tokenizer, prompt, open_answer=True, **words)
            return opened + answer_text(row.answer)
        return render(self.tokenizer, [*prompt, _as_message(row.answer)], **words)

    def _own_inputs(self, encoder: Encoder, row: Answered) -> dict[str, list[int]]:
        chat = not isinstance(row.prompt, str)
        answer = _as_message(row.answer) if chat else row.answer
        one = Row(row.prompt, answer, tools=row.tools, template=row.template)
        encoded = encoder.encode([one], [encoder.render(one)])[0]
        ids = [*encoded.prompt_ids, *encoded.chosen_ids]
        if row.ended and not encoded.chosen_ids and encoder.eos is not None:
            ids.append(encoder.eos)  # an answer of nothing, which no row of a file is
        if not row.ended and ids[-1] in encoder.ends:
            ids.pop()
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}

    def _plain(self, encoded: Any) -> dict[str, list[int]]:
        names = ("input_ids", "attention_mask", "token_type_ids")
        found = {name: list(encoded[name]) for name in names if name in encoded}
        if self.decoder:
            found.pop("token_type_ids", None)
        return found


def _as_message(answer: str | Message) -> Message:
    return {"role": "assistant", "content": answer} if isinstance(answer, str) else answer


def scorer_of(reward_model: Path, policy: Path | None) -> Scorer:
    """The scorer of a policy's tokens; without `policy` they are the reward model's own."""
    if policy is None:
        return Scorer(reward_model)
    tokenizer = load_tokenizer(policy)
    return Scorer(reward_model, reader=tokenizer, ends=special_ids(tokenizer, policy).ends)


def same_tokens(policy: PreTrainedTokenizerBase, reward: PreTrainedTokenizerBase) -> bool:
    """Whether each of the policy's tokens is the same token, under the same id, in `reward`."""
    theirs = reward.get_vocab()
    return all(theirs.get(token) == number for token, number in policy.get_vocab().items())


def context_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """How many tokens a classifier reads; None where neither file says."""
    both = places_of(model.config), tokenizer.model_max_length
    known = [n for n in both if n and 0 < n < 10**9]
    return min(known, default=None)


def require_differing(folder: Path | str, scores: Sequence[float]) -> None:
    """InputError where a reward model gives all of several answers one score."""
    if len(scores) > 1 and min(scores) == max(scores):
        raise InputError(
            f"{folder}: the reward model gives all {len(scores)} answers the score {scores[0]:g}: "
            "train it, or look for a head of zeros"
        )
