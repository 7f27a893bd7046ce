"""PPO: ours against TRL 1.12.0's `PPOTrainer`, the last one released, one update a round.

An update is all that lies between one batch of prompts and the next: sampling, scoring by reward
model, reference and value model, and every epoch of steps. Both sides have the same four models,
prompts, lengths, minibatches and precision; TRL is at its fastest: one batch for the whole
rollout, no gradient checkpointing, fused AdamW, nothing saved, sampled for show or reported. Where
our policy trains by LoRA so does TRL's; sharing a trunk is ours alone.
The learning rate is too small to change what a completion looks like, so that the work stays the
same; `setting` has the length of completions on either side. Each side draws its own, so that
their losses cannot be compared here; `tests/oracles/test_trl_ppo.py` does that, token by token.
"""

import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain, count, product, repeat
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
)

from benchmarks.pipeline.places import stage_context
from benchmarks.speed.generation import chat_prompts
from benchmarks.speed.sides import (
    Choice,
    Round,
    Speed,
    Turns,
    Work,
    Worker,
    compare_rates,
    seconds_since,
)
from benchmarks.speed.smollm2 import convert
from benchmarks.speed.trl.ppo import TRL, import_trl_ppo, install_trl, loaded, trl_settings
from rlhf.ppo import PPOConfig, ppo_update
from rlhf.rollout import make_actors
from shared.generation.engine import Sampling
from shared.generation.start import TRANSFORMERS, Drawing, GenerationConfig
from shared.models.cost import Meter, matmul_rate
from shared.models.load import ModelConfig, Start, load_tokenizer, new_scalar_model, save
from shared.models.lora import LoRAConfig, adapter
from shared.stages import Stages, output_folder
from shared.tasks.registry import TaskConfig, make_task
from shared.training.fit import OptimizerConfig
from shared.training.sft import SftConfig, train_sft

KL_COEF = 0.1
STEADY = {
    "optimizer": OptimizerConfig(
        learning_rate=1e-6, schedule="constant", warmup_share=0.0, adam_epsilon=1e-5
    ),
    "value_learning_rate": 1e-6,
}


class Update(NamedTuple):
    """What both sides do in a round, with `lora` on the policy.

    `generation` and a shared trunk are ours alone: TRL samples with transformers and has a value
    model of its own.
    """

    model: str
    shape: str
    ppo: PPOConfig
    sampling: Sampling
    generation: GenerationConfig = TRANSFORMERS
    lora: LoRAConfig | None = None

    @property
    def passes(self) -> int:
        """Forward passes, or their worth, that a token goes through: a backward pass is worth two.

        Sampled once; scored by reference, reward model and value function, and by the policy
        unless the engine's numbers are its own or it shares the value function's trunk; then in
        each epoch forward and backward through policy and value model, or through the one trunk.
        What LoRA leaves out counts as done.
        """
        trunk = self.ppo.shared_trunk
        scored = 3 if self.ppo.reuse_logprobs or trunk else 4
        return 1 + scored + self.ppo.epochs * 3 * (1 if trunk else 2)


def updates() -> Iterator[Update]:
    """All comparisons."""
    for epochs, trunk in ((1, ""), (2, ""), (1, ", shared trunk")):
        ppo = PPOConfig(rollout_size=512, epochs=epochs, minibatch_size=64, **STEADY)
        ppo = ppo.model_copy(update={"shared_trunk": bool(trunk)})
        sampling = Sampling(max_new_tokens=16)
        yield Update("reviews", f"512 x 16, epochs {epochs}{trunk}", ppo, sampling)
    # With room for 96 tokens short answers end by themselves, long ones are cut
    sampled = ("transformers", 32), ("vllm", 32), ("vllm", 96)
    for (engine, tokens), with_lora in product(sampled, (False, True)):
        ppo = PPOConfig(rollout_size=16, epochs=1, minibatch_size=8, micro_batch_size=8, **STEADY)
        shape = f"16 x {tokens}, {engine}{', lora, shared trunk' if with_lora else ''}"
        yield Update(
            "smollm2-135m",
            shape,
            ppo.model_copy(update={"shared_trunk": with_lora}),
            Sampling(max_new_tokens=tokens),
            GenerationConfig(engine=engine),  # pyright: ignore[reportArgumentType]
            LoRAConfig() if with_lora else None,
        )


