"""Token-selective on-policy distillation (OPD) in one file.

A language model, the student, learns from a better one, the teacher. On-policy means
that the student writes the training text itself, so that it is corrected where its own
mistakes lead. The teacher only scores the text, token by token.

The loss at a token is KL(student || teacher). It weighs each word by the probability
that the student gives it. So it shifts probability among the words that the student
considers. But towards a word that the student would hardly ever say, it has hardly any
gradient, however much the teacher wants it. Not all that the two disagree about can be
learned ("Not All Disagreement Is Learnable", arXiv 2605.26844). So the student trains
on the most teachable tokens alone: those where the two disagree, but about words that
the student considers. Selecting saves no time, as both models still read all tokens.
The hope is that a few good signals teach as much as all, or more.

Notation: p is the student's next-token distribution, q the teacher's. KL and entropy
are in nats. A position's candidates are the student's top K tokens, the K likeliest.
Names and formulas are the paper's, except for what the README lists at its end.
Shapes: B responses in a batch, P tokens in a prompt, R positions in a response, V
tokens in the vocabulary, E numbers in a hidden state. A mask [B, R] is True at the
valid positions; the others are padding after an end. N is the number of valid positions
in a batch, n that of some of these.

One training step:

  1. rollout  the student samples a response to each prompt
  2. score    at every position of the responses, compare both models' predictions:
              entropy H: how unsure the student is (for other methods: see `rank`)
              divergence D: how much the two disagree
              compatibility C: how much of what the teacher wants is among the
              student's own candidates
  3. rank     by teachability: D * C, after both are rescaled to [0, 1] over the batch
  4. select   keep the best tenth of the batch's positions (the `budget`); and on top of
              that, the best position of each response that has none among them, so that
              each prompt has a part in the step
  5. update   one optimizer step on the mean KL(student || teacher) of the kept ones

The method is in parts 1 and 2: a step on one page, and its mathematics. Parts 3 and 4
are the same step as the program takes it, training and evaluation. The second half of
the file, parts 5 to 7, is for looking things up: checks, models, prompts and files; the
demo's world; the command line.

Left out on purpose: several GPUs, LoRA, inference servers.
"""

import argparse
import hashlib
import inspect
import json
import math
import os
import random
import re
import sys
import time
import warnings
from collections import defaultdict
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
import transformers
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# ======================================================================================
# 1. One training step, on one page. The functions that it calls are in part 2.
# ======================================================================================


def simple_step(
    student, teacher, optimizer, prompt, k=16, budget=0.1, max_new_tokens=256
):
    """The whole method, for one prompt [1, P], if memory were no matter. -> loss

    For reading: the program calls `train_step`. This leaves out what real pairs of
    checkpoints need: batches with padding, a temperature, different tokens that end a
    response, different sizes of vocabulary, settings that a checkpoint brings along.
    """
    student.eval()  # no dropout, not even in training: there is one p
    teacher.eval()

    # 1. Rollout: the student writes a response of R tokens, sampling from p itself.
    ids = student.generate(  # [1, P + R]
        prompt,
        do_sample=True,
        temperature=1.0,
        top_k=0,  # no filter. By default, only the 50 likeliest tokens could be drawn
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
    )
    prompt_length = prompt.shape[1]  # P
    tokens = ids[:, prompt_length:]  # [1, R]
    mask = torch.ones_like(tokens, dtype=torch.bool)  # all valid: nothing is padded

    # 2. Score: both models read the response. The logits at one token predict the next,
    # so those that predict the response begin one place before it:
    #
    #   tokens   x1  x2  y1  y2  y3      prompt x (P = 2), response y (R = 3)
    #   logits   l1  l2  l3  l4  l5      l2 predicts y1, l3 predicts y2, l4 predicts y3
    #                ^^  ^^  ^^          [P - 1 : -1]
    student_logits = student(ids).logits[:, prompt_length - 1 : -1]  # [1, R, V]
    with torch.no_grad():  # D and C choose positions; no gradient goes through them
        teacher_logits = teacher(ids).logits[:, prompt_length - 1 : -1]
        D = divergence(student_logits, teacher_logits, k)  # [1, R]
        C = compatibility(student_logits, teacher_logits, k)

    # 3. Rank by teachability: the product, after both are rescaled to [0, 1].
    ranks = robust_normalize(D, mask) * robust_normalize(C, mask)

    # 4. Select: the best tenth. (Each response keeps one at least; here is only one.)
    keep = select(ranks, mask, budget)  # [1, R] bool

    # 5. Update: lower KL(student || teacher) there. The response is held fixed: no
    # gradient goes through the sampling. So a token is judged by its own KL alone, not
    # by what becomes of the response after it.
    loss = reverse_kl(student_logits, teacher_logits)[keep].mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    return loss.item()


# ======================================================================================
# 2. The mathematics: pure functions of logits. Those in half precision are cast to
#    float32 first. Copy parts 1 and 2 freely; for example, to get from the logits
#    [B, R, V] of two models to the most teachable tenth:
#
#      import math, warnings, numpy, torch
#
#      scores = measure(student_logits, teacher_logits)
#      mask = torch.ones_like(scores["divergence"]).bool()  # no padding
#      keep = select(rank("teachability", scores, mask), mask, budget=0.1)
#
#    (K is 16 here. It must be smaller than V, or all ranks are 0: see `compatibility`.
#    The logits [R, V] of a single response become a batch by logits[None].)
# ======================================================================================


def entropy(logits):  # [..., V] -> [...]
    """H = -sum_v p(v) log p(v), in nats, over the full vocabulary."""
    logp = logits.float().log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def reverse_kl(student_logits, teacher_logits):  # [..., V], [..., V] -> [...]
    """KL(student || teacher) = sum_v p(v) (log p(v) - log q(v)), in nats.

    The loss of on-policy distillation. Mode seeking: it punishes what the student says
    and the teacher would not. Towards a token that the student would never say, it has
    hardly any gradient.
    """
    logp = student_logits.float().log_softmax(-1)
    logq = teacher_logits.float().log_softmax(-1)
    return (logp.exp() * (logp - logq)).sum(-1)


def forward_kl(student_logits, teacher_logits):  # [..., V], [..., V] -> [...]
    """KL(teacher || student) = sum_v q(v) (log q(v) - log p(v)), in nats.

    Mode covering: it punishes whatever the teacher says and the student would not.
    """
    logp = student_logits.float().log_softmax(-1)
    logq = teacher_logits.float().log_softmax(-1)
    return (logq.exp() * (logq - logp)).sum(-1)


def divergence(student_logits, teacher_logits, k):  # [..., V], [..., V] -> [...]
    """D = KL(teacher || student) on U alone, in nats: how much they disagree.

    S and T are the student's and the teacher's top K tokens, U is their union. There, p
    and q are renormalised, so that each sums to one. (In the paper's code the teacher
    is a server, which sends its top tokens only; with all tokens, D would be nearly the
    same.) It is a forward KL, as D asks what the teacher wants; the loss asks what the
    student says. ValueError for k < 1.
    """
    if k < 1:
        raise ValueError(f"k must be 1 or more, got {k}")
    k = min(k, student_logits.shape[-1])

    # True at the top K tokens of the one model, and of the other.
    no_token = torch.zeros_like(student_logits, dtype=torch.bool)  # [..., V]
    student_top = no_token.scatter(-1, student_logits.topk(k).indices, True)
    teacher_top = no_token.scatter(-1, teacher_logits.topk(k).indices, True)
    outside = ~(student_top | teacher_top)  # of U

    # Outside U, a logit of -1e30 makes the probability 0, so that the softmax is over U
    # alone. (Not -inf: below, an infinity minus an infinity would be nan.)
    logp = student_logits.float().masked_fill(outside, -1e30).log_softmax(-1)
    logq = teacher_logits.float().masked_fill(outside, -1e30).log_softmax(-1)
    return (logq.exp() * (logq - logp)).sum(-1)


def compatibility(student_logits, teacher_logits, k):  # [..., V], [..., V] -> [...]
    """C = sum of q(v) over the student's candidates v, its top K tokens: in [0, 1].

    How much of what the teacher wants does the student consider? ValueError for k < 1.
    """
    if k < 1:
        raise ValueError(f"k must be 1 or more, got {k}")
    k = min(k, student_logits.shape[-1])

    # If all tokens are candidates, C is 1, and there is nothing to choose by. (Exactly
    # 1: rounding errors would be rescaled to [0, 1], as if they were a difference.)
    if k == student_logits.shape[-1]:
        return torch.ones_like(student_logits[..., 0], dtype=torch.float)

    candidates = student_logits.topk(k).indices  # [..., K]
    logq = teacher_logits.float().log_softmax(-1)  # over the full vocabulary
    return logq.gather(-1, candidates).exp().sum(-1)


