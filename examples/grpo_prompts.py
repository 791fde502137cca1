"""GRPO with dynamic sampling on a toy task: how many rollouts each strategy of prompt selection needs.

A prompt is a rule and a word of digits; the answer is the rule applied to each digit, and the reward is 1 if every
digit is right, else 0. The policy starts with one rule known, like a pretrained model: these prompts are solved from
the start. Answers of several digits in unknown rules are out of reach until their digits are learned from short ones,
and some prompts have a wrong answer key and are never solved. Groups with equal rewards teach nothing: each step draws
prompts until BATCH groups have variance, and discards the others (DAPO, arXiv 2503.14476).
"""

from collections import Counter

import numpy as np
import torch

import rayprune

DIGITS, RULES, LENGTH, WIDTH = 4, 32, 4, 64
PROMPTS, HELD_OUT, TRIVIAL, BROKEN = 500, 500, 0.6, 0.2
GROUP, BATCH, LR, ENTROPY, MAX_STEPS, TARGET = 8, 32, 3e-2, 0.02, 200, 0.85
AT_ONCE, MAX_DRAWS = BATCH * 3 // 2, 2 * PROMPTS  # prompts drawn in one call, and in one step before it gives up


def make_task(seed):
    """Return the prompts: rules (N,), digits and answers (N, LENGTH), and lengths (N,); and the held-out ones."""
    rng = np.random.default_rng(seed)
    tables = np.stack([np.arange(DIGITS), *(rng.permutation(DIGITS) for _ in range(RULES - 1))])
    parts = []
    for count, broken in ((PROMPTS, BROKEN), (HELD_OUT, 0.0)):
        trivial = rng.random(count) < TRIVIAL
        rules = np.where(trivial, 0, rng.integers(1, RULES, count))
        digits = rng.integers(0, DIGITS, (count, LENGTH))
        answers = tables[rules[:, None], digits]
        answers[rng.random(count) < broken, 0] = DIGITS  # no policy can answer this
        parts.append(tuple(map(torch.from_numpy, (rules, digits, answers, rng.integers(1, LENGTH + 1, count)))))
    return parts


class Policy(torch.nn.Module):
    """Logits of each answer digit from the rule and the digit at its place."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(RULES * DIGITS, WIDTH)
        self.head = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(WIDTH, DIGITS))

    def forward(self, rules, digits):
        return self.head(self.embed(rules[:, None] * DIGITS + digits)).log_softmax(dim=-1)


def pretrain(policy, optimizer):
    """Teach the policy the first rule, which returns each digit unchanged, and no preference in the others."""
    targets = torch.full((RULES, DIGITS, DIGITS), 1 / DIGITS)
    targets[0] = 0.98 * torch.eye(DIGITS) + 0.02 * targets[0]
    for _ in range(200):
        loss = -(targets * policy(torch.arange(RULES), torch.arange(DIGITS).expand(RULES, -1))).sum(dim=2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def held_out_reward(policy, prompts):
    """Return the expected reward on the held-out prompts, computed from the policy's probabilities."""
    rules, digits, answers, lengths = prompts
    right = policy(rules, digits).gather(2, answers[:, :, None])[:, :, 0]
    return (right * (torch.arange(LENGTH) < lengths[:, None])).sum(dim=1).exp().mean().item()


@torch.no_grad()
def fill_batch(policy, selector, prompts):
    """Draw prompts until BATCH groups have variance; return these groups, and the number of drawn prompts.

    A group is a prompt's id, its rollouts (GROUP, LENGTH) and their rewards (GROUP,). After MAX_DRAWS prompts, the step
    goes on with the groups that it has.
    """
    groups, drawn = [], 0
    while len(groups) < BATCH and drawn < MAX_DRAWS:
        ids = torch.from_numpy(selector.next(selector.draws_for(BATCH - len(groups), most=AT_ONCE)))
        rules, digits, answers, lengths = (part[ids] for part in prompts)
        rollouts = torch.distributions.Categorical(logits=policy(rules, digits)).sample((GROUP,)).transpose(0, 1)
        right = (rollouts == answers[:, None]) | (torch.arange(LENGTH) >= lengths[:, None, None])
        rewards = right.all(dim=2).float()  # (n, GROUP)
        selector.observe(ids.numpy(), rewards.numpy())
        groups += [group for group in zip(ids, rollouts, rewards, strict=True) if group[2].std() > 0]
        drawn += len(ids)
    return groups, drawn


def train(strategy, seed, lr=LR):
    """Run GRPO until the held-out reward is TARGET; return the numbers of rollouts and steps, and others."""
    torch.manual_seed(seed)
    prompts, held_out = make_task(seed)
    policy = Policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    pretrain(policy, optimizer)
    selector = rayprune.PromptSelector(PROMPTS, strategy, seed)
    reward, total = held_out_reward(policy, held_out), Counter()
    while reward < TARGET and total["steps"] < MAX_STEPS:
        groups, drawn = fill_batch(policy, selector, prompts)
        total.update(drawn=drawn, wasted=drawn - len(groups), steps=1, short=len(groups) < BATCH)
        if not groups:
            continue  # nothing to learn from
        ids, rollouts, rewards = map(torch.stack, zip(*groups[:BATCH], strict=True))  # those beyond are discarded, too
        total["distinct"] += len(ids.unique())
        rules, digits, _, lengths = (part[ids] for part in prompts)
        mask = torch.arange(LENGTH) < lengths[:, None]
        log_probs = policy(rules, digits)  # (BATCH, LENGTH, DIGITS)
        advantages = (rewards - rewards.mean(dim=1, keepdim=True)) / (rewards.std(dim=1, keepdim=True) + 1e-4)
        chosen = log_probs[:, None].expand(-1, GROUP, -1, -1).gather(3, rollouts[..., None])[..., 0]
        entropy = -(log_probs.exp() * log_probs).sum(dim=2)[mask].mean()
        loss = -((chosen * mask[:, None]).sum(dim=2) * advantages).mean() - ENTROPY * entropy
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        reward = held_out_reward(policy, held_out)
    means = {"wasted": total["wasted"] / total["drawn"], "distinct": total["distinct"] / total["steps"]}
    return {**total, **means, "rollouts": total["drawn"] * GROUP, "reward": reward}


def main(strategies=("uniform", "mopps", "greso", "learnability", "zero_variance"), seed=0):
    """Train once with each strategy; print and return the results."""
    results = {}
    for strategy in strategies:
        result = results[strategy] = train(strategy, seed)
        ratio = result["rollouts"] / results[strategies[0]]["rollouts"]
        print(
            f"{strategy}: {result['rollouts']:,} rollouts to a held-out reward of {result['reward']:.3f}, "
            f"{result['wasted']:.0%} of the groups without variance, {result['steps']} steps, "
            f"{ratio:.2f} of the rollouts of {strategies[0]}"
        )
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)  # so small a network gains nothing from more threads
    main()
