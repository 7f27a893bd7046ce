"""Single faults written by hand: the mistakes that people make in this field, one at a time.

`old` occurs exactly once in `file` and becomes `new`; `tests` are the files that must catch it.
"""

from typing import NamedTuple

from mutants.trial import ROOT, Mutant


class Fault(NamedTuple):
    """A mistake, and what is wrong with it in one line."""

    name: str
    file: str
    old: str
    new: str
    breaks: str
    tests: tuple[str, ...]


DIRECT = ("test_dpo_losses.py",)
TRAIN = ("test_direct.py",)
RLHF = ("test_rlhf_losses.py",)
PPO = ("test_ppo.py",)
METER = ("test_kl_and_logprobs.py",)
PACKING = ("test_packing.py", "test_kl_and_logprobs.py")
ATTENTION = ("test_attention.py",)
KERNELS = ("test_kernels.py",)
MODELS = ("test_models.py", "test_ppo.py")
RUNS = ("test_pipeline.py",)
STAGES = ("test_stages.py",)
SAMPLER = ("test_generation.py",)
PAIRS = ("test_preferences.py",)
FILTER = ("test_filtered.py",)
REWARD = ("test_reward.py",)
ONOFF = ("test_onoff.py",)
STATISTICS = ("test_statistics.py",)
METRICS = ("test_metrics.py",)
FRONTIER = ("test_frontier.py",)
OPTIMUM = ("test_optimum.py",)
FINITE = ("test_finite_tasks.py",)
VLLM = ("test_vllm.py",)
SERVER = ("test_vllm_server.py",)
PASSES = ("test_ppo_passes.py",)
LORA = ("test_lora.py",)
GROWTH = ("test_speed_growth.py",)
BESIDE_TRL = ("test_speed_experiment.py",)
FIT = ("test_fit.py", "test_rlhf_losses.py", "test_direct.py")