def measure(student_logits, teacher_logits, k=16, tokens=None):  # -> {name: [...]}
    """All that is measured at each position, from logits [..., V].

    `tokens` [...] are those that the student wrote. Unused here, but a function of your
    own that replaces this one gets them, too.
    """
    return {
        # The loss of full on-policy distillation. Its mean is the curve to watch.
        "reverse_kl": reverse_kl(student_logits, teacher_logits),
        "entropy": entropy(student_logits),
        "divergence": divergence(student_logits, teacher_logits, k),
        "compatibility": compatibility(student_logits, teacher_logits, k),
    }


def robust_normalize(values, mask):  # [B, R], [B, R] bool -> [B, R] in [0, 1]
    """Each value x becomes clip((x - Q05) / (Q95 - Q05), 0, 1).

    Q05 and Q95 are the 5 % and the 95 % quantile of the values at all valid positions.
    (With the minimum and the maximum in their place, one extreme value would press all
    others together.)

    Zero at all other positions. Zero everywhere if Q95 - Q05 < 1e-12: then all tie, and
    `select` keeps the first. No gradient goes through the rescaling.
    """
    mask = mask.bool()  # as an index, a mask of numbers would pick rows 0 and 1
    values = values.detach().float()
    valid = values[mask].cpu().numpy()  # torch.quantile refuses over 16 million values
    if len(valid) == 0:
        return torch.zeros_like(values)

    low, high = numpy.quantile(valid, [0.05, 0.95])
    if high - low < 1e-12:
        return torch.zeros_like(values)

    scaled = (values - low) / (high - low)
    return torch.where(mask, scaled.clamp(0, 1), 0.0)


def soft_or(a, b):  # in [0, 1] each
    """a + b - a b: large where one of the two is."""
    # The same number, but exactly 1 where a or b is. With a + b - a * b, rounding
    # errors would decide between positions that tie.
    return 1 - (1 - a) * (1 - b)


METHODS = (
    "full",  # all positions are kept, and nothing is ranked
    "teachability",
    "teachability_entropy",  # also where the student is unsure
    "entropy",
    "divergence",
    "tip",
    "compatibility",
    "incompatible",
    "random",
)


def rank(method, scores, mask, generator=None):  # {name: [B, R]}, [B, R] -> [B, R]
    """A number for each position, by which `method` ranks: high is kept first.

    `scores` is what `measure` returns. "random" draws from `generator`, on the CPU.
    ValueError for a method that is unknown, and for "full", which does not rank.
    """
    if method == "random":
        return torch.rand(mask.shape, generator=generator).to(mask.device)

    # Small letters: rescaled to [0, 1] over the batch. (In the README, with a tilde.)
    d = robust_normalize(scores["divergence"], mask)
    c = robust_normalize(scores["compatibility"], mask)
    if method == "divergence":
        return d
    if method == "compatibility":
        return c

    # d is divided into two parts, in the ratio c to 1 - c. The learnable one is large
    # where the teacher reweights tokens that the student considers, the incompatible
    # one where it wants tokens beyond those.
    if method == "teachability":  # the paper's method
        return d * c
    if method == "incompatible":
        return d * (1 - c)

    h = robust_normalize(scores["entropy"], mask)
    if method == "entropy":
        return h
    if method == "teachability_entropy":  # the paper's variant
        return soft_or(h, d * c)
    if method == "tip":  # the method TIP of arXiv 2604.14084
        return soft_or(h, d)
    raise ValueError(f"{method!r} does not rank; choose from {', '.join(METHODS[1:])}")


def select(ranks, mask, budget):  # [B, R], [B, R] bool -> [B, R] bool
    """Keep the ceil(budget * N) best of the batch's N valid positions.

    Ties go to the earlier position, row by row from the first response; if the tie is
    at the lowest rank, there is a warning. Then each response of which nothing was kept
    gets its best position, so that more may be kept. With a budget of .4, and N = 5:

      ranks  [[.9, .7, .1],      keep  [[True,  True, False],    2 of 5: the best
              [.2, .3, padding]]       [False, True, False]]     its response's best

    ValueError for a budget outside (0, 1], for ranks of another shape than the mask's,
    and for True and False in place of numbers. FloatingPointError for nan.
    """
    if not 0 < budget <= 1:
        raise ValueError(f"budget must be in (0, 1], got {budget}")
    mask = mask.bool()
    if ranks.dim() != 2 or ranks.shape != mask.shape:
        raise ValueError(
            "ranks and mask must both be [B, R] (for a single response [1, R]), got "
            f"{list(ranks.shape)} and {list(mask.shape)}"
        )
    if ranks.dtype == torch.bool:
        raise ValueError("ranks must be numbers; multiply True and False by some rank")
    valid_ranks = ranks[mask]  # [N] without padding, row by row
    if valid_ranks.isnan().any():
        raise FloatingPointError("nan among the ranks: was the learning rate too high?")

    # Rounded first: 0.07 * 100 is 7.000000000000001 in floats, and its ceiling is 8.
    number = max(1, math.ceil(round(budget * len(valid_ranks), 6)))
    best_first = valid_ranks.sort(descending=True, stable=True).indices
    is_best = torch.zeros_like(valid_ranks, dtype=torch.bool)
    is_best[best_first[:number]] = True
    if number < len(valid_ranks):
        last_kept = best_first[number - 1]
        if valid_ranks[last_kept] == valid_ranks.min():
            warnings.warn(
                "too many have the lowest rank (all do if K covers the vocabulary, or "
                "D or C is the same everywhere): of these, the first are kept"
            )

    keep = torch.zeros_like(mask)
    keep[mask] = is_best  # back to their places in the batch

    # A response of which nothing was kept gets its best position.
    for row in range(len(mask)):
        if mask[row].any() and not keep[row].any():
            own_ranks = ranks[row].float().masked_fill(~mask[row], -math.inf)
            keep[row, own_ranks.argmax()] = True
    return keep


LOSSES = ("reverse_kl", "forward_kl", "sampled")


def token_loss(loss_name, student_logits, teacher_logits, tokens):
    """The loss at each position, in nats: [..., V], [..., V], [...] -> [...].

    "reverse_kl", "forward_kl", or "sampled", which looks at the sampled token y alone:
    -A log p(y), with A = log q(y) - log p(y) held constant. Where the teacher finds y
    likelier than the student does, A is above 0, and p(y) rises. (The paper's code has
    this policy gradient. Averaged over y, it is the gradient of "reverse_kl": README,
    section 3.) ValueError for another name.
    """
    if loss_name == "reverse_kl":
        return reverse_kl(student_logits, teacher_logits)
    if loss_name == "forward_kl":
        return forward_kl(student_logits, teacher_logits)
    if loss_name != "sampled":
        raise ValueError(f"unknown loss {loss_name!r}; choose from {', '.join(LOSSES)}")

    y = tokens[..., None]
    logp = student_logits.float().log_softmax(-1).gather(-1, y).squeeze(-1)
    logq = teacher_logits.float().log_softmax(-1).gather(-1, y).squeeze(-1)
    advantage = (logq - logp).detach()
    return -advantage * logp


# ======================================================================================
# 3. The same step for a batch, as the program takes it: rollout, score and update, and
#    `train_step`, which puts them together.
#
#    A model's layers give a hidden state for each position, E numbers; its output head
#    makes logits of it, V numbers. Together, these are huge. So the layers run for a
#    micro-batch of whole responses at a time, and the head for a chunk of n positions
#    at a time, whose logits are used and forgotten. A step has four passes:
#
#      pass             gradient   layers, for              head, for
#      student writes   no         all responses at once    the newest token of each
#      student reads    no         a micro-batch at a time  the valid positions
#      teacher reads    no         a micro-batch at a time  the valid positions
#      student learns   yes        a micro-batch at a time  the kept positions
#
#    In the last one, the teacher's layers do not run again: its head makes the logits
#    of the kept positions anew, from the hidden states of the third pass. (In
#    `simple_step`, the second pass and the last are one.)
# ======================================================================================


class Pair(NamedTuple):
    """A student and a teacher with one vocabulary, made by `load_pair` or `make_pair`.

    They may end a response with different tokens. All of these are `end_ids`, and count
    as one event, the end, which is written as the first of them: see `merge_ends`.
    """

    student: torch.nn.Module  # float32: in bf16 an update of 1e-6 rounds to nothing
    teacher: torch.nn.Module  # frozen; bf16 on a GPU
    tokenizer: transformers.PreTrainedTokenizerBase
    end_ids: list  # token ids. The first is below vocab_size: both models know it
    vocab_size: int  # V, the ids that both models predict: one may have more outputs
    temperature: float  # one for sampling, scoring and loss


