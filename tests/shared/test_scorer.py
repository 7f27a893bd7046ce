"""Scores of reward models from elsewhere: those that plain transformers gives the same texts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_models import (
    CHAT,
    CHATML,
    END,
    EOS,
    byte_tokenizer,
    chat_tokenizer,
    write_encoder,
    write_policy,
    write_reward,
)
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from rlhf.best_of_n import best_of_n
from rlhf.reward import normalise, take_reward
from shared.config import InputError
from shared.data.samples import PromptSamples
from shared.generation.engine import Sampling
from shared.generation.hf import HFEngine
from shared.models.load import load_policy, load_tokenizer, special_ids
from shared.models.reward_files import read_chats, save_normalisation, write_chats
from shared.models.scorer import Answered, Scorer, scorer_of
from shared.models.sequences import Limit
from shared.stages import write_jsonl

PROMPTS = ["Where is Oslo?", "Is 7 even?", "Say something long, and then say it again."]
ANSWERS = [" In Norway.", " No: 7 is odd, as 7 = 2 * 3 + 1.", " Again."]
FEW = Limit(2, 10**6)


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    write_policy(tmp_path / "policy", chat_tokenizer())
    return tmp_path / "policy"


def tokens(policy: Path, ended: bool = True) -> tuple[list[list[int]], list[list[int]]]:
    tokenizer = load_tokenizer(policy)
    prompts = tokenizer(PROMPTS, add_special_tokens=False).input_ids
    answers = tokenizer(ANSWERS, add_special_tokens=False).input_ids
    return prompts, [[*ids, EOS] if ended else ids for ids in answers]


@torch.no_grad()
def plain_scores(folder: Path, rows: list[Any], **options: Any) -> torch.Tensor:
    """By transformers alone: one text or pair at a time, nothing padded."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pairs = [row if isinstance(row, tuple) else (row,) for row in rows]
    encoded = [tokenizer(*row, return_tensors="pt", **options) for row in pairs]
    if model.config.model_type != "bert":
        for row in encoded:
            row.pop("token_type_ids", None)
    return torch.cat([model(**row).logits.flatten() for row in encoded])


def turned(**names: Any):
    return byte_tokenizer(turned=True, pad_token="<pad>", eos_token="<|im_end|>", **names)


