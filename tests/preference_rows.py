"""Rows of preferences as users have them: chats, and texts."""

import json
import random
from pathlib import Path
from typing import Any

WORDS = ["good", "bad", "film", "hello", "the", "you", "are", "yes", "no"]


def say(dice: random.Random, words: int) -> str:
    return " ".join(dice.choice(WORDS) for _ in range(words))


def chat_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    dice = random.Random(seed)

    def answer() -> list[dict[str, str]]:
        return [{"role": "assistant", "content": say(dice, dice.randint(1, 6))}]

    return [
        {
            "prompt": [{"role": "user", "content": f"{n} {say(dice, 3)}"}],
            "chosen": answer(),
            "rejected": [{"role": "assistant", "content": f"{say(dice, 4)} {n}"}],
        }
        for n in range(count)
    ]


def text_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    dice = random.Random(seed)
    return [
        {
            "prompt": f"{n} {say(dice, 3)}",
            "chosen": f" {say(dice, dice.randint(1, 6))}",
            "rejected": f" {say(dice, 4)} {n}",
        }
        for n in range(count)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
