"""The task `snippets`: data, splits, gold and labels, on made-up sentences and on the real ones."""

import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from checks import close

from shared.config import InputError
from shared.data.pairs import Pair
from shared.data.preferences import label
from shared.data.splits import Split
from shared.tasks import snippets_data
from shared.tasks.registry import TaskConfig, make_task
from shared.tasks.regression import Terms, TextRegression, choose_strength, words_of
from shared.tasks.snippets import Snippets, SnippetsConfig, fit_film, key_of
from shared.tasks.snippets_data import RATINGS, SHA256, TEXTS, fetch, mended, read_sentences, unpack

REAL = Path("data/snippets")
SPLITS: tuple[Split, ...] = ("sft", "preference", "reward-test", "ppo", "validation", "test")
MOODS = {"splendid": 3, "charming": 2, "decent": 1, "flat": -1, "dull": -2, "dreadful": -3}


def made_up(count: int) -> list[tuple[str, list[int]]]:
    """Sentences whose ratings follow one word: people differ by at most one."""
    rng = np.random.default_rng(0)
    starts, ends = ("bo", "ka", "li", "mu", "ne", "ro", "so", "ta"), ("ran", "tis", "vel", "zon")
    names = [start + end for start in starts for end in ends]
    rows = []
    for number in range(count):
        word = list(MOODS)[rng.integers(len(MOODS))]
        a, b, c, d, e = rng.choice(names, 5)
        before = "" if number % 4 else f"{e.title()} is {d} {c}. "
        text = f"{before}{a.title()} and {b} {c} made {d} look {word} in the {e} scenes."
        rows.append((text, [MOODS[word] + int(r) for r in rng.integers(-1, 2, size=15)]))
    return rows


def written(folder: Path, rows: list[tuple[str, list[int]]]) -> Path:
    """The two files, in the published form."""
    folder.mkdir(exist_ok=True)
    numbered = list(enumerate(rows, start=1))
    texts = [f"{n}\t{np.mean(r):.11g}\t{text}" for n, (text, r) in numbered]
    ratings = [f"{n}\t{np.mean(r):.9g}\t{np.std(r):.5f}\t{r}" for n, (_, r) in numbered]
    (folder / TEXTS).write_bytes("\r\n".join(texts).encode())
    (folder / RATINGS).write_bytes("\n".join(ratings).encode())
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("snippets"), made_up(1500))


def published(folder: Path) -> dict[str, str]:
    """What the files in `folder` would have to be, if they were the published ones."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def task(folder) -> Snippets:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snippets_data, "SHA256", published(folder))
        made = make_task(TaskConfig(name="snippets", snippets=SnippetsConfig(data=folder)))
    assert isinstance(made, Snippets)
    return made


def test_what_is_read_is_what_was_written(tmp_path):
    rows = made_up(30)
    sentences = read_sentences(written(tmp_path, rows))
    assert [(s.text, s.ratings) for s in sentences] == rows
    assert [s.number for s in sentences] == list(range(1, 31))


def test_lost_dashes_and_quotes_come_back():
    assert mended("So much of it    again,  as ever   is a ''mess''. ") == (
        'So much of it -- again, as ever -- is a "mess".'
    )


@pytest.mark.parametrize(
    ("file", "line", "fault"),
    [
        (TEXTS, "7\t0.5", r"line 7: expected 3 fields"),
        (TEXTS, "seven\t0.5\ta film", r"line 7: expected 3 fields .* the first a number"),
        (TEXTS, "700\t0.5\ta film", rf"line 7: {RATINGS} has no row 700"),
        (RATINGS, "7\t0.5\t0.1", r"line 7: expected 4 fields"),
        (RATINGS, "7\t0.5\t0.1\t[1, 2", r"line 7: expected a list"),
        (RATINGS, "7\t0.5\t0.1\t[1, 2.5]", r"line 7: expected a list"),
        (RATINGS, "7\t0.5\t0.1\t[1]", r"line 7: expected a list of two"),
        (RATINGS, "7\t0.5\t0.1\t{}", r"line 7: expected a list"),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path, file, line, fault):
    path = written(tmp_path, made_up(10)) / file
    lines = path.read_text().split("\n")
    path.write_text("\n".join([*lines[:6], line, *lines[7:]]))
    with pytest.raises(InputError, match=rf"{file}, {fault}"):
        read_sentences(tmp_path)


def test_a_missing_folder_says_how_to_get_it(tmp_path):
    config = TaskConfig(name="snippets", snippets=SnippetsConfig(data=tmp_path / "none"))
    with pytest.raises(InputError, match=r"none.*make snippets"):
        make_task(config)


def test_sentences_that_were_changed_are_refused(folder):
    with pytest.raises(InputError, match=r"not as vaderSentiment==0\.5 has it; `make snippets`"):
        Snippets(SnippetsConfig(data=folder))


def package(path: Path, names: list[str]) -> Path:
    """A source package with an archive that holds `names`, and more that nobody asked for."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for name in [*names, "tweets_GroundTruth.txt", "../escaped.txt"]:
            member = tarfile.TarInfo(f"hutto_ICWSM_2014/{name}")
            member.size = len(name)
            archive.addfile(member, io.BytesIO(name.encode()))
    with zipfile.ZipFile(path, "w") as whole:
        whole.writestr(snippets_data.ARCHIVE, inner.getvalue())
        whole.writestr("vaderSentiment-0.5/LICENSE.txt", "MIT")
    return path