def test_a_decoder_with_its_own_tokenizer_scores_texts(policy: Path, tmp_path: Path):
    write_reward(tmp_path / "reward", turned())
    scorer = Scorer(tmp_path / "reward", reader=load_tokenizer(policy))
    assert scorer.by_text
    found = scorer.score_all(*tokens(policy), limit=FEW)
    texts = [p + a + "<|im_end|>" for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    expected = plain_scores(tmp_path / "reward", texts)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.01


def test_a_completion_that_was_cut_gets_no_eos(policy: Path, tmp_path: Path):
    write_reward(tmp_path / "reward", turned())
    scorer = Scorer(tmp_path / "reward", reader=load_tokenizer(policy))
    found = scorer.score_all(*tokens(policy, ended=False))
    texts = [p + a for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    expected = plain_scores(tmp_path / "reward", texts)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_an_encoder_reads_pairs(policy: Path, tmp_path: Path):
    """BERT's kind: [CLS] prompt [SEP] completion [SEP], with types; dropout is off."""
    special = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
    tokenizer = byte_tokenizer(special, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )  # fmt: skip
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    write_encoder(tmp_path / "reward", tokenizer)
    scorer = Scorer(tmp_path / "reward", reader=load_tokenizer(policy))
    found = scorer.score_all(*tokens(policy), limit=FEW)
    pairs = list(zip(PROMPTS, ANSWERS, strict=True))
    torch.testing.assert_close(
        found, plain_scores(tmp_path / "reward", pairs), atol=1e-5, rtol=1e-5
    )
    assert found.std() > 1e-3
    prompts, answers = tokens(policy)
    long = scorer.encode(prompts[0] * 20, answers[0])["input_ids"]
    assert len(long) == 128 and long[-len(ANSWERS[0]) - 1 :][-1] == 2  # the answer is whole
    assert tokenizer.decode(long).endswith(f"{ANSWERS[0]}[SEP]")
    with pytest.raises(InputError, match="which reads 128"):
        scorer.encode(prompts[0], answers[0] * 20)


def test_an_encoder_of_the_policys_own_tokenizer_still_reads_texts(policy: Path, tmp_path: Path):
    write_encoder(tmp_path / "reward", chat_tokenizer(chat_template=None))
    assert Scorer(tmp_path / "reward", reader=load_tokenizer(policy)).by_text


def test_chats_go_through_the_reward_models_own_template(policy: Path, tmp_path: Path):
    template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% if m.role == 'assistant' %}"
        "<|im_end|>{% endif %}\n{% endfor %}"
    )
    write_reward(tmp_path / "reward", turned(chat_template=template))
    tokenizer = load_tokenizer(policy)
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True).input_ids  # pyright: ignore
    answer = [*tokenizer(" In Norway.").input_ids, END]
    write_chats(tmp_path, {tuple(prompt): CHAT})
    scorer = Scorer(tmp_path / "reward", reader=tokenizer, chats=read_chats(tmp_path))
    whole = [*CHAT, {"role": "assistant", "content": " In Norway."}]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "reward")
    text = theirs.apply_chat_template(whole, tokenize=False)
    expected = plain_scores(tmp_path / "reward", [text], add_special_tokens=False)
    found = scorer.score_all([prompt], [answer])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    plain = scorer_of(tmp_path / "reward", policy)
    assert (plain.score_all([prompt], [answer]) != found).all()
    with pytest.raises(InputError, match="none of the chats"):
        scorer.score_all([prompt[1:]], [answer])
    write_chats(tmp_path / "reward", {tuple(prompt): CHAT})  # as `take_reward` leaves it
    again = scorer_of(tmp_path / "reward", policy).score_all([prompt], [answer])
    torch.testing.assert_close(again, found)


