"""Runs TRL 1.12's PPO in a process of its own and writes down what it computed.

    PYTHONPATH=<folder with trl 1.12.0> python trl_ppo.py FOLDER

FOLDER holds `policy` and `reward` (transformers folders), `prompts.json` (token ids) and
`values.safetensors` (numbers and their mask). `functions.safetensors` and one
`step-<n>.safetensors` for each backward pass of `PPOTrainer.train` come to lie beside them: TRL's
own variables of that moment, the weights before it and the gradient after it.
"""

import json
import sys
from pathlib import Path
from types import FrameType

import torch
import trl
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer
from trl.experimental.utils import first_true_indices, get_reward

KEPT = (
    "context_length", "query_responses", "padding_mask", "padding_mask_p1", "micro_batch_inds",
    "logprobs", "ref_logprobs", "scores", "values", "kl", "rewards", "advantages", "returns",
    "new_logprobs", "vpred", "mb_advantage", "mb_logprobs", "mb_values", "mb_return",
    "pg_loss", "vf_loss", "vf_clipfrac",
)  # fmt: skip


def main(folder: Path) -> None:
    assert trl.__version__ == "1.12.0", trl.__version__
    torch.set_num_threads(1)
    functions(folder)
    trained(folder)


def functions(folder: Path) -> None:
    inputs = load_file(folder / "values.safetensors")
    values, mask = inputs["values"], inputs["mask"].bool()
    found = {
        "mean": ppo_trainer.masked_mean(values, mask),
        "whitened": ppo_trainer.masked_whiten(values, mask),
        "scaled": ppo_trainer.masked_whiten(values, mask, shift_mean=False),
        "first": first_true_indices(~mask),
    }
    reward = classifier(folder)
    with torch.no_grad():
        logits, scores, last = get_reward(reward, inputs["ids"], 0, int(inputs["width"]))
    found |= {"logits": logits, "scores": scores, "last": last}
    write(folder / "functions.safetensors", found)


def trained(folder: Path) -> None:
    """One update of two epochs on all prompts at once, large enough a step to reach the clips."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    prompts = json.loads((folder / "prompts.json").read_text())
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(folder / "scratch"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            num_sample_generations=0,
            learning_rate=3e-3,
            per_device_train_batch_size=len(prompts),
            gradient_accumulation_steps=1,
            total_episodes=len(prompts),
            num_ppo_epochs=2,
            response_length=10,
            stop_token="eos",
            temperature=0.7,
            missing_eos_penalty=1.0,
            kl_coef=0.3,
            gamma=0.9,
            lam=0.8,
            vf_coef=1.0,  # the two models share no weight
        ),
        processing_class=tokenizer,
        model=policy(folder, "policy"),
        ref_model=policy(folder, "ref"),
        reward_model=classifier(folder),
        value_model=classifier(folder),
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in prompts]),
        eval_dataset=Dataset.from_list([{"input_ids": ids} for ids in prompts]),
    )
    models, steps = {"policy": trainer.policy_model, "value": trainer.value_model}, []

    def backward(loss: Tensor) -> None:
        moment = variables(sys._getframe(1))
        moment |= {f"{name}_weights": flat(m.parameters()) for name, m in models.items()}
        loss.backward()
        gradients = {name: (p.grad for p in m.parameters()) for name, m in models.items()}
        moment |= {f"{name}_gradient": flat(rows) for name, rows in gradients.items()}
        steps.append(moment)

    trainer.accelerator.backward = backward
    trainer.train()
    (logged,) = [row for row in trainer.state.log_history if "objective/kl" in row]
    for number, moment in enumerate(steps):
        write(folder / f"step-{number}.safetensors", moment)
    (folder / "log.json").write_text(json.dumps(logged))


def variables(frame: FrameType) -> dict[str, Tensor]:
    return {name: torch.as_tensor(frame.f_locals[name]) for name in KEPT}


def flat(tensors) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: t.detach().clone().contiguous() for name, t in tensors.items()}, path)


def policy(folder: Path, name: str) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)


def classifier(folder: Path) -> nn.Module:
    model = AutoModelForSequenceClassification.from_pretrained(
        folder / "reward", num_labels=1, dtype=torch.float32
    )
    return model.eval()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