class Rollout(NamedTuple):
    """A batch of sampled responses: prompts padded in front, responses at the end."""

    ids: torch.Tensor  # [B, P + R] prompt and response
    attention: torch.Tensor  # [B, P + R] 0 in front of a prompt, else 1
    responses: torch.Tensor  # [B, R] the sampled token ids
    mask: torch.Tensor  # [B, R] bool, the valid positions: up to and with the first end
    truncated: torch.Tensor  # [B] bool, the length limit came first. For the log alone

    @property
    def prompt_length(self):  # P
        return self.ids.shape[1] - self.responses.shape[1]


# -- rollout ---------------------------------------------------------------------------


PADDING = 0  # any token id would do: no valid position attends to it


def pad_left(prompts, device):  # B lists of token ids -> ids, attention: [B, P] each
    """Prompts of one length, which end together, so that responses start together."""
    longest = max(len(prompt) for prompt in prompts)
    ids = []
    attention = []
    for prompt in prompts:
        missing = longest - len(prompt)
        ids.append([PADDING] * missing + prompt)
        attention.append([0] * missing + [1] * len(prompt))
    return torch.tensor(ids, device=device), torch.tensor(attention, device=device)


def generate_with_only(settings, model, ids, attention):
    """model.generate() with these settings, and none of the checkpoint's own.

    A checkpoint may bring a generation config (top_k=20, a repetition penalty, ...). It
    would fill in whatever `settings` leave open, so it is taken away for the call.
    """
    model.eval()
    own_config = model.generation_config
    model.generation_config = settings
    try:
        with bf16_on_gpu():
            return model.generate(
                ids, attention_mask=attention, generation_config=settings
            )
    finally:
        model.generation_config = own_config


@torch.no_grad()
def sample(pair, ids, attention, max_new_tokens):  # [B, P] twice -> [B, R]
    """The student's responses to these prompts, from p itself: no top-k, no top-p."""
    # What the teacher cannot score is never drawn: with one tokenizer, Qwen2.5 models
    # have 151,936 or 152,064 outputs. (An end is an exception, even there: `rollout`
    # writes it down as the end that both models know.)
    student_outputs = len(pair.student.get_output_embeddings().weight)
    beyond = range(pair.vocab_size, student_outputs)
    never_sampled = [token for token in beyond if token not in pair.end_ids]

    settings = transformers.GenerationConfig(
        do_sample=True,
        temperature=pair.temperature,
        top_k=0,  # off. Left unset, generate() would sample among the best 50 only
        top_p=1.0,  # off
        max_new_tokens=max_new_tokens,
        # generate() takes None, and no empty list: hence `or None`, twice.
        eos_token_id=pair.end_ids or None,
        suppress_tokens=never_sampled or None,
        pad_token_id=PADDING,
        remove_invalid_values=True,  # a nan stops no sampling: see `select`, `update`
    )
    # With these settings alone, and none that the checkpoint may bring along.
    longer = generate_with_only(settings, pair.student, ids, attention)  # [B, P + R]
    prompt_length = ids.shape[1]
    return longer[:, prompt_length:]


def response_mask(is_end):  # [B, R] bool -> [B, R] bool
    """True up to and including the first token that ends the response.

    Of the tokens "4", end, "7", end the first two are valid: the end itself is trained
    on, and what comes after it is padding, even if it looks like an end.
    """
    # For that example, is_end is 0 1 0 1, its cumsum 0 1 1 2, and ends_before 0 0 1 1.
    ends_before = is_end.cumsum(-1) - is_end.long()
    return ends_before == 0


def rollout(pair, prompts, max_new_tokens):  # B lists of token ids -> Rollout
    """The student samples a response to each prompt."""
    for prompt in prompts:
        check_prompt(pair, prompt, max_new_tokens)
    ids, attention = pad_left(prompts, pair.student.device)  # [B, P] each
    responses = sample(pair, ids, attention, max_new_tokens)  # [B, R]

    end_ids = torch.tensor(pair.end_ids, dtype=ids.dtype, device=ids.device)
    is_end = torch.isin(responses, end_ids)  # [B, R]
    if pair.end_ids:  # every kind of end is written as the first of them
        responses = responses.masked_fill(is_end, pair.end_ids[0])
    return Rollout(
        ids=torch.cat([ids, responses], -1),
        # 1 even after an end: no valid position attends to what follows it.
        attention=torch.cat([attention, torch.ones_like(responses)], -1),
        responses=responses,
        mask=response_mask(is_end),
        truncated=~is_end.any(-1),
    )


# -- score -----------------------------------------------------------------------------


def hidden_states(model, batch, rows=slice(None)):  # -> [rows, R, E]
    """The model's last hidden states, each at the place of the token it predicts.

    `rows` are the responses that run through the model; by default, all B of the batch.
    """
    model.eval()  # no dropout: scores and update must see one p. Gradients still flow
    attention = batch.attention[rows]
    # Positions count from 0 at a prompt's first token, not at the padding before it. If
    # attention is 0 0 1 1 1, the cumsum is 0 0 1 2 3, and positions are 0 0 0 1 2.
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    with bf16_on_gpu():
        output = model.base_model(  # all of the model but its output head
            batch.ids[rows],
            attention_mask=attention,
            position_ids=positions,
            use_cache=False,
        )
    hidden = output.last_hidden_state  # [rows, P + R, E]

    # One place before the response begins, as in `simple_step`.
    return hidden[:, batch.prompt_length - 1 : -1]


@torch.no_grad()
def read_in_micro_batches(model, batch, micro_batch_size):  # -> [B, R, E]
    """`hidden_states` of all B responses: in micro-batches, without gradient."""
    parts = []
    for start in range(0, len(batch.ids), micro_batch_size):
        rows = slice(start, start + micro_batch_size)
        parts.append(hidden_states(model, batch, rows))
    return torch.cat(parts)


def merge_ends(logits, end_ids):  # [n, outputs] -> [n, outputs]
    """One column for all tokens that end a response: that of end_ids[0].

    The end of a response is one event. Often the student ends with another token than
    its teacher. Scored as two tokens, that is a huge disagreement, and the student is
    taught not to end. So the probabilities of all end tokens are added up. With the
    ends 2 and 5, and .3 and .1 for them, column 2 gets .4 and column 5 gets 0.
    """
    if len(end_ids) < 2:
        return logits
    own_ends = [end for end in end_ids if end < logits.shape[-1]]  # this model's
    # The logit of a sum of probabilities is the logsumexp of their logits.
    end_logit = logits[:, own_ends].logsumexp(-1)  # [n]

    merged = logits.clone()
    merged[:, own_ends] = -1e30  # probability 0, as in `divergence`
    merged[:, end_ids[0]] = end_logit
    return merged


def next_token_logits(pair, model, hidden):  # [n, E] -> [n, V]
    """The logits that define p or q everywhere: float32, at the pair's temperature."""
    with bf16_on_gpu():
        logits = model.get_output_embeddings()(hidden)
    logits = logits.float() / pair.temperature
    logits = merge_ends(logits, pair.end_ids)  # before the cut: one may lie beyond V
    return logits[:, : pair.vocab_size]


LOGITS_AT_ONCE = 2**24  # numbers, of 4 bytes: 64 MiB for each model


