"""One optimiser step of DPO, IPO, KTO and the reward model, against TRL's trainers.

Both sides start from one folder and see the same pairs in the same batches, in the same precision
and under the same AdamW. All losses can be compared: IPO is the form per token, the one that TRL
has, and TRL's KTO gets our mismatched completions.
"""

from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import count, product
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from transformers import PreTrainedModel

from benchmarks.speed.cases import LOSS_OF_WORK, WORKLOADS, Case, make_case, policy_folder
from benchmarks.speed.sides import Choice, Round, Speed, Work, Worker, compare_rates, seconds_since
from benchmarks.speed.trl.steps import train_in_turn
from dpo.losses import UNPAIRED
from dpo.train import DirectConfig, DirectData, Objective
from rlhf.reward import reward_loss
from shared.data.batches import PairRows
from shared.data.pairs import read_pairs
from shared.models.cost import Meter, matmul_rate
from shared.models.load import load_policy, load_scalar_model, load_tokenizer, special_ids
from shared.models.sequences import Limit
from shared.training.fit import Trainee, prepare, step

TRAINERS = {
    "dpo": "DPOTrainer",
    "ipo": "DPOTrainer",
    "kto": "KTOTrainer",
    "reward": "RewardTrainer",
}


def speed_steps(work: str, choice: Choice) -> Iterator[Speed]:
    """All chosen comparisons of `work`, each as it is done."""
    for name, workload in WORKLOADS.items():
        for shape, precision in product(workload.shapes, workload.precisions):
            if not choice.takes(name, precision, shape):
                continue
            policy = policy_folder(name, choice.runs)
            with TemporaryDirectory() as scratch:
                steps = choice.rounds + 1
                case = make_case(work, precision, workload, shape, steps, policy, Path(scratch))
                yield compare_steps(case, name, shape, choice.rounds)


def compare_steps(case: Case, model: str, shape: str, rounds: int) -> Speed:
    """Ours and TRL's in turn, `rounds` steps after a first one.

    `mfu` is ours': the median round's FLOP/s over the best matrix-product rate of those measured
    before each round (other processes only ever lower it). Null where there is a GPU, since
    that rate is the CPU's.
    """
    threads, rates = torch.get_num_threads(), []
    ours = Worker(our_steps, case, threads=threads)
    peer = Worker(train_in_turn, case, threads=threads, loops=True)

    def ours_after_rate() -> float:
        rates.append(matmul_rate(dtype=getattr(torch, case.precision)))
        return ours()

    speeds = compare_rates(ours_after_rate, peer, rounds)
    memory = ours.end() / peer.end()
    both = list(zip(ours.rounds, peer.rounds, strict=True))
    if any(a.tokens != b.tokens for a, b in both):
        raise RuntimeError(f"klash speed {case.work}: the sides trained on different tokens")
    losses = [(a.loss, b.loss) for a, b in both if a.loss is not None and b.loss is not None]
    flops = median(one.flops / one.seconds for one in ours.rounds[1:] if one.flops)
    return Speed(
        work=case.work,
        model=model,
        dtype=case.precision,
        shape=shape,
        unit="pairs/s",
        ours=speeds.ours,
        peer=speeds.peer,
        peer_name=f"trl {version('trl')} {TRAINERS[case.work]}",
        ratio=speeds.ratio,
        loss_difference=max(abs(a - b) for a, b in losses),
        memory_ratio=memory,
        mfu=flops / max(rates),
        setting=case_setting(case, rounds),
    )


def case_setting(case: Case, rounds: int) -> dict[str, float]:
    """Mean lengths are in tokens."""
    pairs = read_pairs(case.data / "train.jsonl")
    sides = [side for pair in pairs for side in (pair.chosen_ids, pair.rejected_ids)]
    return {
        "batch": case.batch,
        "micro_batch": case.micro_batch,
        "steps": rounds + 1,
        "prompt_tokens": mean(len(pair.prompt_ids) for pair in pairs),
        "completion_tokens": mean(map(len, sides)),
        "learning_rate": case.learning_rate,
        **(LOSS_OF_WORK[case.work][1] if case.work in LOSS_OF_WORK else {}),
    }


def our_steps(case: Case) -> Work:
    """A round is the next batch's step, as `klash compare` trains."""
    meter, take = reward_steps(case) if case.work == "reward" else direct_steps(case)
    firsts = count(0, case.batch)

    def work() -> Round:
        start, before, first = perf_counter(), meter.flops, next(firsts)
        log = take(range(first, first + case.batch))
        seconds, flops = seconds_since(start), meter.flops - before
        return Round(case.batch, seconds, log["loss"], meter.train_tokens, flops)

    return work


TakeStep = Callable[[range], dict[str, float]]  # one optimiser step on these pairs; its log


def direct_steps(case: Case) -> tuple[Meter, TakeStep]:
    loss, setting = LOSS_OF_WORK[case.work]
    data = DirectData(case.data, case.data, case.data if loss in UNPAIRED else None)
    meter, pad_id = Meter(), special_ids(load_tokenizer(case.model)).pad
    objective = Objective(data, pad_id, loss, dict(setting), limit_of(case))
    model = trainee_of(load_policy(case.model), case)

    def take(pairs: range) -> dict[str, float]:
        rows = [row for i in pairs for row in (i, objective.rows.count + i)]
        return objective.step(model, rows if objective.single_rows else list(pairs))

    return meter, take


def limit_of(case: Case) -> Limit:
    """As many pairs in one pass as TRL takes."""
    return DirectConfig(micro_batch_size=case.micro_batch).limit


def reward_steps(case: Case) -> tuple[Meter, TakeStep]:
    pairs = read_pairs(case.data / "train.jsonl")
    pad_id = special_ids(load_tokenizer(case.model)).pad
    meter, model = Meter(), trainee_of(load_scalar_model(case.model), case)
    rows, loss = PairRows(pairs, pad_id, limit_of(case)), reward_loss(center=0.0)

    def take(numbers: range) -> dict[str, float]:
        batches = [(batch, float(batch.chosen)) for batch in rows.of_pairs(numbers)]
        return step(model, batches, loss)

    return meter, take


def trainee_of(model: PreTrainedModel, case: Case) -> Trainee:
    return prepare(model, case.optimizer, steps=1)
