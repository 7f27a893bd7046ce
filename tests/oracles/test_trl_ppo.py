"""PPO against TRL 1.12.0, the last release that had it, installed apart and run on its own.

Every number that TRL's trainer computed on the way is compared with ours from the same tokens and
weights. Three definitions differ, and the tests say so: TRL gives the score to the position after
EOS, so that its advantages and its value loss have one token more; it whitens with the unbiased
variance; and its `approxkl` is half a mean square over all positions, padding included.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from checks import close, weights
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.losses import gae, policy_loss, shaped_rewards, value_loss, whiten
from shared.kl import k1, masked_mean, masked_sum
from shared.models.load import (
    load_policy,
    load_scalar_model,
    save,
    sequence_scores,
    state_values,
    token_scalars,
)
from shared.models.logprobs import token_logprobs
from shared.models.sequences import Sequences, collate
from shared.tasks.registry import TaskConfig, make_task

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
PAD, EOS, T = 0, 1, 10
TEMPERATURE, KL_COEF, GAMMA, LAM, CLIP = 0.7, 0.3, 0.9, 0.8, 0.2
ROWS = [([5, 6, 7], [20, 21, EOS]), ([9], [EOS]), ([10, 11], [22, 23, 24, 25])]  # the last is cut
LENGTHS = torch.tensor([3, 1, 4, 4])
Tensors = dict[str, Tensor]


class Peer(NamedTuple):
    """What the other process was given, and what it wrote."""

    folder: Path
    given: Tensors
    functions: Tensors
    first: Tensors  # at the backward pass of the first epoch
    second: Tensors
    log: dict[str, float]


@pytest.fixture(scope="module")
def peer(
    tmp_path_factory: pytest.TempPathFactory,
    policy_folder: Path,
    reward_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    task_config: TaskConfig,
) -> Peer:
    folder, library = (tmp_path_factory.mktemp(name) for name in ("peer", "library"))
    target = ["--target", str(library), "--no-deps", "--quiet", "trl==1.12.0"]
    subprocess.run([sys.executable, "-m", "pip", "install", *target], check=True)
    policy = load_policy(policy_folder)
    save(policy, tokenizer, folder / "ref")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # so that there is a KL to pay for
        for parameter in policy.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    save(policy, tokenizer, folder / "policy")
    save(load_scalar_model(reward_folder), tokenizer, folder / "reward")
    texts = make_task(task_config).prompts("ppo", 24, 0)
    prompts = [[17], *[tokenizer(text).input_ids for text in texts[1:]]]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    batch = collate(*zip(*ROWS, strict=True), PAD)
    given = {
        "values": torch.randn(4, 4, dtype=torch.float64, generator=generator),
        "mask": (torch.arange(4) < LENGTHS[:, None]).to(torch.uint8),
        "ids": batch.ids,
        "width": torch.tensor(batch.prompt_width),
    }
    save_file(given, folder / "values.safetensors")
    script = Path(__file__).with_name("trl_ppo.py")
    environment = {**os.environ, "PYTHONPATH": str(library), "TRL_EXPERIMENTAL_SILENCE": "1"}
    subprocess.run([sys.executable, str(script), str(folder)], check=True, env=environment)
    names = ("functions", "step-0", "step-1")
    found = [load_file(folder / f"{name}.safetensors") for name in names]
    return Peer(folder, given, *found, json.loads((folder / "log.json").read_text()))


# Its functions


def test_the_masked_mean_is_trls(peer: Peer):
    close(masked_mean(peer.given["values"], peer.given["mask"].bool()), peer.functions["mean"])


@pytest.mark.parametrize(("name", "shift_mean"), [("whitened", True), ("scaled", False)])
def test_whitening_is_trls_but_for_its_unbiased_variance(peer: Peer, name: str, shift_mean: bool):
    """TRL divides the squares by n - 1, we by n: theirs has variance (n - 1) / n."""
    values, mask = peer.given["values"], peer.given["mask"].bool()
    centre = 0.0 if shift_mean else peer.functions["mean"]
    n = int(mask.sum())
    theirs = (peer.functions[name] - centre) * (n / (n - 1)) ** 0.5 + centre
    ours = whiten(values, mask, shift_mean=shift_mean)
    close(ours[mask], theirs[mask], 1e-7)
    assert (ours - peer.functions[name])[mask].abs().max() > 1e-3


def test_the_score_is_read_where_trl_reads_it(peer: Peer):
    """At the last token before padding: EOS, or the last token of a row that was cut."""
    batch = collate(*zip(*ROWS, strict=True), PAD)
    model = load_scalar_model(peer.folder / "reward")
    assert torch.equal(peer.functions["first"], LENGTHS)
    assert torch.equal(peer.functions["last"], batch.prompt_width + batch.lengths - 1)
    with torch.no_grad():
        close(sequence_scores(model, batch), peer.functions["scores"])
        real = batch.attention.bool()
        every = token_scalars(model, batch, real)
    close(every, peer.functions["logits"][:, :, 0][real])


# Its trainer: the rollout


def sequences(step: Tensors) -> Sequences:
    """The rows that TRL sampled, cut after EOS."""
    ids, width = step["query_responses"], int(step["context_length"])
    mask = ~step["padding_mask"]
    prompt = (ids[:, :width] != PAD).long()
    return Sequences(ids, torch.cat([prompt, mask.long()], 1), mask)


def with_weights(model, flat: Tensor):
    torch.nn.utils.vector_to_parameters(flat, model.parameters())
    return model


def gradient_of(model) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_trls_rows_end_at_eos_or_at_the_cap(peer: Peer):
    batch = sequences(peer.first)
    ends = batch.completion_ids.gather(1, batch.lengths.unsqueeze(1) - 1)[:, 0] == EOS
    assert 0.2 < ends.float().mean() < 0.8
    assert (batch.lengths[~ends] == T).all()
    assert batch.prompt_width > int(batch.attention[:, : batch.prompt_width].sum(1).min())


@torch.no_grad()
def test_logprobs_values_and_scores_of_the_rollout_equal_trls(peer: Peer):
    step, batch = peer.first, sequences(peer.first)
    mask = batch.mask
    for name, key in (("policy", "logprobs"), ("ref", "ref_logprobs")):
        ours = token_logprobs(load_policy(peer.folder / name), batch, TEMPERATURE)
        close(ours[mask], step[key][mask], 2e-5)
    reward = load_scalar_model(peer.folder / "reward")
    close(state_values(reward, batch)[mask], step["values"][mask], 2e-5)
    truncated = (batch.completion_ids != EOS).all(1)
    close(sequence_scores(reward, batch) - 1.0 * truncated, step["scores"], 2e-5)


def test_the_kl_of_a_sequence_is_the_one_trl_logs(peer: Peer):
    kl = k1(peer.first["logprobs"], peer.first["ref_logprobs"])
    ours = masked_sum(kl, ~peer.first["padding_mask"]).mean().item()
    assert abs(ours) > 0.01
    assert ours == pytest.approx(peer.log["objective/kl"], abs=1e-5)
    scores = peer.first["scores"].mean().item()
    assert scores - KL_COEF * ours == pytest.approx(peer.log["objective/rlhf_reward"], abs=1e-5)


def rewards_and_advantages(step: Tensors, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rewards, advantages, returns) by our functions over `mask`."""
    kl = k1(step["logprobs"], step["ref_logprobs"])
    rewards = shaped_rewards(step["scores"], kl, mask, kl_coef=KL_COEF)
    return rewards, *gae(rewards, step["values"], mask, gamma=GAMMA, lam=LAM)


