"""The task `reviews`: the grammar accepts what it writes, VADER is the truth, splits are apart."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import PreTrainedTokenizerBase
from vaderSentiment.vaderSentiment import BOOSTER_DICT, NEGATE, SentimentIntensityAnalyzer

from shared.config import InputError
from shared.data.splits import Split, split_of
from shared.tasks import reviews
from shared.tasks.reviews import GRAMMAR, Reviews, ReviewsConfig, accepts, sample

SPLITS: tuple[Split, ...] = ("sft", "preference", "reward-test", "ppo", "validation", "test")
TASK = Reviews(ReviewsConfig())
VADER = SentimentIntensityAnalyzer()


def texts(symbol: str, count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [sample(symbol, rng) for _ in range(count)]


def words(symbol: str) -> list[str]:
    """The words of a word class."""
    return [word for _, (word,) in GRAMMAR[symbol]]


# --- grammar ----------------------------------------------------------------------------------


@pytest.mark.parametrize("symbol", ["COMPLETION", *(s for s in GRAMMAR if s.startswith("AFTER_"))])
def test_whatever_is_written_as_a_completion_is_accepted(symbol: str):
    assert all(TASK.well_formed(text) for text in texts(symbol, 1000))


@pytest.mark.parametrize("symbol", ["PROMPT", "SENTENCE", "CLAUSE", "UP", "DOWN", "FLAT"])
def test_every_symbol_accepts_what_it_writes(symbol: str):
    assert all(accepts(symbol, text.split()) for text in texts(symbol, 500))


def test_rules_are_drawn_as_often_as_they_say():
    """0.35 : 0.4 : 0.25 for a prompt's mood; a mood is read off by the parser."""
    prompts = [text.split()[:-1] for text in texts("PROMPT", 6000)]
    moods = [next(m for m in ("UP", "DOWN", "FLAT") if accepts(m, p)) for p in prompts]
    counts = [moods.count(mood) for mood in ("UP", "DOWN", "FLAT")]
    assert stats.chisquare(counts, [6000 * p for p in (0.35, 0.4, 0.25)]).pvalue > 1e-4


def test_every_rule_s_weights_add_to_one_and_every_symbol_is_reached():
    for symbol, rules in GRAMMAR.items():
        if len(rules) > 1 and symbol not in reviews._WORDS:
            assert sum(weight for weight, _ in rules) == pytest.approx(1), symbol
    used = {part for rules in GRAMMAR.values() for _, rule in rules for part in rule}
    starts = {"PROMPT", "COMPLETION"} | {s for s in GRAMMAR if s.startswith("AFTER_")}
    assert set(GRAMMAR) - used == starts


@pytest.mark.parametrize(
    "text",
    [
        "the hero seemed brave .",  # `hero` is no noun of the grammar
        "the plot was brave",  # no full stop
        "plot was brave .",
        "the plot brave .",
        "the plot was very very brave .",
        "the plot was not not brave .",
        "the plot was brave . .",
        "the plot was brave . and",
        "the plot was brave but .",
        "the plot was brave but the plot was dull but the plot was long .",
        "brave",
        ". the plot was brave",
        "brave brave brave .",
        "i did loved the plot .",
        "i did not loved the plot .",
        "the plot was boring boring .",
        "The plot was brave .",
        "",
    ],
)
def test_what_is_no_review_is_refused(text: str):
    assert not TASK.well_formed(text)


@pytest.mark.parametrize(
    "text",
    [
        "the plot was brave .",
        "the plot was not very dull .",
        "the plot was barely memorable .",
        "i did not hate the opening .",
        "everyone really loved the cast .",
        "the plot was brave but the cast was not funny .",
        "the plot was dull . they watched the finale . the script felt weak .",
    ],
)
def test_plain_reviews_are_accepted(text: str):
    assert TASK.well_formed(text)


def refused(changed: list[list[str]], whole: list[list[str]]) -> float:
    """Share of refused texts among those that the change did change."""
    pairs = [(c, w) for c, w in zip(changed, whole, strict=True) if c != w]
    assert len(pairs) > len(whole) / 2
    return float(np.mean([not TASK.well_formed(" ".join(c)) for c, _ in pairs]))


def test_corrupted_reviews_are_mostly_refused():
    rng = np.random.default_rng(1)
    whole = [text.split() for text in texts("COMPLETION", 2000)]
    vocabulary = sorted({word for text in whole for word in text})
    dropped, swapped, appended = [], [], []
    for text in whole:
        i, j = rng.choice(len(text), 2, replace=False)
        dropped.append(text[:i] + text[i + 1 :])
        swapped.append([text[j] if k == i else text[i] if k == j else w
                        for k, w in enumerate(text)])  # fmt: skip
        appended.append([*text, str(rng.choice(vocabulary))])
    assert refused(appended, whole) == 1.0  # nothing can follow a full stop but a whole sentence
    assert refused(dropped, whole) > 0.8  # what is dropped may be a booster or a `not`
    assert refused(swapped, whole) > 0.8  # two nouns may change places


