"""The answer in words. A winner needs three seeds and an interval that excludes zero."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.evaluation.statistics import SEEDS_FOR_A_WINNER
from benchmarks.report.style import look
from benchmarks.report.tables import count, duration, interval, kl_digits, number, percent
from benchmarks.results.schema import Comparison, Method, Results

LEFT_OUT = {  # the reasons of `shared.data.cleaning`, where their names are no words for rows
    "undecodable": "unreadable",
    "wrong-role": "with roles in a wrong order",
    "several-turns": "with several turns in an answer",
    "prompt-mismatch": "with two prompts",
    "single-answer": "with one rated answer",
    "not-finite": "with a score that is no number",
    "tie": "tied",
    "contradiction": "contradicting each other",
    "over-long": "too long",
    "refused": "refused by the chat template",
}
UNMOVED = 0.05  # nats a sequence
DIRECT = ("dpo", "fdpo", "ipo", "kto", "cdpo", "rdpo", "ipo-token")


@dataclass(frozen=True)
class Conclusion:
    """The first screen: one sentence, a few facts under it, and what weakens them."""

    answer: str
    facts: Sequence[tuple[str, str]]  # a word or two, and the sentence
    caveat: str
    comparisons: Sequence[Comparison]  # those of the first screen
    shown: int  # of all comparisons, how many show a difference


def conclude(results: Results) -> Conclusion:
    """The comparisons of `results` in words."""
    headline = main_comparisons(results)
    facts = {
        "Data": " ".join(filter(None, (_data_sentence(results), _labels_sentence(results)))),
        "Judge": _judge_sentence(results),
        "Score": _score_sentence(results),
        "Among the others": _direct_sentence(results, headline),
        "Tuned freely" if results.tuned else "At one setting": _tuned_sentence(results),
        "Little moved": _unmoved_sentence(results),
        "Room left": _limit_sentence(results),
        "Cost": _cost_sentence(results),
    }
    return Conclusion(
        answer=_answer_sentence(results, headline),
        facts=[fact for fact in facts.items() if fact[1]],
        caveat=_caveat(results),
        comparisons=headline,
        shown=sum(winner(c, results) is not None for c in results.comparisons),
    )


def winner(comparison: Comparison, results: Results) -> str | None:
    """The method that scores higher, or None where that is not shown."""
    difference = comparison.difference
    seeds = len(results.seeds)
    if difference.per_seed:
        seeds = min(seeds, sum(value is not None for value in difference.per_seed))
    if seeds < SEEDS_FOR_A_WINNER or difference.low is None or difference.high is None:
        return None
    if results.judge is not None and not results.judge.knows:
        return None
    if difference.low > 0:
        return comparison.a
    return comparison.b if difference.high < 0 else None


def main_comparisons(results: Results) -> list[Comparison]:
    """Those at the highest level of matched KL that most pairs reach; else at tuned settings."""
    known = [c for c in results.comparisons if c.difference.mean is not None]
    levels = sorted({c.kl for c in known if c.metric == "gold_at_matched_kl" and c.kl is not None})
    if not levels:
        return [c for c in known if c.metric == "gold"]
    pairs = {level: [c for c in known if c.metric != "gold" and c.kl == level] for level in levels}
    return pairs[max(levels, key=lambda level: (len(pairs[level]), level))]


def nats(kl: float | None) -> str:
    """`1 nat`, `0.5 nats`."""
    return f"{kl:g} nat" if kl == 1 else f"{kl:g} nats"


def _answer_sentence(results: Results, headline: Sequence[Comparison]) -> str:
    if not results.judged:
        return "No winner can be named: nobody judged the answers."
    if results.judge is not None and not results.judge.pairs:
        return "No winner can be named: no labels are held out to measure the judge on."
    if results.judge is not None and not results.judge.knows:
        return "No winner can be named: on held-out pairs the judge may be no better than a coin."
    if not headline:
        return "No two methods could be compared: no level of KL was reached by both."
    seeds = len(results.seeds)
    if seeds < SEEDS_FOR_A_WINNER:
        have = {0: "none", 1: "one", 2: "two"}[seeds]
        return f"No winner can be named: that takes three seeds, and this run has {have}."
    clauses = _clauses([c for c in headline if "ppo" in (c.a, c.b)] or headline, results)
    return f"{_heading(headline, results.tuned)}, {'; '.join(clauses)}."


def _heading(headline: Sequence[Comparison], tuned: bool) -> str:
    if headline[0].metric == "gold":
        return f"At their own {'tuned ' if tuned else ''}settings"
    return f"At {nats(headline[0].kl)} of KL from the start"


def _clauses(comparisons: Sequence[Comparison], results: Results) -> list[str]:
    """Clauses: who scores higher than whom, methods that beat the same ones together."""
    beaten: dict[str, list[str]] = {}
    undecided: list[str] = []
    for c in comparisons:
        best = winner(c, results)
        if best is None:
            a, b = (c.b, c.a) if c.b == "ppo" else (c.a, c.b)
            undecided.append(f"{look(a).label} and {look(b).label}")
        else:
            loser = c.b if best == c.a else c.a
            beaten.setdefault(best, []).append(look(loser).label)
    together: dict[tuple[str, ...], list[str]] = {}
    for best, losers in beaten.items():
        together.setdefault(tuple(losers), []).append(look(best).label)
    clauses = [
        f"{_and(best)} {'scores' if len(best) == 1 else 'score'} higher than {_and(losers)}"
        for losers, best in sorted(together.items(), key=lambda x: -len(x[0]) * len(x[1]))
    ]
    if undecided and not clauses:
        if len(undecided) > 1:
            return ["no difference between methods is shown"]
        return [f"no difference between {undecided[0]} is shown"]
    if len(undecided) == 1:
        clauses.append(f"between {undecided[0]} no difference is shown")
    elif undecided:
        clauses.append(f"{len(undecided)} other differences are not shown")
    return clauses


def _direct_sentence(results: Results, headline: Sequence[Comparison]) -> str:
    """What the first sentence left out: comparisons without PPO."""
    rest = [c for c in headline if "ppo" not in (c.a, c.b)]
    if len(results.seeds) < SEEDS_FOR_A_WINNER or not rest or len(rest) == len(headline):
        return ""
    clauses = "; ".join(_clauses(rest, results))
    return re.sub(r"^(no|between) ", lambda m: m[0].capitalize(), clauses) + "."


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _rivals(results: Results) -> tuple[tuple[str, Method], tuple[str, Method]] | None:
    """PPO and the first direct method there is."""
    direct = next((name for name in DIRECT if name in results.methods), None)
    if direct is None or "ppo" not in results.methods:
        return None
    return ("ppo", results.methods["ppo"]), (direct, results.methods[direct])


def _labels_sentence(results: Results) -> str:
    """What methods trained on, where it is no pairs, and what could not."""
    labels = results.labels
    if labels is None:
        return ""
    weights = (
        f"{name} {number(weight)}"
        for name, weight in (
            ("desirable_weight", labels.desirable_weight),
            ("undesirable_weight", labels.undesirable_weight),
        )
        if weight != 1
    )
    balanced = "".join(f", with {weight} unless its setting says otherwise" for weight in weights)
    return (
        f"Single answers, {count(labels.desirable)} desirable and {count(labels.undesirable)} "
        f"undesirable. SFT trains on the desirable ones, KTO on both{balanced}. What compares two "
        "answers (DPO, IPO, fDPO, training a reward model) needs pairs and is no part of this run."
    )


def _data_sentence(results: Results) -> str:
    """Of one's own files: how many rows are used, and why the others are not."""
    own = results.own_rows
    if own is None:
        return ""
    why = ", ".join(f"{count(n)} {LEFT_OUT.get(key, key)}" for key, n in own.dropped.items() if n)
    left = f" Left out: {why}." if why else ""
    sides = {"train": "train", "validation": "choose settings", "test": "test"}
    sides |= {"judge": "train the judge"}
    said = [f"{count(own.sides[s])} {verb}" for s, verb in sides.items() if own.sides.get(s)]
    return (
        f"{count(own.kept)} of the {count(own.rows)} rows of {_and(own.files)} are used.{left} "
        f"{'Answers' if results.labels else 'Pairs'}: {_and(said)}."
    )