def test_on_its_own_mask_with_one_token_more_rewards_and_returns_equal_trls(peer: Peer):
    step, mask = peer.first, ~peer.first["padding_mask_p1"]
    rewards, _, returns = rewards_and_advantages(step, mask)
    close(rewards[mask], step["rewards"][mask], 1e-5)
    close(returns[mask], step["returns"][mask], 1e-5)


def test_rows_that_were_cut_have_trls_returns_and_rows_that_ended_have_not(peer: Peer):
    """An ended row's score comes one position later there: A = g V' - V + g lam (s - V')."""
    step, mask = peer.first, ~peer.first["padding_mask"]
    _, advantages, returns = rewards_and_advantages(step, mask)
    cut = mask.all(1)
    close(returns[cut], step["returns"][cut], 1e-5)
    rows = (~cut).nonzero()[:, 0]
    last = mask.sum(1)[rows] - 1
    penalty = KL_COEF * step["kl"][rows, last]
    value, score = step["values"][rows, last], step["scores"][rows]
    after = step["values"][rows, last + 1]
    close(advantages[rows, last], score - penalty - value, 1e-5)
    late = GAMMA * after - penalty - value + GAMMA * LAM * (score - after)
    close(step["returns"][rows, last] - value, late, 1e-5)
    assert (advantages[rows, last] - late).abs().mean() > 0.01