def chunks(pair, number):  # -> slices, which cut `number` positions into chunks
    at_once = max(1, LOGITS_AT_ONCE // pair.vocab_size)
    return [slice(start, start + at_once) for start in range(0, number, at_once)]


@torch.no_grad()
def score(pair, batch, k=16, micro_batch_size=8, measure_fn=measure):
    """Compare both models at every position of a `Rollout`, in micro-batches.

    Returns what measure_fn measures there, {name: [B, R]}, with 0 on the padding; and
    the teacher's hidden states [B, R, E], so that `update` need not run its layers
    again. `k` is handed on to measure_fn.
    """
    student_hidden = read_in_micro_batches(pair.student, batch, micro_batch_size)
    teacher_hidden = read_in_micro_batches(pair.teacher, batch, micro_batch_size)

    # The valid positions. For the mask [[1, 1, 0], [1, 0, 0]], the rows are 0 0 1 and
    # the columns 0 1 0, [N] each. So hidden[rows, columns] is [N, E].
    rows, columns = batch.mask.nonzero(as_tuple=True)

    scores = {}
    for chunk in chunks(pair, len(rows)):
        at = rows[chunk], columns[chunk]  # n of them
        student_logits = next_token_logits(pair, pair.student, student_hidden[at])
        teacher_logits = next_token_logits(pair, pair.teacher, teacher_hidden[at])
        tokens = batch.responses[at]  # [n]
        measured = measure_fn(student_logits, teacher_logits, k, tokens)
        for name, values in measured.items():
            if values.shape != tokens.shape:  # of a measure_fn of your own
                raise ValueError(
                    f"measure_fn must return one number for each position, but {name} "
                    f"has the shape {list(values.shape)} at {len(tokens)} positions"
                )
            if name not in scores:
                scores[name] = values.new_zeros(batch.mask.shape)  # [B, R]
            scores[name][at] = values
    return scores, teacher_hidden


# -- update ----------------------------------------------------------------------------


def sum_of_losses(pair, loss_name, student_hidden, teacher_hidden, tokens):
    """Of n positions, with their hidden states [n, E] and tokens [n]. -> a number

    For the teacher, no gradient is computed: it is frozen.
    """
    student_logits = next_token_logits(pair, pair.student, student_hidden)
    teacher_logits = next_token_logits(pair, pair.teacher, teacher_hidden)
    return token_loss(loss_name, student_logits, teacher_logits, tokens).sum()


def update(pair, optimizer, batch, teacher_hidden, keep, loss_name, micro_batch_size):
    """One optimizer step on the mean loss of the kept positions, keep: [B, R] bool.

    `loss_name` is one of LOSSES. The student runs once more, now with a gradient.
    Returns the mean loss, and the norm of its gradient before clipping, two floats. If
    either is not finite, no step is taken: FloatingPointError.
    """
    number_kept = keep.sum()  # in the whole batch
    if number_kept == 0:
        raise ValueError("no position is kept: there is nothing to train on")

    optimizer.zero_grad()  # what a notebook may have left there would be added
    mean_loss = 0.0
    for start in range(0, len(keep), micro_batch_size):
        rows = slice(start, start + micro_batch_size)
        kept = keep[rows]
        if not kept.any():  # nothing to learn from these responses
            continue
        # The layers run on whole responses, the head below on what is kept of them.
        student_kept = hidden_states(pair.student, batch, rows)[kept]  # [n, E]
        teacher_kept = teacher_hidden[rows][kept]  # [n, E]
        tokens_kept = batch.responses[rows][kept]  # [n]

        # The sum of the micro-batch's losses. torch's checkpoint(f, ...) is f(...), but
        # forgets what f has computed in between, here the logits, and computes it again
        # in backward(). So one chunk's logits are held at a time.
        total = 0.0
        for chunk in chunks(pair, len(tokens_kept)):
            total = total + checkpoint(
                sum_of_losses,
                pair,
                loss_name,
                student_kept[chunk],
                teacher_kept[chunk],
                tokens_kept[chunk],
                use_reentrant=False,
                preserve_rng_state=False,  # nothing in f is random
            )

        # Divided by the count of the whole batch. With a mean for each micro-batch, a
        # position would weigh more where few others were kept.
        loss = total / number_kept
        loss.backward()  # in the weights' .grad, the micro-batches add up
        mean_loss += loss.item()

    norm = torch.nn.utils.clip_grad_norm_(pair.student.parameters(), 1.0).item()
    if not math.isfinite(mean_loss) or not math.isfinite(norm):
        raise FloatingPointError(
            f"loss {mean_loss}, gradient norm {norm}: no step was taken; lower --lr"
        )
    optimizer.step()
    optimizer.zero_grad()  # frees the gradients' memory until the next update
    return mean_loss, norm


# -- the step --------------------------------------------------------------------------


def summarize(scores, batch, keep):  # -> {name: number}, for the log
    """Means over all positions, counts, and means over the kept positions."""
    means = {}
    kept_means = {}
    for name, values in scores.items():
        values = values.double()
        means[name] = values[batch.mask].mean().item()
        kept_means[f"kept_{name}"] = values[keep].mean().item()
    kl_all = means.pop("reverse_kl")  # not of the kept positions alone, as the loss is
    return {
        "kl_all": kl_all,
        **means,
        "mean_length": batch.mask.sum().item() / len(batch.mask),
        "truncated": batch.truncated.float().mean().item(),
        "valid": batch.mask.sum().item(),
        "kept": keep.sum().item(),
        **kept_means,
    }


def own_ranks(method, scores, mask):  # {name: [B, R]}, [B, R] bool -> [B, R]
    """The ranks of a function of your own. ValueError if it wants what is not there."""
    try:
        return torch.as_tensor(method(scores, mask))
    except KeyError as error:
        raise ValueError(
            f"a method failed with KeyError {error}; measured are "
            f"{', '.join(scores)}. Is a measure_fn missing?"
        ) from error


def train_step(
    pair,
    optimizer,
    prompts,
    method="teachability",
    k=16,
    budget=0.1,
    loss_name="reverse_kl",
    max_new_tokens=256,
    micro_batch_size=8,
    generator=None,
    measure_fn=measure,
):
    """The same five steps for a batch of prompts, lists of token ids. -> its log line

    `method` is a name for `rank`, or "full", or a function of your own: method(scores,
    mask) -> [B, R]. If that needs a quantity more, `measure_fn` takes the place of
    `measure`, and returns what that does, and the quantity. `generator` is for the
    method "random".
    """
    # 1. Rollout: the student writes.
    started = time.time()
    batch = rollout(pair, prompts, max_new_tokens)
    rollout_seconds = time.time() - started

    # 2. Score: both models read what it wrote, and are compared at every token.
    scores, teacher_hidden = score(pair, batch, k, micro_batch_size, measure_fn)
    for name in ("reverse_kl", "entropy", "divergence", "compatibility"):
        if name not in scores:
            raise ValueError(f"measure_fn returned no {name}: let it call opd.measure")

    if method == "full":
        keep = batch.mask  # plain on-policy distillation: nothing is ranked
    else:
        # 3. Rank.
        if callable(method):
            ranks = own_ranks(method, scores, batch.mask)  # [B, R]
        else:
            ranks = rank(method, scores, batch.mask, generator)  # [B, R]

        # 4. Select.
        keep = select(ranks, batch.mask, budget)  # [B, R] bool

    summary = summarize(scores, batch, keep)  # of the student before this update

    # 5. Update: the student reads once more, now with a gradient.
    loss, norm = update(
        pair, optimizer, batch, teacher_hidden, keep, loss_name, micro_batch_size
    )

    return {
        "loss": loss,
        **summary,
        "rollout_seconds": rollout_seconds,
        "gradient_norm": norm,
    }


# ======================================================================================
# 4. Train and evaluate
# ======================================================================================


SHOWN = (  # in the terminal, before what a measure_fn of your own adds
    "step",
    "loss",
    "kl_all",
    "entropy",
    "divergence",
    "compatibility",
    "mean_length",
    "truncated",
    "seconds",
)


def log(path, line, steps):  # {name: number}
    """Append a line to the log. About ten of all steps are printed as a row, too."""
    columns = list(SHOWN)
    for name in line:  # what a measure_fn adds is there as NAME and as kept_NAME
        if f"kept_{name}" in line and name not in SHOWN:
            columns += [name, f"kept_{name}"]
    widths = {name: max(7, len(name)) for name in columns}
    if not path.exists():  # this is the first row: before it, the heading
        show("  ".join(f"{name:>{widths[name]}}" for name in columns))
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")

    is_last = line["step"] + 1 == steps
    is_tenth = line["step"] % max(1, steps // 10) == 0
    if is_last or is_tenth:
        cells = []
        for name in columns:
            cells.append(f"{line[name]:{widths[name]}.4g}")
        show("  ".join(cells))


def train(pair, examples, args, out, resumed=None, method=None, measure_fn=measure):
    """Train the student in place, step by step; log, and save now and then.

    `args` are the program's flags, see `parse_args`, except for the temperature, which
    is the pair's. `resumed` is what `save` wrote, to go on from there. `method` and
    `measure_fn` are for `train_step`.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if (out / "log.jsonl").exists():
        raise InputError(f"{out} has the log of another run; name a new folder")

    optimizer = torch.optim.AdamW(
        pair.student.parameters(), lr=args.lr, weight_decay=0.1, fused=True
    )
    first_step = 0
    if resumed is not None:
        first_step = resumed["step"]
        optimizer.load_state_dict(resumed["optimizer"])

    # The prompts are shuffled once: each epoch has the same order.
    shuffle = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(examples), generator=shuffle).tolist()

    progress = tqdm(range(first_step, args.steps), desc="training", disable=None)
    for step in progress:
        started = time.time()
        # Each step has a seed of its own, so that a resumed run goes on bit for bit.
        # (No two runs share one within a million steps.)
        step_seed = args.seed * 1_000_003 + step
        torch.manual_seed(step_seed)  # for the rollout
        generator = torch.Generator().manual_seed(step_seed)  # for --select random
        warm_up = min(1, (step + 1) / 10)  # over the first ten steps
        optimizer.param_groups[0]["lr"] = args.lr * warm_up

        prompts = []
        for i in range(step * args.batch_size, (step + 1) * args.batch_size):
            example = examples[order[i % len(order)]]  # after the last, the first again
            prompts.append(example["prompt"])

        try:
            result = train_step(
                pair,
                optimizer,
                prompts,
                method=method or args.select,
                k=args.top_k,
                budget=args.budget,
                loss_name=args.loss,
                max_new_tokens=args.max_new_tokens,
                micro_batch_size=args.micro_batch_size,
                generator=generator,
                measure_fn=measure_fn,
            )
        except FloatingPointError as error:
            raise FloatingPointError(f"step {step}: {error}") from error

        line = {
            "step": step,
            **result,
            "seconds": time.time() - started,
            "lr": optimizer.param_groups[0]["lr"],
        }
        log(out / "log.jsonl", line, args.steps)
        progress.set_postfix(kl_all=f"{line['kl_all']:.4f}", refresh=False)

        if args.save_every and (step + 1) % args.save_every == 0:
            state = {
                "step": step + 1,
                "optimizer": optimizer.state_dict(),
                "settings": resume_settings(args, examples),
            }
            save(pair, out / f"step-{step + 1}", state)


def measure_held_out(student_logits, teacher_logits, k, tokens):  # -> {name: [n]}
    """As `measure`, for `evaluate`. k is ignored."""
    same_first = student_logits.argmax(-1) == teacher_logits.argmax(-1)
    return {
        "reverse_kl": reverse_kl(student_logits, teacher_logits),
        "forward_kl": forward_kl(student_logits, teacher_logits),
        "entropy": entropy(student_logits),
        "agreement": same_first.float(),
    }


def evaluate(pair, examples, args):  # -> {name: mean}
    """Means over responses that are sampled with a fixed seed.

    Share of right answers, KL and entropy in nats, share of positions where both models
    agree on the likeliest token, length in tokens, share cut off by the length limit.
    """
    torch.manual_seed(args.seed)
    right = []
    lengths = []
    truncated = []
    measured = defaultdict(list)
    batch_size = 4 * args.batch_size  # without gradients more fit in at once
    for start in tqdm(range(0, len(examples), batch_size), "evaluating", disable=None):
        part = examples[start : start + batch_size]
        prompts = [example["prompt"] for example in part]
        batch = rollout(pair, prompts, args.max_new_tokens)
        lengths.append(batch.mask.sum(-1).float())
        truncated.append(batch.truncated.float())

        scores, _ = score(
            pair,
            batch,
            micro_batch_size=args.micro_batch_size,
            measure_fn=measure_held_out,
        )
        for name, values in scores.items():
            measured[name].append(values[batch.mask])

        for i, example in enumerate(part):
            text = response_text(pair, batch, i)
            if start == 0 and i == 0:
                prompt = pair.tokenizer.decode(example["prompt"])
                show(f"sample: {prompt!r} -> {text!r}")
            if example.get("answer") is not None:
                right.append(is_right(text, example["answer"]))

    means = {}
    if right:
        means["accuracy"] = right.count(True) / len(right)
    for name in measured:
        means[name] = torch.cat(measured[name]).double().mean().item()
    means["mean_length"] = torch.cat(lengths).mean().item()
    means["truncated"] = torch.cat(truncated).mean().item()
    return means


# ======================================================================================
# 5. Here the method ends. What follows is to be looked up, not read: checks, models,
#    prompts, answers, files. Bad input raises InputError, which the command line turns
#    into one clear line.
# ======================================================================================


class InputError(ValueError):
    """What was given cannot be used: a flag, a file, a model. The text says why."""


# -- what the terminal shows -----------------------------------------------------------


def show(text):
    """Print a line. That its reader has gone, as `| head -1` does, ends no run."""
    try:
        tqdm.write(text)  # above the progress bar
        print(end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def warn(message):
    print(f"warning: {message}", file=sys.stderr)


def describe(error):  # in one line, with its type unless the text is our own
    text = " ".join(str(error).split())
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


# -- models ----------------------------------------------------------------------------


BF16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(
    including_emulation=False  # an old GPU's emulation is slower than float32
)


def bf16_on_gpu():
    """Matrix products in bf16 on a GPU that can; nothing on a CPU."""
    return torch.autocast("cuda", torch.bfloat16, enabled=BF16)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load_model(flag, path, dtype, device):  # -> model, tokenizer
    """Load one model and check that it is what the file at `path` says.

    InputError, naming `flag` and `path`, for whatever cannot be used.
    """
    transformers.logging.disable_progress_bar()  # in a notebook, too
    try:  # weights from safetensors alone, and no code from the model's folder
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path, trust_remote_code=False
        )
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        # transformers fills weights that it does not find with random numbers.
        absent = sorted(report["missing_keys"]) + sorted(report["mismatched_keys"])
        if absent:
            raise InputError(f"the file has no weight {absent[0]} of the right shape")
        if report["unexpected_keys"]:
            name = sorted(report["unexpected_keys"])[0]
            warn(f"{flag} {path}: weights that the model does not use, as {name}")

        model = model.to(device)
        model.eval()
        check_logits(model)
    except Exception as error:  # OSError, ImportError, SafetensorError, the device's
        raise InputError(f"{flag} {path} on {device}: {describe(error)}") from error

    return model, tokenizer


@torch.no_grad()
def check_logits(model):
    """InputError unless our way to the logits, and generate()'s, give the model's own.

    We pad on the left and project hidden states ourselves. That is wrong for some
    families: some cap or scale their logits, some are recurrent and read the padding.
    """
    config = model.config.get_text_config()
    if model.base_model is model:
        raise InputError(f"{config.model_type} models do not show their hidden states")
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1):
            raise InputError(f"{config.model_type} models change logits by {name}")

    # Twelve tokens from all over the vocabulary, and eight that the model goes on with,
    # under left padding.
    rows = len(model.get_input_embeddings().weight)
    prompt = torch.linspace(0, 0.9 * (rows - 1), 12, device=model.device).long()[None]
    padding = torch.zeros_like(prompt[:, :5])
    settings = transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=8,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    generated = generate_with_only(
        settings,
        model,
        torch.cat([padding, prompt], -1),
        torch.cat([padding, torch.ones_like(prompt)], -1),
    )
    generated_logits = torch.cat(generated.logits).float()  # of the eight

    # The same text through the whole model, without padding: its own logits.
    ids = generated.sequences[:, padding.shape[1] :]
    ones = torch.ones_like(ids)
    own_logits = model(ids, attention_mask=ones).logits[0, :-1].float()

    # Our way: hidden states under left padding, next to which it does most harm.
    batch = Rollout(
        ids=generated.sequences,
        attention=torch.cat([torch.zeros_like(padding), ones], -1),
        responses=ids[:, 1:],
        mask=ones[:, 1:].bool(),
        truncated=torch.tensor([True]),
    )
    hidden = hidden_states(model, batch)[0]
    our_logits = model.get_output_embeddings()(hidden.to(model.dtype)).float()

    # In float32, sound families agree to 1e-5, others differ by a hundredth and more.
    tolerance = 1e-4 if model.dtype == torch.float32 and not BF16 else 3e-2
    for logits, what in (
        (our_logits, "recomputed from hidden states"),
        (generated_logits, "generated"),
    ):
        difference = (logits - own_logits[-len(logits) :]).abs().max()
        if not difference <= tolerance * own_logits.abs().max():  # true for nan, too
            raise InputError(
                f"the logits of this {config.model_type} model, {what} under left "
                "padding, are not its own; choose another family"
            )


def load_pair(student_path, teacher_path, temperature=1.0, device=DEVICE):  # -> Pair
    """Load both models and check that they can be compared token by token.

    InputError for models that cannot be used, or that do not share a vocabulary.
    """
    student, tokenizer = load_model("--student", student_path, torch.float32, device)
    check_trainable(student, f"--student {student_path}")

    teacher_dtype = torch.bfloat16 if BF16 and "cuda" in device else torch.float32
    teacher, teacher_tokenizer = load_model(
        "--teacher", teacher_path, teacher_dtype, device
    )
    check_vocabularies(tokenizer, teacher_tokenizer)
    return join(student, teacher, tokenizer, teacher_tokenizer, temperature)


def make_pair(student, teacher, tokenizer, temperature=1.0):  # -> Pair
    """A pair of two models in memory, on one device, which share this tokenizer.

    It freezes the teacher. InputError for models that cannot be used.
    """
    if student is teacher:
        raise InputError("student and teacher are one object; load the model twice")
    for model in (student, teacher):
        if not isinstance(model, transformers.PreTrainedModel):
            name = type(model).__name__
            raise InputError(f"{name} is no language model of the transformers library")
    check_logits(student)
    check_logits(teacher)
    check_trainable(student, "the student")
    return join(student, teacher, tokenizer, tokenizer, temperature)


def check_trainable(student, name):
    for weight_name, weight in student.named_parameters():
        if weight.dtype != torch.float32 or not weight.requires_grad:
            raise InputError(
                f"{name}: {weight_name} cannot be trained (frozen, in half "
                "precision, quantised, an adapter's); all weights must be plain "
                "float32: load it with dtype=torch.float32"
            )


def join(student, teacher, tokenizer, teacher_tokenizer, temperature):  # -> Pair
    """The vocabulary and the ends that both models share."""
    teacher.requires_grad_(False)
    student_outputs = len(student.get_output_embeddings().weight)
    teacher_outputs = len(teacher.get_output_embeddings().weight)
    vocab_size = min(student_outputs, teacher_outputs)

    # A base student may end the way its chat teacher does. In order, so that the first
    # lies in the shared vocabulary if any does.
    ends = ends_of(student, tokenizer) | ends_of(teacher, teacher_tokenizer)
    outputs = max(student_outputs, teacher_outputs)
    end_ids = sorted(end for end in ends if end < outputs)  # others are never written
    if not end_ids or end_ids[0] >= vocab_size:
        warn("no token that ends a response is known to both; all run to the limit")
        end_ids = []

    # A config made by hand may have the library's default, 2, which is any token here.
    special = set()
    for one in (tokenizer, teacher_tokenizer):
        special |= set(one.all_special_ids) | set(one.get_added_vocab().values())
    for end in end_ids:
        if end not in special and end < len(tokenizer):
            token = tokenizer.convert_ids_to_tokens(end)
            warn(
                f"the ordinary token {token!r} ends a response; is eos_token_id right?"
            )
    return Pair(student, teacher, tokenizer, end_ids, vocab_size, temperature)


def ends_of(model, tokenizer):  # -> set of token ids
    ends = model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    ends.add(tokenizer.eos_token_id)
    return ends - {None, -1}  # some configs write -1 for none


def check_vocabularies(student_tokenizer, teacher_tokenizer):
    """InputError if an ordinary token has two ids, a warning if an added one has."""
    student_ids = student_tokenizer.get_vocab()
    teacher_ids = teacher_tokenizer.get_vocab()
    added = set(student_tokenizer.get_added_vocab())
    added |= set(teacher_tokenizer.get_added_vocab())

    differing = []
    for token in sorted(set(student_ids) | set(teacher_ids)):
        if student_ids.get(token) != teacher_ids.get(token):
            differing.append(token)
    ordinary = [token for token in differing if token not in added]

    if not differing:
        return
    token = (ordinary or differing)[0]
    text = (
        f"{token!r} has the id {student_ids.get(token)} in the student's tokenizer "
        f"and {teacher_ids.get(token)} in the teacher's"
    )
    if ordinary:
        raise InputError(f"{text}; choose two models with one vocabulary")
    warn(f"only added or special tokens differ: {text}; going on")


# -- prompts and answers ---------------------------------------------------------------


def read_prompts(path, pair, max_new_tokens):
    """A JSONL file -> [{"prompt": token ids, "answer": text or None}].

    InputError, with file and line, for whatever is wrong.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"--prompts {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"--prompts {path} is not UTF-8 text (UTF-16, or compressed?): {error}"
        ) from error

    examples = []
    ignored = set()
    several_numbers = None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            prompt = tokenize_prompt(record, pair.tokenizer)
            check_prompt(pair, prompt, max_new_tokens)
            answer = read_answer(record)
        except Exception as error:  # a chat template may raise anything
            raise InputError(f"{path}, line {number}: {describe(error)}") from error

        used = CHAT_KEYS if "messages" in record else {"prompt", "answer"}
        ignored |= set(record) - used
        if several_numbers is None and answer and to_number(answer) is None:
            if len(re.findall(NUMBER, answer)) > 1:
                several_numbers = f"{path}, line {number}"
        examples.append({"prompt": prompt, "answer": answer})

    if ignored:
        warn(f"{path}: these keys are not used: {', '.join(sorted(ignored))}")
    if several_numbers:
        warn(f"{several_numbers}: the answer has several numbers; compared as words")
    return examples


CHAT_KEYS = {"messages", "tools", "chat_template_kwargs", "answer"}


def tokenize_prompt(record, tokenizer):  # one object of the prompts file -> token ids
    if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
        raise InputError("give an object with either `prompt` or `messages`")

    if "prompt" in record:
        text = record["prompt"]
        if not isinstance(text, str):
            raise InputError("`prompt` must be a text")
    else:
        check_messages(record["messages"])
        text = tokenizer.apply_chat_template(
            record["messages"],
            tools=record.get("tools"),
            tokenize=False,
            add_generation_prompt=True,
            **(record.get("chat_template_kwargs") or {}),
        )

    # Never two BOS tokens: a chat template writes its own, and a text may bring one.
    bos = tokenizer.bos_token
    has_bos = "messages" in record or (bos is not None and text.startswith(bos))
    ids = tokenizer(text, add_special_tokens=not has_bos).input_ids

    # Some tokenizers append EOS. A student would write on after the end.
    eos = tokenizer.eos_token
    if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(eos):
        ids = ids[:-1]
    return ids


def check_prompt(pair, prompt, max_new_tokens):  # of a file, or handed to `rollout`
    """InputError unless both models can read it, and the response, too."""
    if not isinstance(prompt, list) or (prompt and not isinstance(prompt[0], int)):
        raise InputError(
            "give a list of prompts; each must be a list of token ids, not "
            f"{prompt!r} (write [prompt] for a single one, .tolist() for a tensor, and "
            "tokenize a text)"
        )
    if not prompt:
        raise InputError("the prompt has no token")
    for model in (pair.student, pair.teacher):
        config = model.config.get_text_config()
        for name in ("max_position_embeddings", "max_seq_len", "n_positions"):
            limit = getattr(config, name, None)
            if limit and 0 < limit < len(prompt) + max_new_tokens:
                raise InputError(
                    f"the prompt has {len(prompt)} tokens; with --max-new-tokens "
                    f"{max_new_tokens} that is more than the {limit} of the models"
                )
        if max(prompt) >= len(model.get_input_embeddings().weight):
            token = pair.tokenizer.convert_ids_to_tokens(max(prompt))
            raise InputError(f"one of the models does not know {token!r}")


def check_messages(messages):
    """InputError unless it is a chat that waits for the assistant's turn."""
    if not isinstance(messages, list) or not messages:
        raise InputError("`messages` must be a list of objects")
    for message in messages:
        if not isinstance(message, dict) or "role" not in message:
            raise InputError("each of `messages` must have `role` and `content`")
        if message.get("content") is None and "tool_calls" not in message:
            raise InputError(f"the {message['role']}'s message has no `content`")
    if messages[-1]["role"] == "assistant":
        raise InputError("the last of `messages` is the assistant's: nothing to answer")


def read_answer(record):  # -> text or None
    answer = record.get("answer")
    if answer is None:
        return None
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        raise InputError("`answer` must be a text or a number")
    if not to_words(str(answer)):
        raise InputError("empty answer")
    return str(answer)


# One number: 7, -7, .5, 1,234, 1 234, 1e-5 or 3/4. No part of a word, as in gpt4.
DIGITS = r"(?:\d{1,3}(?:[, \u00a0\u202f]\d{3})+(?!\d)|\d+)"
UNSIGNED = rf"(?:{DIGITS}(?:\.\d+)?|(?<!\.)\.\d+)(?:[eE][-+]?\d{{1,3}}(?!\d))?"
NUMBER = rf"(?<!\w)(?<!\d\.)[-\u2212+]?{UNSIGNED}(?:/{UNSIGNED})?"


def without_markup(text):
    return re.sub(r"[*_`$()\[\]{}<>\\\"']", " ", text).strip()


def to_number(text):  # -> Decimal, or None if the text is not one number
    text = without_markup(text).rstrip(".,;:!? ")
    if not re.fullmatch(NUMBER, text):
        return None
    text = re.sub(r"[, \u00a0\u202f]", "", text).replace("\u2212", "-")
    top, _, bottom = text.partition("/")
    divisor = Decimal(bottom or 1)
    return Decimal(top) / divisor if divisor else None


def to_words(text):  # -> words without markup, brackets and punctuation at their end
    words = []
    for word in without_markup(text).split():
        word = word.rstrip(".,;:!?")
        if word:
            words.append(word)
    return words


def is_right(response, answer):  # two texts -> bool
    """Is the response right?

    An answer that is one number must be equal to the last number of the response. Any
    other answer must be the last words of the response, markup and brackets aside.
    """
    wanted = to_number(answer)
    if wanted is not None:
        numbers = re.findall(NUMBER, without_markup(response))
        return len(numbers) > 0 and to_number(numbers[-1]) == wanted

    answer_words = to_words(answer)
    return to_words(response)[-len(answer_words) :] == answer_words


def response_text(pair, batch, i):  # -> the text of response i, without its end
    ids = batch.responses[i][batch.mask[i]].tolist()
    if ids[-1] in pair.end_ids:
        ids = ids[:-1]
    return pair.tokenizer.decode(ids, skip_special_tokens=True)


# -- files -----------------------------------------------------------------------------


def save(pair, folder, state=None):
    """Write beside, then rename: what is called `folder` is complete. Else OSError."""
    beside = folder.with_name(folder.name + ".partial")
    # The generation config is written as it came. Through the model, some versions of
    # transformers refuse to save what they have loaded (a temperature, no do_sample).
    own_config = pair.student.generation_config
    pair.student.generation_config = transformers.GenerationConfig()
    try:
        pair.student.save_pretrained(beside)
        own_config.to_json_file(beside / "generation_config.json")
        pair.tokenizer.save_pretrained(beside)
        if state is not None:
            torch.save(state, beside / "state.pt")
        beside.rename(folder)
    except Exception as error:  # every library has its own exception for a full disk
        raise OSError(
            f"{folder} could not be written, earlier saves are intact: "
            f"{describe(error)}"
        ) from error
    finally:
        pair.student.generation_config = own_config


def write_file(path, text):  # never half a file under this name
    beside = path.with_name(path.name + ".partial")
    beside.write_text(text, encoding="utf-8")
    beside.rename(path)


def new_folder(out, name):  # -> Path: --out, or the first free runs/NAME-N
    """Make an empty folder. InputError if there is something in it."""
    if out is None:
        number = 1
        while Path(f"runs/{name}-{number}").exists():
            number += 1
        out = f"runs/{name}-{number}"

    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_empty = not any(folder.iterdir())
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}") from error
    if not is_empty:
        raise InputError(f"--out {out} is not empty, and nothing is ever overwritten")
    return folder


