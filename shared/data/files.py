"""What rows of a file mean: one function a format, from a raw row to comparisons.

`FORMATS` names them. The format of a file is found from its first row, and told, or given by name;
every other row must be in it. A new format is a function and a line in `FORMATS`.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

from shared.data.rows import (
    ANSWERS,
    RATINGS,
    DataConfig,
    Messages,
    Row,
    Unreadable,
    Unusable,
    finite,
    label_at,
    message_of,
    messages_at,
    number_at,
    shown,
    text_at,
)
from shared.data.turns import (
    TURN,
    answer_of,
    asked,
    pair_after,
    pair_of_chats,
    pair_of_texts,
    pair_of_transcripts,
    split_chat,
    user,
)

Raw = dict[str, Any]


def read_pairs_row(raw: Raw, data: DataConfig) -> list[Row]:
    """TRL's pairs with an explicit prompt: three texts, or messages, or a text and messages.

    Messages of the answers may begin with those of the prompt. A text beside whole chats must be
    their last user message, as in HuggingFaceH4/ultrafeedback_binarized.
    """
    prompt, answers = raw["prompt"], [raw["chosen"], raw["rejected"]]
    texts = [isinstance(answer, str) for answer in answers]
    if isinstance(prompt, str) and all(texts):
        return [Row(prompt, *answers)]
    if not isinstance(prompt, str | list) or (any(texts) and not all(texts)):
        raise Unreadable(
            "`prompt`, `chosen` and `rejected` must be three texts, or lists of messages {role, "
            "content} (" + ", ".join(f"`{k}`: {shown(raw[k])}" for k in PAIR) + ")"
        )
    chosen, rejected = answer_messages(raw, "chosen"), answer_messages(raw, "rejected")
    if isinstance(prompt, str):
        if len(chosen) == len(rejected) == 1:
            return [pair_after([user(prompt)], chosen, rejected)]
        return [pair_of_chats(chosen, rejected, prompt)]
    return [pair_after(messages_at(raw, "prompt"), chosen, rejected)]


def read_implicit(raw: Raw, data: DataConfig) -> list[Row]:
    """Pairs whose prompt is what both sides begin with: messages (Skywork) or texts."""
    if all(isinstance(raw[side], str) for side in SIDES):
        if _is_transcript(raw):
            raise Unreadable("a dialogue among other texts; name the format: hh-rlhf")
        return [pair_of_texts(raw["chosen"], raw["rejected"])]
    if any(isinstance(raw[side], str) for side in SIDES):
        raise Unreadable("`chosen` and `rejected` must be two texts, or two lists of messages")
    return [pair_of_chats(answer_messages(raw, "chosen"), answer_messages(raw, "rejected"))]


def read_transcripts(raw: Raw, data: DataConfig) -> list[Row]:
    """Anthropic/hh-rlhf: dialogues as text, split at the last "\\n\\nAssistant:"."""
    return [pair_of_transcripts(text_at(raw, "chosen"), text_at(raw, "rejected"), data.chat)]


def read_labels(raw: Raw, data: DataConfig) -> list[Row]:
    """TRL's unpaired answers: `prompt`, `completion` and `label`."""
    label = label_at(raw, "label")
    return [row._replace(label=label) for row in read_answers(raw, data)]


def read_chat_labels(raw: Raw, data: DataConfig) -> list[Row]:
    """Whole chats with a `label`, of which the last message is judged."""
    return [read_chats(raw, data)[0]._replace(label=label_at(raw, "label"))]


