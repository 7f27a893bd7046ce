"""The tasks by name."""

from typing import Literal

from shared.config import Config
from shared.tasks.reviews import Reviews, ReviewsConfig
from shared.tasks.task import Task


class TaskConfig(Config):
    """Which task, and its own settings."""

    name: Literal["reviews"] = "reviews"
    reviews: ReviewsConfig = ReviewsConfig()


def make_task(config: TaskConfig) -> Task:
    return {"reviews": lambda: Reviews(config.reviews)}[config.name]()
