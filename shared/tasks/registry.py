"""The tasks by name."""

from typing import Literal

from shared.config import Config
from shared.data.rows import DataConfig
from shared.tasks.exact import Exact, ExactConfig
from shared.tasks.own import Own, OwnData
from shared.tasks.reviews import Reviews, ReviewsConfig
from shared.tasks.snippets import Snippets, SnippetsConfig
from shared.tasks.task import Task


class TaskConfig(Config):
    """Where prompts, labels and gold scores come from."""

    name: Literal["reviews", "exact", "snippets", "own"] = "reviews"
    """The task: short reviews, scored by VADER; one so small that all completions are listed;
    openings of real film reviews, scored by what people's ratings teach; or one's own data."""
    reviews: ReviewsConfig = ReviewsConfig()
    """Settings of the task `reviews`."""
    exact: ExactConfig = ExactConfig()
    """Settings of the task `exact`."""
    snippets: SnippetsConfig = SnippetsConfig()
    """Settings of the task `snippets`."""
    pairs: str | tuple[str, ...] = ()
    """Of the task `own`: files or folders beside the experiment's file, or a hub name."""
    rows: Literal["auto", "pairs", "labels"] = "auto"
    """Of the task `own`: what a row holds, two answers or a single one with a label; `auto` finds
    it from the first row. SFT and KTO train on labels; what needs pairs is left out."""
    data: DataConfig = DataConfig()
    """Of the task `own`: how these are read and cleaned."""

    @property
    def finite(self) -> bool:
        """Few prompts, the same in every split, whose completions can all be listed."""
        return self.name == "exact"


TaskInput = TaskConfig | OwnData  # a stage's task: of one's own, what was made of the file


def make_task(config: TaskInput) -> Task:
    if isinstance(config, OwnData):
        return Own(config)
    if config.name == "own":
        raise ValueError("the task `own` is made of its prepared data, `OwnData`")
    if config.name == "exact":
        return Exact(config.exact)
    if config.name == "snippets":
        return Snippets(config.snippets)
    return Reviews(config.reviews)