def _unmoved_sentence(results: Results) -> str:
    """That no training went anywhere, where none did: then there is little to compare."""
    trained = [
        m.kl.mean
        for m in results.methods.values()
        if m.kind in ("direct", "filtered", "ppo") and m.kl.mean is not None
    ]
    if not trained or max(trained) >= UNMOVED:
        return ""
    return (
        f"No trained method is {UNMOVED} nats or more from the start, so that they can hardly "
        "differ: more pairs, epochs or a larger learning rate are needed to compare them."
    )


def _judge_sentence(results: Results) -> str:
    """Who gave gold, and how often it agrees with the labels of pairs that nothing trained on."""
    judge, learnt = results.judge, results.gold_quality
    if learnt is not None:
        return (
            f"Gold is learnt from people's ratings; on {learnt.sentences:,} sentences that nothing "
            f"was fitted on it correlates {number(learnt.correlation)} with their mean, VADER "
            f"{number(learnt.second_opinion)}."
        )
    if judge is None:
        if results.judged:
            return ""
        known = "KL, length" if results.labels else "KL, accuracy on held-out pairs, length"
        score = "the reward model's score, " if results.scored else ""
        return f"Without a judge there is no gold. Shown is what one knows without: {score}{known}."
    if not judge.pairs:
        return f"Gold is {judge.name}, which could not be measured: labels held out are all alike."
    mean, limits = percent(judge.accuracy.mean), interval(judge.accuracy, 0, 100)
    pairs, better = "held-out pairs", "the chosen answer"
    if results.labels:
        pairs, better = "couples of a desirable and an undesirable answer", "the desirable one"
    said = f"Gold is {judge.name}; of {judge.pairs} {pairs} it prefers {better} in "
    roles = f" It is also {_and(judge.roles)}." if judge.roles else ""
    return f"{said}{mean} {limits}.{roles}"