class Inputs(NamedTuple):
    """What the sides start from: folders of models, and the prompts of every update."""

    policy: Path
    reward: Path
    prompts: list[list[int]]


def speed_ppo(choice: Choice) -> Iterator[Speed]:
    """Episodes a second of full updates, float32, each comparison as it is done.

    vLLM's rows only where vLLM is installed.
    """
    has_vllm = importlib.util.find_spec("vllm") is not None
    chosen = [
        update
        for update in updates()
        if (has_vllm or update.generation.engine != "vllm")
        and choice.takes(update.model, "float32", update.shape)
    ]
    if not chosen:
        return
    library = install_trl(output_folder(choice.runs / "speed") / f"trl-{TRL}")
    for update in chosen:
        yield compare_updates(update, INPUTS[update.model](choice.runs), library, choice.rounds)


def compare_updates(update: Update, inputs: Inputs, library: Path, rounds: int) -> Speed:
    """`library`: the folder of TRL 1.12.0."""
    threads = torch.get_num_threads()
    ours = Worker(our_updates, update, inputs, threads=threads)
    peer = Worker(trl_updates, update, inputs, library, threads=threads, loops=True)
    matmul_rates = []

    def ours_after_rate() -> float:
        matmul_rates.append(matmul_rate(0.2))
        return ours()

    speeds = compare_rates(ours_after_rate, peer, rounds)
    memory_ratio = ours.end() / peer.end()
    our_rounds, peer_rounds = ours.rounds[1:], peer.rounds[1:]
    flops = median(r.flops / r.seconds for r in our_rounds if r.flops)
    episodes = update.ppo.rollout_size
    return Speed(
        work="ppo",
        model=update.model,
        dtype="float32",
        shape=update.shape,
        unit="episodes/s",
        ours=speeds.ours,
        peer=speeds.peer,
        peer_name=f"trl {TRL} PPOTrainer",
        ratio=speeds.ratio,
        memory_ratio=memory_ratio,
        mfu=flops / max(matmul_rates),
        setting={
            "episodes": episodes,
            "epochs": update.ppo.epochs,
            "minibatch": update.ppo.minibatch_size,
            "max_new_tokens": update.sampling.max_new_tokens,
            "prompt_tokens": mean(map(len, inputs.prompts)),
            "completion_tokens": mean(r.tokens for r in our_rounds if r.tokens) / episodes,
            "peer_completion_tokens": mean(r.tokens for r in peer_rounds if r.tokens) / episodes,
            "passes": update.passes,
            "flops_per_episode": mean(r.flops for r in our_rounds if r.flops) / episodes,
        },
    )


# The two sides


def our_updates(update: Update, inputs: Inputs) -> Work:
    """What `train_ppo` does in one turn of its loop."""
    ppo, sampling, meter = update.ppo, update.sampling, Meter()
    start, drawing = Start(inputs.policy, update.lora), Drawing(sampling, update.generation)
    actors = make_actors(start, inputs.reward, ppo.optimizers(updates=1), drawing, meter)
    seeds = count()

    def work() -> Round:
        draw = sampling.model_copy(update={"seed": next(seeds)})
        flops, generated, start = meter.flops, meter.generated_tokens, perf_counter()
        ppo_update(actors, inputs.prompts, ppo, KL_COEF, draw)
        seconds = seconds_since(start)
        episodes, tokens = len(inputs.prompts), meter.generated_tokens - generated
        return Round(episodes, seconds, flops=meter.flops - flops, tokens=tokens)

    return work