# --- prompts ----------------------------------------------------------------------------------


def test_no_prompt_meets_two_splits_whatever_the_seeds():
    seen: dict[str, Split] = {}
    for split, seed in itertools.product(SPLITS, range(5)):
        for prompt in TASK.prompts(split, 200, seed):
            assert seen.setdefault(prompt, split) == split


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(SPLITS), st.integers(0, 60), st.integers(0, 60), st.integers(0, 2**32))
def test_fewer_prompts_are_the_first_of_more(split: Split, n: int, m: int, seed: int):
    few, many = sorted((n, m))
    assert TASK.prompts(split, few, seed) == TASK.prompts(split, many, seed)[:few]


def test_prompts_are_different_well_made_and_as_many_as_asked():
    prompts = TASK.prompts("test", 1000, 3)
    assert len(set(prompts)) == len(prompts) == 1000
    assert all(accepts("PROMPT", prompt.split()) for prompt in prompts)
    assert {split_of(prompt) for prompt in prompts} == {"test"}
    assert TASK.prompts("test", 0, 3) == []


def test_another_seed_draws_other_prompts():
    """Prompts of one split may meet over seeds, but most do not."""
    first, second = (set(TASK.prompts("ppo", 300, seed)) for seed in (0, 1))
    assert len(first & second) < 150


def test_splits_have_the_shares_they_say():
    prompts = set(texts("PROMPT", 20000))
    shares = {split: np.mean([split_of(p) == split for p in prompts]) for split in SPLITS}
    assert shares == pytest.approx(
        {"sft": 0.3, "preference": 0.3, "reward-test": 0.1, "ppo": 0.2, "validation": 0.05,
         "test": 0.05}, abs=4 * (0.25 / len(prompts)) ** 0.5,
    )  # fmt: skip