def read_answers(raw: Raw, data: DataConfig) -> list[Row]:
    """TRL's prompt and completion, texts or messages: one answer, for SFT."""
    prompt, completion = raw["prompt"], raw["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return [Row(prompt, completion)]
    if isinstance(prompt, str) and isinstance(completion, list | dict):
        before = [user(prompt)]
    elif isinstance(completion, list | dict):
        before = messages_at(raw, "prompt")
    else:
        raise Unreadable(
            "`prompt` and `completion` must be two texts, or lists of messages {role, content} "
            f"(`prompt`: {shown(prompt)}, `completion`: {shown(completion)})"
        )
    return [Row(before, answer_of(before, answer_messages(raw, "completion"), "completion"))]


def read_chats(raw: Raw, data: DataConfig) -> list[Row]:
    """Whole chats: the last message is the answer, for SFT."""
    prompt, answer = split_chat(messages_at(raw, "messages"), "messages")
    return [Row(prompt, answer)]


def read_prompts(raw: Raw, data: DataConfig) -> list[Row]:
    """Prompts alone, as texts or messages."""
    if isinstance(raw["prompt"], str):
        return [Row(raw["prompt"], None)]
    return [Row(asked(messages_at(raw, "prompt")), None)]


def read_argilla(raw: Raw, data: DataConfig) -> list[Row]:
    """argilla/ultrafeedback-binarized-preferences."""
    prompt, chosen = text_at(raw, "instruction"), text_at(raw, "chosen_response")
    return [Row(prompt, chosen, text_at(raw, "rejected_response"))]


def read_shp(raw: Raw, data: DataConfig) -> list[Row]:
    """stanfordnlp/SHP: `labels` is 1 where answer A is preferred."""
    first, second = text_at(raw, "human_ref_A"), text_at(raw, "human_ref_B")
    order = (first, second) if label_at(raw, "labels") else (second, first)
    return [Row(text_at(raw, "history"), *order)]


def read_helpsteer(raw: Raw, data: DataConfig) -> list[Row]:
    """nvidia/HelpSteer3: a preference below 0 is for the first answer, above for the second."""
    return [
        _signed(messages_at(raw, "context"), raw, "response1", "response2", "overall_preference")
    ]


def read_helpsteer2(raw: Raw, data: DataConfig) -> list[Row]:
    """nvidia/HelpSteer2's preferences: the same sign, and a prompt as text."""
    prompt = [user(text_at(raw, "prompt"))]
    return [_signed(prompt, raw, "response_1", "response_2", "preference_strength")]


def _signed(prompt: Messages, raw: Raw, first: str, second: str, key: str) -> Row:
    preference = number_at(raw, key)
    if preference == 0:
        raise Unusable("tie", f"`{key}` is 0")
    order = (first, second) if preference < 0 else (second, first)
    chosen, rejected = ([{"role": "assistant", "content": text_at(raw, side)}] for side in order)
    return pair_after(prompt, chosen, rejected)


def read_comparisons(raw: Raw, data: DataConfig) -> list[Row]:
    """openai/summarize_from_feedback, `comparisons`: the prompt of the TL;DR experiments."""
    info, summaries, choice = raw["info"], raw["summaries"], raw["choice"]
    if not isinstance(info, dict) or not isinstance(summaries, list) or len(summaries) != 2:
        raise Unreadable("`info` must be an object and `summaries` a list of two {text}")
    texts = [text_at(one, "text") if isinstance(one, dict) and "text" in one else None
             for one in summaries]  # fmt: skip
    if None in texts:
        raise Unreadable("`summaries` must be two objects with a `text`")
    if choice not in (0, 1):
        raise Unreadable(f"`choice` must be 0 or 1 (found {shown(choice)})")
    choice = int(choice)
    parts = [
        f"{name.upper()}: {'r/' if name == 'subreddit' else ''}{info[name]}"
        for name in ("subreddit", "title", "post", "article")
        if info.get(name)
    ]
    if not isinstance(info.get("post") or info.get("article"), str):
        raise Unreadable("`info` must hold the text of a `post` or an `article`")
    prompt = "\n\n".join([*parts, "TL;DR:"])
    return [Row(prompt, f" {str(texts[choice]).strip()}", f" {str(texts[1 - choice]).strip()}")]


def read_sharegpt(raw: Raw, data: DataConfig) -> list[Row]:
    """LLaMA-Factory's and ShareGPT's `conversations` of {from, value}, with `chosen` and `rejected`
    (one such message each), with a label (`label`, `kto_tag`), or alone.
    """
    messages = messages_at(raw, "conversations")
    if "chosen" in raw and "rejected" in raw:
        sides = (answer_messages(raw, side) for side in SIDES)
        return [pair_after(messages, *sides)]
    prompt, answer = split_chat(messages, "conversations")
    return [Row(prompt, answer, label=_label(raw))]


def read_alpaca(raw: Raw, data: DataConfig) -> list[Row]:
    """LLaMA-Factory's `instruction`, `input` and `history`, with `chosen` and `rejected`, with an
    `output` and a label, or with an `output` alone.
    """
    words = [text_at(raw, key) for key in ("instruction", "input") if raw.get(key)]
    messages: Messages = []
    history = raw.get("history") or []
    if not isinstance(history, list):
        raise Unreadable(f"`history` must be a list (found {shown(history)})")
    for turn in history:
        if not isinstance(turn, list) or len(turn) != 2:
            raise Unreadable(f"`history` must be pairs of texts (found {shown(turn)})")
        messages += [user(turn[0]), {"role": "assistant", "content": turn[1]}]
    messages = [message_of(one, "history") for one in messages] + [user("\n".join(words))]
    keys = SIDES if set(SIDES) <= raw.keys() else ("output",)
    if not set(keys) <= raw.keys():
        raise Unreadable("no `output`, and no `chosen` with `rejected`")
    answers = [{"role": "assistant", "content": text_at(raw, key)} for key in keys]
    return [Row(messages, *answers, label=_label(raw))]


def _label(raw: Raw) -> bool | None:
    key = next((key for key in ("label", "kto_tag") if key in raw), None)
    return None if key is None else label_at(raw, key)


IN_ANSWER = ("overall_score", "score", "rating", "reward")


def read_rated(raw: Raw, data: DataConfig) -> list[Row]:
    """n answers of one prompt with a rating each -> pairs, by the rule that `data.rated` names.

    The answers are texts with `scores` beside them, or objects {text or response, score}.
    """
    prompt, answers = _first_of(raw, ("prompt", "instruction")), _first_of(raw, ANSWERS)
    beside = next((raw[key] for key in RATINGS if key in raw), None)
    if not isinstance(answers, list) or (beside is not None and not isinstance(beside, list)):
        raise Unreadable("the answers must be a list, and so their scores")
    if beside is not None and len(beside) != len(answers):
        raise Unreadable(f"{len(answers)} answers have {len(beside)} scores")
    rated = [_rated(one, None if beside is None else beside[n]) for n, one in enumerate(answers)]
    rated.sort(key=lambda one: -one[1])
    if len(rated) < 2:
        raise Unusable("single-answer", "fewer than two answers have no better and worse")
    least = data.margin if data.rated == "margin" else max(data.margin, 1e-12)
    pairs = list(itertools.combinations(rated, 2))
    if data.rated == "best-worst":
        pairs = [(rated[0], rated[-1])]
    pairs = [(better, worse) for better, worse in pairs if better[1] - worse[1] >= least]
    if not pairs:
        raise Unusable("tie", "no two ratings differ enough")
    if isinstance(prompt, str):
        return [Row(prompt, better[0], worse[0]) for better, worse in pairs]
    before = messages_at({"prompt": prompt}, "prompt")
    return [
        pair_after(before, *([{"role": "assistant", "content": one[0]}] for one in pair))
        for pair in pairs
    ]


def _first_of(raw: Raw, keys: tuple[str, ...]) -> Any:
    for key in keys:
        if key in raw:
            return raw[key]
    raise Unreadable(f"`{keys[0]}` is missing (found {', '.join(raw)})")


def _rated(answer: Any, score: Any) -> tuple[str, float]:
    if isinstance(answer, dict):
        if score is None:
            score = next((answer[key] for key in IN_ANSWER if key in answer), None)
        answer = next((answer[k] for k in ("text", "response", "content") if k in answer), None)
    if not isinstance(answer, str) or score is None:
        raise Unreadable("an answer must be a text with a score, or {text, score}")
    return answer, finite(score, "score")


def answer_messages(raw: Raw, key: str) -> Messages:
    """An answer's messages; LLaMA-Factory gives one message, and some files its text alone."""
    value = raw[key]
    if isinstance(value, dict):
        return [message_of(value, key)]
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    return messages_at(raw, key)


PAIR, SIDES = ("prompt", "chosen", "rejected"), ("chosen", "rejected")
Read = Callable[[Raw, DataConfig], list[Row]]


class Format(NamedTuple):
    """`keys` that a row must have; `fits` looks at their values where other formats share them."""

    read: Read
    keys: tuple[str, ...]
    also: tuple[str, ...] = ()  # keys that it reads where they are
    fits: Callable[[Raw], bool] = lambda raw: True


def _is_transcript(raw: Raw) -> bool:
    return all(isinstance(raw[side], str) and TURN in raw[side] for side in SIDES)


def _is_rated(raw: Raw) -> bool:
    key = next((key for key in ANSWERS if key in raw), None)
    if key is None or not ("prompt" in raw or "instruction" in raw):
        return False
    inside = isinstance(raw[key], list) and all(isinstance(one, dict) for one in raw[key])
    return inside or any(key in raw for key in RATINGS)


def _no_answers(raw: Raw) -> bool:
    return not {"chosen", "rejected", "completion", "response_1", "response"} & raw.keys()


def _has_answer(raw: Raw) -> bool:
    return "output" in raw or ("chosen" in raw and "rejected" in raw)


# The first that fits is taken: those with more keys stand before those with fewer.
FORMATS: dict[str, Format] = {
    "ultrafeedback": Format(read_pairs_row, (*PAIR, "score_chosen", "score_rejected", "messages")),
    "pairs": Format(read_pairs_row, PAIR),
    "sharegpt": Format(
        read_sharegpt, ("conversations",), ("chosen", "rejected", "label", "kto_tag")
    ),
    "alpaca": Format(
        read_alpaca,
        ("instruction",),
        ("input", "history", "output", "chosen", "rejected", "label", "kto_tag"),
        _has_answer,
    ),
    "hh-rlhf": Format(read_transcripts, SIDES, fits=_is_transcript),
    "implicit-pairs": Format(read_implicit, SIDES),
    "argilla": Format(read_argilla, ("instruction", "chosen_response", "rejected_response")),
    "shp": Format(read_shp, ("history", "human_ref_A", "human_ref_B", "labels")),
    "helpsteer3": Format(
        read_helpsteer, ("context", "response1", "response2", "overall_preference")
    ),
    "helpsteer2": Format(
        read_helpsteer2, ("prompt", "response_1", "response_2", "preference_strength")
    ),
    "summarize-from-feedback": Format(read_comparisons, ("info", "summaries", "choice")),
    "rated": Format(
        read_rated, (), ("prompt", "instruction", *ANSWERS, *RATINGS), _is_rated
    ),
    "labels": Format(read_labels, ("prompt", "completion", "label")),
    "chat-labels": Format(read_chat_labels, ("messages", "label")),
    "answers": Format(read_answers, ("prompt", "completion")),
    "chats": Format(read_chats, ("messages",)),
    "prompts": Format(read_prompts, ("prompt",), fits=_no_answers),
}  # fmt: skip
ALIASES = {
    "skywork": "implicit-pairs",
    "trl": "pairs",
    "llama-factory": "sharegpt",
    "kto": "labels",
}