class NoMoreRounds(Exception):
    """The only way out of a loop that asks for batches for ever."""


def trl_updates(turns: Turns, update: Update, inputs: Inputs, library: Path) -> None:
    """`PPOTrainer.train`, made to wait where it asks for the next batch of prompts."""
    module = import_trl_ppo(library)
    cut, generated = module.truncate_response, []

    def counted(stop: int, pad: int, responses: torch.Tensor) -> torch.Tensor:
        kept = cut(stop, pad, responses)
        generated.append((kept != pad).sum().item())
        return kept

    module.truncate_response = counted
    trainer = trl_trainer(module, update, inputs)
    batches, episodes = trainer.dataloader, len(inputs.prompts)

    def paced() -> Iterator[Any]:
        for batch in chain.from_iterable(repeat(batches)):
            if not turns.wait():
                raise NoMoreRounds
            start = perf_counter()
            yield batch
            turns.send(Round(episodes, seconds_since(start), tokens=generated[-1]))

    trainer.dataloader = paced()
    with suppress(NoMoreRounds):
        trainer.train()


def trl_trainer(module: Any, update: Update, inputs: Inputs) -> Any:
    """A `PPOTrainer` of `module` that does the same work, with more episodes than needed."""
    from datasets import Dataset

    ppo, prompts = update.ppo, inputs.prompts
    rows = Dataset.from_list([{"input_ids": ids} for ids in prompts])
    with tempfile.TemporaryDirectory() as scratch:
        trainer = module.PPOTrainer(
            args=module.PPOConfig(
                output_dir=scratch,
                optim="adamw_torch_fused",
                learning_rate=ppo.optimizer.learning_rate,
                lr_scheduler_type="constant",
                adam_epsilon=ppo.optimizer.adam_epsilon,
                total_episodes=len(prompts) * 10**6,
                kl_coef=KL_COEF,
                **trl_settings(ppo, update.sampling),
            ),
            processing_class=AutoTokenizer.from_pretrained(inputs.policy, padding_side="left"),
            model=loaded(AutoModelForCausalLM, inputs.policy),
            ref_model=None if update.lora else loaded(AutoModelForCausalLM, inputs.policy),
            reward_model=loaded(AutoModelForSequenceClassification, inputs.reward),
            value_model=loaded(AutoModelForSequenceClassification, inputs.reward),
            train_dataset=rows,
            eval_dataset=rows,
            peft_config=None if update.lora is None else adapter(update.lora),
        )
    trainer.remove_callback(PrinterCallback)
    trainer.accelerator.print = lambda *_: None
    return trainer


# What they start from


def reviews_inputs(runs: Path) -> Inputs:
    """A policy after a short SFT, since one with random weights would never end by itself."""
    stages, task = Stages(runs / ".stages", lambda *_: None, stage_context()), TaskConfig()
    sft = SftConfig(examples=4000, epochs=1)
    policy = stages.run("sft", train_sft, task=task, model=ModelConfig(), sft=sft, seed=0)
    reward = stages.run("random-reward", random_reward, policy=policy)
    tokenizer, texts = load_tokenizer(policy), make_task(task).prompts("ppo", 512, 0)
    return Inputs(policy, reward, [tokenizer(text).input_ids for text in texts])


def smollm2_inputs(runs: Path) -> Inputs:
    policy = runs / "speed" / "smollm2-135m"
    convert(policy)
    stages = Stages(runs / ".stages", lambda *_: None, stage_context())
    reward = stages.run("random-reward", random_reward, policy=policy)
    return Inputs(policy, reward, chat_prompts(policy, 16))


def random_reward(folder: Path, policy: Path) -> None:
    """Stage: a reward model that knows nothing; its arithmetic is any other's."""
    save(new_scalar_model(policy, seed=0), load_tokenizer(policy), folder)


INPUTS = {"reviews": reviews_inputs, "smollm2-135m": smollm2_inputs}