def test_only_the_film_files_come_out_of_the_package(tmp_path):
    unpack(package(tmp_path / "p.zip", [TEXTS, RATINGS, "_README_.txt"]), tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == set(SHA256)
    assert (tmp_path / "out" / TEXTS).read_text() == TEXTS
    assert not list(tmp_path.rglob("escaped.txt"))


def test_a_package_without_the_files_is_refused(tmp_path):
    with pytest.raises(InputError, match=RATINGS):
        unpack(package(tmp_path / "p.zip", [TEXTS, "_README_.txt"]), tmp_path / "out")
    (tmp_path / "no.zip").write_text("no archive")
    with pytest.raises(InputError, match=r"not the source package vaderSentiment==0.5"):
        unpack(tmp_path / "no.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fetching_twice_downloads_once(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    unpack(package(tmp_path / "p.zip", [TEXTS, RATINGS, "_README_.txt"]), tmp_path / "out")
    with pytest.raises(InputError, match=r"^pip could not download vaderSentiment==0.5: [^\n]+$"):
        fetch(tmp_path / "out")  # there, but not what the package holds
    monkeypatch.setattr(snippets_data, "SHA256", published(tmp_path / "out"))
    assert fetch(tmp_path / "out") is False


def test_no_opening_and_no_sentence_is_in_two_splits(task):
    prompts = {split: set(_all_prompts(task, split)) for split in SPLITS}
    assert sum(map(len, prompts.values())) == len(set().union(*prompts.values())) > 2000
    keys = {split: {key_of(p) for p in found} for split, found in prompts.items()}
    assert all(keys[split] <= {key_of(s.text) for s in task.film.splits[split]} for split in SPLITS)
    assert sum(map(len, keys.values())) == len(set().union(*keys.values()))


def test_a_sentence_keeps_its_split_when_others_come(task, tmp_path):
    ours = made_up(1500)
    others = [(f"Then {text.lower()}", ratings) for text, ratings in made_up(400)]
    more = fit_film(read_sentences(written(tmp_path, [*others, *ours])))
    of = {s.text: split for split, found in more.splits.items() for s in found}
    for split, sentences in task.film.splits.items():
        assert {of.get(s.text, split) for s in sentences} <= {split}


def test_a_sentence_that_repeats_most_of_another_is_left_out(tmp_path):
    rows = made_up(1000)
    copy = f"Surely it is true that {rows[0][0].lower()}"
    film = fit_film(read_sentences(written(tmp_path, [*rows, (copy, [0, 1])])))
    texts = [s.text for found in film.splits.values() for s in found]
    assert rows[0][0] in texts and copy not in texts


def test_openings_are_four_to_eight_words_that_leave_four(task):
    whole = [s.text for s in task.film.splits["ppo"]]
    for prompt in _all_prompts(task, "ppo"):
        assert 4 <= len(prompt.split()) <= 8
        began = [text for text in whole if text.startswith(prompt + " ")]
        assert began and all(len(t.split()) >= len(prompt.split()) + 4 for t in began)


def test_an_opening_does_not_end_a_sentence(task):
    assert any(s.text.split()[3].endswith(".") for s in task.film.splits["ppo"])
    assert not any(p.endswith(".") for p in _all_prompts(task, "ppo"))


def test_every_sentence_gives_one_opening_before_any_gives_two(task):
    sentences = [s.text for s in task.film.splits["preference"]]
    count = len({key_of(text) for text in sentences})
    assert count > 200
    first = task.prompts("preference", count, 3)
    shared = len(sentences) - count  # sentences whose key another one has
    assert len({key_of(prompt) for prompt in first}) >= count - shared
    assert first == task.prompts("preference", count, 3)
    assert set(first) != set(task.prompts("preference", count, 4))


def test_more_openings_than_there_are_is_an_error(task):
    with pytest.raises(InputError, match=r"found \d+ different `test` openings"):
        task.prompts("test", 100_000, 0)
    with pytest.raises(InputError, match=r"at most 14 words"):
        task.corpus(100_000, 0)


def test_the_corpus_is_sft_sentences_cut_in_two(task):
    whole = {s.text for s in task.film.splits["sft"]}
    for prompt, completion in task.corpus(200, 0):
        assert prompt + completion in whole
        assert completion.startswith(" ") and len(completion.split()) <= 14


def _all_prompts(task: Snippets, split: Split) -> list[str]:
    return list(dict.fromkeys(opening for opening, _ in task._openings(split, 0)))


def test_vectors_are_tf_idf_of_length_one():
    terms = Terms.of(["a good film", "a bad film", "good"])
    assert set(terms.column) == {"a", "good", "film"}  # in two texts; no pair of words is
    stems = Terms.of(["it captivates", "captivating"]).column
    assert set(stems) == {"captiv-"}
    close(terms.idf[terms.column["a"]], np.log(4 / 3) + 1)
    row = terms.vectors(["Good, good: a film!", "unknown"]).toarray()
    assert row[0, terms.column["good"]] / row[0, terms.column["a"]] == pytest.approx(2)
    assert np.linalg.norm(row, axis=1) == pytest.approx([1, 0])


def test_the_regression_solves_the_normal_equations(folder):
    sentences = read_sentences(folder)[:300]
    texts, ratings = [s.text for s in sentences], np.array([np.mean(s.ratings) for s in sentences])
    fitted = TextRegression.fit(texts, ratings, strength=2.0)
    x, y = fitted.terms.vectors(texts).toarray(), ratings - ratings.mean()
    weights = np.linalg.solve(x.T @ x + 2.0 * np.eye(x.shape[1]), x.T @ y)
    close(fitted.weights, weights, 1e-5)
    close(fitted(["nothing known"]), [ratings.mean()])


def test_the_chosen_strength_fits_what_is_to_be_learnt(folder):
    texts = [s.text for s in read_sentences(folder)[:400]]
    rng, strengths = np.random.default_rng(0), (0.01, 1.0, 100.0)
    assert choose_strength(texts, rng.normal(size=400), strengths) == 100.0
    plain = np.array([next(MOODS[w] for w in words_of(t) if w in MOODS) for t in texts], float)
    assert choose_strength(texts, plain, strengths) == 0.01


def test_gold_reads_the_word_that_people_rated_by(task):
    said = [f" look {word} in the muran scenes." for word in MOODS]
    gold = task.gold(["Boran and katis libran made nevel"] * len(said), said)
    assert list(np.argsort(-gold)) == list(range(len(MOODS)))
    quality = task.gold_quality()
    assert quality.correlation > 0.95 and quality.sentences > 50
    # a rating is -1, 0 or 1 beside the mood, evenly
    assert quality.rater_sd == pytest.approx((2 / 3) ** 0.5, abs=0.02)


def test_the_second_opinion_is_vaders_of_both_parts(task):
    """Its paper's example: "The movie was good" to be read whole, 0.44."""
    found = task.second_opinion(["The movie was", "The movie was not"], [" good", " good"])
    assert found[0] == pytest.approx(0.4404, abs=1e-4) and found[1] < 0


def test_labels_are_the_rating_of_one_person_a_side(task):
    rng = np.random.default_rng(0)
    for a, b in [(0.0, 0.0), (1.0, 0.3), (-2.0, 0.5)]:
        noise_a, noise_b = rng.normal(size=(2, 200_000))
        p, spread = float(task.preference(np.array([a]), np.array([b]))[0]), task.film.rater_sd
        assert p == pytest.approx((a + spread * noise_a > b + spread * noise_b).mean(), abs=0.005)
        # whole numbers of the same spread: rounding adds a twelfth to the variance
        within = (spread**2 - 1 / 12) ** 0.5
        whole_a, whole_b = (a + within * noise_a).round(), (b + within * noise_b).round()
        tossed = (whole_a > whole_b).mean() + (whole_a == whole_b).mean() / 2
        assert p == pytest.approx(tossed, abs=0.02)


def test_drawn_labels_follow_the_probability(task):
    pairs = [Pair(str(i), "p", [1], [2], [3], 1.0, 0.0) for i in range(20_000)]
    labelled = label(pairs, task, "bradley-terry", np.random.default_rng(0))
    p = float(task.preference(np.array([1.0]), np.array([0.0]))[0])
    assert np.mean([q.chosen_gold == 1.0 for q in labelled]) == pytest.approx(p, abs=0.015)


@pytest.mark.parametrize(
    ("completion", "fine"),
    [
        (" made libran look charming in the muran scenes.", True),
        (' look dull, "in muran scenes!"', True),
        (" look dull in muran scenes", False),  # goes on
        ("", False),
        (" .", False),
        (" dull.", True),
        (" zzz.", False),
        (" look dull dull dull in muran scenes.", False),
        (" look dull look dull look dull.", False),
        (" zzz qqq www eee look dull.", False),
    ],
)
def test_well_formed_is_a_sentence_that_ends_and_does_not_repeat(task, completion, fine):
    assert task.well_formed(completion) is fine


def test_the_tokenizer_is_the_policys(task):
    with pytest.raises(InputError, match=r"model\.pretrained"):
        task.tokenizer()


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="no data/snippets (`make snippets`)")
def test_real_sentences_give_a_gold_far_above_vader():
    task = Snippets(SnippetsConfig(data=REAL))
    quality = task.gold_quality()
    assert quality.sentences > 800
    assert quality.correlation > max(0.65, quality.second_opinion + 0.2)
    assert len(read_sentences(REAL)) == 10_605
    # published means are those of the ratings
    rows = [line.split("\t") for line in (REAL / RATINGS).read_text().splitlines()]
    close([np.mean(json.loads(r[3])) for r in rows], [float(r[1]) for r in rows], 1e-8)


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="no data/snippets (`make snippets`)")
def test_real_sentences_fill_the_reference_run_and_are_well_formed():
    task = Snippets(SnippetsConfig(data=REAL))
    wanted: dict[Split, int] = {"preference": 4000, "ppo": 4096, "reward-test": 1000, "test": 256}
    for split, count in wanted.items():
        assert len(task.prompts(split, count, 0)) == count
    rests = [completion for _, completion in task.corpus(2000, 0)]
    assert np.mean([task.well_formed(rest) for rest in rests]) > 0.9