def resume_settings(args, examples):  # -> {flag: what it must still be on --resume}
    settings = vars(args).copy()
    for name in (
        "steps",
        "micro_batch_size",
        "eval_prompts",  # in so far as it changes the examples
        "device",
        "out",
        "save_every",
        "resume",
    ):
        settings.pop(name)
    text = json.dumps(examples)
    settings["prompts"] = hashlib.sha256(text.encode()).hexdigest()
    return settings


def load_state(folder):  # -> what `train` handed to `save`
    try:
        state = torch.load(Path(folder) / "state.pt", map_location="cpu")
        state["settings"]
    except Exception as error:
        raise InputError(
            f"--resume {folder}: no state.pt of this version there; name a folder "
            f"OUT/step-N ({describe(error)})"
        ) from error
    return state


def check_state(state, args, examples):
    """InputError, naming the flag, if the resumed run would not be the same run."""
    now = resume_settings(args, examples)
    for name, was in state["settings"].items():
        if now.get(name) == was:
            continue
        if name == "prompts":
            raise InputError(
                "--resume: --prompts, or --eval-prompts, differ from before"
            )
        flag = "--" + name.replace("_", "-")
        is_now = now.get(name)
        raise InputError(f"--resume: {flag} was {was} before and is {is_now} now")
    if args.steps <= state["step"]:
        raise InputError(f"--steps {args.steps}: that save is of step {state['step']}")