@pytest.fixture
def shrink(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The grammar may be made smaller; the cache of its weights forgets."""
    reviews._rules.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    reviews._rules.cache_clear()


def test_more_prompts_than_there_are_is_the_users_error(shrink: pytest.MonkeyPatch):
    shrink.setitem(GRAMMAR, "PROMPT", [(1.0, ("NOUN", "CONJUNCTION"))])  # 48 prompts
    assert all(prompt.count(" ") == 1 for prompt in TASK.prompts("ppo", 2, 0))
    with pytest.raises(InputError, match="ask for fewer"):
        TASK.prompts("validation", 40, 0)


@pytest.mark.timeout(10)
def test_a_grammar_whose_prompts_are_all_of_one_split_does_not_loop(shrink: pytest.MonkeyPatch):
    prompt = TASK.prompts("test", 1, 0)[0]
    shrink.setitem(GRAMMAR, "PROMPT", [(1.0, tuple(prompt.split()))])
    reviews._rules.cache_clear()
    assert TASK.prompts("test", 1, 0) == [prompt]
    with pytest.raises(InputError, match="ask for fewer"):
        TASK.prompts("test", 2, 0)


def test_the_corpus_goes_on_as_its_prompts_do():
    corpus = TASK.corpus(300, 5)
    assert [prompt for prompt, _ in corpus] == TASK.prompts("sft", 300, 5)
    assert all(TASK.well_formed(completion) for _, completion in corpus)
    assert TASK.corpus(300, 5) == corpus
    assert TASK.corpus(300, 6) != corpus


def test_completions_follow_the_mood_of_their_prompts():
    """Praise and `but` lead to blame, praise and `and` to praise."""
    corpus = TASK.corpus(3000, 0)
    gold = vader_scores([completion for _, completion in corpus])
    prompts = vader_scores([prompt.rsplit(" ", 1)[0] for prompt, _ in corpus])
    turns = np.array([prompt.endswith("but") for prompt, _ in corpus])
    loud = np.abs(prompts) > 0.1
    same = np.sign(gold) * np.sign(prompts)
    assert same[loud & ~turns].mean() > 0.1
    assert same[loud & turns].mean() < -0.1


# --- gold -------------------------------------------------------------------------------------


def vader_scores(sentences: list[str]) -> np.ndarray:
    return np.array([VADER.polarity_scores(s)["compound"] for s in sentences])


def gold(prompt: str, completion: str) -> float:
    return float(TASK.gold([prompt], [completion])[0])


def test_gold_is_vaders_compound_score_of_the_two_read_together():
    prompts, completions = texts("PROMPT", 300), texts("COMPLETION", 300, seed=1)
    together = [f"{p} {c}" for p, c in zip(prompts, completions, strict=True)]
    found = TASK.gold(prompts, completions)
    np.testing.assert_array_equal(found, vader_scores(together))
    assert found.shape == (300,)
    assert np.abs(found).max() <= 1
    alone = vader_scores(completions)
    assert np.mean(found != alone) > 0.5  # the prompt counts


def test_gold_of_an_empty_completion_is_the_prompts_own():
    prompt = "the plot was charming but"
    assert gold(prompt, "") == vader_scores([prompt])[0]


def test_gold_needs_one_completion_a_prompt():
    with pytest.raises(ValueError, match="zip"):
        TASK.gold(["a", "b"], ["c"])


def test_not_turns_gold_round():
    quiet = "the plot was quiet and"
    assert gold(quiet, "the cast was great .") > 0 > gold(quiet, "the cast was not great .")
    assert gold(quiet, "the cast was awful .") < 0 < gold(quiet, "the cast was not awful .")
    assert gold(quiet, "i loved the cast .") > 0 > gold(quiet, "i did not love the cast .")
    assert gold(quiet, "i hated the cast .") < 0 < gold(quiet, "i did not hate the cast .")


def test_boosters_strengthen_and_weaken():
    quiet = "the plot was quiet and"
    plain = gold(quiet, "the cast was great .")
    assert gold(quiet, "the cast was extremely great .") > plain
    assert gold(quiet, "the cast was barely great .") < plain
    dull = gold(quiet, "the cast was dull .")
    assert gold(quiet, "the cast was really dull .") < dull
    assert gold(quiet, "the cast was slightly dull .") > dull


def test_what_follows_but_weighs_more():
    praise, blame = "the plot was great", "the cast was awful ."
    assert gold(f"{praise} but", blame) < gold(f"{praise} and", blame)
    turned = gold("the plot was awful but", "the cast was great .")
    assert turned > gold("the plot was awful and", "the cast was great .")


def test_the_same_completion_is_worth_more_after_praise():
    assert gold("the plot was superb and", "the cast was dull .") > gold(
        "the plot was terrible and", "the cast was dull ."
    )


# --- words ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("symbol", "sign"),
    [("GOOD", 1), ("LIKED", 1), ("LIKE", 1), ("BAD", -1), ("LOATHED", -1), ("LOATHE", -1)],
)
def test_adjectives_and_verbs_are_vaders_with_the_right_sign(symbol: str, sign: int):
    assert {word: np.sign(VADER.lexicon.get(word, 0)) for word in words(symbol)} == dict.fromkeys(
        words(symbol), sign
    )


@pytest.mark.parametrize("symbol", ["PLAIN", "SEE", "SAW", "NOUN", "PERSON", "COPULA"])
def test_plain_words_mean_nothing_to_vader(symbol: str):
    known = VADER.lexicon.keys() | BOOSTER_DICT.keys() | set(NEGATE)
    assert [word for word in words(symbol) if word in known] == []


def test_boosters_are_vaders_of_both_kinds():
    signs = {word: np.sign(BOOSTER_DICT[word]) for word in words("BOOST")}
    assert set(signs.values()) == {-1.0, 1.0}
    assert "really" in signs  # also written before verbs
    assert "not" in NEGATE


def test_praise_scores_above_blame_however_it_is_put():
    quiet = "the plot was quiet and"
    for praise, blame in [("PRAISE", "BLAME"), ("LIKING", "LOATHING")]:
        high = [f"everyone {t} the cast ." if praise == "LIKING" else f"the cast was {t} ."
                for t in set(texts(praise, 300))]  # fmt: skip
        low = [f"everyone {t} the cast ." if blame == "LOATHING" else f"the cast was {t} ."
               for t in set(texts(blame, 300))]  # fmt: skip
        assert min(gold(quiet, t) for t in high) > 0 > max(gold(quiet, t) for t in low)


# --- labels -----------------------------------------------------------------------------------


def test_labels_are_bradley_terry_at_the_scale_that_is_set():
    a, b = np.array([0.5, -0.2, 0.3]), np.array([-0.5, -0.2, 0.4])
    expected = [1 / (1 + np.exp(-3.0)), 0.5, 1 / (1 + np.exp(0.3))]
    np.testing.assert_allclose(TASK.preference(a, b), expected)
    sharp = Reviews(ReviewsConfig(label_scale=10))
    np.testing.assert_allclose(sharp.preference(a, b)[0], 1 / (1 + np.exp(-10.0)))
    np.testing.assert_allclose(TASK.preference(a, b) + TASK.preference(b, a), 1)


# --- tokenizer --------------------------------------------------------------------------------


def test_text_comes_back_from_its_tokens(tokenizer: PreTrainedTokenizerBase):
    for text in [*texts("PROMPT", 1000), *texts("COMPLETION", 1000, seed=1)]:
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert len(ids) == len(text.split())  # one token a word and nothing added
        assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text


def test_special_tokens_are_apart(tokenizer: PreTrainedTokenizerBase):
    ids = [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    assert len({*ids}) == 3
    assert None not in ids


def test_an_unknown_word_is_unknown_and_takes_one_token(tokenizer: PreTrainedTokenizerBase):
    assert tokenizer("the zebra was dull").input_ids[1] == tokenizer.unk_token_id


def test_ids_do_not_depend_on_the_order_of_the_grammar(tokenizer: PreTrainedTokenizerBase):
    assert TASK.tokenizer().get_vocab() == tokenizer.get_vocab()
    plain = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])[3:]
    assert [word for word, _ in plain] == sorted(word for word, _ in plain)
