"""The tasks by name."""

from typing import Literal

from shared.config import Config
from shared.tasks.exact import Exact, ExactConfig
from shared.tasks.reviews import Reviews, ReviewsConfig
from shared.tasks.task import Task


class TaskConfig(Config):
    """Where prompts, labels and gold scores come from."""

    name: Literal["reviews", "exact"] = "reviews"
    """The task: short reviews, scored by VADER, or one so small that all completions are listed."""
    reviews: ReviewsConfig = ReviewsConfig()
    """Settings of the task `reviews`."""
    exact: ExactConfig = ExactConfig()
    """Settings of the task `exact`."""

    @property
    def finite(self) -> bool:
        """Few prompts, the same in every split, whose completions can all be listed."""
        return self.name == "exact"


def make_task(config: TaskConfig) -> Task:
    if config.name == "exact":
        return Exact(config.exact)
    return Reviews(config.reviews)