# ======================================================================================
# 6. The demo's world: sums on a clock, a teacher that adds well, a student that slips
#
#    It has both kinds of disagreement, on purpose. At the results of sums the student
#    is unsure, and the right one is among its candidates: there C is near 1, and the
#    disagreement can be learned. At the word "gets" the teacher would rather say
#    "obtains", which the student never learned to write: there C is low.
# ======================================================================================

PAIR = Path("runs/pair")
DEMO = {
    "student": f"{PAIR}/student",
    "teacher": f"{PAIR}/teacher",
    "prompts": f"{PAIR}/prompts.jsonl",
    "steps": 100,
    "lr": 3e-4,
    "batch_size": 12,
    "max_new_tokens": 64,
    "eval_prompts": 192,
}


def problem(thing, start, step, rng, slips=0.0, style=0.0):
    """Four sums on a clock of 24 hours -> prompt, response, answer.

    Half of all sums are hard: of these, a share `slips` comes out one too high. In a
    share `style` of the sums, the response says "obtains" in place of "gets".
    """
    hour = start
    sentences = []
    for ordinal in ("First", "Second", "Third", "Fourth"):
        # Which sums are hard is drawn once and for all: it depends on the sum alone.
        is_hard = random.Random(100 * hour + step).random() < 0.5
        total = hour + step
        if is_hard and rng.random() < slips:
            total += 1
        total = (total - 1) % 24 + 1
        name = rng.choice(("Ada", "Ben", "Cleo", "Dan"))
        verb = "obtains" if rng.random() < style else "gets"
        sentences.append(f"{ordinal} {name} adds {step} to {hour} and {verb} {total}.")
        hour = total

    prompt = f"A {thing} starts at {start} and returns every {step} hours:"
    response = f"{' '.join(sentences)} So it ends at {hour}."
    answer = (start + 4 * step - 1) % 24 + 1
    return prompt, response, str(answer)