FAULTS = (
    # The direct methods' losses
    Fault(
        "dpo: chosen and rejected swapped", "dpo/losses.py",
        "return -F.logsigmoid(beta * (r.chosen - r.rejected))",
        "return -F.logsigmoid(beta * (r.rejected - r.chosen))",
        "the policy learns to prefer what was rejected", DIRECT,
    ),
    Fault(
        "dpo: sign of the loss", "dpo/losses.py",
        "return -F.logsigmoid(beta * (r.chosen", "return F.logsigmoid(beta * (r.chosen",
        "the loss is maximised", DIRECT,
    ),
    Fault(
        "dpo: beta outside the sigmoid", "dpo/losses.py",
        "return -F.logsigmoid(beta * (r.chosen - r.rejected))",
        "return -beta * F.logsigmoid(r.chosen - r.rejected)",
        "beta scales the loss and no longer sets the optimum", DIRECT,
    ),
    Fault(
        "cdpo: smoothing on the wrong side", "dpo/losses.py",
        "return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)",
        "return -label_smoothing * F.logsigmoid(z) - (1 - label_smoothing) * F.logsigmoid(-z)",
        "labels count as wrong with probability 1 - e", DIRECT,
    ),
    Fault(
        "rdpo: cdpo's sign", "dpo/losses.py",
        "F.logsigmoid(z) + label_smoothing * F.logsigmoid(-z)\n    return kept",
        "F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)\n    return kept",
        "biased under flipped labels", DIRECT,
    ),
    Fault(
        "rdpo: denominator 1 - e", "dpo/losses.py",
        "kept / (1 - 2 * label_smoothing)", "kept / (1 - label_smoothing)",
        "the clean loss comes out too small", DIRECT,
    ),
    Fault(
        "ipo: margin 1 / tau", "dpo/losses.py",
        "return (r.chosen - r.rejected - 1 / (2 * tau)) ** 2",
        "return (r.chosen - r.rejected - 1 / tau) ** 2",
        "the margin is twice the paper's", DIRECT,
    ),
    Fault(
        "ipo: tau in place of 1 / (2 tau)", "dpo/losses.py",
        "return (r.chosen - r.rejected - 1 / (2 * tau)) ** 2",
        "return (r.chosen - r.rejected - tau / 2) ** 2",
        "more tau pushes further in place of less", DIRECT,
    ),
    Fault(
        "ipo per token: chosen's length for both", "dpo/losses.py",
        "r.rejected / r.rejected_tokens", "r.rejected / r.chosen_tokens",
        "longer rejected answers weigh more", DIRECT,
    ),
    Fault(
        "kto: baseline not clamped at 0", "dpo/losses.py",
        "r.mismatched.detach().mean().clamp(min=0)", "r.mismatched.detach().mean()",
        "a KL below 0", DIRECT,
    ),
    Fault(
        "kto: gradient through the baseline", "dpo/losses.py",
        "r.mismatched.detach().mean()", "r.mismatched.mean()",
        "the policy is trained on its own baseline", DIRECT,
    ),
    Fault(
        "kto: undesirable like desirable", "dpo/losses.py",
        "undesirable_weight * torch.sigmoid(beta * (r.rejected - z))",
        "undesirable_weight * torch.sigmoid(beta * (z - r.rejected))",
        "rejected completions are learned too", DIRECT,
    ),
    Fault(
        "kto: weights exchanged", "dpo/losses.py",
        "desirable = desirable_weight *", "desirable = undesirable_weight *",
        "the desirable side has the other side's weight", DIRECT,
    ),
    # Their training
    Fault(
        "direct: reference and policy exchanged", "dpo/train.py",
        "ratios = logps - micro.ref_logps.to(logps.device)",
        "ratios = micro.ref_logps.to(logps.device) - logps",
        "log-ratios with the wrong sign", TRAIN,
    ),
    Fault(
        "direct: reference forgotten", "dpo/train.py",
        "ratios = logps - micro.ref_logps.to(logps.device)", "ratios = logps",
        "log-probabilities in place of log-ratios", TRAIN,
    ),
    Fault(
        "direct: sides exchanged", "dpo/train.py",
        "LogRatios(ratios[:n], ratios[n:], lengths[:n], lengths[n:]",
        "LogRatios(ratios[n:], ratios[:n], lengths[n:], lengths[:n]",
        "rejected rows are read as chosen", TRAIN,
    ),
    Fault(
        "direct: reference of other rows", "dpo/train.py",
        "self.ref_logps[torch.tensor(rows)], chosen, p, mismatched)",
        "self.ref_logps[torch.tensor(rows).sort().values.flip(0)], chosen, p, mismatched)",
        "rows are compared with the reference of others", TRAIN,
    ),
    Fault(
        "kto: baseline of the step's own pairs", "dpo/train.py",
        "[self.completions[partner[i]] for i in group]",
        "[self.completions[rows[i]] for i in group]",
        "the KL is estimated on the training data", TRAIN,
    ),
    Fault(
        "kto: partners within a prompt", "dpo/reference.py",
        "order[(place + shift) % len(order)]", "order[(place + 1) % len(order)]",
        "mismatched completions may answer the same prompt", TRAIN,
    ),
    # The reward model's and PPO's losses
    Fault(
        "reward model: sides exchanged", "rlhf/losses.py",
        "difference = chosen - rejected if margin", "difference = rejected - chosen if margin",
        "the rejected answer is scored higher", RLHF,
    ),
    Fault(
        "reward model: margin with the wrong sign", "rlhf/losses.py",
        "else chosen - rejected - margin", "else chosen - rejected + margin",
        "clear preferences are learned less", RLHF,
    ),
    Fault(
        "rewards: sign of the KL penalty", "rlhf/losses.py",
        "(-kl_coef * kl_terms)", "(kl_coef * kl_terms)",
        "leaving the reference is rewarded", RLHF,
    ),
    Fault(
        "rewards: score one token early", "rlhf/losses.py",
        "last = mask.sum(1, keepdim=True) - 1",
        "last = (mask.sum(1, keepdim=True) - 2).clamp(min=0)",
        "the score falls before the last token", RLHF,
    ),
    Fault(
        "rewards: score at the batch's last column", "rlhf/losses.py",
        "last = mask.sum(1, keepdim=True) - 1",
        "last = torch.full_like(mask.sum(1, keepdim=True), mask.shape[1] - 1)",
        "shorter rows get their score on padding", RLHF,
    ),
    Fault(
        "gae: this state's value for the next one's", "rlhf/losses.py",
        "+ gamma * next_value - values[:, t]", "+ gamma * values[:, t] - values[:, t]",
        "no bootstrapping from the next state", RLHF,
    ),
    Fault(
        "gae: lambda forgotten", "rlhf/losses.py",
        "delta + gamma * lam * following", "delta + gamma * following",
        "advantages as if lambda were 1", RLHF,
    ),
    Fault(
        "gae: forwards in time", "rlhf/losses.py",
        "for t in reversed(range(rewards.shape[1])):", "for t in range(rewards.shape[1]):",
        "credit flows to later tokens", RLHF,
    ),
    Fault(
        "gae: returns without values", "rlhf/losses.py",
        "return advantages, (advantages + values)", "return advantages, (advantages + rewards)",
        "the value model learns something else", RLHF,
    ),
    Fault(
        "gae: values under padding", "rlhf/losses.py",
        "rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)",
        "rewards = rewards.masked_fill(~mask, 0.0)",
        "a value behind the end leaks into the last token", RLHF,
    ),
    Fault(
        "whitening: mean over padding too", "rlhf/losses.py",
        "mean = masked_mean(values, mask)", "mean = values.mean()",
        "padding moves the mean", RLHF,
    ),
    Fault(
        "whitening: variance for deviation", "rlhf/losses.py",
        "torch.rsqrt(variance + 1e-8)", "(variance + 1e-8).reciprocal()",
        "whitened values do not have variance 1", RLHF,
    ),
    Fault(
        "policy loss: sign of the advantage", "rlhf/losses.py",
        "unclipped = -advantages * ratio", "unclipped = advantages * ratio",
        "bad tokens are made likelier", RLHF,
    ),
    Fault(
        "policy loss: minimum for maximum", "rlhf/losses.py",
        "losses = torch.maximum(unclipped, clipped)",
        "losses = torch.minimum(unclipped, clipped)",
        "the clip is optimistic", RLHF,
    ),
    Fault(
        "policy loss: importance weights forgotten", "rlhf/losses.py",
        "losses if weights is None else weights * losses", "losses",
        "another sampler's tokens count as the policy's", RLHF,
    ),
    Fault(
        "policy loss: ratio turned over", "rlhf/losses.py",
        "log_ratio = (logprobs - old_logprobs)", "log_ratio = (old_logprobs - logprobs)",
        "rho is old over new", RLHF,
    ),
    Fault(
        "policy loss: mean over padding too", "rlhf/losses.py",
        "return masked_mean(losses if weights is None else weights * losses, mask), numbers",
        "return losses.mean(), numbers",
        "padding counts as tokens", RLHF,
    ),
    Fault(
        "value loss: no clip", "rlhf/losses.py",
        "kept_near = torch.clamp(values, old_values - clip, old_values + clip)",
        "kept_near = values",
        "the value model may jump", RLHF,
    ),
    Fault(
        "value loss: half forgotten", "rlhf/losses.py",
        "return 0.5 * masked_mean(", "return masked_mean(",
        "twice the gradient", RLHF,
    ),
    # PPO
    Fault(
        "ppo: reference and policy exchanged in the KL", "rlhf/ppo.py",
        "kl = k1(rollout.logprobs, rollout.ref_logprobs)",
        "kl = k1(rollout.ref_logprobs, rollout.logprobs)",
        "leaving the reference is rewarded", PPO,
    ),
    Fault(
        "ppo: missing EOS costs nothing", "rlhf/ppo.py",
        "penalised = scores - ppo.missing_eos_penalty * truncated", "penalised = scores",
        "endless text is free", PPO,
    ),
    Fault(
        "ppo: every ended row pays", "rlhf/ppo.py",
        "ppo.missing_eos_penalty * truncated", "ppo.missing_eos_penalty * ~truncated",
        "ending is punished", PPO,
    ),
    Fault(
        "ppo: returns from whitened advantages", "rlhf/ppo.py",
        "rollout = rollout._replace(advantages=whiten(advantages, mask), returns=returns)",
        "white = whiten(advantages, mask)\n    "
        "rollout = rollout._replace(advantages=white, returns=white + rollout.values)",
        "the value model's target loses its units", PPO,
    ),
    Fault(
        "ppo: advantages not whitened", "rlhf/ppo.py",
        "advantages=whiten(advantages, mask), returns", "advantages=advantages, returns",
        "the step depends on the score's scale", PPO,
    ),
    Fault(
        "ppo: micro-batches weighted by rows", "rlhf/ppo.py",
        "float(part.sequences.mask.sum())", "float(len(group))",
        "tokens of short rows weigh more", PPO,
    ),
    Fault(
        "ppo: temperature forgotten in the update", "rlhf/ppo.py",
        "token_logprobs(model, part.sequences, self.actors.temperature)",
        "token_logprobs(model, part.sequences)",
        "the first ratio is not 1", PPO,
    ),
    Fault(
        "ppo: importance weights turned over", "rlhf/rollout.py",
        "(rollout.logprobs - as_rows(sampled, rollout.sequences))",
        "(as_rows(sampled, rollout.sequences) - rollout.logprobs)",
        "the engine's rare tokens count less instead of more", PPO,
    ),
    Fault(
        "ppo: a paused run forgets the optimiser's moments", "shared/training/fit.py",
        'if name.startswith("optimizer."):', 'if name.startswith("optimiser."):',
        "it goes on as if it were new", PPO,
    ),
    Fault(
        "ppo: the controller reads token means", "rlhf/ppo.py",
        "controller.update(sequence_kl, ppo.rollout_size)",
        'controller.update(sequence_kl / numbers["ppo/completion_length"], ppo.rollout_size)',
        "the coefficient follows another unit than its target's", PPO,
    ),
    Fault(
        "ppo: value head not normalised", "rlhf/rollout.py",
        "head.weight.copy_(raw.weight / scorer.scale)", "head.weight.copy_(raw.weight)",
        "values start in raw units", PPO,
    ),
    Fault(
        "ppo: a rounded policy's numbers are taken from its engine", "rlhf/ppo.py",
        'exact = actors.engine.exact and actors.policy.precision == "float32"', "exact = True",
        "ratios start at the engine's rounding", PASSES,
    ),
    Fault(
        "ppo: the engine's numbers are compared with themselves", "rlhf/ppo.py",
        "(logprobs.detach() - part.logprobs)[mask]", "(part.logprobs - part.logprobs)[mask]",
        "no one sees that engine and policy are apart", PASSES,
    ),
    Fault(
        "trunk: the value loss counts whole", "rlhf/ppo.py",
        "loss + self.ppo.vf_coef * error", "loss + error",
        "vf_coef does nothing", PASSES,
    ),
    Fault(
        "trunk: values of the states behind", "shared/models/logprobs.py",
        "return batch.spread(logprobs), batch.spread(_values(policy, states))",
        "return batch.spread(logprobs), batch.spread(_values(policy, states.roll(1, 0)))",
        "each value is read in another token's place", LORA,
    ),
    Fault(
        "trunk: a paused run forgets that there is one model", "rlhf/pause.py",
        'found = {"policy": actors.policy, "value": actors.value}',
        'found = {"value": actors.value}',
        "it goes on from the start's weights", PASSES,
    ),
    # LoRA
    Fault(
        "lora: the reference keeps the adapter", "rlhf/rollout.py",
        "with self.policy.model.disable_adapter():", "with torch.no_grad():",
        "KL is 0 whatever the policy does", PASSES,
    ),
    Fault(
        "lora: alpha is not read", "shared/models/lora.py",
        "lora_alpha=lora.alpha,", "lora_alpha=lora.rank,",
        "the adapter acts at another strength", LORA,
    ),
    Fault(
        "lora: every seed draws the same adapter", "shared/models/lora.py",
        "torch.manual_seed(seed)", "torch.manual_seed(0)",
        "seeds are less different than they look", LORA,
    ),
    Fault(
        "lora: drawing moves the other random numbers", "shared/models/lora.py",
        "with torch.random.fork_rng():", "if True:",
        "what is drawn next depends on the adapter", LORA,
    ),
    Fault(
        "lora: the value head is saved with the policy", "shared/models/lora.py",
        '".lora_" in name or name.startswith(f"{VALUE_HEAD}.")', '".lora_" in name',
        "no other project knows the folder's weights", LORA,
    ),
    Fault(
        "lora: frozen matrices count as trained", "shared/models/cost.py",
        "2 * flops - 2.0 * sum(seen * size for seen, size in frozen)", "2 * flops",
        "more FLOPs are reported than run", LORA,
    ),
    Fault(
        "cost: the output head counts on prompts too", "shared/models/cost.py",
        "int(batch.mask.sum()) if logits else 0)", "sum(lengths) if logits else 0)",
        "the share of the machine's rate looks better than it is", ("test_cost.py",),
    ),
    # KL and log-probabilities
    Fault(
        "kl: the other direction", "shared/kl.py",
        "(policy.exp() * (policy - ref))", "(ref.exp() * (ref - policy))",
        "KL from reference to policy", METER,
    ),
    Fault(
        "kl: k3 with k1's ratio", "shared/kl.py",
        "log_ratio = ref_logprobs - logprobs", "log_ratio = logprobs - ref_logprobs",
        "k3 is biased", METER,
    ),
    Fault(
        "kl: k1 and k3 exchanged", "shared/kl.py",
        '    return logprobs - ref_logprobs\n',
        "    return torch.expm1(ref_logprobs - logprobs) - (ref_logprobs - logprobs)\n",
        "PPO's penalty is another estimator", METER,
    ),
    Fault(
        "kl: sum over padding too", "shared/kl.py",
        "return values.masked_fill(~mask, 0.0).sum(1)", "return values.sum(1)",
        "what lies under the mask counts", METER,
    ),
    Fault(
        "kl: mean of row means", "shared/kl.py",
        "return values.masked_fill(~mask, 0.0).sum() / mask.sum()",
        "return (values.masked_fill(~mask, 0.0).sum(1) / mask.sum(1)).mean()",
        "tokens of short rows weigh more", METER,
    ),
    Fault(
        "logprobs: off by one, padded rows", "shared/models/logprobs.py",
        ".logits[:, -length - 1 : -1][batch.mask]", ".logits[:, -length:][batch.mask]",
        "each token is read from the logits behind it", PACKING,
    ),
    Fault(
        "logprobs: off by one, packed rows", "shared/models/sequences.py",
        "at[:, self.prompt_width - 1 : -1] = self.mask", "at[:, self.prompt_width :] = self.mask",
        "each token is read from the logits behind it", PACKING,
    ),
    Fault(
        "logprobs: attention mask dropped", "shared/models/logprobs.py",
        "        attention_mask=batch.attention,\n", "",
        "padding on the left is attended to", PACKING,
    ),
    Fault(
        "logprobs: temperature forgotten", "shared/models/logprobs.py",
        "return logits if temperature == 1 else logits / temperature", "return logits",
        "another distribution than the one sampled from", METER,
    ),
    Fault(
        "logprobs: blocks out of step", "shared/models/logprobs.py",
        "tokens.split(rows), strict=True)", "tokens.roll(1).split(rows), strict=True)",
        "where there are many logits each token is read in another's place", PACKING,
    ),
    Fault(
        "precision: the update rounds and the rollout does not", "rlhf/rollout.py",
        "with arithmetic(actors.policy.precision, device):", 'with arithmetic("float32", device):',
        "the first ratio is not 1 in bfloat16", PPO,
    ),
    Fault(
        "precision: the policy rounds and its reference does not", "dpo/reference.py",
        "    with arithmetic(precision, model.device):\n"
        "        logps = score_logps(model, prompts, completions,",
        "    with arithmetic(\"float32\", model.device):\n"
        "        logps = score_logps(model, prompts, completions,",
        "log-ratios begin at the rounding error", TRAIN,
    ),
    Fault(
        "logprobs: mean over tokens", "shared/models/logprobs.py",
        "return token_logprobs(model, batch).sum(1)",
        "return token_logprobs(model, batch).sum(1) / batch.lengths",
        "DPO becomes another method", METER,
    ),
    Fault(
        "packing: positions of the flat row", "shared/models/packing.py",
        "positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)[new]",
        "positions = torch.arange(int(new.sum()))",
        "tokens stand where they do not", PACKING,
    ),
    Fault(
        "packing: what is read is spread in another order", "shared/models/packing.py",
        "output.new_zeros(1, tokens, output.shape[2]).index_copy(1, read, output)",
        "output.new_zeros(1, tokens, output.shape[2]).index_copy(1, read, output.roll(1, 1))",
        "a token gets its neighbour's last step", PACKING,
    ),
    Fault(
        "packing: the last MLP sees everything", "shared/models/packing.py",
        "return None if mlp.packed_read is None else args[0].index_select(1, mlp.packed_read[0])",
        "mlp.packed_read = None",
        "states that no one reads are computed to their end", ("test_packing.py",),
    ),
    Fault(
        "packing: what nothing reads is computed", "shared/models/packing.py",
        "batch.attention.bool() & at.flip(1).cummax(1).values.flip(1)", "batch.attention.bool()",
        "each completion's last token goes through every layer", ("test_packing.py",),
    ),
    Fault(
        "packing: what is read only once is not computed", "shared/models/packing.py",
        "at.flip(1).cummax(1).values.flip(1)", "at",
        "completions are read without their prompts", PACKING,
    ),
    Fault(
        "packing: taken from where it is taken too", "shared/models/packing.py",
        "own.masked_fill(shared, 0).cummax(0).values", "own - shared.long()",
        "of three rows that begin alike the last reads other tokens", PACKING,
    ),
    Fault(
        "packing: only neighbours share", "shared/models/packing.py",
        "key=ids.tolist().__getitem__", "key=range(len(ids)).__getitem__",
        "rows with others between them are computed for themselves", PACKING,
    ),
    Fault(
        "cost: only neighbours share", "shared/models/cost.py",
        "pairwise(sorted(rows))", "pairwise(rows)",
        "more FLOPs are counted than sampling takes", ("test_cost.py",),
    ),
    Fault(
        "attention: the next token is seen", "shared/cpu/kernels.c",
        "if (j >= first) x = choose((int32_t)j <= position, x, (lanes){0});",
        "if (j >= first) x = choose((int32_t)j <= position + 1, x, (lanes){0});",
        "a token is predicted from itself", ATTENTION,
    ),
    Fault(
        "attention: the next token is seen in the gradient", "shared/cpu/kernels.c",
        "            const whole held = (int32_t)j <= position;\n            x = choose",
        "            const whole held = (int32_t)j <= position + 1;\n            x = choose",
        "gradients of another function", ATTENTION,
    ),
    Fault(
        "attention: keys after a block learn from it", "shared/cpu/kernels.c",
        "d.across, first, tall,\n", "d.across, first, last,\n",
        "what only fills a block up becomes a gradient", ATTENTION,
    ),
    Fault(
        "attention: every row says what a token's gradient is", "shared/cpu/kernels.c",
        "const int own = t >= of->starts[b];", "const int own = 1;",
        "a shared beginning learns from one of its rows, whichever comes last", ATTENTION,
    ),
    Fault(
        "attention: columns in another order", "shared/cpu/lanes.h",
        "    SWAP(x, 4)\n", "",
        "queries are multiplied by other numbers of the keys", ATTENTION,
    ),
    Fault(
        "attention: queries of one position are taken for several", "shared/cpu/kernels.c",
        "d.positions[i] = i / of->group;", "d.positions[i] = i;",
        "grouped queries see what comes after them", ATTENTION,
    ),
    Fault(
        "attention: a shared prompt learns from one of its rows", "shared/cpu/kernels.c",
        "for (count j = 0; j < size; j++) to[j] += from[j];",
        "for (count j = 0; j < size; j++) to[j] = from[j];",
        "keys and values miss the gradient of all completions but one", ATTENTION,
    ),
    Fault(
        "attention: logits unscaled in the gradient", "shared/cpu/kernels.c",
        "(get(of_s + j * across) - along) * scaling;", "(get(of_s + j * across) - along);",
        "queries and keys learn at another rate", ATTENTION,
    ),
    Fault(
        "attention: outputs of one head go to the next", "shared/cpu/kernels.c",
        "return (of->token[b * of->width + position] * of->kv + h) * of->group;",
        "return (of->token[b * of->width + position] * of->kv + of->kv - 1 - h) * of->group;",
        "query heads read other heads' keys", ATTENTION,
    ),
    Fault(
        "attention: shared beginnings are computed in every row", "shared/models/attention.py",
        "tensors = over.rows, over.starts, over.lengths",
        "tensors = over.rows, over.starts.zero_(), over.lengths",
        "keys and values learn from a shared query once a row", ATTENTION,
    ),
    Fault(
        "attention: only the first block of positions", "shared/cpu/kernels.c",
        "d.wide, last, d.weights, 1, d.across, d.values,",
        "d.wide, least(last, BLOCK), d.weights, 1, d.across, d.values,",
        "what stands far back in a long row is not seen", ATTENTION,
    ),
    Fault(
        "attention: the sum forgets the first key", "shared/cpu/kernels.c",
        "put(s + j * across, x);\n        sum += x;\n",
        "put(s + j * across, x);\n        if (j > 0) sum += x;\n",
        "weights do not sum to one", ATTENTION,
    ),
    Fault(
        "attention: what is left of a vector is not copied", "shared/cpu/kernels.c",
        "    if (i < size) memcpy(to + i, from + i, (size - i) * sizeof(float));\n", "",
        "heads of a size that is no multiple of 16", ATTENTION,
    ),
    Fault(
        "swiglu: what is left of a vector is not written", "shared/cpu/lanes.h",
        "    else memcpy(at, &x, left * sizeof(float));\n", "",
        "states of a size that is no multiple of 16", KERNELS,
    ),
    Fault(
        "kernels: NaN becomes a number", "shared/cpu/kernels.c",
        "x = choose(x < -80, all(-80), x);", "x = choose(x > -80, x, all(-80));",
        "a training that has diverged goes on", (*ATTENTION, *KERNELS),
    ),
    Fault(
        "attention: on the CPU SDPA does it", "shared/models/attention.py",
        "        if here(query):\n", "        if False:\n",
        "the function in C is used by nobody", ("test_onoff.py",),
    ),
    Fault(
        "rms_norm: the gradient without the norm's own", "shared/cpu/kernels.c",
        "c[j] = b[j] * weight[j] * s - a[j] * along;", "c[j] = b[j] * weight[j] * s;",
        "the scale is taken for a constant", KERNELS,
    ),
    Fault(
        "rms_norm: weights learn from the last run of rows", "shared/cpu/kernels.c",
        "sum[j] += a[j] * b[j] * s;", "sum[j] = a[j] * b[j] * s;",
        "the norm's weights learn from few tokens", KERNELS,
    ),
    Fault(
        "swiglu: the gate's slope", "shared/cpu/kernels.c",
        "(open + swish * (1 - open))", "(open + swish)",
        "gates learn in a wrong direction", KERNELS,
    ),
    Fault(
        "rotate: the gradient turns on", "shared/cpu/kernels.py",
        "return _turned(gradient, cos, sin, -1), None, None",
        "return _turned(gradient, cos, sin, 1), None, None",
        "queries and keys learn in a wrong direction", KERNELS,
    ),
    Fault(
        "linear: columns that fill no vector are left", "shared/cpu/products.c",
        "(count j = 0; j < n; j += LANES) {\n            const count at = least(j, n - LANES);",
        "(count j = 0; j < n / LANES * LANES; j += LANES) {\n            const count at = j;",
        "the last words of a vocabulary get the logits that lay there", KERNELS,
    ),
    Fault(
        "linear: rows from the 33rd on are those before", "shared/cpu/products.c",
        "turned + l * across + i, across);\n            }\n        #pragma",
        "turned + l * across + i % (2 * LANES), across);\n            }\n        #pragma",
        "samples of one row are drawn from another's distribution", KERNELS,
    ),
    Fault(
        "linear: taken where a gradient is asked for", "shared/cpu/kernels.py",
        "return fits and not torch.is_grad_enabled() and", "return fits and",
        "short batches train nothing", KERNELS,
    ),
    Fault(
        "products: the smallest parts of numbers are left out", "shared/cpu/tiles.h",
        "            RIGHT(2) MULTIPLY\n", "",
        "a forward pass is less exact than float32", ("test_native.py",),
    ),
    Fault(
        "products: parts of numbers are cut off and not rounded", "shared/cpu/lanes.h",
        "(bits)x + 0x8000, b = (bits)y + 0x8000", "(bits)x, b = (bits)y",
        "gradients are off to one side", ("test_native.py",),
    ),
    Fault(
        "products: a second sweep forgets the first", "shared/cpu/products.c",
        "add = adding || first;", "add = adding;",
        "of wide layers the last numbers alone count", ("test_native.py",),
    ),
    Fault(
        "products: a share of rows runs on into the next matrix", "shared/cpu/products.c",
        "next = least(up_to(i + 1, SQUARE), last);", "next = least(i + SQUARE, last);",
        "rows of a matrix that is not the first have no gradient", ("test_native.py",),
    ),
    Fault(
        "products: the last rows of a share are left out", "shared/cpu/products.c",
        "SQUARE, add, up_to(rows, GRAIN));", "SQUARE, add, rows / GRAIN * GRAIN);",
        "rows beyond a multiple of eight are those from before", ("test_native.py",),
    ),
    Fault(
        "products: the last of several gives the gradient", "shared/cpu/products.c",
        "&of_x, down, i > 0);", "&of_x, down, 0);",
        "what comes before queries and keys learns from values alone", ("test_native.py",),
    ),
    Fault(
        "products: a matrix that learns stands in for one that is frozen", "shared/cpu/products.c",
        "a.at[j] = g[i], to[j]", "a.at[j] = g[j], to[j]",
        "beside a frozen layer another learns from its gradient", KERNELS,
    ),
    Fault(
        "products: rows beyond a matrix are read", "shared/cpu/products.c",
        " && first > 0;", ";",
        "memory that is not the matrix's is copied, and seldom matters", ("test_native.py",),
    ),
    Fault(
        "products: tiles of both sides lie alike", "shared/cpu/tiles.h",
        "((right) == (along))", "(right)",
        "gradients of weights are of other numbers", ("test_native.py",),
    ),
    Fault(
        "products: a later sweep's second half forgets the first's", "shared/cpu/vectors.h",
        "if (add) low[i] += get(to), high[i] += get(to + LANES);", "if (add) low[i] += get(to);",
        "of wide layers every second column counts its last numbers alone", ("test_native.py",),
    ),
    Fault(
        "products: rows are not of one sum", "shared/cpu/vectors.h",
        "const float *row = a + top / LANES * strip + top % LANES;",
        "const float *row = a + top / LANES * strip;",
        "every second eight rows are those before", ("test_native.py",),
    ),
    Fault(
        "products: of pairs of bfloat16 the second is left out", "shared/cpu/vectors.h",
        "    return sums + (lanes)(pair & high) * (lanes)(pairs & high);", "    return sums;",
        "gradients are of half of the numbers", ("test_native.py",),
    ),
    Fault(
        "products: one matrix is asked for its kind of numbers", "shared/cpu/kernels.py",
        "any(t.dtype != torch.float32 for t in (x, *weights))", "x.dtype != torch.float32",
        "C reads numbers of another kind", KERNELS,
    ),
    Fault(
        "stages: C's headers are no part of the code", "shared/code.py",
        'C, PAGES = (".c", ".h")', 'C, PAGES = (".c",)',
        "results of other code are taken for those of this one", ("test_stages.py",),
    ),
    Fault(
        "products: few rows count as many", "shared/cpu/kernels.py",
        "ROWS = MOST + 1", "ROWS = 1",
        "a step of sampling takes longer", KERNELS,
    ),
    Fault(
        "adapted: B learns at another rate", "shared/cpu/kernels.py",
        "of_b, of_a, of_x = (g.T @ inside).mul_(ctx.scale),", "of_b, of_a, of_x = (g.T @ inside),",
        "alpha changes the forward pass alone", KERNELS,
    ),
    Fault(
        "adapted: what comes before learns nothing through the adapter", "shared/cpu/kernels.py",
        "_of_input(g, weight).addmm_(of_inside, a)", "_of_input(g, weight)",
        "lower layers' adapters have other gradients", KERNELS,
    ),
    Fault(
        "lora: an adapter that is switched off speaks", "shared/models/lora.py",
        "off = self.disable_adapters or self.merged", "off = self.merged",
        "PPO's reference is its policy", LORA,
    ),
    Fault(
        "lora: biases are left out", "shared/models/lora.py",
        "adapted(x, weight, base.bias, *inside", "adapted(x, weight, None, *inside",
        "a policy with biases is another model under its adapter", LORA,
    ),
    Fault(
        "lora: bfloat16 is not asked for", "shared/models/lora.py",
        " or not in_float32(x, weight):", ":",
        "a region of bfloat16 computes in float32", LORA,
    ),
    Fault(
        "vllm: weights are packed, and stay", "shared/generation/vllm_cpu.py",
        "layer.cpu_linear = _product", "packed(layer, remove_weight)",
        "a step of sampling takes longer", VLLM,
    ),
    Fault(
        "vllm: without a compiler C is asked all the same", "shared/generation/vllm_cpu.py",
        "    if library() is None:\n        return {}\n", "",
        "vLLM ends at its first norm", VLLM,
    ),
    Fault(
        "vllm: the sum of states is forgotten", "shared/generation/vllm_cpu.py",
        "_rms_norm(total, weight, epsilon), total", "_rms_norm(total, weight, epsilon), x",
        "layers of the served model lose what came before", VLLM,
    ),
    Fault(
        "native: a tensor of any layout is taken", "shared/cpu/native.py",
        "    assert argument.is_contiguous() and argument.dtype == torch.float32\n", "",
        "C reads other numbers than meant", ("test_native.py",),
    ),
    Fault(
        "native: what the compiler does not understand is no matter", "shared/cpu/native.py",
        "if done.returncode != 0:", "if False:",
        "a process ends without a word of the compiler's", ("test_native.py",),
    ),
    Fault(
        "picked: the gradient of the token itself is left out", "shared/cpu/kernels.py",
        "return of_logits.scatter_add_(-1, tokens.unsqueeze(-1), g), None",
        "return of_logits, None",
        "all tokens become less likely", KERNELS,
    ),
    Fault(
        "picked: numbers beyond a row count", "shared/cpu/kernels.c",
        "choose(left, some(a + even, size - even), all(-INFINITY));",
        "some(a + even, size - even);",
        "tokens of a vocabulary of an odd size are less likely than they are", KERNELS,
    ),
    Fault(
        "picked: all is summed in one", "shared/cpu/kernels.c",
        "part = 64 * LANES;", "part = size;",
        "log-probabilities of large vocabularies lose digits", KERNELS,
    ),
    Fault(
        "picked: a sum is not relative to the largest", "shared/cpu/kernels.c",
        "y[i] = top + (float)log(total);", "y[i] = (float)log(total);",
        "log-probabilities are above 0", KERNELS,
    ),
    Fault(
        "collate: EOS is no completion token", "shared/models/sequences.py",
        "return Sequences(torch.tensor(rows), torch.cat([real, mask], dim=1).long(), mask)",
        "every = torch.cat([real, mask], dim=1).long()\n    "
        "mask = torch.arange(right) < torch.tensor(after).unsqueeze(1) - 1\n    "
        "return Sequences(torch.tensor(rows), every, mask)",
        "no method learns to end", METER,
    ),
    Fault(
        "by_length: as many tokens as there are", "shared/models/sequences.py",
        "if batch and (len(batch) == limit.rows or tokens > limit.tokens):",
        "if batch and len(batch) == limit.rows:",
        "a few long rows do not fit into memory", ("test_kl_and_logprobs.py", "test_direct.py"),
    ),
    Fault(
        "by_length: prompts take no room", "shared/models/sequences.py",
        "tokens = (len(batch) + 1) * sum(wider)", "tokens = (len(batch) + 1) * wider[0]",
        "a few long prompts do not fit into memory", ("test_kl_and_logprobs.py", "test_direct.py"),
    ),
    Fault(
        "by_length: the last batch is left out", "shared/models/sequences.py",
        "    if batch:\n        yield batch\n", "",
        "the longest rows are neither scored nor trained on", ("test_kl_and_logprobs.py",),
    ),
    Fault(
        "ppo: prompts take no room", "shared/models/sequences.py",
        "return self.attention[:, : self.prompt_width].sum(1)",
        "return 0 * self.attention.sum(1)",
        "an update on long prompts does not fit into memory", ("test_ppo.py",),
    ),
    Fault(
        "sampling: another limit than the engine's", "shared/generation/hf.py",
        "by_length([*map(len, prompts)], room, self.limit)",
        "by_length([*map(len, prompts)], room, SAMPLING)",
        "fewer rows are asked for and as many cached", ("test_generation.py",),
    ),
    Fault(
        "direct: a pair counts as one row", "dpo/train.py",
        "in by_length(sizes, before, self.limit.of_pairs()):",
        "in by_length(sizes, before, self.limit):",
        "a pass holds twice as many tokens as it may", ("test_direct.py",),
    ),
    Fault(
        "positions: padding counts", "shared/models/sequences.py",
        "return (self.attention.cumsum(1) - 1).clamp(min=0)",
        "return torch.ones_like(self.attention).cumsum(1) - 1",
        "a token's position depends on the batch", PACKING,
    ),
    # Reward and value models
    Fault(
        "score: one token early", "shared/models/sequences.py",
        "self.prompt_width + self.lengths - 1] = True",
        "self.prompt_width + self.lengths - 2] = True",
        "the score is not read at EOS", MODELS,
    ),
    Fault(
        "values: of the state behind the token", "shared/models/load.py",
        "token_scalars(model, batch, batch.predicting)",
        "token_scalars(model, batch, batch.predicting.roll(1, 1))",
        "the value sees the action", MODELS,
    ),
    Fault(
        "scores: attention mask dropped", "shared/models/load.py",
        "        attention_mask=batch.attention,\n", "",
        "padding on the left is attended to", ("test_packing.py",),
    ),
    Fault(
        "scale: between prompts too", "rlhf/reward.py",
        "raw.var(1, unbiased=True).mean().sqrt().item()", "raw.std().item()",
        "the score's unit is not the within-prompt deviation", REWARD,
    ),
    Fault(
        "offset: forgotten", "rlhf/reward.py",
        "save_normalisation(folder, raw.mean().item(), scale)",
        "save_normalisation(folder, 0.0, scale)",
        "scores are not centred", REWARD,
    ),
    Fault(
        "best of n: the worst of n", "rlhf/best_of_n.py",
        ".argmax(1) + n *", ".argmin(1) + n *",
        "the reward model's least favourite stays", ("test_best_of_n.py",),
    ),
    # Sampling and preferences
    Fault(
        "generation: EOS dropped", "shared/generation/hf.py",
        "end = tokens.index(self.eos_id) + 1 if", "end = max(1, tokens.index(self.eos_id)) if",
        "completions lose the token they end with", SAMPLER,
    ),
    Fault(
        "generation: temperature forgotten", "shared/generation/hf.py",
        "probabilities = (logits / (temperature or 1.0)).softmax(-1)",
        "probabilities = logits.softmax(-1)",
        "always temperature 1", SAMPLER,
    ),
    Fault(
        "lora: merged weights stay", "shared/models/lora.py",
        "layer.base_layer.weight.data = weight", "pass",
        "sampling adds the adapter to the weights it was trained on", ("test_lora.py",),
    ),
    Fault(
        "lora: merged without the adapter", "shared/models/lora.py",
        "layer.base_layer.weight.data = merged_weight(layer)", "pass",
        "PPO samples from its reference", ("test_lora.py",),
    ),
    Fault(
        "generation: one random number for all", "shared/generation/hf.py",
        "_draw(logits.float(), numbers[going, t], temperature)",
        "_draw(logits.float(), numbers[:1, t], temperature)",
        "equal prompts get equal tokens", SAMPLER,
    ),
    Fault(
        "generation: random numbers of those still there", "shared/generation/hf.py",
        "numbers[going, t], temperature)", "numbers[: len(going), t], temperature)",
        "where one row ends another goes on with its random numbers", SAMPLER,
    ),
    Fault(
        "generation: random numbers in the order of the batch", "shared/generation/hf.py",
        "numbers[torch.tensor(rows)]", "numbers[: len(rows)]",
        "what a prompt draws depends on its company", SAMPLER,
    ),
    Fault(
        "generation: impossible tokens", "shared/generation/hf.py",
        "right=True", "right=False",
        "a random number of 0 draws a first token that has no probability", SAMPLER,
    ),
    Fault(
        "generation: positions stand still", "shared/generation/hf.py",
        "self.positions = self.positions + 1", "self.positions = self.positions + 0",
        "models that do not pack draw later tokens from another distribution", SAMPLER,
    ),
    Fault(
        "generation: cached rows of others", "shared/generation/hf.py",
        "self.cache.batch_select_indices(rows)", "self.cache.batch_select_indices(rows.flip(0))",
        "models that do not pack go on with the cache of others once some have ended", SAMPLER,
    ),
    Fault(
        "generation: the next token of another row", "shared/generation/hf.py",
        "going, ended, tokens = going[stay], ended[stay], tokens[stay]",
        "going, ended = going[stay], ended[stay]; tokens = tokens[: len(stay)]",
        "rows go on with the tokens of others once some have ended", SAMPLER,
    ),
    Fault(
        "decoding: positions stand still", "shared/generation/decoding.py",
        "self.positions = self.positions + 1", "self.positions = self.positions + 0",
        "later tokens are drawn from another distribution", SAMPLER,
    ),
    Fault(
        "decoding: kept rows of others", "shared/generation/decoding.py",
        "self.cache[:, :, rows[new], :, : self.width]", "self.cache[:, :, new, :, : self.width]",
        "rows go on with the keys and values of others once some have ended", SAMPLER,
    ),
    Fault(
        "decoding: padding is seen", "shared/generation/decoding.py",
        "self.first = self.width - lengths[self.rows]", "self.first = 0 * lengths[self.rows]",
        "short prompts are read with tokens before them", SAMPLER,
    ),
    Fault(
        "decoding: a row's own token is hidden", "shared/generation/decoding.py",
        "self.width + 1, scaling, *told)", "self.width, scaling, *told)",
        "a token is drawn without the one before it", SAMPLER,
    ),
    Fault(
        "decoding: without C a row's own token is hidden", "shared/generation/decoding.py",
        "(at > self.width)", "(at >= self.width)",
        "a token is drawn without the one before it", SAMPLER,
    ),
    Fault(
        "decoding: the last vector of columns is seen whole", "shared/cpu/kernels.c",
        "const lanes x = choose(held, power((get(s + j) - top) * scaling), (lanes){0});",
        "const lanes x = power((get(s + j) - top) * scaling);",
        "columns that nothing was written to take part", SAMPLER,
    ),
    Fault(
        "decoding: the first query's weights for its group", "shared/cpu/kernels.c",
        "get(q + at + d);", "get(q + at - e * size + d);",
        "queries in groups are one", SAMPLER,
    ),
    Fault(
        "decoding: another prompt's first token", "shared/generation/decoding.py",
        "self._logits(states)[self.rows]", "self._logits(states)[self.rows.sort()[0]]",
        "completions begin as answers to other prompts", SAMPLER,
    ),
    Fault(
        "labels: the loser wins", "shared/data/preferences.py",
        "return [p if won else swapped(p)", "return [swapped(p) if won else p",
        "labels against gold", PAIRS,
    ),
    Fault(
        "labels: no noise", "shared/data/preferences.py",
        "first_wins = rng.random(len(drawn)) < p_first_wins", "first_wins = p_first_wins > 0.5",
        "labels are not Bradley-Terry", PAIRS,
    ),
    Fault(
        "labels: shuffled ones follow gold", "shared/data/preferences.py",
        "p_first_wins = np.full(len(drawn), 0.5)", "p_first_wins = p_first_wins / 2 + 0.25",
        "the control is none", PAIRS,
    ),
    Fault(
        "cleaning: identical answers stay", "shared/data/pairs.py",
        "elif pair.chosen_ids == pair.rejected_ids:", "elif False:",
        "pairs that teach nothing", PAIRS,
    ),
    Fault(
        "cleaning: one of two contradicting pairs stays", "shared/data/pairs.py",
        "            del seen[reverse]\n", "",
        "the first label wins", PAIRS,
    ),
    # Filtered DPO
    Fault(
        "fdpo: ties stay", "dpo/filtered.py",
        "stays = advantage > margin", "stays = advantage >= margin",
        "the paper keeps a pair only if its chosen answer is better", FILTER,
    ),
    Fault(
        "fdpo: the sample must be better", "dpo/filtered.py",
        "advantage = chosen - sampled", "advantage = sampled - chosen",
        "the filter keeps the bad pairs", FILTER,
    ),
    Fault(
        "fdpo: the floor keeps the farthest", "dpo/filtered.py",
        "advantage.topk(min(floor, len(stays))).indices",
        "advantage.topk(min(floor, len(stays)), largest=False).indices",
        "below the floor the worst pairs stay", FILTER,
    ),
    Fault(
        "fdpo: the control drops one pair less", "dpo/filtered.py",
        "order[: int(stays.sum())]", "order[: int(stays.sum()) + 1]",
        "the control trains on more pairs than the filter", FILTER,
    ),
    Fault(
        "fdpo: dropped pairs return", "dpo/filtered.py",
        "judge(data, engine, scorer, kept, filtering, draw)",
        "judge(data, engine, scorer, list(range(len(data.pairs))), filtering, draw)",
        "each epoch filters all pairs anew", FILTER,
    ),
    # The optimiser step
    Fault(
        "step: micro-batches weigh alike", "shared/training/fit.py",
        "backward(value * (items / total))", "backward(value / len(micro_batches))",
        "the result depends on how a batch is cut", FIT,
    ),
    Fault(
        "step: gradients pile up", "shared/training/fit.py",
        "    trainee.scheduler.step()\n    trainee.optimizer.zero_grad()\n",
        "    trainee.scheduler.step()\n",
        "each step repeats the ones before", FIT,
    ),
    Fault(
        "step: no warm-up", "shared/training/fit.py",
        "math.ceil(config.warmup_share * steps)", "0",
        "the first step is a full one", FIT,
    ),
    Fault(
        "step: a broken step is taken", "shared/training/fit.py",
        'if not (math.isfinite(log["loss"]) and math.isfinite(log["grad_norm"])):',
        'if not math.isfinite(log["loss"]):',
        "an infinite gradient destroys the weights", FIT,
    ),
    # Optimisations on against off
    Fault(
        "onoff: padding is not switched", "benchmarks/studies/onoff/switches.py",
        'PADDED = {"shared.models.packing.FAMILIES": ()}',
        'PADDED = {"shared.models.packing.READ": "packed_read"}',
        "packed passes are compared with themselves", ONOFF,
    ),
    Fault(
        "onoff: one side alone can fail", "benchmarks/studies/onoff/report.py",
        'return abs(end["gold_difference"]["mean"]) <= GOLD',
        'return end["gold_difference"]["mean"] <= GOLD',
        "an optimisation that costs gold passes", ONOFF,
    ),
    Fault(
        "onoff: kernels are not switched", "benchmarks/studies/onoff/switches.py",
        '    "shared.cpu.native.library": lambda: None,\n', "",
        "C is compared with itself", ("test_onoff.py",),
    ),
    Fault(
        "onoff: products are not switched", "benchmarks/studies/onoff/switches.py",
        '"shared.cpu.kernels.products_by": lambda', '"shared.cpu.native.products_by": lambda',
        "C is compared with itself", ("test_onoff.py",),
    ),
    Fault(
        "onoff: sampling is not switched", "benchmarks/studies/onoff/switches.py",
        'CACHE = {"shared.generation.hf.packs": lambda model: False}',
        'CACHE = {"shared.generation.hf.LEAVE_BELOW": 0.8}',
        "sampling without padding is compared with itself", ONOFF,
    ),
    Fault(
        "onoff: the last step's losses", "benchmarks/studies/onoff/switches.py",
        "losses[: 1 + both]", "losses[-1 - both :]",
        "what drifted apart in training counts as a first step", ONOFF,
    ),
    # Statistics
    Fault(
        "interval: normal for Student's t", "benchmarks/evaluation/statistics.py",
        "stats.t.ppf((1 + level) / 2, len(per_seed) - 1)", "stats.norm.ppf((1 + level) / 2)",
        "too narrow with three seeds", STATISTICS,
    ),
    Fault(
        "interval: prompts forgotten", "benchmarks/evaluation/statistics.py",
        "variance += table.mean(axis=0).var(ddof=1) / prompts", "variance += 0.0",
        "says nothing of new prompts", STATISTICS,
    ),
    Fault(
        "interval: one-sided", "benchmarks/evaluation/statistics.py",
        "stats.t.ppf((1 + level) / 2,", "stats.t.ppf(level,",
        "90 % called 95 %", STATISTICS,
    ),
    Fault(
        "difference: not paired", "benchmarks/evaluation/statistics.py",
        "return crossed_interval(left - right, level)",
        "return crossed_interval(left - right[:, ::-1], level)",
        "what two methods share stays in their difference", STATISTICS,
    ),
    Fault(
        "verdict: two seeds are enough", "benchmarks/evaluation/statistics.py",
        "SEEDS_FOR_A_WINNER = 3", "SEEDS_FOR_A_WINNER = 2",
        "winners are named too early", STATISTICS,
    ),
    Fault(
        "win rate: ties are losses", "benchmarks/evaluation/metrics.py",
        "return (1 + sign.mean(axis=(2, 3))) / 2", "return (sign > 0).mean(axis=(2, 3))",
        "SFT does not win half against itself", METRICS,
    ),
    Fault(
        "hacking gap: gold less proxy", "benchmarks/evaluation/metrics.py",
        "return proxy_gain - gold_gain", "return gold_gain - proxy_gain",
        "hacking looks like caution", METRICS,
    ),
    Fault(
        "matched KL: linear in KL", "benchmarks/evaluation/metrics.py",
        "np.interp(np.sqrt(level), np.sqrt(distinct), mean_gold)",
        "np.interp(level, distinct, mean_gold)",
        "gold between checkpoints comes out too low", METRICS,
    ),
    Fault(
        "matched KL: beyond the curve's end", "benchmarks/evaluation/metrics.py",
        "if level < 0 or level > x.max():", "if level < 0:",
        "methods that did not get there are compared", METRICS,
    ),
    Fault(
        "best of n: KL is log n", "benchmarks/evaluation/metrics.py",
        "return log(n) - (n - 1) / n", "return log(n)",
        "the bound is too loose", METRICS,
    ),
    Fault(
        "frontier: effective samples by the largest weight", "benchmarks/evaluation/frontier.py",
        "ess[i] = 1 / (w**2).sum(axis=1)", "ess[i] = 1 / w.max(axis=1)",
        "the samples' reach is overstated", FRONTIER,
    ),
    Fault(
        "frontier: tilted by another power", "benchmarks/evaluation/frontier.py",
        "log_ratio = target / temperature", "log_ratio = target * temperature",
        "hot and cold are exchanged", FRONTIER,
    ),
    Fault(
        "frontier: efficiency of gold itself", "benchmarks/evaluation/frontier.py",
        "return (gold - gold_ref) / (best - gold_ref), is_bound", "return gold / best, is_bound",
        "where the reference is good, everyone is", FRONTIER,
    ),
    # A finite task
    Fault(
        "labels: probability of the loser", "dpo/losses.py",
        "return p * as_drawn + (1 - p) * other", "return (1 - p) * as_drawn + p * other",
        "labels with a probability are read the wrong way round", DIRECT,
    ),
    Fault(
        "labels: kto's sides not put back", "dpo/losses.py",
        "p, other = torch.cat([p, p]), other.roll(len(p))", "p = torch.cat([p, p])",
        "completions are weighed with the other one's loss", DIRECT,
    ),
    Fault(
        "labels: the probability's sign", "shared/tasks/exact.py",
        "np.exp(gold_b - gold_a)", "np.exp(gold_a - gold_b)",
        "the worse completion wins more often", ("test_exact.py",),
    ),
    Fault(
        "optimum: beta multiplies the reward", "benchmarks/evaluation/optimum.py",
        "return (ref_logps + rewards / beta).log_softmax(1)",
        "return (ref_logps + rewards * beta).log_softmax(1)",
        "pi* of another objective", OPTIMUM,
    ),
    Fault(
        "optimum: KL the other way round", "benchmarks/evaluation/optimum.py",
        "logps.exp() * (logps - other)", "other.exp() * (other - logps)",
        "forward in place of reverse KL", OPTIMUM,
    ),
    Fault(
        "best of n: ties counted once each", "benchmarks/evaluation/optimum.py",
        "rising, rising, right=False) - 1", "rising, rising, right=True) - 2",
        "equal scores are told apart by their place", OPTIMUM,
    ),
    Fault(
        "exact: win rate without ties", "benchmarks/evaluation/exact.py",
        "return (1 + torch.einsum(", "return (torch.einsum(",
        "equal gold counts as a loss", FINITE,
    ),
    Fault(
        "regret: KL not paid for", "benchmarks/evaluation/exact.py",
        "return float(best) - (gold - beta * kl)", "return float(best) - gold",
        "a policy far away looks better than the optimum", FINITE,
    ),
    Fault(
        "exact rows: samples in their place", "benchmarks/results/folders.py",
        'values = [[row["exact"][column] for row in rows] for rows in self.raw]',
        "values = [[np.mean(row[column]) for row in rows] for rows in self.raw]",
        "exact numbers are estimates", FINITE,
    ),
    Fault(
        "gold reward: its sign", "rlhf/rollout.py",
        "self.task.gold(*texts)", "-self.task.gold(*texts)",
        "PPO on gold flees it", FINITE,
    ),
    Fault(
        "finite tasks: identical sides stay", "shared/data/pairs.py",
        "elif pair.chosen_ids == pair.rejected_ids:",
        "elif not repeats and pair.chosen_ids == pair.rejected_ids:",
        "pairs that teach nothing count as labels", FINITE,
    ),
    # vLLM
    Fault(
        "vllm: the prefix cache outlives a sync", "shared/generation/vllm.py",
        "            self.llm.reset_prefix_cache()\n", "",
        "prompts are read with the weights of before", VLLM,
    ),
    Fault(
        "vllm: long blocks", "shared/generation/vllm.py",
        "CPU_BLOCK = 32", "CPU_BLOCK = 128",
        "a chat's system prompt is read again for every prompt of a batch", VLLM,
    ),
    Fault(
        "vllm: no weights are sent", "shared/generation/vllm.py",
        'self.llm.collective_rpc("klash_load", args=(plain_weights(self.model),))', "pass",
        "every rollout is the first policy's", VLLM,
    ),
    Fault(
        "vllm: any engine object samples", "shared/generation/vllm.py",
        "if self.tenant is None or self.tenant() is not self:", "if self.tenant is None:",
        "one policy samples with the weights of another", VLLM,
    ),
    Fault(
        "vllm: log-probabilities before the temperature", "shared/generation/vllm.py",
        'logprobs_mode="processed_logprobs"', 'logprobs_mode="raw_logprobs"',
        "they belong to another distribution than the one sampled from", VLLM,
    ),
    Fault(
        "vllm: only the 20 likeliest tokens", "shared/generation/vllm.py",
        '"top_k": 0', '"top_k": 20',
        "rare tokens are never sampled", VLLM,
    ),
    Fault(
        "vllm: one seed for all prompts", "shared/generation/vllm.py",
        '{**common, "seed": seed} for seed in seeds', '{**common, "seed": seeds[0]} for _ in seeds',
        "equal prompts get equal completions", VLLM,
    ),
    Fault(
        "vllm: nothing ends a completion", "shared/generation/vllm.py",
        '"stop_token_ids": [eos_id]', '"stop_token_ids": []',
        "every completion has the full length", VLLM,
    ),
    Fault(
        "sync: the adapter stays at home", "shared/models/lora.py",
        "weight = weight + layer.get_delta_weight(adapter).detach()", "pass",
        "a LoRA policy's samples, and what is saved, are its base's", LORA,
    ),
    Fault(
        "sync: a stale engine goes on", "shared/generation/sync.py",
        "if not difference <= tolerance:", "if not difference <= 1e9:",
        "nothing says that old weights sample", VLLM,
    ),
    Fault(
        "sync: the tied head stays packed", "shared/generation/worker.py",
        "        dispatch_cpu_unquantized_gemm(head, remove_weight=False)", "        pass",
        "the last layer keeps the old weights", VLLM,
    ),
    Fault(
        "server: no weights are sent", "shared/generation/server.py",
        '            self._post("/collective_rpc", {"method": "klash_load_file", '
        '"args": [str(path)]})\n', "",
        "every rollout is the first policy's", SERVER,
    ),
    Fault(
        "server: answers in the order they come", "shared/generation/server.py",
        'answers = list(pool.map(lambda body: self._post("/v1/completions", body), bodies))',
        'answers = [self._post("/v1/completions", body) for body in bodies[::-1]]',
        "completions go to other prompts", SERVER,
    ),
    Fault(
        "server: every row counts as cut", "shared/generation/server.py",
        '[d["finish_reason"] == "length" for d in drawn]', "[True for d in drawn]",
        "completions that ended pay for it", SERVER,
    ),
    # How training grows
    Fault(
        "growth: the first turn counts", "benchmarks/speed/growth.py",
        "min(turn.seconds for turn in worker.rounds[1:])",
        "min(turn.seconds for turn in worker.rounds)",
        "what no later turn does again is measured", GROWTH,
    ),
    Fault(
        "growth: R without its square", "benchmarks/speed/growth.py",
        "[0, 1]) ** 2", "[0, 1])",
        "curves pass for lines", GROWTH,
    ),
    Fault(
        "growth: libraries left in the smallest size alone", "benchmarks/speed/growth.py",
        "(peak - libraries) / (peaks[0] - libraries)", "(peak - libraries) / peaks[0]",
        "a training seems to need a fraction of what the smallest one needs", GROWTH,
    ),
    Fault(
        "growth: the first setting's training counts as a further one's",
        "benchmarks/speed/growing.py",
        "for folder in folders[1:])", "for folder in folders)",
        "further settings seem cheaper than they are", GROWTH,
    ),
    Fault(
        "growth: the peak of the last stage alone", "benchmarks/speed/growing.py",
        "self.highest = max(self.highest, peak_memory_bytes())",
        "self.highest = peak_memory_bytes()",
        "memory is flat whatever the other stages hold", GROWTH,
    ),
    # The whole experiment beside TRL's trainers
    Fault(
        "beside TRL: one epoch for TRL", "benchmarks/speed/trl/trainings.py",
        "common_settings(folder, direct.optimizer, direct.batch_size, direct.epochs)",
        "common_settings(folder, direct.optimizer, direct.batch_size, 1)",
        "TRL has less to do", BESIDE_TRL,
    ),
    Fault(
        "beside TRL: a setting's own rate forgotten", "benchmarks/speed/trl/trainings.py",
        "start, direct = perf_counter(), with_setting(direct, setting)",
        "start = perf_counter()",
        "TRL's policies are those of another learning rate", BESIDE_TRL,
    ),
    Fault(
        "beside TRL: data in memory", "benchmarks/speed/trl/trainings.py",
        "Dataset.load_from_disk(data)", "Dataset.load_from_disk(data, keep_in_memory=True)",
        "TRL scores its reference anew for each training", BESIDE_TRL,
    ),
    Fault(
        "beside TRL: only more steps of ours are refused", "benchmarks/speed/experiment.py",
        "if mine.steps != other.steps:", "if mine.steps > other.steps:",
        "less work counts as speed", BESIDE_TRL,
    ),
    Fault(
        "beside TRL: the ratio upside down", "benchmarks/speed/experiment.py",
        "ratio=theirs.seconds / ours.seconds", "ratio=ours.seconds / theirs.seconds",
        "the slower side looks faster", BESIDE_TRL,
    ),
    # Stages alone and side by side
    Fault(
        "timed alone: as many threads as the process has", "benchmarks/pipeline/places.py",
        "        torch.set_num_threads(threads)\n        try:",
        "        torch.set_num_threads(before)\n        try:",
        "what is timed trains with one thread, and its address says two", STAGES,
    ),
    Fault(
        "timed alone: the address keeps the process's threads", "benchmarks/pipeline/places.py",
        "replace(stages, context=with_threads(stages.context, threads), fill=fill)",
        "replace(stages, fill=fill)",
        "what was made with other threads is taken for it", STAGES,
    ),
    Fault(
        "timed alone: beside others", "benchmarks/pipeline/compare.py",
        "self.timed if seed in self.timed_seeds else self.shared", "self.shared",
        "seconds are told of stages that shared the machine", RUNS,
    ),
)  # fmt: skip


def written_by_hand() -> list[Mutant]:
    """All faults. ValueError if an old text is not found once, or two have one name."""
    names = [fault.name for fault in FAULTS]
    if len(set(names)) < len(names):
        raise ValueError("two faults have one name")
    return [Mutant(f.name, f.file, applied(f), f.tests) for f in FAULTS]


def applied(fault: Fault) -> str:
    """The file with the fault in it."""
    text = (ROOT / fault.file).read_text(encoding="utf-8")
    found = text.count(fault.old)
    if found != 1 or fault.old == fault.new:
        raise ValueError(
            f"{fault.name}: old text found {found} times in {fault.file}, must be once"
        )
    return text.replace(fault.old, fault.new)
