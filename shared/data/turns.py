"""Where a prompt ends and an answer begins, in chats and in transcripts."""

import re
from itertools import takewhile

from shared.data.rows import ASKING, Message, Messages, Row, Unusable

TURN, HUMAN = "\n\nAssistant:", "\n\nHuman:"
_TURNS = re.compile(r"\n\n(Human|Assistant):")


def user(text: str) -> Message:
    """What the user said."""
    return {"role": "user", "content": text}


def pair_of_texts(chosen: str, rejected: str) -> Row:
    """Two texts whose shared beginning is the prompt, as TRL's `extract_prompt` cuts them."""
    shared = sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(chosen, rejected)))  # noqa: B905
    if shared == min(len(chosen), len(rejected)) and chosen != rejected:
        raise Unusable("empty", "one side is the beginning of the other")
    if chosen == rejected:
        raise Unusable("identical", "both sides are the same text")
    if shared and chosen[shared - 1] == " ":
        shared -= 1
    if not chosen[:shared].strip():
        raise Unusable("prompt-mismatch", "the two texts share no beginning, so there is no prompt")
    return Row(chosen[:shared], chosen[shared:], rejected[shared:])


def pair_of_transcripts(chosen: str, rejected: str, chat: str = "as-is") -> Row:
    """Dialogues as text; with `chat` = messages as the turns that they are made of."""
    sides = [text.rpartition(TURN) for text in (chosen, rejected)]
    for before, turn, answer in sides:
        if not turn or HUMAN in answer:
            raise Unusable("wrong-role", "a dialogue does not end with the assistant's turn")
        if not before.strip():
            raise Unusable("empty", "a dialogue begins with the answer")
    if sides[0][0] != sides[1][0]:
        raise Unusable("prompt-mismatch", "the two dialogues differ before their last answer")
    if chat == "as-is":
        return Row(sides[0][0] + TURN, sides[0][2], sides[1][2])
    first, second = ({"role": "assistant", "content": side[2].strip()} for side in sides)
    return Row(turns_of(sides[0][0]), first, second)


def turns_of(text: str) -> Messages:
    """The messages of a dialogue as text; what stands before the first turn is the system's."""
    before, *rest = _TURNS.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    said = [
        {"role": roles[speaker], "content": words.strip()}
        for speaker, words in zip(rest[::2], rest[1::2], strict=True)
    ]
    return [{"role": "system", "content": before.strip()}, *said] if before.strip() else said


def split_chat(messages: Messages, name: str) -> tuple[Messages, Message]:
    """(what comes before, the last message), which must be the assistant's."""
    if messages[-1]["role"] != "assistant":
        role = messages[-1]["role"]
        raise Unusable("wrong-role", f"the last message of `{name}` is the {role}'s")
    if len(messages) == 1:
        raise Unusable("empty", f"`{name}` holds an answer and no prompt")
    return asked(messages[:-1]), messages[-1]


def asked(prompt: Messages) -> Messages:
    """A prompt that ends with whom the assistant answers."""
    if (role := prompt[-1]["role"]) not in ASKING:
        raise Unusable("wrong-role", f"the prompt ends with a message of the {role}, not the user")
    return prompt


def pair_after(prompt: Messages, chosen: Messages, rejected: Messages) -> Row:
    """Two answers to a prompt, which they may repeat."""
    return Row(
        asked(prompt),
        answer_of(prompt, chosen, "chosen"),
        answer_of(prompt, rejected, "rejected"),
    )


def answer_of(prompt: Messages, answer: Messages, name: str) -> Message:
    """The one message of the assistant after the prompt, whose messages `answer` may begin with."""
    if answer[: len(prompt)] == prompt:
        answer = answer[len(prompt) :]
    if not answer:
        raise Unusable("empty", f"`{name}` is the prompt and no answer")
    roles = [message["role"] for message in answer]
    if roles == ["assistant"]:
        return answer[0]
    if roles[-1] != "assistant" or len(answer) == 1:
        raise Unusable("wrong-role", f"the role of an answer must be assistant (`{name}`: {roles})")
    if roles[0] != "assistant":
        raise Unusable("prompt-mismatch", f"`{name}` repeats a conversation that is not its prompt")
    raise Unusable(
        "several-turns",
        f"`{name}` holds several turns ({', '.join(roles)}); only the last turn of the assistant "
        "can be compared: put the others into the prompt",
    )


def pair_of_chats(chosen: Messages, rejected: Messages, asking: str | None = None) -> Row:
    """Whole chats whose shared messages are the prompt; `asking` is its last message as text."""
    first, second = (
        split_chat(chat, name) for chat, name in ((chosen, "chosen"), (rejected, "rejected"))
    )
    if first[0] != second[0]:
        shared = list(takewhile(lambda two: two[0] == two[1], zip(chosen, rejected)))  # noqa: B905
        if shared and shared[-1][0]["role"] in ASKING:
            raise Unusable(
                "several-turns",
                "the two chats differ before their last message; only the last turn of the "
                "assistant can be compared",
            )
        raise Unusable("prompt-mismatch", "`chosen` and `rejected` begin with different prompts")
    if asking is not None and first[0][-1]["content"].strip() != asking.strip():
        raise Unusable("prompt-mismatch", "`prompt` is not the last user message of the two chats")
    return Row(first[0], first[1], second[1])