def test_a_reward_model_by_trl_scores_as_plain_transformers_does(policy: Path, tmp_path: Path):
    """TRL's RewardTrainer on the policy, its folder as it is: the policy's tokens, no text."""
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import RewardTrainer

    rows = [
        {"prompt": p, "chosen": a, "rejected": " No idea."}
        for p, a in zip(PROMPTS, ANSWERS, strict=True)
    ]
    trainer = RewardTrainer(
        model=str(policy),
        args=RewardConfig(
            output_dir=str(tmp_path / "trl"), num_train_epochs=2, learning_rate=1e-3, use_cpu=True,
            report_to="none", save_strategy="no", bf16=False, disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(policy),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "reward"))
    scorer = Scorer(tmp_path / "reward", reader=load_tokenizer(policy))
    assert not scorer.by_text
    found = scorer.score_all(*tokens(policy), limit=FEW)
    texts = [p + a + "<|endoftext|>" for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    expected = plain_scores(tmp_path / "reward", texts)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# --- where they are used -----------------------------------------------------------------------


def samples(folder: Path, policy: Path) -> Path:
    prompts, answers = tokens(policy)
    rows = [PromptSamples(t, p, answers, [0.0] * 3) for t, p in zip(PROMPTS, prompts, strict=True)]
    folder.mkdir()
    write_jsonl(folder / "samples.jsonl", [row._asdict() for row in rows])
    return folder


def test_a_reward_model_from_elsewhere_gets_a_normalisation(policy: Path, tmp_path: Path):
    write_reward(tmp_path / "theirs", turned())
    save_normalisation(tmp_path / "theirs", offset=5.0, scale=9.0)  # another policy's
    (tmp_path / "taken").mkdir()
    references = samples(tmp_path / "samples", policy)
    take_reward(tmp_path / "taken", str(tmp_path / "theirs"), None, policy, references)
    prompts, answers = tokens(policy)
    many = [p for p in prompts for _ in answers]
    scores = scorer_of(tmp_path / "taken", policy).score_all(many, answers * 3).view(3, 3)
    assert scores.mean().item() == pytest.approx(0, abs=1e-5)
    assert scores.var(1).mean().item() == pytest.approx(1, rel=1e-4)
    texts = [p + a + "<|im_end|>" for p in PROMPTS for a in ANSWERS]
    raw = plain_scores(tmp_path / "theirs", texts)
    torch.testing.assert_close(scores.flatten(), (raw - raw.mean()) / raw.view(3, 3).var(1).mean() ** 0.5, atol=1e-4, rtol=1e-4)  # fmt: skip # noqa: E501


def test_best_of_n_takes_the_favourite_of_a_model_that_reads_texts(policy: Path, tmp_path: Path):
    write_reward(tmp_path / "reward", turned())
    tokenizer = load_tokenizer(policy)
    scorer = scorer_of(tmp_path / "reward", policy)
    engine = HFEngine(load_policy(policy), special_ids(tokenizer, policy))
    prompts, sampling = tokens(policy)[0], Sampling(max_new_tokens=6, seed=3)
    best = best_of_n(engine, scorer, prompts, 4, sampling)
    drawn = engine.generate([p for p in prompts for _ in range(4)], sampling)
    scores = scorer.score_all([p for p in prompts for _ in range(4)], drawn.ids).view(3, 4)
    assert scorer.score_all(prompts, best.ids).tolist() == pytest.approx(
        scores.max(1).values.tolist(), rel=1e-5
    )


def zero_head(folder: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.score.weight.data.zero_()
    model.save_pretrained(folder)


def one_sample(folder: Path) -> None:
    path = folder.parent / "samples" / "samples.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_jsonl(path, [{**row, "completions": row["completions"][:1]} for row in rows])


@pytest.mark.parametrize("fault", [zero_head, one_sample])
@pytest.mark.parametrize("tokenizer", [chat_tokenizer, turned])
@pytest.mark.parametrize("scaled", [True, False])
def test_scores_that_do_not_differ_stop_the_run(
    policy: Path,
    tmp_path: Path,
    tokenizer: Callable[[], Any],
    fault: Callable[[Path], None],
    scaled: bool,
):
    write_reward(tmp_path / "reward", tokenizer())
    references = samples(tmp_path / "samples", policy)
    fault(tmp_path / "reward")
    with pytest.raises(InputError, match="do not differ between samples"):
        normalise(tmp_path / "reward", references, scaled=scaled, policy=policy)
    assert not (tmp_path / "reward" / "normalisation.json").exists()


def test_a_score_that_is_not_a_number_stops_whoever_does_not_look(policy: Path, tmp_path: Path):
    """Weights that are finite and overflow on the way: nothing in the file tells."""
    model: Any = write_reward(tmp_path / "reward", chat_tokenizer())
    model.score.weight.data.fill_(3e38)
    model.save_pretrained(tmp_path / "reward")
    scorer = Scorer(tmp_path / "reward")
    rows = tokens(policy)
    scores = scorer.score_all(*rows, finite=False)
    if scores.isfinite().all():
        pytest.skip("they did not overflow")
    with pytest.raises(InputError, match="not a number"):
        scorer.score_all(*rows)


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf"), -1.0])
def test_a_normalisation_that_divides_by_nothing_is_not_written(tmp_path: Path, scale: float):
    with pytest.raises(InputError, match="do not differ"):
        save_normalisation(tmp_path, 0.0, scale)
    assert not any(tmp_path.iterdir())


def test_a_frozen_reward_model_in_bfloat16(policy: Path, tmp_path: Path):
    write_reward(tmp_path / "reward", chat_tokenizer(chat_template=CHATML))
    whole, half = Scorer(tmp_path / "reward"), Scorer(tmp_path / "reward", dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    a, b = (s.score_all(*tokens(policy)) for s in (whole, half))
    assert b.dtype == torch.float32
    torch.testing.assert_close(a, b, atol=0.1 * float(a.abs().max()), rtol=0.1)


# --- one reading of a text ---------------------------------------------------------------------


@pytest.mark.parametrize("ends", [None, frozenset({EOS, END})])
def test_only_what_says_that_it_was_trained_here_is_read_as_our_trainers_encode(
    tmp_path: Path, ends: frozenset[int] | None
):
    """A trained one ends at <|im_end|>, as its pairs did; another has all of the template."""
    write_reward(tmp_path / "reward", chat_tokenizer())
    save_normalisation(tmp_path / "reward", 0.0, 1.0, ends)
    ids = Scorer(tmp_path / "reward").inputs(Answered(CHAT, "In Norway."))["input_ids"]
    chat = [*CHAT, {"role": "assistant", "content": "In Norway."}]
    whole = AutoTokenizer.from_pretrained(tmp_path / "reward").apply_chat_template(
        chat, return_dict=False
    )
    assert whole[-2] == END  # behind it a line break
    assert ids == (whole if ends is None else whole[:-1])


def test_a_taken_reward_model_is_not_said_to_be_trained_here(policy: Path, tmp_path: Path):
    write_reward(tmp_path / "theirs", turned())
    for name in ("training_args.bin", "log.jsonl", "adapter_config.json", "cost.json"):
        (tmp_path / "theirs" / name).write_text("{}")
    (tmp_path / "theirs" / "qwen.tiktoken").write_text("")
    write_chats(tmp_path / "theirs", {})
    save_normalisation(tmp_path / "theirs", 5.0, 9.0, frozenset({3}))
    (tmp_path / "taken").mkdir()
    references = samples(tmp_path / "samples", policy)
    take_reward(tmp_path / "taken", str(tmp_path / "theirs"), None, policy, references)
    assert Scorer(tmp_path / "taken").own is None
    assert {path.name for path in (tmp_path / "taken").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "normalisation.json", "chats.jsonl", "qwen.tiktoken",
    }  # fmt: skip


def test_a_blank_between_prompt_and_answer_is_kept(policy: Path, tmp_path: Path):
    """SentencePiece's kind of tokenizer drops the first blank of what it decodes alone."""
    write_reward(tmp_path / "reward", turned())
    words = {word: n for n, word in enumerate(["<pad>", "</s>", "<unk>", "▁Where", "▁In", "▁Oslo"])}
    tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore
    tokenizer.decoder = decoders.Metaspace()  # pyright: ignore
    reader = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    scorer = Scorer(tmp_path / "reward", reader=reader, ends=frozenset({1}))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "reward")
    expected = theirs("Where In Oslo").input_ids
    assert scorer.encode([3], [4, 5])["input_ids"] == expected
    assert scorer.encode([3], [4, 5, 1])["input_ids"] == [*expected, theirs.eos_token_id]
    assert scorer.encode([3], [4, 5, 2])["input_ids"][-1] != theirs.eos_token_id  # no end


def test_a_chat_that_was_cut_is_read_as_open(policy: Path, tmp_path: Path):
    write_reward(tmp_path / "reward", turned(chat_template=CHATML))
    reader, theirs = load_tokenizer(policy), AutoTokenizer.from_pretrained(tmp_path / "reward")
    prompt = reader.apply_chat_template(CHAT, add_generation_prompt=True).input_ids  # pyright: ignore
    answer, chats = reader("In Norway.").input_ids, {tuple(prompt): CHAT}
    scorer = Scorer(tmp_path / "reward", reader=reader, chats=chats, ends=frozenset({EOS, END}))
    opened = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    for end, behind in (([], ""), ([END], "<|im_end|>\n")):
        found = scorer.encode(prompt, [*answer, *end])["input_ids"]
        assert found == theirs(f"{opened}In Norway.{behind}").input_ids