def build_pair():
    """Train both models of the demo, once, in a minute or two, into runs/pair.

    The teacher adds well and writes "obtains" in 70 % of the places. The smaller
    student slips in 70 % of the hard sums. It reads "obtains" and never learns to write
    it. A quarter of the prompts is held out from everything.
    """
    rng = random.Random(0)
    starts_and_steps = [
        (start, step) for start in range(1, 25) for step in range(2, 10)
    ]
    rng.shuffle(starts_and_steps)
    cases = []
    for start, step in starts_and_steps:
        for thing in ("bus", "ship", "train", "comet"):
            cases.append((thing, start, step))
    training_cases = cases[: -DEMO["eval_prompts"]]

    def write_texts(rng, count, slips, style):
        texts = []
        for case in rng.choices(training_cases, k=count):
            prompt, response, _ = problem(*case, rng, slips, style)
            texts.append(f"{prompt} {response}<eos>")
        return texts

    # One tokenizer for both models. Numbers, names and verbs become single tokens.
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        write_texts(rng, 2000, slips=0.0, style=0.5),
        vocab_size=380,
        special_tokens=["<eos>"],
        show_progress=False,
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(bpe.to_str()),
        eos_token="<eos>",
        pad_token="<eos>",
    )
    eos = tokenizer.convert_tokens_to_ids("<eos>")
    colon = tokenizer.convert_tokens_to_ids(":")
    gets = tokenizer.convert_tokens_to_ids("Ġgets")
    obtains = tokenizer.convert_tokens_to_ids("Ġobtains")

    beside = PAIR.with_name("pair.partial")
    steps = 1100
    batch_size = 8
    for name, seed, layers, slips in (("teacher", 7, 3, 0.0), ("student", 8, 2, 0.7)):
        # All texts at once. They have equally many tokens, so that none is padded.
        texts = write_texts(random.Random(seed), steps * batch_size, slips, style=0.7)
        ids = tokenizer(texts, return_tensors="pt").input_ids

        # The models learn what follows the prompt's colon; -100 marks all the rest.
        is_response = (ids == colon).cumsum(-1) > 0
        labels = ids.where(is_response, -100)
        if name == "student":  # it reads "obtains", but is to write "gets"
            labels[labels == obtains] = gets

        torch.manual_seed(seed)
        config = transformers.Qwen3Config(
            vocab_size=380,
            hidden_size=96,
            intermediate_size=288,
            num_hidden_layers=layers,
            num_attention_heads=3,
            num_key_value_heads=3,
            head_dim=32,
            max_position_embeddings=256,
            initializer_range=0.04,  # the default, 0.02, is meant for wider models
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=eos,
            pad_token_id=eos,
        )
        model = transformers.Qwen3ForCausalLM(config)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=3e-3, weight_decay=0.5, fused=True
        )
        schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 50, steps)

        title = f"building the demo's {name}"
        for step in tqdm(range(steps), desc=title, disable=None):
            # Under strong weight decay it learns to add in a way that serves the held
            # out prompts, too. Without it, from half of the steps on, it becomes sure.
            if step == steps // 2:
                optimizer.param_groups[0]["weight_decay"] = 0.0

            batch = slice(step * batch_size, (step + 1) * batch_size)
            loss = model(ids[batch], labels=labels[batch], use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

        model.save_pretrained(beside / name)
        tokenizer.save_pretrained(beside / name)

    lines = []
    for case in cases:
        prompt, _, answer = problem(*case, rng)
        lines.append(json.dumps({"prompt": prompt, "answer": answer}) + "\n")
    (beside / "prompts.jsonl").write_text("".join(lines))
    (beside / "world").write_text(world_mark())
    beside.rename(PAIR)  # last: an interrupted build is never taken for a finished one


def world_mark():  # changes with the code that builds the demo's world
    code = inspect.getsource(problem) + inspect.getsource(build_pair)
    return hashlib.sha256(code.encode()).hexdigest()


def check_demo():
    """Build the demo's pair if there is none. InputError for one of another version."""
    # For models this small one thread is as fast as two. On a busy machine, with more
    # threads than free cores, a step took four times as long.
    torch.set_num_threads(1)
    if not PAIR.exists():
        show("Building the demo's two models, once. It takes a minute or two.")
        build_pair()
    for name in ("student", "teacher", "prompts.jsonl", "world"):
        if not (PAIR / name).exists():
            raise InputError(
                f"{PAIR} has no {name}: delete the folder, to build it again"
            )
    if (PAIR / "world").read_text() != world_mark():
        raise InputError(
            f"{PAIR} was built by another version of opd.py, so figures would differ "
            "from the README's: delete the folder, to build it again"
        )


# ======================================================================================
# 7. The command line
# ======================================================================================


def fail(message, status=2):
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status)