def _score_sentence(results: Results) -> str:
    """Without a judge: how each method changed the reward model's score, and at what KL."""
    if results.judged:
        return ""
    clauses = [
        f"{number(m.proxy.mean, signed=True)} {interval(m.proxy)}".strip()
        + f" with {look(name).label} ({number(m.kl.mean, kl_digits(m.kl.mean))} nats)"
        for name, m in results.methods.items()
        if name != "sft" and m.proxy.mean is not None
    ]
    return (
        f"Against SFT the reward model's score changes by {_and(clauses)}. That is what PPO and "
        "best-of-n aim at, and no proof."
        if clauses
        else ""
    )


def _tuned_sentence(results: Results) -> str:
    rivals = _rivals(results)
    clauses = [
        f"{look(name).label} reaches gold {number(m.gold.mean)} at "
        f"{number(m.kl.mean, kl_digits(m.kl.mean))} nats"
        for name, m in rivals or ()
        if m.gold.mean is not None
    ]
    if rivals is None or len(clauses) < 2:
        return ""
    pair = {name for name, _ in rivals}
    for c in results.comparisons:
        if c.metric == "gold" and {c.a, c.b} == pair and interval(c.difference):
            shown = "" if winner(c, results) else ", not shown"
            mean = number(c.difference.mean, signed=True)
            return f"{_and(clauses)} (difference {mean} {interval(c.difference)}{shown})."
    return f"{_and(clauses)}."


def _limit_sentence(results: Results) -> str:
    clauses = [
        f"{look(name).label} gets {'at least ' if m.efficiency_is_lower_bound else ''}"
        f"{percent(m.frontier_efficiency.mean)}"
        for name, m in _rivals(results) or ()
        if m.frontier_efficiency.mean is not None
    ]
    return f"Of the most that any policy could gain at its KL, {_and(clauses)}." if clauses else ""


def _cost_sentence(results: Results) -> str:
    rivals = _rivals(results)
    if rivals is None or min(m.cost.wall_s for _, m in rivals) <= 0:
        return ""
    (_, ppo), (name, direct) = rivals
    return (
        f"A training run takes {duration(ppo.cost.wall_s)} with PPO and "
        f"{duration(direct.cost.wall_s)} with {look(name).label}, on this machine; "
        f"models in memory at once: {ppo.cost.models_held} against {direct.cost.models_held}."
    )


def _caveat(results: Results) -> str:
    seeds = len(results.seeds)
    if seeds <= 1:
        return (
            "One seed: there are no intervals, and no difference can be distinguished from chance. "
            "Take every number as one draw."
        )
    if seeds < SEEDS_FOR_A_WINNER:
        return "Two seeds: the intervals are very wide. Take every difference as a hint."
    return ""
