"""What `klash data check` and `klash doctor` say of a user's rows: each a count, and a fix."""

from collections.abc import Iterator

from benchmarks.data.giveaways import FEWEST, LIMIT, Accuracies
from benchmarks.doctor.finding import Finding, make_finding
from dpo.losses import balancing_weights
from shared.data.chat import NOTES
from shared.data.cleaning import REASONS, Report, places_text
from shared.data.examples import MOST_REPEATED, REPEATED

MOST_CONTRADICTIONS = 0.01  # share of rows above which labels are not to be trusted
MOST_DROPPED = 0.5
LEAVE_OUT = "--max-bad-rows {bad} (in an experiment: [task.data] max_bad_rows = {bad})"
MOST_UNKNOWN = 0.01  # share of the answers' tokens
CHECKS = {
    "generation prompt": ("no-generation-prompt", "rendered-otherwise"),
    "bos of chats": ("without-bos",),
    "boundary": ("boundary",),
    "one eos": ("without-end", "two-ends"),
    "control tokens": ("control-tokens",),
}
OF_CHATS = ("generation prompt", "bos of chats")
FIXES = {
    "boundary": "end prompts without a space and begin completions with it (or both at a line "
    "break): what the policy is trained on is not what it reads when it is sampled",
    "rendered-otherwise": "the chat template must render a prompt the same way with and without "
    "its answer",
    "no-generation-prompt": "let the chat template end with the answer's header if "
    "add_generation_prompt",
    "without-bos": "let the chat template begin with {{ bos_token }}, as the tokenizer begins "
    "texts, and save it: models trained with a BOS break without",
    "without-end": "the chat template must end an answer with the tokenizer's eos_token, or one "
    "that generation_config lists; set one of both",
    "two-ends": "take the EOS text out of the data: it is added where a completion ends",
    "control-tokens": "take the special tokens out of the messages' texts: the model reads them as "
    "the template's own marks, which lets a text forge a turn",
}


def of_rows(report: Report, max_bad_rows: int, *, strict: bool = False) -> Iterator[Finding]:
    """What became of the rows; with `strict` no row may be dropped."""
    bad = report.dropped["undecodable"]
    dropped = sum(report.dropped.values())
    lines = "; ".join(dropped_texts(report)) or "none empty, identical or repeated"
    fix = "mend the rows that are named, or leave them out"
    if bad > max_bad_rows and not strict:
        fix = (
            f"mend the rows that cannot be read ({places_text(report.places['undecodable'])}), or "
            f"leave them out with {LEAVE_OUT.format(bad=bad)}"
        )
    yield make_finding(
        "rows",
        bad <= max_bad_rows and dropped <= report.read * (0 if strict else MOST_DROPPED),
        f"{report.read} read in the format {report.format}, {report.kept} kept; dropped: {lines}",
        fix,
    )
    both = report.dropped["contradiction"]
    if both:
        yield make_finding(
            "contradictions",
            both <= MOST_CONTRADICTIONS * report.read,
            f"{both} of {report.read} rows say the opposite of another, and none of them is used",
            "decide each of them: what is said both ways teaches nothing",
        )
    if repeated := report.notes[REPEATED]:
        yield make_finding(
            "prompt in answers",
            repeated <= MOST_REPEATED * report.kept,
            f"the answers of {repeated} of {report.kept} rows repeat the prompt "
            f"({places_text(report.places[REPEATED])})",
            "take it out of them: prompt and answer are put together, and it would be read twice",
        )
    if unread := [name for name in report.notes if name.startswith("column not read: ")]:
        columns = ", ".join(name.partition(": ")[2] for name in unread)
        yield Finding("columns", f"not read: {columns}")


def dropped_texts(report: Report) -> list[str]:
    """Of each reason how many rows, what is wrong, and where."""
    return [
        f"{count} {reason} ({report.said.get(reason) or REASONS[reason]}: "
        f"{places_text(report.places[reason])})"
        for reason, count in sorted(report.dropped.items())
        if count
    ]


def of_labels(report: Report) -> Iterator[Finding]:
    """Answers with labels: both kinds are there, and which weights balance KTO."""
    if report.kind == "labels":
        yield from of_label_counts(report.desirable, report.undesirable)


def of_label_counts(good: int, bad: int) -> Iterator[Finding]:
    """`good` desirable and `bad` undesirable answers."""
    if not good or not bad:
        missing = "undesirable" if good else "desirable"
        yield Finding(
            "labels",
            f"{good} desirable, {bad} undesirable answers",
            f"no answer is labelled {missing}, so nothing can be learnt from the labels: add some, "
            "or train on these answers as SFT",
        )
        return
    rarer, ratio = ("undesirable", good / bad) if good >= bad else ("desirable", bad / good)
    low, high = (0.75, 1.0) if rarer == "undesirable" else (1.0, 4 / 3)
    yield Finding(
        "labels",
        f"{good} desirable, {bad} undesirable: {rarer}_weight = {low * ratio:.3g} to "
        f"{high * ratio:.3g} balances KTO{own_weight(good, bad)}; DPO, IPO, fDPO and a reward "
        "model need pairs and cannot use these rows",
    )


def own_weight(good: int, bad: int) -> str:
    """The weight that a training of Klash has, where it is not 1 for both."""
    return "".join(
        f" ({weight:.3g} unless a setting names another)"
        for weight in balancing_weights(good, bad).values()
    )


def of_giveaways(found: Accuracies | None) -> Iterator[Finding]:
    """Nothing tells chosen from rejected without reading."""
    if found is None:
        return
    enough = found.pairs >= FEWEST
    for name, accuracy in (
        ("length alone", found.length),
        ("first words", found.first_words),
        ("last words", found.last_words),
    ):
        tells = "tells" if name == "length alone" else "tell"
        yield make_finding(
            name,
            accuracy < LIMIT or not enough,
            f"{name} {tells} chosen from rejected in {round(accuracy * found.pairs)} of "
            f"{found.pairs} pairs ({accuracy:.0%}; chance 50%, too much from {LIMIT:.0%})",
            "every method will learn that first: add pairs in which it is the other way round",
        )


def of_tokens(report: Report) -> Iterator[Finding]:
    """What a tokenizer and its template make of the rows that are kept."""
    for check, notes in CHECKS.items():
        if check in OF_CHATS and not report.chats:
            continue
        found = [note for note in notes if report.notes[note]]
        said = "; ".join(
            f"{NOTES[note]}: {report.notes[note]} rows ({places_text(report.places[note])})"
            for note in found
        )
        fix = FIXES[found[0]] if found else ""
        yield Finding(check, said or f"0 of {report.kept} rows", fix)
    prompts = report.notes["control-tokens-in-prompts"]
    if 0 < prompts < 0.5 * report.kept:  # more than that, and they were rendered on purpose
        where = places_text(report.places["control-tokens-in-prompts"])
        yield Finding(
            "control tokens in prompts",
            f"{NOTES['control-tokens-in-prompts']}: {prompts} of {report.kept} rows ({where})",
            FIXES["control-tokens"],
        )
    rows, share = report.notes["unknown-tokens"], report.unknown_tokens / max(1, report.tokens)
    asked = report.unknown_in_prompts / max(1, report.prompt_tokens)
    where = f" ({places_text(report.places['unknown-tokens'])})" if rows else ""
    yield make_finding(
        "unknown tokens",
        max(share, asked) <= MOST_UNKNOWN,
        f"{rows} of {report.kept} rows hold them, {share:.1%} of the answers' tokens, {asked:.1%} "
        f"of the prompts'{where}",
        "the tokenizer does not know these words: take a model whose tokenizer does",
    )