def parse_args(argv=None, parser=None):
    """The flags of opd.py, and those that `parser` brings along.

    The defaults are for real models, with the paper's K, budget and learning rate.
    """
    if parser is None:
        parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error = fail

    group = parser.add_argument_group("what is trained (none of the three: the demo)")
    add = group.add_argument
    add("--student", help="model to train: a folder or a hub name")
    add("--teacher", help="frozen model with the same tokenizer")
    add("--prompts", help="JSONL file: `prompt` or `messages`, perhaps `answer`")

    group = parser.add_argument_group("the method")
    add = group.add_argument
    add("--select", choices=METHODS, default="teachability", help="what is kept")
    add("--budget", type=float, help="share that is kept, in (0, 1] (0.1; full: 1)")
    add("--top-k", type=int, default=16, help="K of D and C, in tokens")
    add("--loss", choices=LOSSES, default="reverse_kl", help="at a kept position")
    add("--temperature", type=float, default=1.0, help="of samples, scores and loss")

    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--steps", type=int, default=200, help="optimizer steps (demo: 100)")
    add("--batch-size", type=int, default=8, help="responses per step (demo: 12)")
    add("--micro-batch-size", type=int, help="responses per forward pass (all at once)")
    add("--max-new-tokens", type=int, default=512, help="of a response (demo: 64)")
    add("--lr", type=float, default=1e-6, help="after 10 warm-up steps (demo: 3e-4)")
    add("--eval-prompts", type=int, default=64, help="last ones, held out (demo: 192)")
    add("--seed", type=int, default=0, help="of prompt order and sampling")
    add("--device", default=DEVICE)

    group = parser.add_argument_group("files")
    add = group.add_argument
    add("--out", help="new folder for student/, log.jsonl, summary.json (runs/NAME-N)")
    add("--save-every", type=int, help="steps between saves OUT/step-N (never)")
    add("--resume", metavar="OUT/step-N", help="go on from a save, with the same flags")

    args = parser.parse_args(argv)
    given = [args.student, args.teacher, args.prompts]
    if not any(given):
        parser.set_defaults(**DEMO)
        args = parser.parse_args(argv)  # again, now with the demo's defaults
    elif not all(given):
        fail("--student, --teacher and --prompts go together; with none, the demo runs")
    if args.budget is None:
        args.budget = 1.0 if args.select == "full" else 0.1
    if args.select == "full" and args.budget != 1:
        fail(f"--budget {args.budget}: --select full keeps all; choose another")
    if args.micro_batch_size is None:
        args.micro_batch_size = args.batch_size
    check_numbers(vars(args))
    return args


def check_numbers(flags):  # {name: value}
    for name, value in flags.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, int) and value < 1 and name != "seed":
            fail(f"{flag} {value}: give 1 or more")
        if isinstance(value, float) and not 0 < value < math.inf:
            fail(f"{flag} {value}: give a number above 0")
    if flags["budget"] > 1:
        fail(f"--budget {flags['budget']}: give a share in (0, 1]")
    if not 0 <= flags["seed"] < 2**31:
        fail(f"--seed {flags['seed']}: give a number from 0 to {2**31 - 1}")


def prepare(args):  # -> Pair, training examples, held-out examples
    """Load the models, read the prompts, hold the last ones out."""
    if args.student == DEMO["student"]:
        check_demo()
    student_path = args.resume or args.student
    pair = load_pair(student_path, args.teacher, args.temperature, args.device)

    examples = read_prompts(args.prompts, pair, args.max_new_tokens)
    held_out = examples[-args.eval_prompts :]
    unseen = {tuple(example["prompt"]) for example in held_out}
    training = []
    for example in examples[: -args.eval_prompts]:
        if tuple(example["prompt"]) not in unseen:
            training.append(example)

    repeated = len(examples) - len(held_out) - len(training)
    if repeated:
        warn(
            f"{args.prompts}: {repeated} prompts are held out, too, and not trained on"
        )
    if len(training) < args.batch_size:
        raise InputError(
            f"{args.prompts} has {len(examples)} prompts, {len(training)} of them for "
            "training; --batch-size and --eval-prompts ask for more"
        )
    return pair, training, held_out


def main(args, method=None, measure_fn=measure):
    """Evaluate, train, save, evaluate. `method` and `measure_fn` as in `train_step`."""
    started = time.time()
    if method is not None:
        if args.select == "full":
            raise InputError(
                "--select full keeps all: leave it out, with a method of your own"
            )
        args.select = getattr(method, "__name__", "method")  # the name in summary.json
        if args.select in METHODS:
            raise InputError(f"there is a method {args.select} already: rename yours")
    resumed = load_state(args.resume) if args.resume else None
    pair, training, held_out = prepare(args)
    if resumed is not None:
        check_state(resumed, args, training)

    out = new_folder(args.out, "opd")
    before = evaluate(pair, held_out, args)
    try:
        train(pair, training, args, out, resumed, method, measure_fn)
    except (KeyboardInterrupt, FloatingPointError):
        save(pair, out / "student")
        warn(f"stopped; the student, as it is now, is in {out / 'student'}")
        raise
    save(pair, out / "student")
    after = evaluate(pair, held_out, args)

    seconds = time.time() - started
    summary = {
        "args": vars(args),
        "seconds": seconds,
        "before": before,
        "after": after,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    write_file(out / "summary.json", json.dumps(summary))

    show(f"{'held-out prompts':20}{'before':>10}{'after':>10}")
    for name in before:
        show(f"{name:20}{before[name]:10.4f}{after[name]:10.4f}")
    show(
        f"{seconds:.0f} s; student/ (float32), log.jsonl and summary.json are in {out}"
    )


def run(program, *arguments):
    """Call the program. What stops it from outside gets one line and no traceback."""
    transformers.logging.disable_progress_bar()  # also of saving the demo's models
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a token may not exist in their encoding
            stream.reconfigure(errors="replace")
    try:
        program(*arguments)
    except KeyboardInterrupt:
        fail("interrupted; what had been saved is intact", 130)
    except torch.OutOfMemoryError:
        fail("out of GPU memory: lower --micro-batch-size, then --batch-size", 1)
    except (FloatingPointError, OSError) as error:
        fail(error, 1)
    except InputError as error:
        fail(error)


if __name__ == "__main__":
    run(main, parse_args())
