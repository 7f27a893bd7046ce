"""The tasks by name."""

from typing import Literal

from shared.config import Config
from shared.tasks.exact import Exact, ExactConfig
from shared.tasks.reviews import Reviews, ReviewsConfig
from shared.tasks.task import Task


class TaskConfig(Config):
    """Which task, and its own settings."""

    name: Literal["reviews", "exact"] = "reviews"
    reviews: ReviewsConfig = ReviewsConfig()
    exact: ExactConfig = ExactConfig()

    @property
    def finite(self) -> bool:
        """Few prompts, the same in every split, whose completions can all be listed."""
        return self.name == "exact"


def make_task(config: TaskConfig) -> Task:
    if config.name == "exact":
        return Exact(config.exact)
    return Reviews(config.reviews)