def test_its_advantages_are_whitened_over_the_mask_without_the_token_more(peer: Peer):
    step, mask = peer.first, ~peer.first["padding_mask"]
    raw, n = step["returns"] - step["values"], int(mask.sum())
    theirs = step["advantages"] * (n / (n - 1)) ** 0.5
    close(whiten(raw, mask), theirs, 1e-5)


# Its trainer: the losses and their gradients


@pytest.mark.parametrize("epoch", ["first", "second"])
def test_the_policy_loss_and_its_gradient_equal_trls(peer: Peer, epoch: str):
    step, batch = getattr(peer, epoch), sequences(peer.first)
    rows = step["micro_batch_inds"]
    batch = Sequences(*(t[rows] for t in batch))
    model = with_weights(load_policy(peer.folder / "policy"), step["policy_weights"])
    logprobs = token_logprobs(model, batch, TEMPERATURE)
    close(logprobs[batch.mask], step["new_logprobs"][batch.mask], 3e-5)
    old, advantages = step["mb_logprobs"], step["mb_advantage"]
    loss, numbers = policy_loss(logprobs, old, advantages, batch.mask, clip=CLIP)
    close(loss, step["pg_loss"], 1e-5)
    loss.backward()
    scale = step["policy_gradient"].norm()
    assert scale > 0.1
    close(gradient_of(model) / scale, step["policy_gradient"] / scale, 1e-4)
    if epoch == "second":
        assert (weights(model) - peer.first["policy_weights"]).norm() > 0.01
        assert numbers["ppo/policy/clipfrac"] > 0.02
        share = numbers["ppo/policy/clipfrac"] / 2  # TRL logs the mean of both epochs
        assert share == pytest.approx(peer.log["policy/clipfrac_avg"], abs=1e-4)


@pytest.mark.parametrize("epoch", ["first", "second"])
def test_the_value_loss_and_its_gradient_equal_trls_on_its_own_mask(peer: Peer, epoch: str):
    """The value of the token more is that of the state which ends in EOS."""
    step, batch = getattr(peer, epoch), sequences(peer.first)
    rows = step["micro_batch_inds"]
    batch = Sequences(batch.ids[rows], batch.attention[rows], ~step["padding_mask_p1"][rows])
    model = with_weights(load_scalar_model(peer.folder / "reward"), step["value_weights"])
    values = state_values(model, batch)
    close(values[batch.mask], step["vpred"][batch.mask], 2e-5)
    old, returns = step["mb_values"], step["mb_return"]
    loss, numbers = value_loss(values, old, returns, batch.mask, clip=CLIP)
    close(loss, step["vf_loss"], 1e-4)
    loss.backward()
    scale = step["value_gradient"].norm()
    assert scale > 0.1
    close(gradient_of(model) / scale, step["value_gradient"] / scale, 1e-4)
    assert numbers["ppo/val/clipfrac"] == pytest.approx(step["vf_clipfrac"].item(), abs=1e-6)
    if epoch == "second":
        assert numbers["ppo/val/clipfrac"] > 0.02


def test_approxkl_is_a_token_mean_of_k3_and_trls_half_a_mean_square_with_padding(peer: Peer):
    """Padding counts as no change there, so that shorter answers make the number smaller."""
    step, mask = peer.second, ~peer.second["padding_mask"][peer.second["micro_batch_inds"]]
    change = step["new_logprobs"] - step["mb_logprobs"]
    theirs = (change**2).mean().item() / 2
    assert theirs / 2 == pytest.approx(peer.log["policy/approxkl_avg"], rel=1e-3)  # epoch 1: 0
    zero = torch.zeros_like(change)
    found = policy_loss(step["new_logprobs"], step["mb_logprobs"], zero, mask, clip=CLIP)[1]
    k3 = (change[mask].exp() - 1 - change[mask]).mean().item()
    assert found["ppo/policy/approxkl"] == pytest.approx(k3, rel=1e-4)
    assert found["ppo/policy/approxkl"] > 1.2 * theirs
