"""Tests of opd.py: offline, on the CPU, on tiny random models.

To understand a training step, read `plain_step`, right below: from the responses to
the gradient, one position at a time. Expected values are loops in plain Python or
numbers worked out by hand. In this order (the first three to learn from, the others to
look things up):

  the plain step, and an example of three tokens
  grading an assignment, and helpers for it
  the mathematics, function by function; it grades the assignment
  helpers: tiny models, prompts, runs of the program
  the step: rollout, the end of a response, scores, gradient
  the program: training, evaluation, interruptions
  models, prompts and answers, bad input, the terminal, the demo
  diagnose.py and the scripts of the evidence
  the README's blocks, commands and files; TRL

`OPD=my_opd pytest -k mathematics` runs the tests of ten functions, those whose names
begin with test_mathematics_, against a my_opd.py that `.evidence/assignment.py` wrote.
"""

import gzip
import html.parser
import importlib.util
import inspect
import io
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import diagnose

opd = importlib.import_module(os.environ.get("OPD", "opd"))
# Tiny batches have many ties. The tests of this warning look at it all the same.
pytestmark = pytest.mark.filterwarnings("ignore:too many have the lowest rank")

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text()
V = 64  # vocabulary of the tiny models


# ======================================================================================
# The plain step: on lists of plain floats. The functions that it calls follow it, then
# an example of three tokens
# ======================================================================================


def plain_step(
    student, teacher, prompts, responses, temperature, k, budget, end_ids
):  # -> what the log must say, gradient
    """A step of teachability OPD from the responses to the gradient, said plainly.

    prompts, responses: lists of token ids. The student has sampled the responses.
    `test_two_whole_steps_are_those_of_a_plain_reimplementation` compares the program.
    """
    H, D, C, KL = [], [], [], []
    losses = []
    rows = []
    for row in range(len(prompts)):
        for t in range(len(responses[row])):
            # Both models see the prompt and the response so far: what comes next?
            context = prompts[row] + responses[row][:t]
            logp = log_probabilities(student, context, temperature, end_ids)
            logq = log_probabilities(teacher, context, temperature, end_ids).detach()

            # Score the position, in plain floats.
            p = [math.exp(x) for x in logp.tolist()]
            q = [math.exp(x) for x in logq.tolist()]
            scores = plain_scores(p, q, k)
            for values, value in zip((H, D, C), scores):
                values.append(value)
            KL.append(kl(p, q))

            # Its loss, as a tensor that has a gradient: KL(student || teacher).
            losses.append((logp.exp() * (logp - logq)).sum())
            rows.append(row)

    # Rank by D * C, with D and C rescaled over the whole batch. Keep the best.
    ranks = [d * c for d, c in zip(normalized(D), normalized(C))]
    kept = keep_best(ranks, rows, budget)

    # The loss is the mean over the kept positions, its gradient through all layers.
    loss = sum(losses[i] for i in kept) / len(kept)
    gradient = torch.autograd.grad(loss, list(student.parameters()))

    N = len(rows)
    expected = {
        "loss": loss.item(),
        "kl_all": sum(KL) / N,
        "entropy": sum(H) / N,
        "divergence": sum(D) / N,
        "compatibility": sum(C) / N,
        "kept": len(kept),
        "valid": N,
    }
    return expected, gradient


def log_probabilities(model, context, temperature, end_ids):
    """Of the token after `context`. All ends of a response are one: the last entry.

    (opd.py puts it in the place of the first end. No sum asks for the order.)
    """
    logits = model(torch.tensor([context])).logits[0, -1] / temperature
    logp = logits.log_softmax(-1)
    others = [v for v in range(len(logp)) if v not in end_ids]
    end = logp[end_ids].exp().sum().log()
    return torch.cat([logp[others], end[None]])


def plain_scores(p, q, k):  # two distributions -> H, D, C of one position
    student_top = top(p, k)
    union = student_top | top(q, k)
    H = -sum(x * math.log(x) for x in p)
    D = kl(restricted(q, union), restricted(p, union))
    C = sum(q[v] for v in student_top)
    return H, D, C


def kl(p, q):
    return sum(x * math.log(x / y) for x, y in zip(p, q))


def top(probabilities, k):
    return set(sorted(range(len(probabilities)), key=lambda v: -probabilities[v])[:k])


def restricted(probabilities, union):
    inside = [probabilities[v] for v in union]
    return [x / sum(inside) for x in inside]


def normalized(values):  # of all valid positions
    low = quantile(values, 0.05)
    high = quantile(values, 0.95)
    return [min(max((z - low) / (high - low), 0.0), 1.0) for z in values]


def quantile(values, share):
    values = sorted(values)
    at = share * (len(values) - 1)
    below = int(at)
    above = min(below + 1, len(values) - 1)
    return values[below] + (values[above] - values[below]) * (at - below)


def keep_best(ranks, rows, budget):  # a number and a row for each position -> set
    """The positions to keep: the best of all, and the best of each row without one."""
    best_first = sorted(range(len(ranks)), key=lambda i: -ranks[i])  # ties: the earlier
    number = math.ceil(budget * len(ranks) - 1e-9)  # 0.07 * 100 > 7 in floats
    kept = set(best_first[:number])
    for row in set(rows):
        own = [i for i in best_first if rows[i] == row]
        if not kept & set(own):
            kept.add(own[0])
    return kept


def test_of_three_tokens_the_one_that_can_be_learned_is_kept():
    # Three positions, in a vocabulary of four, at K = 2. The student expects p, its
    # teacher q. First they agree. Then the teacher wants the student's second choice,
    # which can be learned. Then it wants a token that the student does not consider.
    p = [[0.70, 0.28, 0.01, 0.01], [0.70, 0.28, 0.01, 0.01], [0.9985, 9e-4, 5e-4, 1e-4]]
    q = [[0.70, 0.28, 0.01, 0.01], [0.15, 0.83, 0.01, 0.01], [0.29, 0.005, 0.005, 0.7]]
    scores = [plain_scores(p[t], q[t], 2) for t in range(3)]
    H, D, C = [list(column) for column in zip(*scores)]
    assert D == pytest.approx([0, 0.685, 5.88], abs=1e-2)  # alone it picks the third
    assert C == pytest.approx([0.98, 0.98, 0.295])

    d = normalized(D)  # the 5 % quantile becomes 0, the 95 % quantile 1
    c = normalized(C)
    assert d == pytest.approx([0, 0.116, 1], abs=1e-3)
    assert c == pytest.approx([1, 1, 0])
    ranks = [d[t] * c[t] for t in range(3)]
    assert keep_best(ranks, rows=[0, 0, 0], budget=1 / 3) == {1}


# ======================================================================================
# Grading: a function that is not written yet fails with one line
# ======================================================================================


def graded(function):
    """The same function; while it is not written yet, a test fails with one line."""

    def call(*arguments, **more):
        try:
            return function(*arguments, **more)
        except NotImplementedError as error:
            message = str(error)
        pytest.fail(message, pytrace=False)

    return call


if "OPD" in os.environ:
    for name, value in list(vars(opd).items()):
        if inspect.isfunction(value) and value.__module__ == opd.__name__:
            setattr(opd, name, graded(value))


# ======================================================================================
# Helpers: formulas, random logits, a check that says what is wrong
# ======================================================================================


def softmax(scores):
    top = max(scores)
    powers = [math.exp(s - top) for s in scores]
    return [x / sum(powers) for x in powers]


def logits(*shape, seed=0, scale=2.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def as_lists(tensor):
    return tensor.reshape(-1, tensor.shape[-1]).double().tolist()


def log_of(*probabilities):  # logits of which these are the softmax
    return torch.tensor(probabilities).log()


def check(function, found, expected, hint="", tolerance=1e-5):
    """All values must agree. The message names the function and the first wrong one."""
    __tracebackhide__ = True
    assert isinstance(found, torch.Tensor), f"{function} must return a tensor"
    expected = torch.as_tensor(expected, dtype=torch.float64)
    shape = list(found.shape)
    assert (
        found.shape == expected.shape
    ), f"{function} returns the shape {shape}, not {list(expected.shape)}. {hint}"
    found = found.detach().double()
    wrong = ~((found - expected).abs() <= tolerance)  # true for nan, too
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        pytest.fail(
            f"{function} is wrong: {found[place].item():.6g} at {list(place)}, where "
            f"{expected[place].item():.6g} is right. {hint}",
            pytrace=False,
        )


def loop(formula, *tensors):  # formula(p, q, ...) at each position, [..., V] -> [...]
    values = []
    for position in zip(*[as_lists(tensor) for tensor in tensors]):
        values.append(formula(*[softmax(scores) for scores in position]))
    return torch.tensor(values, dtype=torch.float64).view(tensors[0].shape[:-1])


def places(grid):
    return set(map(tuple, grid.nonzero().tolist()))


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


# ======================================================================================
# The mathematics. A name that begins with test_mathematics_ is part of the assignment:
# any correct solution passes. The others hold what opd.py itself promises beside.
# ======================================================================================


BF16_HINT = "If this test alone fails: cast bf16 logits to float first."


# ---- entropy, reverse_kl, forward_kl


def test_mathematics_entropy_agrees_with_a_loop():
    s = logits(2, 3, 7)
    expected = loop(lambda p: -sum(x * math.log(x) for x in p), s)
    check("entropy", opd.entropy(s), expected, "H = -sum_v p(v) log p(v)")


def test_mathematics_entropy_of_four_equal_tokens_is_ln_4():
    found = opd.entropy(torch.zeros(1, 4))
    check("entropy", found, [math.log(4)], "In nats: the natural logarithm.")


def test_mathematics_reverse_kl_agrees_with_a_loop():
    s = logits(2, 3, 7)
    t = logits(2, 3, 7, seed=1)
    hint = "sum_v p(v) (log p(v) - log q(v))"
    check("reverse_kl", opd.reverse_kl(s, t), loop(kl, s, t), hint)


def test_mathematics_reverse_kl_puts_the_student_first():
    # 1/2 ln 2 + 1/2 ln(2/3) = 1/2 ln(4/3). The other way round it were 0.131.
    found = opd.reverse_kl(log_of([0.5, 0.5]), log_of([0.25, 0.75]))
    hint = "It is KL(student || teacher); 0.1308 is KL(teacher || student)."
    check("reverse_kl", found, [0.5 * math.log(4 / 3)], hint)


def test_mathematics_reverse_kl_has_the_gradient_of_the_readme():
    s = logits(7).requires_grad_()
    t = logits(7, seed=1)
    p = softmax(s.tolist())
    q = softmax(t.tolist())
    expected = [x * (math.log(x / y) - kl(p, q)) for x, y in zip(p, q)]
    (gradient,) = torch.autograd.grad(opd.reverse_kl(s, t), s)
    hint = "On the logit of v it is p(v) (log p(v)/q(v) - KL): through p, too."
    check("the gradient of reverse_kl", gradient, expected, hint)


def test_mathematics_forward_kl_agrees_with_a_loop():
    s = logits(2, 3, 7)
    t = logits(2, 3, 7, seed=1)
    expected = loop(lambda p, q: kl(q, p), s, t)
    hint = "sum_v q(v) (log q(v) - log p(v))"
    check("forward_kl", opd.forward_kl(s, t), expected, hint)


def test_mathematics_forward_kl_puts_the_teacher_first():
    # 1/4 ln(1/2) + 3/4 ln(3/2). The other way round it were 0.144.
    found = opd.forward_kl(log_of([0.5, 0.5]), log_of([0.25, 0.75]))
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    hint = "It is KL(teacher || student); 0.1438 is KL(student || teacher)."
    check("forward_kl", found, [expected], hint)


def test_mathematics_forward_kl_has_the_gradient_p_minus_q():
    s = logits(7).requires_grad_()
    t = logits(7, seed=1)
    p = softmax(s.tolist())
    q = softmax(t.tolist())
    expected = [x - y for x, y in zip(p, q)]
    (gradient,) = torch.autograd.grad(opd.forward_kl(s, t), s)
    check("the gradient of forward_kl", gradient, expected)


def test_mathematics_forward_kl_teaches_a_token_without_student_mass_reverse_kl_not():
    s = torch.tensor([4.0, 3.0, -20.0], requires_grad=True)
    t = torch.tensor([0.0, 0.0, 6.0])
    (reverse,) = torch.autograd.grad(opd.reverse_kl(s, t), s)
    (forward,) = torch.autograd.grad(opd.forward_kl(s, t), s)
    assert abs(reverse[2]) < 1e-6, "reverse_kl: its gradient must be weighted by p"
    assert forward[2] < -0.9, "forward_kl: its gradient must be weighted by q"


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl"])
def test_mathematics_extreme_logits_give_finite_values_and_gradients(name):
    # Through probabilities, log(0) and 0 * inf would come in.
    s = torch.tensor([[80.0, -80.0, 0.0, 0.0]], requires_grad=True)
    t = torch.tensor([[-80.0, 80.0, 0.0, 0.0]])
    loss = getattr(opd, name)(s, t)
    (gradient,) = torch.autograd.grad(loss.sum(), s)
    assert loss.isfinite().all(), f"{name} is not finite: use log_softmax, not log(p)"
    assert gradient.isfinite().all(), f"the gradient of {name} is not finite"
    check(name, loss, [160.0], tolerance=1e-3)


def check_bf16(name, exact, pair=True):
    # In bf16 itself the KL of two close distributions is off by ten times.
    s = logits(50, 200).bfloat16()
    t = (s.float() + 0.05 * logits(50, 200, seed=1)).bfloat16()
    inputs = (s, t) if pair else (s,)
    found = getattr(opd, name)(*inputs)
    check(name, found, loop(exact, *inputs), BF16_HINT)


def test_mathematics_entropy_casts_bf16_logits_before_the_softmax():
    check_bf16("entropy", lambda p: -sum(x * math.log(x) for x in p), pair=False)


def test_mathematics_reverse_kl_casts_bf16_logits_before_the_softmax():
    check_bf16("reverse_kl", kl)


def test_mathematics_forward_kl_casts_bf16_logits_before_the_softmax():
    check_bf16("forward_kl", lambda p, q: kl(q, p))


# ---- divergence


def divergence_by_sets(k):
    return lambda p, q: plain_scores(p, q, k)[1]


@pytest.mark.parametrize("k", [1, 3, 5])
def test_mathematics_divergence_agrees_with_a_loop_over_sets(k):
    s = logits(4, 5, 9)
    t = logits(4, 5, 9, seed=1)
    hint = "KL(teacher || student), both renormalised on the union of both top K."
    found = opd.divergence(s, t, k)
    check(f"divergence at k = {k}", found, loop(divergence_by_sets(k), s, t), hint)


def test_mathematics_divergence_counts_shared_ids_once():
    # Both top 2 are {0, 1}, and so is U; on it p = (3/4, 1/4). Those of q are {0, 2}.
    p = log_of([0.6, 0.2, 0.1, 0.1])
    found = opd.divergence(p, log_of([0.2, 0.6, 0.1, 0.1]), 2)
    hint = "U is a set: a token in both top K counts once."
    check("divergence", found, [0.5 * math.log(3)], hint)

    # U = {0, 1, 2}: 0 is shared. On it p = (6, 2, 1) / 9 and q = (6, 1, 2) / 9.
    found = opd.divergence(p, log_of([0.6, 0.1, 0.2, 0.1]), 2)
    check("divergence", found, [1 / 9 * math.log(2)], hint)


def test_mathematics_divergence_puts_the_teacher_first():
    # K covers all: D is KL(q || p) of the whole distributions.
    found = opd.divergence(log_of([0.5, 0.5]), log_of([0.25, 0.75]), 2)
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    hint = "It is KL(teacher || student); 0.1438 is KL(student || teacher)."
    check("divergence", found, [expected], hint)


def test_mathematics_divergence_uses_the_students_probability_of_the_teachers_tokens():
    # K = 1: U = {0, 3}; on it p = (0.9, 0.1), q = (0.25, 0.75). With p(3) = 0, D were
    # infinite; without q(0), it were smaller.
    p = log_of([0.72, 0.1, 0.1, 0.08])
    q = log_of([0.2, 0.1, 0.1, 0.6])
    expected = 0.25 * math.log(0.25 / 0.9) + 0.75 * math.log(0.75 / 0.1)
    hint = "Outside its own top K a model has its exact probability, not zero."
    check("divergence", opd.divergence(p, q, 1), [expected], hint)


def test_mathematics_divergence_of_extreme_logits_is_finite():
    s = torch.tensor([[80.0, -80.0, 0.0, 0.0]])
    t = torch.tensor([[-80.0, 80.0, 0.0, 0.0]])
    check("divergence", opd.divergence(s, t, 2), [160.0], tolerance=1e-3)


def test_mathematics_divergence_casts_bf16_logits_before_the_softmax():
    s = logits(50, 200).bfloat16()
    t = (s.float() + 0.05 * logits(50, 200, seed=1)).bfloat16()
    expected = loop(divergence_by_sets(8), s, t)
    # Equal logits may stand at the edge of a top K: leave those positions out.
    sure = torch.ones(50) > 0
    for z in (s, t):
        edge = z.float().topk(9).values
        sure &= edge[:, 7] > edge[:, 8]
    assert sure.sum() > 30
    found = opd.divergence(s, t, 8)[sure]
    check("divergence", found, expected[sure], BF16_HINT)


# ---- compatibility


@pytest.mark.parametrize("k", [1, 3, 5])
def test_mathematics_compatibility_agrees_with_a_loop_over_sets(k):
    s = logits(4, 5, 9)
    t = logits(4, 5, 9, seed=1)
    expected = loop(lambda p, q: sum(q[v] for v in top(p, k)), s, t)
    hint = "The sum of q(v) over the top K tokens of p."
    check(f"compatibility at k = {k}", opd.compatibility(s, t, k), expected, hint)


def test_mathematics_compatibility_is_teacher_mass_on_the_students_top_k():
    p = log_of([0.72, 0.1, 0.1, 0.08])
    q = log_of([0.2, 0.15, 0.05, 0.6])
    hint = (
        "It is q(0), as 0 is the student's top 1. 0.6 is that of the teacher's own top "
        "1; 0.08 and 0.72 are of p; 0.25 and 1 are renormalised."
    )
    check("compatibility", opd.compatibility(p, q, 1), [0.2], hint)


def test_mathematics_compatibility_casts_bf16_logits_before_the_softmax():
    s = logits(50, 200)
    t = logits(50, 200, seed=1).bfloat16()
    expected = loop(lambda p, q: sum(q[v] for v in top(p, 8)), s, t)
    found = opd.compatibility(s, t, 8)
    check("compatibility", found, expected, BF16_HINT)


@pytest.mark.parametrize("name", ["divergence", "compatibility"])
@pytest.mark.parametrize("k", [0, -1])
def test_mathematics_a_support_of_no_tokens_is_refused(name, k):
    # Otherwise D = C = 0 everywhere, and the selection is a matter of ties, silently.
    with pytest.raises(ValueError):
        getattr(opd, name)(logits(3, 6), logits(3, 6, seed=1), k)
        pytest.fail(f"{name} at k = {k}: raise ValueError", pytrace=False)


# ---- robust_normalize


def test_mathematics_robust_normalize_interpolates_its_quantiles():
    # Values 0 .. 20: Q05 = 1, Q95 = 19. So 10 becomes 1/2 and 4 becomes 1/6.
    values = torch.arange(21.0)[None]
    found = opd.robust_normalize(values, values >= 0)[0]
    expected = [min(max((z - 1) / 18, 0.0), 1.0) for z in range(21)]
    check("robust_normalize", found, expected, "Q05 is 1 here, Q95 is 19.")

    # Q05 of (0, 1, 10) lies a tenth of the way from 0 to 1; Q95 = 9.1.
    values = torch.tensor([[0.0, 1.0, 10.0]])
    found = opd.robust_normalize(values, values >= 0)
    hint = "Quantiles lie between two values: linear interpolation."
    check("robust_normalize", found, [[0, 0.9 / 9, 1]], hint)


def test_mathematics_robust_normalize_takes_quantiles_of_valid_positions_only():
    values = torch.arange(24.0).view(2, 12)
    mask = torch.arange(12) < torch.tensor([[12], [9]])  # 0 .. 20; the rest is padding
    values = values.masked_fill(~mask, 1000.0)
    found = opd.robust_normalize(values, mask)
    expected = [min(max((z - 1) / 18, 0.0), 1.0) for z in range(21)] + [0, 0, 0]
    hint = "Padding has no part in the quantiles, and becomes 0."
    check("robust_normalize", found.flatten(), expected, hint)


def test_mathematics_robust_normalize_of_equal_values_is_zero():
    ones = torch.ones(2, 3)
    single = torch.tensor([[True, False, False], [False, False, False]])
    zeros = torch.zeros(2, 3)
    hint = "Where Q95 - Q05 < 1e-12, all become 0, not nan."
    check("robust_normalize", opd.robust_normalize(7 * ones, ones > 0), zeros, hint)
    check("robust_normalize", opd.robust_normalize(ones, single), zeros, hint)


def test_robust_normalize_of_no_valid_position_is_zero():
    assert opd.robust_normalize(torch.ones(2, 3), torch.zeros(2, 3) > 0).sum() == 0


def test_robust_normalize_takes_more_values_than_torch_quantile_does():
    values = torch.arange(16_777_217 + 1.0).flip(0)[None]
    out = opd.robust_normalize(values, values > -1)
    assert out.max() == 1
    assert out.min() == 0
    assert out[0, len(out[0]) // 2] == pytest.approx(0.5, abs=1e-3)


# ---- rank


def grids(seed=0):  # -> scores by name, mask; whatever stands at padding is nonsense
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(6) < torch.tensor([6, 3, 1, 5])[:, None]
    scores = {}
    for name in ("entropy", "divergence", "compatibility"):
        values = torch.rand(4, 6, generator=generator)
        scores[name] = torch.where(mask, values, 9 * values)
    return scores, mask


TABLE = {  # of the README, with h, d and c rescaled
    "entropy": lambda h, d, c: h,
    "divergence": lambda h, d, c: d,
    "compatibility": lambda h, d, c: c,
    "teachability": lambda h, d, c: d * c,
    "incompatible": lambda h, d, c: d * (1 - c),
    "tip": lambda h, d, c: h + d - h * d,
    "teachability_entropy": lambda h, d, c: h + d * c - h * d * c,
}


@pytest.mark.parametrize("method", TABLE)
def test_mathematics_rank_is_its_row_of_the_table(method):
    scores, mask = grids()
    rescaled = []
    for name in ("entropy", "divergence", "compatibility"):
        values = scores[name][mask].tolist()
        rescaled.append(normalized(values))
    expected = [TABLE[method](h, d, c) for h, d, c in zip(*rescaled)]
    found = opd.rank(method, scores, mask)
    assert found.shape == mask.shape, "rank: a number for each position, [B, R]"
    hint = "H, D and C are rescaled first, over the valid positions of the batch."
    check(f'rank of "{method}"', found[mask], expected, hint)


def test_mathematics_rank_by_chance_follows_its_generator():
    scores, mask = grids()
    ranks = []
    for seed in (1, 1, 2):
        generator = torch.Generator().manual_seed(seed)
        ranks.append(opd.rank("random", scores, mask, generator))
    assert ranks[0].shape == mask.shape, 'rank of "random": a number for each position'
    assert torch.equal(ranks[0], ranks[1]), 'rank of "random": draw from `generator`'
    assert not torch.equal(ranks[0], ranks[2]), 'rank of "random": the same twice'


def test_mathematics_rank_refuses_an_unknown_method():
    scores, mask = grids()
    with pytest.raises(ValueError):
        opd.rank("nonsense", scores, mask)
        pytest.fail("rank of an unknown method: raise ValueError", pytrace=False)


def test_rank_knows_all_methods_and_names_them_where_it_refuses():
    scores, mask = grids()
    assert set(TABLE) | {"full", "random"} == set(opd.METHODS)
    for name in ("nonsense", "full"):  # full is a method, but ranks nothing
        with pytest.raises(ValueError, match=f"{name}.*teachability.*random"):
            opd.rank(name, scores, mask)


def test_no_gradient_goes_through_a_rank():
    scores, mask = grids()
    expected = opd.rank("teachability", scores, mask)
    for values in scores.values():
        values.requires_grad_()
    found = opd.rank("teachability", scores, mask)
    assert torch.equal(found, expected) and not found.requires_grad


def test_a_mask_of_ones_and_zeros_means_what_a_bool_one_means():
    # Taken as an index, it would pick rows 1 and 0, without a word.
    scores, mask = grids()
    ranks = opd.rank("teachability", scores, mask)
    keep = opd.select(ranks, mask, 0.3)
    for numbers in (mask.long(), mask.float()):
        assert torch.equal(opd.rank("teachability", scores, numbers), ranks)
        assert torch.equal(opd.select(ranks, numbers, 0.3), keep)


def test_soft_or_ties_exactly_where_entropy_is_saturated():
    scores, mask = grids()
    scores["entropy"][:, 0] = 9.0  # normalised to 1: D must make no difference
    for method in ("tip", "teachability_entropy"):
        assert opd.rank(method, scores, mask)[:, 0].tolist() == [1.0] * 4


# ---- select


def check_selection(ranks, mask, budget, expected, hint=""):
    __tracebackhide__ = True
    keep = opd.select(torch.tensor(ranks), torch.tensor(mask), budget)
    if keep.dtype != torch.bool or keep.shape != torch.tensor(mask).shape:
        pytest.fail("select must return a bool tensor [B, R]", pytrace=False)
    if places(keep) != expected:
        pytest.fail(
            f"select is wrong: of the ranks {ranks} with the mask {mask} and budget "
            f"{budget} it keeps {sorted(places(keep))}, not {sorted(expected)}. {hint}",
            pytrace=False,
        )


def test_mathematics_select_keeps_the_best_of_the_whole_batch():
    ranks = [[0.1, 0.9, 0.8, 0.7], [0.2, 0.3, 0.6, 0.0]]
    mask = [[True] * 4, [True] * 4]
    best = {(0, 1), (0, 2), (0, 3), (1, 2)}
    check_selection(ranks, mask, 0.5, best, "Not half of each response.")


def test_mathematics_select_rounds_the_number_up():
    ranks = [[0.1, 0.9, 0.8, 0.7, 0.2]]
    mask = [[True] * 5]
    hint = "0.3 of 5 positions is 1.5, so 2: the ceiling."
    check_selection(ranks, mask, 0.3, {(0, 1), (0, 2)}, hint)


def test_mathematics_select_gives_ties_to_the_earlier_position():
    ranks = [[0.5] * 10, [0.5] * 10]
    mask = [[True] * 10, [True] * 10]
    first = {(0, t) for t in range(10)} | {(1, t) for t in range(5)}
    hint = "All are equal: the earlier win, row by row (a stable sort)."
    check_selection(ranks, mask, 0.75, first, hint)


def test_mathematics_select_gives_each_response_one_position():
    ranks = [[0.9, 0.8, 0.7, 0.6], [0.1, 0.3, 0.2, 0.9], [0.0, 0.0, 0.0, 0.0]]
    mask = [[True] * 4, [True, True, True, False], [False] * 4]
    hint = "A response without a position gets its best; all-padding rows get none."
    check_selection(ranks, mask, 0.25, {(0, 0), (0, 1), (1, 1)}, hint)


def test_mathematics_select_never_keeps_padding():
    ranks = [[0.1, 0.2, 0.9, 0.9], [0.3, 0.4, 0.5, 0.6]]
    mask = [[True, True, False, False], [True] * 4]
    check_selection(ranks, mask, 0.3, {(1, 3), (1, 2), (0, 1)}, "N is 6, not 8.")


def random_selection(seed):
    dice = random.Random(seed)
    B = dice.randint(1, 5)
    R = dice.randint(1, 8)
    ranks = [[dice.randint(0, 3) / 3 for _ in range(R)] for _ in range(B)]
    lengths = [dice.randint(0, R) for _ in range(B)]
    mask = [[t < n for t in range(R)] for n in lengths]
    return ranks, mask, dice.choice([0.03, 0.1, 0.29, 0.5, 1])


def test_mathematics_select_agrees_with_brute_force_also_with_ties_and_empty_rows():
    for seed in range(60):
        ranks, mask, budget = random_selection(seed)
        valid = sorted(places(torch.tensor(mask)))
        if valid:
            own_ranks = [ranks[row][t] for row, t in valid]
            best = keep_best(own_ranks, [row for row, _ in valid], budget)
            check_selection(ranks, mask, budget, {valid[i] for i in best})


@pytest.mark.parametrize("budget", [0, -0.1, 1.0001])
def test_mathematics_select_refuses_a_budget_outside_its_range(budget):
    with pytest.raises(ValueError):
        opd.select(torch.rand(2, 2), torch.ones(2, 2) > 0, budget)
        pytest.fail(f"select at budget {budget}: raise ValueError", pytrace=False)


def test_select_counts_without_float_noise():
    ranks = torch.rand(1, 100)
    mask = torch.ones(1, 100) > 0
    # 0.07 * 100 > 7 in floats
    for budget, expected in ((0.07, 7), (0.29, 29), (0.055, 6), (1e-9, 1), (1, 100)):
        assert opd.select(ranks, mask, budget).sum() == expected


def test_select_keeps_none_of_a_batch_of_padding():
    assert not opd.select(torch.rand(2, 3), torch.zeros(2, 3) > 0, 0.5).any()


# ---- token_loss


@pytest.mark.parametrize("kind", opd.LOSSES)
def test_mathematics_token_loss_agrees_with_a_loop(kind):
    s = logits(2, 5, 11)
    t = logits(2, 5, 11, seed=1)
    tokens = torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(2))
    expected = []
    for a, b, y in zip(as_lists(s), as_lists(t), tokens.flatten().tolist()):
        p = softmax(a)
        q = softmax(b)
        values = {
            "reverse_kl": kl(p, q),
            "forward_kl": kl(q, p),
            "sampled": -math.log(q[y] / p[y]) * math.log(p[y]),
        }
        expected.append(values[kind])
    found = opd.token_loss(kind, s, t, tokens)
    expected = torch.tensor(expected).view(2, 5)
    hint = '"sampled" is -A log p(y) with A = log q(y) - log p(y).'
    check(f'token_loss "{kind}"', found, expected, hint, tolerance=1e-4)


def test_mathematics_token_loss_sampled_holds_the_advantage_constant():
    s = logits(6).requires_grad_()
    t = logits(6, seed=1)
    p = softmax(s.tolist())
    q = softmax(t.tolist())
    y = 3
    loss = opd.token_loss("sampled", s[None], t[None], torch.tensor([y]))
    (gradient,) = torch.autograd.grad(loss.sum(), s)
    advantage = math.log(q[y] / p[y])
    expected = [advantage * (p[v] - (v == y)) for v in range(6)]
    hint = "Only log p(y) has a gradient, A has none (detach)."
    check('the gradient of token_loss "sampled"', gradient, expected, hint)


def test_mathematics_token_loss_sampled_has_the_expected_gradient_of_reverse_kl():
    # The mean over all tokens y, each with its probability p(y), is exact.
    s = logits(6).requires_grad_()
    t = logits(6, seed=1)
    p = softmax(s.tolist())
    q = softmax(t.tolist())
    found = torch.zeros(6)
    for y in range(6):
        loss = opd.token_loss("sampled", s[None], t[None], torch.tensor([y]))
        found += p[y] * torch.autograd.grad(loss.sum(), s)[0]
    expected = [x * (math.log(x / y) - kl(p, q)) for x, y in zip(p, q)]
    assert max(map(abs, expected)) > 0.1
    check('the expected gradient of token_loss "sampled"', found, expected)


@pytest.mark.parametrize("kind", opd.LOSSES)
def test_mathematics_token_loss_of_identical_models_is_zero_with_its_gradient(kind):
    s = logits(5, 11).requires_grad_()
    loss = opd.token_loss(kind, s, s.detach().clone(), torch.arange(5))
    (gradient,) = torch.autograd.grad(loss.sum(), s)
    check(f'token_loss "{kind}"', loss, torch.zeros(5))
    check(f'the gradient of token_loss "{kind}"', gradient, torch.zeros(5, 11))


def test_mathematics_token_loss_refuses_an_unknown_kind():
    with pytest.raises(ValueError):
        opd.token_loss("nonsense", logits(5, 11), logits(5, 11), torch.arange(5))
        pytest.fail("token_loss of an unknown kind: raise ValueError", pytrace=False)


# ---- update


def tiny_pair(temperature=0.7):  # its student has another width than its teacher
    student = model_of("llama", seed=1, scale=8.0).eval()
    teacher = model_of("llama", seed=2, scale=8.0, width=24).eval()
    teacher.requires_grad_(False)
    return opd.Pair(student, teacher, None, [0], V, temperature)


def tiny_batch():
    """Three prompts and responses of 5, 2 and 4 tokens, and some positions to keep."""
    prompts = [[5, 6, 7, 8, 9], [5], [10, 11, 12]]
    responses = [[13, 14, 15, 16, 17], [18, 0], [19, 20, 21, 0]]
    ids = []
    attention = []
    for prompt, response in zip(prompts, responses):
        left = 5 - len(prompt)
        right = 5 - len(response)
        ids.append([0] * left + prompt + response + [0] * right)
        attention.append([0] * left + [1] * (10 - left))
    ids = torch.tensor(ids)
    mask = torch.arange(5) < torch.tensor([[5], [2], [4]])
    truncated = torch.tensor([True, False, False])
    batch = opd.Rollout(ids, torch.tensor(attention), ids[:, 5:], mask, truncated)
    kept = {(0, 0), (0, 2), (0, 3), (0, 4), (1, 1), (2, 1)}
    keep = torch.zeros(3, 5) > 1
    for place in kept:
        keep[place] = True
    return batch, keep, prompts, responses


def plain_gradient(pair, prompts, responses, keep, kind="reverse_kl"):
    """The mean loss of the kept positions and its gradient, one forward pass each."""
    losses = []
    for row, t in sorted(places(keep)):
        context = torch.tensor([prompts[row] + responses[row][:t]])
        p = pair.student(context).logits[0, -1] / pair.temperature
        q = pair.teacher(context).logits[0, -1] / pair.temperature
        logp = p[: pair.vocab_size].log_softmax(-1)
        logq = q[: pair.vocab_size].log_softmax(-1)
        if kind == "reverse_kl":
            losses.append((logp.exp() * (logp - logq)).sum())
        else:
            y = responses[row][t]
            losses.append(-(logq[y] - logp[y]).detach() * logp[y])
    loss = sum(losses) / len(losses)
    gradient = torch.autograd.grad(loss, list(pair.student.parameters()))
    return loss.item(), flat(gradient)


def update_of(pair, batch, keep, size, kind="reverse_kl"):
    """What one update hands to its optimizer, and what it returns."""
    steps = []

    def step():
        steps.append(flat([w.grad for w in pair.student.parameters()]))

    pair.student.zero_grad()
    optimizer = SimpleNamespace(step=step, zero_grad=pair.student.zero_grad)
    loss, norm = step_of(pair, optimizer, batch, keep, kind, size)
    assert len(steps) == 1, f"update takes {len(steps)} optimizer steps, not one"
    return steps[0], loss, norm


def gradient(pair, batch, keep, size, kind="reverse_kl"):
    """What one update hands to its optimizer, with the clipping undone."""
    found, _, norm = update_of(pair, batch, keep, size, kind)
    return found * max(1.0, norm + 1e-6)


@pytest.mark.parametrize("kind", ["reverse_kl", "sampled"])
@pytest.mark.parametrize("size", [3, 2, 1])
def test_mathematics_update_has_the_gradient_of_the_mean_over_all_kept(kind, size):
    pair = tiny_pair()
    batch, keep, prompts, responses = tiny_batch()
    loss, expected = plain_gradient(pair, prompts, responses, keep, kind)
    assert expected.abs().max() > 1e-2

    found = gradient(pair, batch, keep, size, kind)
    name = f"update: the gradient in micro-batches of {size}"
    share = (found @ expected) / (expected @ expected)
    other = (found - share * expected).norm() / expected.norm()
    if other < 1e-3 and abs(share - 1) > 1e-3:
        pytest.fail(
            f"{name} is {share:.3f} times what it must be: divide the sum of all "
            "micro-batches' losses by the number of kept positions of the whole batch, "
            "and clip the gradient to a norm of 1",
            pytrace=False,
        )
    hint = (
        f"({other:.0%} of it points elsewhere.) It must be that of the mean over all "
        "kept positions of the batch, however it is split; each position's loss is of "
        "the logits that predict its token, which stand one place before it."
    )
    check(name, found, expected, hint)


def test_mathematics_update_takes_the_logits_that_predict_each_token():
    pair = tiny_pair()
    batch, keep, prompts, responses = tiny_batch()
    keep[:] = False
    keep[0, 2] = True
    right, _ = plain_gradient(pair, prompts, responses, keep)
    after, _ = plain_gradient(pair, prompts, responses, keep.roll(1, 1))
    before, _ = plain_gradient(pair, prompts, responses, keep.roll(-1, 1))
    _, loss, _ = update_of(pair, batch, keep, 3)
    for wrong, place in ((after, "after"), (before, "before")):
        if loss == pytest.approx(wrong, rel=1e-3):
            pytest.fail(
                f"update: that is the loss of the position {place} the kept one. A "
                "token is predicted by the state at the token before it",
                pytrace=False,
            )
    assert loss == pytest.approx(right, rel=1e-3), "update: not the kept one's loss"


def test_mathematics_update_returns_the_mean_loss_and_the_norm_before_clipping():
    pair = tiny_pair()
    batch, keep, prompts, responses = tiny_batch()
    expected, expected_gradient = plain_gradient(pair, prompts, responses, keep)
    expected_norm = expected_gradient.norm().item()
    assert expected_norm > 1.05
    for size in (3, 1):
        found, loss, norm = update_of(pair, batch, keep, size)
        assert loss == pytest.approx(
            expected, rel=1e-4
        ), "update must return the mean loss over all kept positions of the batch"
        assert norm == pytest.approx(
            expected_norm, rel=1e-4
        ), "update must return the gradient's norm before clipping"
        assert found.norm().item() == pytest.approx(
            1, rel=1e-3
        ), "update must clip the gradient to a norm of 1 before the step"


def test_mathematics_update_leaves_no_gradient_behind_and_the_teacher_alone():
    pair = tiny_pair()
    batch, keep, _, _ = tiny_batch()
    first, _, _ = update_of(pair, batch, keep, 2)
    optimizer = torch.optim.SGD(pair.student.parameters(), lr=0.0)
    step_of(pair, optimizer, batch, keep, "reverse_kl", 2)
    for weight in pair.student.parameters():
        if weight.grad is not None and weight.grad.abs().max() > 0:
            pytest.fail("update must call optimizer.zero_grad() last", pytrace=False)
    for weight in pair.teacher.parameters():
        assert weight.grad is None, "update: the teacher must get no gradient"


def test_mathematics_update_takes_no_step_if_the_loss_is_not_finite():
    pair = tiny_pair()
    batch, keep, _, _ = tiny_batch()
    pair.teacher.get_output_embeddings().weight.data[3] = math.nan
    before = flat(pair.student.parameters()).clone()
    optimizer = torch.optim.SGD(pair.student.parameters(), lr=1.0)
    with pytest.raises(FloatingPointError):
        step_of(pair, optimizer, batch, keep, "reverse_kl", 3)
        pytest.fail("update of a nan loss: raise FloatingPointError", pytrace=False)
    after = flat(pair.student.parameters())
    assert torch.equal(before, after), "update must take no step if the loss is nan"


# ---- What opd.py promises beside: one type, exact equality, clear messages


@pytest.mark.parametrize("name", ["divergence", "compatibility"])
@pytest.mark.parametrize("k", [0, -1])
def test_the_refusal_of_an_empty_support_says_what_is_wrong(name, k):
    with pytest.raises(ValueError, match="k must be"):
        getattr(opd, name)(logits(3, 6), logits(3, 6, seed=1), k)


@pytest.mark.parametrize("budget", [0, -0.1, 1.0001, math.nan])
def test_the_refusal_of_a_budget_says_what_is_wrong(budget):
    with pytest.raises(ValueError, match="budget"):
        opd.select(torch.rand(2, 2), torch.ones(2, 2) > 0, budget)


def test_a_top_k_of_more_than_all_tokens_is_one_of_all():
    s = logits(4, 5, 9)
    t = logits(4, 5, 9, seed=1)
    check("divergence", opd.divergence(s, t, 99), loop(divergence_by_sets(99), s, t))
    check("compatibility", opd.compatibility(s, t, 99), torch.ones(4, 5))


def test_where_all_tokens_are_candidates_no_rounding_error_decides():
    # Rescaled, the little by which a sum of probabilities misses 1 would fill [0, 1].
    s = logits(4, 50, 9)
    t = logits(4, 50, 9, seed=1)
    scores = opd.measure(s, t, 16)
    assert torch.equal(scores["compatibility"], torch.ones(4, 50))
    ranks = opd.rank("teachability", scores, torch.ones(4, 50))
    assert torch.equal(ranks, torch.zeros(4, 50))


def test_whatever_the_type_of_the_logits_float32_comes_back():
    s = logits(50, 200).bfloat16()
    t = (s.float() + 0.05 * logits(50, 200, seed=1)).bfloat16()
    assert opd.entropy(s).dtype == torch.float32
    assert opd.compatibility(s, t, 8).dtype == torch.float32
    for function in (
        opd.forward_kl,
        opd.reverse_kl,
        lambda s, t: opd.divergence(s, t, 8),
    ):
        exact = function(s.float(), t.float())
        assert torch.equal(function(s, t), exact)
        assert function(s, t).dtype == torch.float32
        assert (exact > -1e-6).all()


def test_extreme_logits_give_finite_gradients_of_the_divergence_too():
    s = torch.tensor([[80.0, -80.0, 0.0, 0.0]], requires_grad=True)
    t = torch.tensor([[-80.0, 80.0, 0.0, 0.0]])
    loss = opd.divergence(s, t, 2)
    (gradient,) = torch.autograd.grad(loss.sum(), s)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()


def test_identical_models_have_exactly_no_loss():
    s = logits(5, 11)
    for kind in opd.LOSSES:
        loss = opd.token_loss(kind, s.requires_grad_(), s.detach(), torch.arange(5))
        (gradient,) = torch.autograd.grad(loss.sum(), s)
        assert loss.abs().max() == 0
        assert gradient.abs().max() < 1e-6


def test_each_pure_function_runs_alone_when_pasted():
    source = Path(opd.__file__).read_text()
    s = logits(3, 6)
    t = logits(3, 6, seed=1)
    mask = torch.ones(3, 6) > 0
    arguments = {
        "entropy": (s,),
        "forward_kl": (s, t),
        "reverse_kl": (s, t),
        "divergence": (s, t, 2),
        "compatibility": (s, t, 2),
        "robust_normalize": (s, mask),
        "select": (s, mask, 0.3),
        "response_mask": (torch.tensor([[False, True, False]]),),
    }
    for name in arguments:
        # The imports, and no other function.
        alone = {"torch": torch, "math": math, "warnings": warnings, "numpy": np}
        text = re.search(rf"^def {name}\(.*?(?=^\S|\Z)", source, re.M | re.S)[0]
        exec(text, alone)
        found = alone[name](*arguments[name])
        assert torch.equal(found, getattr(opd, name)(*arguments[name]))


def test_parts_1_and_2_as_a_whole_run_when_pasted_into_a_notebook(long_pair):
    source = Path(opd.__file__).read_text()
    parts = source[source.index("# 1. One training") : source.index("# 3. The same")]
    pasted = {"torch": torch, "math": math, "warnings": warnings, "numpy": np}
    exec(parts, pasted)
    s, t = logits(4, 9, 30), logits(4, 9, 30, seed=1)
    mask = torch.ones(4, 9) > 0
    scores = pasted["measure"](s, t, 5)
    ranks = pasted["rank"]("teachability", scores, mask)
    keep = pasted["select"](ranks, mask, 0.25)
    assert keep.sum() >= 9

    # The example at the head of part 2 gives the same, at its own K and budget.
    example = re.findall(r"^#      (.*)$", parts, re.M)
    pasted |= {"student_logits": s, "teacher_logits": t}
    exec("\n".join(example), pasted)
    ranks_at_16 = opd.rank("teachability", opd.measure(s, t, k=16), mask)
    assert torch.equal(pasted["keep"], opd.select(ranks_at_16, mask, 0.1))
    assert torch.equal(ranks, opd.rank("teachability", scores, mask))
    with pytest.raises(ValueError):
        pasted["token_loss"]("nonsense", s, t, torch.zeros(4, 9).long())

    optimizer = torch.optim.SGD(long_pair.student.parameters(), lr=1.0)
    models = (long_pair.student, long_pair.teacher)
    assert pasted["simple_step"](*models, optimizer, torch.tensor([[5, 6, 7]])) > 0


def test_response_mask_ends_with_the_first_of_several_ends_even_if_they_pad():
    responses = torch.tensor(
        [[5, 6, 2, 2, 2], [9, 5, 2, 5, 5], [5, 5, 5, 5, 5], [2, 5, 9, 5, 5]]
    )
    is_end = (responses == 2) | (responses == 9)
    assert opd.response_mask(is_end).sum(1).tolist() == [3, 1, 5, 1]
    assert opd.response_mask(responses == 7).all()


# ======================================================================================
# Helpers for all that follows: tiny models, prompts and runs of the program
# ======================================================================================


def tokenizer_of(size=V, word="w", **special):
    words = {"<eos>": 0, "<s>": 1, "<end>": 2}
    for i in range(3, size):
        words[f"{word}{i}"] = i
    inner = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<eos>", "pad_token": "<eos>", **special}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)


SIZES = {
    "vocab_size": V,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "eos_token_id": 0,
    "bos_token_id": None,
}


def model_of(family, seed=0, vocab=V, width=16, scale=3.0, **more):
    torch.manual_seed(seed)
    settings = {**SIZES, "vocab_size": vocab, "hidden_size": width, "pad_token_id": 0}
    settings |= {"max_position_embeddings": 64, "tie_word_embeddings": True}
    if family != "gpt2":
        settings["intermediate_size"] = 32
    config = transformers.AutoConfig.for_model(family, **{**settings, **more})
    model = transformers.AutoModelForCausalLM.from_config(config)
    # Otherwise every distribution is flat.
    model.get_output_embeddings().weight.data.mul_(scale)
    return model


def change(file, **values):  # some entries of a JSON file
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def put(folder, model, tokenizer=None):
    model.save_pretrained(folder)
    (tokenizer or tokenizer_of()).save_pretrained(folder)
    return str(folder)


def uneven_pair(folder):
    """Two models far apart, whose responses end after different numbers of tokens."""
    pair = [model_of("qwen3", seed, scale=12.0).eval() for seed in (0, 1)]
    for role, model in zip(("student", "teacher"), pair):
        model.generation_config.eos_token_id = list(range(12))
        put(folder / role, model)
    return pair


def prompts_file(path, count=12):
    dice = random.Random(0)
    with open(path, "w") as file:
        for i in range(count):
            words = [f"w{dice.randint(3, V - 1)}" for _ in range(1 + i % 5)]
            record = {"prompt": " ".join(words), "answer": f"w{3 + i}"}
            file.write(json.dumps(record) + "\n")
    return str(path)


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for family in ("qwen3", "llama", "gpt2"):
        put(folder / f"{family}-student", model_of(family, seed=1))
        width = 24 if family == "gpt2" else 16
        put(folder / f"{family}-teacher", model_of(family, seed=2, width=width))
    prompts_file(folder / "prompts.jsonl")
    return folder


def flags(store, out, *more, family="qwen3"):
    text = (
        f"--student {store}/{family}-student --teacher {store}/{family}-teacher "
        f"--prompts {store}/prompts.jsonl --steps 3 --batch-size 4 --max-new-tokens 6 "
        f"--lr 1e-3 --eval-prompts 4 --device cpu --out {out}"
    )
    return text.split() + [str(flag) for flag in more]


def log_of_run(out):
    lines = (Path(out) / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture
def run(store, tmp_path):
    """The program with these flags, into tmp_path / name -> its log."""

    def main(name, *more, family="qwen3", method=None, measure_fn=opd.measure):
        args = opd.parse_args(flags(store, tmp_path / name, *more, family=family))
        opd.main(args, method, measure_fn)
        return log_of_run(tmp_path / name)

    return main


def summary_of(out):
    return json.loads((out / "summary.json").read_text())


def weights_of(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    )
    return model.state_dict()


def load_weights(folder):
    return flat(weights_of(folder).values())


def same_weights(a, b):
    return torch.equal(load_weights(a), load_weights(b))


@contextmanager
def one_line(capsys, says, status=2):
    """What stands inside must stop with this status and one clear line at the end."""
    with pytest.raises(SystemExit) as stop:
        yield
    error = capsys.readouterr().err
    assert stop.value.code == status
    assert "Traceback" not in error
    assert error.startswith("error: ") or error.count("\nerror: ") == 1
    assert re.search(says, error.strip().splitlines()[-1])


def finite(log):
    return all(math.isfinite(value) for line in log for value in line.values())


def timeless(log):
    lines = []
    for line in log:
        kept = {name: line[name] for name in line if "seconds" not in name}
        lines.append(kept)
    return lines


def load(store, family="qwen3", **more):
    student = f"{store}/{family}-student"
    return opd.load_pair(student, f"{store}/{family}-teacher", **more)


@pytest.fixture(scope="session")
def loaded(store):  # for tests that change nothing about it
    return load(store)


PROMPTS = [[5, 6, 7, 8, 9], [5], [10, 11, 12]]


def draw(pair, prompts=PROMPTS, length=6):
    torch.manual_seed(0)
    return opd.rollout(pair, prompts, length)


def own_logits(pair, prompt, response):
    """Those of both models that predict the response: whole, alone, no padding."""
    ids = torch.tensor([prompt + response])
    return [model(ids).logits[0, len(prompt) - 1 : -1] for model in pair[:2]]


def one_by_one(pair, prompts, batch):  # -> student's logits, teacher's, response
    for row, mask, prompt in zip(batch.responses, batch.mask, prompts):
        response = row[mask].tolist()
        yield *own_logits(pair, prompt, response), response


def recorded_rollouts(monkeypatch):
    calls = []
    real = opd.rollout

    def rollout(pair, prompts, length):
        batch = real(pair, prompts, length)
        calls.append((prompts, batch))
        return batch

    monkeypatch.setattr(opd, "rollout", rollout)
    return calls


def logits_of(pair, batch):  # -> student's, teacher's at all valid positions: [N, V]
    chunks = []

    def measure(student_logits, teacher_logits, k, tokens):
        chunks.append((student_logits, teacher_logits))
        return {}

    scores_of(pair, batch, 3, 2, measure)
    student, teacher = zip(*chunks)
    return torch.cat(student), torch.cat(teacher)


def scores_of(pair, batch, k, size, *measure_fn):  # the scores alone
    scores, _ = opd.score(pair, batch, k, size, *measure_fn)
    return scores


def step_of(pair, optimizer, batch, keep, kind, size):  # opd.update, after a score
    teacher_hidden = opd.read_in_micro_batches(pair.teacher, batch, size)
    return opd.update(pair, optimizer, batch, teacher_hidden, keep, kind, size)


# ======================================================================================
# The step: two whole steps, then hidden states, logits and gradient
# ======================================================================================


def test_two_whole_steps_are_those_of_a_plain_reimplementation(
    run, tmp_path, monkeypatch
):
    calls = recorded_rollouts(monkeypatch)
    student, teacher = uneven_pair(tmp_path)  # 12 tokens end a response
    flags = "--temperature 0.7 --budget 0.3 --top-k 3 --micro-batch-size 2"
    paths = ["--student", tmp_path / "student", "--teacher", tmp_path / "teacher"]
    log = run("out", *flags.split(), *paths, "--steps", 2, "--lr", 1e-2)

    weights = list(student.parameters())
    first_moments = [torch.zeros_like(w) for w in weights]
    second_moments = [torch.zeros_like(w) for w in weights]
    for step in (0, 1):
        prompts, batch = calls[1 + step]  # calls[0] and calls[3] are the evaluations
        responses = [row[ok].tolist() for row, ok in zip(batch.responses, batch.mask)]
        assert len({len(response) for response in responses}) > 1  # different lengths

        expected, gradient = plain_step(
            student, teacher, prompts, responses, 0.7, 3, 0.3, list(range(12))
        )
        found = {name: log[step][name] for name in expected}
        assert found == pytest.approx(expected, abs=1e-4)
        norm = math.sqrt(sum((g**2).sum().item() for g in gradient))
        assert log[step]["gradient_norm"] == pytest.approx(norm, rel=1e-3)
        assert norm > 1.05  # so it is clipped

        # AdamW, with warm-up over ten steps.
        lr = 1e-2 * (step + 1) / 10
        with torch.no_grad():
            for w, g, m, v in zip(weights, gradient, first_moments, second_moments):
                g = g / norm  # clipped to 1
                m += 0.1 * (g - m)
                v += 0.001 * (g * g - v)
                first = m / (1 - 0.9 ** (step + 1))
                second = v / (1 - 0.999 ** (step + 1))
                w -= lr * 0.1 * w
                w -= lr * first / (second.sqrt() + 1e-8)

    after = weights_of(tmp_path / "out" / "student")
    for name, w in student.state_dict().items():
        # Some may differ: Adam blows up the rounding of gradients near 0.
        wrong = (after[name] - w).abs() > 2e-5
        assert wrong.float().mean() < 0.02, name


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2"])
def test_chunked_projection_and_left_padding_give_the_models_own_logits(
    store, family, monkeypatch
):
    pair = load(store, family)
    batch = draw(pair)
    monkeypatch.setattr(opd, "LOGITS_AT_ONCE", 3 * V)  # three positions a chunk
    student, teacher = logits_of(pair, batch)
    own = list(one_by_one(pair, PROMPTS, batch))
    assert torch.allclose(student, torch.cat([p for p, _, _ in own]), atol=1e-4)
    assert torch.allclose(teacher, torch.cat([q for _, q, _ in own]), atol=1e-4)
    assert batch.responses[batch.mask].tolist() == sum([y for _, _, y in own], [])


def test_a_hidden_state_stands_at_the_place_of_the_token_that_it_predicts(store):
    # One place further and it had seen that token: changing it must change nothing.
    pair = load(store)
    batch = draw(pair, [[5, 6, 7]])
    hidden = opd.hidden_states(pair.student, batch)
    length = batch.mask.shape[1]
    for t in range(length):
        changed = batch.ids.clone()
        changed[0, 3 + t] += 1
        other = opd.hidden_states(pair.student, batch._replace(ids=changed))
        same = (hidden - other).abs().amax(-1)[0] < 1e-6
        assert same.tolist() == [i <= t for i in range(length)]


def test_scores_stand_at_their_positions_and_padding_has_zero(store):
    pair = load(store)
    batch = draw(pair, length=12)
    batch.mask[1, 2:] = False  # a response of two tokens
    scores = scores_of(pair, batch, 3, 2)
    assert set(scores) == {"reverse_kl", "entropy", "divergence", "compatibility"}
    for row, (p, q, response) in enumerate(one_by_one(pair, PROMPTS, batch)):
        expected = {
            "reverse_kl": loop(kl, p, q),
            "entropy": loop(lambda p: -sum(x * math.log(x) for x in p), p),
            "divergence": loop(divergence_by_sets(3), p, q),
            "compatibility": loop(lambda p, q: sum(q[v] for v in top(p, 3)), p, q),
        }
        for name in expected:
            found = scores[name][row]
            check(name, found[: len(response)], expected[name], tolerance=1e-4)
            assert found[len(response) :].abs().sum() == 0


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_gradient_is_that_of_the_mean_over_kept_positions_through_the_whole_model(
    store, family, monkeypatch
):
    pair = load(store, family)
    batch = draw(pair)
    keep = batch.mask & (torch.arange(batch.mask.shape[1]) % 2 == 0)
    monkeypatch.setattr(opd, "LOGITS_AT_ONCE", 2 * V)
    ours = gradient(pair, batch, keep, 3)
    responses = [response for _, _, response in one_by_one(pair, PROMPTS, batch)]
    _, expected = plain_gradient(pair, PROMPTS, responses, keep)
    assert torch.allclose(ours, expected, atol=1e-5)
    assert expected.abs().max() > 1e-3
    assert all(w.grad is None for w in pair.teacher.parameters())


def test_gradient_does_not_depend_on_the_micro_batches(store):
    pair = load(store)
    batch = draw(pair)
    keep = opd.select(torch.rand(batch.mask.shape), batch.mask, 0.4)
    whole = gradient(pair, batch, keep, 3)
    for size in (1, 2):
        assert torch.allclose(gradient(pair, batch, keep, size), whole, atol=1e-6)


@pytest.mark.parametrize("loss", opd.LOSSES)
def test_chunks_change_no_score_and_no_gradient(store, monkeypatch, loss):
    pair = load(store)
    batch = draw(pair)
    keep = opd.select(torch.rand(batch.mask.shape), batch.mask, 0.4)
    scores = scores_of(pair, batch, 3, 3)
    whole = gradient(pair, batch, keep, 3, loss)
    for at_once in (1, V, 2 * V + 1):  # 1, 1 and 2 positions at a time
        monkeypatch.setattr(opd, "LOGITS_AT_ONCE", at_once)
        again = scores_of(pair, batch, 3, 3)
        for name in scores:
            assert torch.allclose(again[name], scores[name], atol=1e-6)
        assert torch.allclose(gradient(pair, batch, keep, 3, loss), whole, atol=1e-6)


def test_no_more_logits_are_made_than_fit_and_none_where_nothing_is_kept(
    store, monkeypatch
):
    pair = load(store)
    batch = draw(pair, length=12)
    keep = opd.select(torch.rand(batch.mask.shape), batch.mask, 0.2)
    sizes = []
    real = opd.next_token_logits

    def recorded(pair, model, hidden):
        sizes.append(len(hidden))
        return real(pair, model, hidden)

    monkeypatch.setattr(opd, "next_token_logits", recorded)
    monkeypatch.setattr(opd, "LOGITS_AT_ONCE", 4 * V)
    scores_of(pair, batch, 3, 3)
    assert max(sizes) == 4
    assert sum(sizes) == 2 * batch.mask.sum()  # each position once by each model

    sizes.clear()
    gradient(pair, batch, keep, 3)
    assert max(sizes) <= 4
    # Twice by each model: forwards, and again when the gradient comes back.
    assert sum(sizes) == 4 * keep.sum() < 2 * batch.mask.sum()


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2"])
def test_under_bf16_autocast_the_update_is_that_of_float32_but_for_rounding(
    store, family
):
    pair = load(store, family)
    batch = draw(pair)
    exact_logits, _ = logits_of(pair, batch)
    exact = gradient(pair, batch, batch.mask, 3)
    with torch.autocast("cpu", torch.bfloat16):  # what opd.bf16_on_gpu does on a GPU
        p, q = logits_of(pair, batch)
        rounded = gradient(pair, batch, batch.mask, 3)
    assert p.dtype == torch.float32
    assert not torch.equal(p, exact_logits)
    assert (opd.reverse_kl(p, q) > 0).all()
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    assert torch.cosine_similarity(rounded, exact, dim=0) > 0.99


# ======================================================================================
# The step: what is sampled is what is scored
# ======================================================================================


# What a checkpoint's own generation_config.json may ask for, all at once.
HOSTILE = {
    "do_sample": True,
    "temperature": 0.3,
    "top_k": 2,
    "top_p": 0.1,
    "min_p": 0.8,
    "typical_p": 0.2,
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": [13, 14, 15, 16],
    "begin_suppress_tokens": [17, 18],
    "bad_words_ids": [[19], [20]],
    "forced_bos_token_id": 21,
    "forced_eos_token_id": 22,
    "min_new_tokens": 4,
    "exponential_decay_length_penalty": (1, 2.0),
    "num_beams": 3,
    "num_return_sequences": 2,
    "guidance_scale": 2.0,
    "stop_strings": ["w"],
    "renormalize_logits": True,
    "eos_token_id": [0, 2],
}


def drawn_from(pair, monkeypatch, prompts, length):
    """A rollout, and the log-probabilities by which generate() drew: [B, R, rows]."""
    real = pair.student.generate
    scores = []

    def generate(ids, attention_mask, generation_config):
        generation_config.update(output_scores=True, return_dict_in_generate=True)
        result = real(
            ids, attention_mask=attention_mask, generation_config=generation_config
        )
        scores.extend(result.scores)
        return result.sequences

    monkeypatch.setattr(pair.student, "generate", generate)
    batch = draw(pair, prompts, length)
    monkeypatch.undo()
    return batch, torch.stack(scores, 1).log_softmax(-1)


def hostile_checkpoint(folder, **more):
    model = model_of("qwen3", scale=5.0, **more)
    path = put(folder, model)
    change(folder / "generation_config.json", **HOSTILE)
    return path


def test_each_token_is_drawn_from_the_distribution_that_is_scored(
    tmp_path, monkeypatch
):
    # At a temperature, with padding rows, against all that a checkpoint may ask for.
    student = hostile_checkpoint(tmp_path / "student", vocab=V + 9)
    teacher = put(tmp_path / "teacher", model_of("qwen3", seed=1))
    pair = opd.load_pair(student, teacher, temperature=0.7)
    batch, logp = drawn_from(pair, monkeypatch, PROMPTS, 6)
    assert batch.mask.shape == logp.shape[:2]
    found = logp[batch.mask]
    own = [p[:, :V] / 0.7 for p, _, _ in one_by_one(pair, PROMPTS, batch)]
    expected = torch.cat(own).log_softmax(-1)
    assert (found[:, :V] - expected).abs().max() < 1e-4
    assert found[:, V:].exp().max() == 0

    # What is scored is that, with both ends, 0 and 2, in one column.
    scored = logits_of(pair, batch)[0].softmax(-1)
    drawn = found[:, :V].exp()
    drawn[:, 0] += drawn[:, 2]
    drawn[:, 2] = 0
    assert (scored - drawn).abs().max() < 1e-5


def test_a_rollout_leaves_the_students_own_generation_config_as_it_was(
    tmp_path, monkeypatch
):
    path = hostile_checkpoint(tmp_path / "model")
    pair = opd.load_pair(path, path)
    own = pair.student.generation_config
    before = own.to_dict()
    assert before["top_k"] == 2
    draw(pair)
    assert pair.student.generation_config is own
    assert own.to_dict() == before

    def stopped(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(pair.student, "generate", stopped)
    with pytest.raises(KeyboardInterrupt):
        draw(pair)
    assert pair.student.generation_config is own


def test_sampling_reaches_beyond_every_filter_of_the_checkpoint(tmp_path):
    model = model_of("qwen3", vocab=300, scale=5.0)  # nearly uniform, without ties
    model.generation_config.update(top_k=2, top_p=0.1, min_p=0.8, do_sample=True)
    path = put(tmp_path / "model", model, tokenizer_of(300))
    pair = opd.load_pair(path, path)
    batch = draw(pair, [[5]] * 3000, 1)
    drawn = torch.bincount(batch.responses[batch.mask], minlength=300)
    assert (drawn > 0).sum() > 290  # about ten draws a token


def first_of(batch):  # the first response alone
    return batch._replace(
        ids=batch.ids[:1],
        attention=batch.attention[:1],
        responses=batch.responses[:1],
        mask=batch.mask[:1],
    )


def test_the_frequencies_of_many_samples_are_the_scored_probabilities(tmp_path):
    path = put(tmp_path / "model", model_of("qwen3", scale=20.0))
    pair = opd.load_pair(path, path, temperature=0.25)
    batch = draw(pair, [[5]] * 20000, 1)
    scored = logits_of(
        pair,
        first_of(batch),
    )[0][
        0
    ].softmax(-1)
    own, _ = own_logits(pair, [5], [6])
    assert torch.allclose(scored, torch.softmax(4 * own[0], -1), atol=1e-5)
    assert scored.max() > 0.1
    drawn = torch.bincount(batch.ids[:, 1], minlength=V)
    often = scored * 20000 > 5
    misses = (drawn - 20000 * scored) ** 2 / (20000 * scored)  # chi-square
    assert misses[often].sum() < often.sum() + 5 * (2 * often.sum()).sqrt()
    assert (drawn / 20000 - scored).abs().max() < 0.01


def test_one_temperature_governs_sampling_scoring_and_loss(tmp_path):
    path = put(tmp_path / "model", model_of("qwen3", scale=20.0))
    pair = opd.load_pair(path, path, temperature=0.25)
    batch = draw(pair, [[5]] * 4000, 1)
    own, _ = own_logits(pair, [5], [6])
    expected = torch.softmax(4 * own[0], -1)
    for scored in logits_of(
        pair,
        first_of(batch),
    ):
        assert torch.allclose(scored[0].softmax(-1), expected, atol=1e-5)
    drawn = torch.bincount(batch.ids[:, 1], minlength=V) / 4000
    assert (drawn - expected).abs().max() < 0.04
    assert expected.max() > 0.1


def test_the_loss_has_the_temperature_of_the_samples(store):
    pair = load(store, temperature=0.7)
    batch = draw(pair)
    ours = gradient(pair, batch, batch.mask, 3)
    responses = [response for _, _, response in one_by_one(pair, PROMPTS, batch)]
    _, expected = plain_gradient(pair, PROMPTS, responses, batch.mask)
    assert torch.allclose(ours, expected, atol=1e-5)


def test_sampled_ids_are_the_scored_ids_and_never_pass_through_text(store, monkeypatch):
    pair = load(store)
    monkeypatch.setattr(type(pair.tokenizer), "decode", None)
    monkeypatch.setattr(type(pair.tokenizer), "__call__", None)
    generated = []
    real = pair.student.generate

    def generate(*args, **more):
        generated.append(real(*args, **more))
        return generated[-1]

    monkeypatch.setattr(pair.student, "generate", generate)
    batch = draw(pair, PROMPTS, 4)
    assert torch.equal(batch.ids, generated[0])
    assert torch.equal(batch.ids[:, 5:], batch.responses)
    assert batch.ids[0, :5].tolist() == PROMPTS[0]
    assert batch.ids[1, 4] == 5
    assert batch.attention[:, :5].sum(1).tolist() == [5, 1, 3]


def test_padding_rows_of_a_wider_model_are_cut_and_never_sampled(tmp_path):
    narrow = put(tmp_path / "narrow", model_of("qwen3"))
    wide = model_of("qwen3", seed=1, vocab=V + 40, scale=0.01)
    wide = put(tmp_path / "wide", wide)
    for student, teacher in ((narrow, wide), (wide, narrow)):
        pair = opd.load_pair(student, teacher)
        batch = draw(pair, [[5]] * 40, 10)
        p, q = logits_of(pair, batch)
        assert pair.vocab_size == V == p.shape[-1] == q.shape[-1]
        assert batch.ids.max() < V


def test_padding_rows_beyond_the_tokenizer_may_be_sampled(run, tmp_path):
    more = []
    for role, seed in (("student", 1), ("teacher", 2)):
        model = model_of("qwen3", seed, vocab=2 * V, scale=0.01)
        more += [f"--{role}", put(tmp_path / role, model)]
    assert finite(run("out", *more))


def test_a_pair_without_any_end_samples_up_to_the_limit(tmp_path):
    model = model_of("llama")
    model.config.eos_token_id = None
    model.generation_config.eos_token_id = None
    tokenizer = tokenizer_of(pad_token=None, eos_token=None)
    path = put(tmp_path / "model", model, tokenizer)
    pair = opd.load_pair(path, path)
    assert pair.end_ids == []
    batch = opd.rollout(pair, PROMPTS, 3)
    assert batch.truncated.all()
    assert batch.mask.all()


# ======================================================================================
# The step: the end of a response is one event
# ======================================================================================


def pair_of_two_ends(folder, student_ends=0, teacher_ends=2, **more):
    """The student ends with one id, its teacher with another -> Pair."""
    paths = []
    for seed, ends in ((1, student_ends), (2, teacher_ends)):
        model = model_of("qwen3", seed, scale=8.0, **more)
        model.generation_config.eos_token_id = ends
        paths.append(put(folder / f"model-{seed}", model))
    return opd.load_pair(*paths)


def merged(logits, end_ids, vocab_size):  # a row -> probabilities of events: end last
    powers = [math.exp(x) for x in logits]
    events = [powers[v] for v in range(vocab_size) if v not in end_ids]
    events.append(sum(powers[v] for v in end_ids if v < len(powers)))
    return [x / sum(events) for x in events]


def test_base_student_stops_at_its_chat_teachers_end_too(tmp_path):
    student = model_of("qwen3", scale=0.01)
    teacher = model_of("qwen3", seed=1)
    teacher.generation_config.eos_token_id = [2, 0]
    pair = opd.load_pair(put(tmp_path / "s", student), put(tmp_path / "t", teacher))
    assert pair.end_ids == [0, 2]
    generated = []
    real = pair.student.generate
    pair.student.generate = (
        lambda *args, **more: generated.append(real(*args, **more))
        or generated[-1].clone()
    )
    batch = draw(pair, [[5]] * 200, 30)
    raw = generated[0][:, 1:]
    assert ((raw == 2) & batch.mask).any()
    assert ((raw == 0) & batch.mask).any()
    for row, mask, truncated in zip(raw.tolist(), batch.mask, batch.truncated):
        ends = [t for t in range(len(row)) if row[t] in (0, 2)]
        assert mask.sum() == (ends[0] + 1 if ends else len(row))
        assert truncated == (not ends)
    assert batch.truncated.any() and not batch.truncated.all()


def test_all_sampled_ends_have_one_id(tmp_path):
    pair = pair_of_two_ends(tmp_path)
    batch = draw(pair, [[5]] * 300, 20)
    assert 2 not in batch.responses
    assert not batch.truncated.all()
    last = batch.responses.gather(1, batch.mask.sum(1, keepdim=True) - 1)
    assert ((last[:, 0] == 0) | batch.truncated).all()
    assert torch.equal(batch.ids[:, 1:], batch.responses)


def test_the_probabilities_of_all_ends_are_added_in_one_column(tmp_path):
    pair = pair_of_two_ends(tmp_path)
    batch = draw(pair)
    own = list(one_by_one(pair, PROMPTS, batch))
    for i, found in enumerate(logits_of(pair, batch)):
        expected = torch.cat([both[i] for both in own]).softmax(-1)
        expected[:, 0] += expected[:, 2]
        expected[:, 2] = 0
        assert torch.allclose(found.softmax(-1), expected, atol=1e-5)
        assert (found.softmax(-1)[:, 2] == 0).all()


def test_all_scores_and_losses_are_those_of_the_merged_distribution(tmp_path):
    pair = pair_of_two_ends(tmp_path)
    # The models' own logits, and a position at which either is sure of its own end.
    student, teacher = logits(6, V), logits(6, V, seed=1)
    student[0, 0] = 14
    teacher[0, 2] = 14
    identity = SimpleNamespace(get_output_embeddings=lambda: lambda hidden: hidden)
    found_p = opd.next_token_logits(pair, identity, student)
    found_q = opd.next_token_logits(pair, identity, teacher)
    y = torch.tensor([0, 5, 6, 7, 8, 9])  # the first is the end
    scores = opd.measure(found_p, found_q, 3, y)
    forward = opd.token_loss("forward_kl", found_p, found_q, None)
    sampled = opd.token_loss("sampled", found_p, found_q, y)
    for i in range(6):
        p = merged(student[i].tolist(), [0, 2], V)
        q = merged(teacher[i].tolist(), [0, 2], V)
        H = -sum(x * math.log(x) for x in p)
        C = sum(q[v] for v in top(p, 3))
        assert scores["entropy"][i] == pytest.approx(H, abs=1e-4)
        assert scores["compatibility"][i] == pytest.approx(C, abs=1e-4)
        assert scores["divergence"][i] == pytest.approx(
            divergence_by_sets(3)(p, q), abs=1e-4
        )
        assert scores["reverse_kl"][i] == pytest.approx(kl(p, q), abs=1e-4)
        assert forward[i] == pytest.approx(kl(q, p), abs=1e-4)
        event = -1 if i == 0 else y[i] - 2  # of the ids before it, 0 and 2 are gone
        expected = -math.log(q[event] / p[event]) * math.log(p[event])
        assert sampled[i] == pytest.approx(expected, abs=1e-4)
    # Both are sure of the end: hardly any disagreement is left where it stood apart.
    assert scores["reverse_kl"][0] < 0.1 < opd.reverse_kl(student, teacher)[0] / 10


def test_a_support_of_all_events_leaves_the_empty_columns_without_effect(tmp_path):
    pair = pair_of_two_ends(tmp_path)
    identity = SimpleNamespace(get_output_embeddings=lambda: lambda hidden: hidden)
    p = opd.next_token_logits(pair, identity, logits(6, V))
    q = opd.next_token_logits(pair, identity, logits(6, V, seed=1))
    check("divergence", opd.divergence(p, q, V), opd.forward_kl(p, q))
    check("compatibility", opd.compatibility(p, q, V), torch.ones(6))


def test_an_end_beyond_the_shared_vocabulary_is_sampled_as_it_is_scored(
    tmp_path, monkeypatch
):
    student = model_of("qwen3", 1, scale=8.0, vocab=V + 9)
    student.generation_config.eos_token_id = V + 3
    student = put(tmp_path / "student", student)
    pair = opd.load_pair(student, put(tmp_path / "teacher", model_of("qwen3", 2)))
    batch, logp = drawn_from(pair, monkeypatch, PROMPTS, 6)
    drawn = logp[batch.mask].exp()
    scored = logits_of(pair, batch)[0].softmax(-1)
    assert drawn[:, V + 3].min() > 0
    check("p(end)", scored[:, 0], drawn[:, 0] + drawn[:, V + 3])
    check("p", scored[:, 1:], drawn[:, 1:V])
    assert drawn[:, [V, V + 1, V + 8]].max() == 0


def test_an_end_beyond_both_models_is_none(tmp_path, capsys):
    # As in a small GPT-2 whose config has the default end, 50256.
    student = model_of("qwen3", 1, vocab=V + 9)
    student.generation_config.eos_token_id = [V + 8, V + 9]
    student = put(tmp_path / "student", student)
    pair = opd.load_pair(student, put(tmp_path / "teacher", model_of("qwen3", 2)))
    assert pair.end_ids == [0, V + 8]
    assert capsys.readouterr().err.count("warning: no token") == 0


def test_an_end_beyond_the_shared_vocabulary_is_no_obstacle(tmp_path):
    # The student ends with V + 3, a row that its teacher does not have.
    student = model_of("qwen3", 1, scale=8.0, vocab=V + 9)
    student.generation_config.eos_token_id = V + 3
    student = put(tmp_path / "student", student)
    teacher = put(tmp_path / "teacher", model_of("qwen3", 2, scale=8.0))
    for paths in ((student, teacher), (teacher, student)):
        pair = opd.load_pair(*paths)
        assert pair.end_ids == [0, V + 3]
        assert pair.vocab_size == V
        prompts = [[5]] * 20
        batch = draw(pair, prompts, 20)
        assert batch.responses.max() < V  # an end, too, has an id that both know
        assert not batch.truncated.all()
        own = list(one_by_one(pair, prompts, batch))
        for i, found in enumerate(logits_of(pair, batch)):
            expected = []
            for row in as_lists(torch.cat([both[i] for both in own])[:50]):
                p = merged(row, [0, V + 3], V)
                expected.append([p[-1], *p[:-1]])  # the end in the column of id 0
            check("p", found[:50].softmax(-1), expected)
        assert step_of(
            pair,
            torch.optim.SGD(pair.student.parameters(), lr=0.1),
            batch,
            batch.mask,
            "reverse_kl",
            100,
        )


def test_with_one_end_nothing_is_merged_bit_for_bit(store):
    pair = load(store)
    assert pair.end_ids == [0]
    batch = draw(pair)
    hidden = opd.hidden_states(pair.student, batch)[batch.mask]
    plain = pair.student.get_output_embeddings()(hidden)
    assert torch.equal(opd.next_token_logits(pair, pair.student, hidden), plain)


def test_the_gradient_is_that_of_the_merged_distribution(tmp_path):
    pair = pair_of_two_ends(tmp_path)
    batch = draw(pair)
    ours = gradient(pair, batch, batch.mask, 2)
    losses = []
    for row, prompt in enumerate(PROMPTS):
        response = batch.responses[row][batch.mask[row]].tolist()
        for t in range(len(response)):
            context = prompt + response[:t]
            logp = log_probabilities(pair.student, context, 1.0, [0, 2])
            logq = log_probabilities(pair.teacher, context, 1.0, [0, 2])
            losses.append((logp.exp() * (logp - logq)).sum())
    loss = sum(losses) / len(losses)
    expected = torch.autograd.grad(loss, list(pair.student.parameters()))
    assert torch.allclose(ours, flat(expected), atol=1e-5)


def test_merging_the_ends_keeps_the_length_of_responses_in_training(
    run, tmp_path, monkeypatch
):
    # Two models that are equal, but for the token by which they end. Scored apart,
    # those are two tokens: the student unlearns its own end long before it learns the
    # other.
    student = model_of("qwen3", tie_word_embeddings=False, scale=1.0)
    student.model.embed_tokens.weight.data[:, 0] = 3.0  # the same at every position
    output = student.lm_head.weight.data
    output[:, 0] = 0.0
    output[0, 0] = 0.7  # likely: a sixth
    output[2, 0] = -1.5  # unlikely
    teacher = transformers.Qwen3ForCausalLM(student.config)
    teacher.load_state_dict(student.state_dict())
    teacher.lm_head.weight.data[[0, 2]] = output[[2, 0]]
    teacher.generation_config.eos_token_id = 2
    more = (
        "--select full --steps 12 --batch-size 4 --max-new-tokens 24 --lr 1e-2".split()
    )
    more += ["--student", put(tmp_path / "student", student)]
    more += ["--teacher", put(tmp_path / "teacher", teacher)]

    together = run("together", *more)
    assert together[0]["kl_all"] < 1e-5
    real = opd.next_token_logits

    def apart(pair, model, hidden):
        return real(pair._replace(end_ids=pair.end_ids[:1]), model, hidden)

    monkeypatch.setattr(opd, "next_token_logits", apart)
    separate = run("separate", *more)
    assert separate[0]["kl_all"] > 1

    lengths = {}
    for name in ("together", "separate"):
        summary = summary_of(tmp_path / name)
        lengths[name] = summary["after"]["mean_length"]
        assert summary["before"]["mean_length"] == 8
    assert 6 < lengths["together"] < 10
    assert lengths["separate"] > 16


# ======================================================================================
# The step: what you add to it
# ======================================================================================


def test_whatever_is_measured_appears_in_the_log_under_its_name(run, monkeypatch):
    updates = []
    real = opd.update

    def update(pair, optimizer, batch, teacher_hidden, keep, *more):
        updates.append((batch, keep))
        return real(pair, optimizer, batch, teacher_hidden, keep, *more)

    def measure_more(student_logits, teacher_logits, k, tokens):
        scores = opd.measure(student_logits, teacher_logits, k, tokens)
        scores["teacher_entropy"] = opd.entropy(teacher_logits)
        scores["student_entropy"] = opd.entropy(student_logits)
        scores["id"] = tokens.float()
        return scores

    plain = run("plain")
    monkeypatch.setattr(opd, "update", update)
    more = run("more", measure_fn=measure_more)
    for line, old, (batch, keep) in zip(timeless(more), timeless(plain), updates):
        # The mean of all valid positions, and that of the kept ones.
        ids = batch.responses.float()
        assert line.pop("id") == pytest.approx(ids[batch.mask].mean().item())
        assert line.pop("kept_id") == pytest.approx(ids[keep].mean().item())
        for prefix in ("", "kept_"):
            entropy = line[f"{prefix}entropy"]
            assert line.pop(f"{prefix}student_entropy") == entropy
            assert line.pop(f"{prefix}teacher_entropy") > 0.1
        assert line == old


@pytest.mark.parametrize("own_rule", [True, False])
@pytest.mark.parametrize(
    "name", ["reverse_kl", "entropy", "divergence", "compatibility"]
)
def test_measuring_less_than_measure_is_refused_before_the_first_update(
    run, tmp_path, monkeypatch, name, own_rule
):
    def measure_too_little(student_logits, teacher_logits, k, tokens):
        scores = opd.measure(student_logits, teacher_logits, k, tokens)
        del scores[name]
        return scores

    def my_rule(scores, mask):
        return torch.rand(mask.shape)

    def update(*args):
        raise AssertionError("an update took place")

    monkeypatch.setattr(opd, "update", update)
    with pytest.raises(ValueError, match=f"measure_fn returned no {name}"):
        run("out", method=my_rule if own_rule else None, measure_fn=measure_too_little)
    assert not (tmp_path / "out" / "log.jsonl").exists()


def test_a_measure_of_several_numbers_is_refused(run):
    def measure_too_much(student_logits, teacher_logits, k, tokens):
        scores = opd.measure(student_logits, teacher_logits, k, tokens)
        return {**scores, "probabilities": student_logits.softmax(-1)}

    with pytest.raises(ValueError, match="one number.*probabilities has the shape"):
        run("out", measure_fn=measure_too_much)


def test_a_rule_of_your_own_is_refused_where_all_is_kept(run):
    def my_rule(scores, mask):
        return torch.rand(mask.shape)

    with pytest.raises(ValueError, match="--select full keeps all"):
        run("out", "--select", "full", method=my_rule)


def test_an_ordinary_token_that_ends_a_response_gets_a_warning(capsys):
    student = model_of("qwen3", seed=0)
    teacher = model_of("qwen3", seed=1)
    tokenizer = tokenizer_of(eos_token="<eos>")
    opd.make_pair(student, teacher, tokenizer)
    assert "ordinary" not in capsys.readouterr().err
    teacher.generation_config.eos_token_id = 7  # as some config's default may be
    pair = opd.make_pair(student, teacher, tokenizer)
    token = tokenizer.convert_ids_to_tokens(7)
    assert 7 in pair.end_ids
    assert f"the ordinary token {token!r} ends" in capsys.readouterr().err


def test_a_rollout_longer_than_the_models_take_is_refused(store):
    pair = load(store)
    limit = pair.student.config.max_position_embeddings
    opd.rollout(pair, [[5, 6]], 3)
    with pytest.raises(ValueError, match=f"more than the {limit} of the models"):
        opd.rollout(pair, [[5, 6]], limit - 1)


def test_prompts_without_an_answer_are_evaluated_without_accuracy(store, tmp_path):
    args = opd.parse_args(flags(store, tmp_path / "out"))
    means = opd.evaluate(load(store), [{"prompt": [5, 6]}], args)
    assert "accuracy" not in means and means["mean_length"] >= 1


def test_each_flag_of_a_step_reaches_it(run, monkeypatch):
    handed = {}
    real = opd.train_step

    def recorded(pair, optimizer, prompts, **settings):
        handed.update(settings)
        return real(pair, optimizer, prompts, **settings)

    monkeypatch.setattr(opd, "train_step", recorded)
    expected = {
        "--select": ("method", "tip"),
        "--top-k": ("k", 5),
        "--budget": ("budget", 0.5),
        "--loss": ("loss_name", "sampled"),
        "--max-new-tokens": ("max_new_tokens", 7),
        "--micro-batch-size": ("micro_batch_size", 3),
    }
    given = []
    for flag, (_, value) in expected.items():
        given += [flag, value]
    run("out", "--steps", 1, *given)
    for name, value in expected.values():
        assert handed[name] == value


def test_each_step_of_each_seed_draws_anew(run, monkeypatch):
    seeds = []
    real = opd.train_step

    def recorded(pair, optimizer, prompts, generator, **more):
        seeds.append((torch.initial_seed(), generator.initial_seed()))
        return real(pair, optimizer, prompts, generator=generator, **more)

    monkeypatch.setattr(opd, "train_step", recorded)
    run("zero", "--steps", 3, "--seed", 0)
    run("one", "--steps", 3, "--seed", 1)
    assert len(set(seeds)) == len(seeds) == 6
    for of_rollout, of_random in seeds:
        assert of_rollout == of_random


def one_step(pair, **settings):  # -> the log line of one step
    optimizer = torch.optim.AdamW(pair.student.parameters(), lr=1e-3)
    torch.manual_seed(0)
    return opd.train_step(pair, optimizer, [[5, 6], [7]], **settings)


def test_a_step_can_be_taken_without_the_program_and_full_keeps_all(store):
    shared = {"max_new_tokens": 20, "micro_batch_size": 1}
    line = one_step(load(store), **shared)
    best = math.ceil(0.1 * line["valid"])
    assert best <= line["kept"] <= best + 2 < line["valid"]  # a tenth, by default

    line = one_step(load(store), method="full", **shared)
    assert line["kept"] == line["valid"]
    assert line["loss"] == pytest.approx(line["kl_all"], rel=1e-5)

    with pytest.raises(ValueError, match="'nonsense' does not rank"):
        one_step(load(store), method="nonsense", **shared)


def test_no_training_adds_to_the_log_of_another(store, tmp_path):
    args = opd.parse_args(flags(store, tmp_path / "out", "--steps", 1))
    pair, training, _ = opd.prepare(args)
    opd.train(pair, training, args, tmp_path / "out")
    log = (tmp_path / "out" / "log.jsonl").read_text()
    with pytest.raises(ValueError, match="the log of another run"):
        opd.train(pair, training, args, tmp_path / "out")
    assert (tmp_path / "out" / "log.jsonl").read_text() == log


def test_gradients_that_were_left_behind_change_no_update(store):
    norms = []
    for left_behind in (False, True):
        pair = load(store)
        batch = draw(pair)
        if left_behind:
            opd.hidden_states(pair.student, batch).square().sum().backward()
        optimizer = torch.optim.SGD(pair.student.parameters(), lr=0.1)
        _, norm = step_of(pair, optimizer, batch, batch.mask, "reverse_kl", 2)
        norms.append(norm)
    assert norms[0] == norms[1] > 0


def test_an_update_with_no_position_kept_is_refused(store):
    pair = load(store)
    batch = draw(pair)
    with pytest.raises(ValueError, match="no position is kept"):
        update_of(pair, batch, torch.zeros_like(batch.mask), 2)


@pytest.mark.parametrize("shape", [(6,), (1, 6, 1), (2, 3)])
def test_ranks_of_another_shape_than_the_mask_are_refused_by_select(shape):
    with pytest.raises(ValueError, match=r"must both be \[B, R\].*got \[.*\[1, 6\]"):
        opd.select(torch.rand(shape), torch.ones(1, 6) > 0, 0.5)


def test_a_rule_of_another_shape_is_refused_and_nan_stops_a_run(run):
    def by_part_of_it(scores, mask):
        return scores["entropy"][:, 1:]

    def by_nothing(scores, mask):
        return scores["entropy"] / 0 * 0

    with pytest.raises(ValueError, match="ranks and mask must both be"):
        run("shape", method=by_part_of_it)
    with pytest.raises(FloatingPointError, match="nan among the ranks"):
        run("nan", method=by_nothing)


def test_a_rule_may_return_an_array_of_numpy(run, tmp_path):
    def by_entropy(scores, mask):
        return scores["entropy"].numpy()

    run("array", method=by_entropy)
    for line in log_of_run(tmp_path / "array"):
        assert line["kept_entropy"] > line["entropy"]


def warnings_of_select(ranks, mask, budget):  # -> how many
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opd.select(ranks, mask, budget)
    for warning in caught:
        assert ": of these, the first are kept" in str(warning.message)
    return len(caught)


def test_positions_that_are_kept_though_they_rank_lowest_get_a_warning():
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, 6:] = False
    ranks = torch.zeros(2, 8)
    ranks[0, 2] = ranks[1, 3] = 1.0
    # Of 14 positions: 7, 3, 2 and all.
    for budget, expected in ((0.5, 1), (3 / 14, 1), (2 / 14, 0), (1, 0)):
        assert warnings_of_select(ranks, mask, budget) == expected

    # That one of each response is kept is no reason for a warning, nor are ties above.
    ranks[1] = 0
    assert places(opd.select(ranks, mask, 0.01)) == {(0, 2), (1, 0)}
    assert warnings_of_select(ranks, mask, 0.01) == 0
    assert warnings_of_select(torch.tensor([[0.0, 0.5, 0.5]]), mask[:1, :3], 0.3) == 0


def test_a_rule_that_ranks_nothing_warns_in_training(run):
    def my_rule(scores, mask):
        return torch.ones_like(scores["entropy"])

    with pytest.warns(UserWarning, match="too many have the lowest rank"):
        run("out", "--steps", 1, method=my_rule)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run("full", "--steps", 1, "--select", "full")


@pytest.mark.parametrize("prompt", ["text", torch.tensor([5, 6]), [], ["w5"]])
def test_a_prompt_that_is_no_list_of_token_ids_is_refused(store, prompt):
    says = "the prompt has no token" if prompt == [] else "must be a list of token ids"
    with pytest.raises(ValueError, match=says):
        opd.rollout(load(store), [[5, 6], prompt], 4)


def test_a_rule_of_your_own_ranks_the_positions_and_is_named_in_the_summary(
    run, tmp_path, monkeypatch, capsys
):
    kept = []
    real = opd.update

    def update(pair, optimizer, batch, teacher_hidden, keep, *more):
        kept.append((batch.mask, keep))
        return real(pair, optimizer, batch, teacher_hidden, keep, *more)

    def latest_first(scores, mask):
        assert scores["entropy"].shape == mask.shape
        return mask.cumsum(-1)

    monkeypatch.setattr(opd, "update", update)
    run("out", "--budget", 0.5, method=latest_first)
    assert summary_of(tmp_path / "out")["args"]["select"] == "latest_first"
    for mask, keep in kept:
        assert torch.equal(keep, opd.select(mask.cumsum(-1), mask, 0.5))
    assert len(kept) == 3


# ======================================================================================
# The program
# ======================================================================================


@pytest.mark.parametrize(
    "family,loss,method",
    [
        ("qwen3", "reverse_kl", "teachability"),
        ("llama", "sampled", "tip"),
        ("gpt2", "forward_kl", "random"),
    ],
)
def test_a_real_run_leaves_a_student_a_log_and_a_summary(
    run, store, tmp_path, family, loss, method, capsys
):
    out = tmp_path / "out"
    log = run("out", "--loss", loss, "--select", method, family=family)
    assert [line["step"] for line in log] == [0, 1, 2]
    assert finite(log)
    for line in log:
        assert line["valid"] == 4 * line["mean_length"]
        best = math.ceil(0.1 * line["valid"])
        assert best <= line["kept"] <= best + 4 < line["valid"]
    learning_rates = [line["lr"] for line in log]
    assert learning_rates == pytest.approx([1e-4, 2e-4, 3e-4])  # warming up

    summary = summary_of(out)
    assert set(summary) == {"args", "versions", "seconds", "before", "after"}
    for when in ("before", "after"):
        assert list(summary[when])[:2] == ["accuracy", "reverse_kl"]
        assert all(math.isfinite(value) for value in summary[when].values())
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "student")
    assert tokenizer("w5").input_ids == [5]
    assert not same_weights(store / f"{family}-student", out / "student")
    assert sorted(path.name for path in out.iterdir()) == [
        "log.jsonl",
        "student",
        "summary.json",
    ]

    printed = capsys.readouterr().out
    assert re.search(r"^accuracy +0\.", printed, re.M)
    assert len(printed.splitlines()) < 20


@pytest.mark.parametrize(
    "steps,shown", [(5, [0, 1, 2, 3, 4]), (20, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 19])]
)
def test_the_terminal_shows_each_tenth_of_the_run_and_the_log_every_step(
    run, capsys, steps, shown
):
    log = run("out", "--steps", steps, "--batch-size", 1, "--max-new-tokens", 2)
    printed = capsys.readouterr().out
    heading, *lines = re.findall(r"^ +(?:step|\d+)  .*", printed, re.M)
    assert heading.split()[:3] == ["step", "loss", "kl_all"]
    assert len(log) == steps
    assert [int(line.split()[0]) for line in lines] == shown
    for line in lines:
        step, *found = map(float, line.split()[:3])
        expected = [log[int(step)][key] for key in ("loss", "kl_all")]
        assert found == pytest.approx(expected, rel=1e-3)
        assert len(line) == len(heading)


def test_the_terminal_shows_what_you_measure_in_columns_of_their_own(run, capsys):
    def measure_more(student_logits, teacher_logits, k, tokens):
        scores = opd.measure(student_logits, teacher_logits, k, tokens)
        return {**scores, "teacher_entropy": opd.entropy(teacher_logits)}

    log = run("out", "--steps", 2, measure_fn=measure_more)
    heading, *lines = re.findall(r"^ +(?:step|\d+)  .*", capsys.readouterr().out, re.M)
    own = ["teacher_entropy", "kept_teacher_entropy"]
    assert heading.split() == [*opd.SHOWN, *own]
    for line, logged in zip(lines, log, strict=True):
        found = [float(number) for number in line.split()[-2:]]
        assert found == pytest.approx([logged[name] for name in own], rel=1e-3)


def test_evaluation_agrees_with_loops_over_the_whole_model(store, capsys):
    pair = load(store)
    args = opd.parse_args(flags(store, "unused", "--batch-size", 3))
    prompts = [[5, 6], [10], [11, 12, 13]]
    batch = draw(pair, prompts)
    texts = []
    for ids, mask in zip(batch.responses, batch.mask):
        words = [f"w{i}" for i in ids[mask].tolist() if i > 2]
        texts.append(" ".join(words))
    answers = [texts[0], None, texts[2] + "9"]  # right, not asked, wrong
    examples = []
    for prompt, answer in zip(prompts, answers):
        examples.append({"prompt": prompt, "answer": answer})
    measured = opd.evaluate(pair, examples, args)

    values = []
    for p, q, _ in one_by_one(pair, prompts, batch):
        for x, y in zip(map(softmax, as_lists(p)), map(softmax, as_lists(q))):
            entropy = -sum(a * math.log(a) for a in x)
            values.append((kl(x, y), kl(y, x), entropy, top(x, 1) == top(y, 1)))
    means = [sum(column) / len(values) for column in zip(*values)]
    names = ["reverse_kl", "forward_kl", "entropy", "agreement"]
    assert [measured[name] for name in names] == pytest.approx(means, abs=1e-4)
    assert measured["accuracy"] == 0.5
    assert measured["mean_length"] == pytest.approx(len(values) / 3)
    unended = [0 not in ids for ids in batch.responses.tolist()]
    assert measured["truncated"] == pytest.approx(sum(unended) / 3)
    assert repr(texts[0]) in capsys.readouterr().out  # the printed sample


def test_evaluation_weighs_positions_alike_however_they_are_batched(store):
    # Batches of 4 and 1 responses: a mean of their means would differ.
    pair = load(store)
    examples = [{"prompt": [5 + i], "answer": "w9"} for i in range(5)]
    args = opd.parse_args(flags(store, "unused", "--batch-size", 1))
    args.temperature = pair.temperature
    torch.manual_seed(args.seed)
    sums = Counter()
    for part in (examples[:4], examples[4:]):
        batch = opd.rollout(pair, [e["prompt"] for e in part], args.max_new_tokens)
        scores = scores_of(pair, batch, 4, 4)
        sums["kl"] += scores["reverse_kl"].sum().item()
        sums["valid"] += batch.mask.sum().item()
    found = opd.evaluate(pair, examples, args)
    assert found["reverse_kl"] == pytest.approx(sums["kl"] / sums["valid"], rel=1e-4)
    assert found["mean_length"] == pytest.approx(sums["valid"] / 5)


def test_without_answers_there_is_no_accuracy(run, tmp_path):
    lines = [json.dumps({"prompt": f"w5 w{6 + i}"}) + "\n" for i in range(10)]
    (tmp_path / "p.jsonl").write_text("".join(lines))
    run("out", "--prompts", tmp_path / "p.jsonl")
    summary = summary_of(tmp_path / "out")
    assert "accuracy" not in summary["after"]
    assert "reverse_kl" in summary["after"]


def test_same_seed_same_log_and_other_seed_other_log(run, tmp_path):
    a = timeless(run("a", "--seed", 3, "--steps", 2))
    b = timeless(run("b", "--seed", 3, "--steps", 2))
    c = timeless(run("c", "--seed", 4, "--steps", 2))
    assert same_weights(tmp_path / "a" / "student", tmp_path / "b" / "student")
    assert a == b
    assert a != c


def test_the_seed_changes_the_samples_and_not_only_the_order_of_the_prompts(
    run, tmp_path
):
    lines = ['{"prompt": "w5 w6"}\n'] * 8 + ['{"prompt": "w7"}\n'] * 4
    (tmp_path / "p.jsonl").write_text("".join(lines))
    prompts = ["--prompts", tmp_path / "p.jsonl"]
    a = run("a", "--seed", 3, "--steps", 1, *prompts)
    b = run("b", "--seed", 4, "--steps", 1, *prompts)
    assert a[0]["kl_all"] != b[0]["kl_all"]


def test_budget_one_is_full_opd_bit_for_bit(run, tmp_path):
    full = timeless(run("full", "--select", "full", "--steps", 2))
    for method in ("divergence", "random"):
        more = ["--select", method, "--budget", 1, "--steps", 2]
        assert timeless(run(method, *more)) == full
        assert same_weights(
            tmp_path / "full" / "student", tmp_path / method / "student"
        )
    assert full[0]["kept"] == full[0]["valid"]


def test_full_distillation_brings_the_student_closer(run, tmp_path):
    more = ["--select", "full", "--steps", 20, "--lr", 2e-2, "--batch-size", 8]
    run("out", *more)
    summary = summary_of(tmp_path / "out")
    assert summary["after"]["reverse_kl"] < 0.7 * summary["before"]["reverse_kl"]


def test_a_bf16_checkpoint_moves_at_a_learning_rate_of_1e_6(run, tmp_path):
    model = model_of("qwen3", seed=1).bfloat16()
    path = put(tmp_path / "bf16", model)
    run("out", "--student", path, "--lr", "1e-6", "--steps", 5, "--select", "full")
    before = model.state_dict()
    after = weights_of(tmp_path / "out" / "student")
    moved = sum((after[name] != before[name].float()).sum().item() for name in after)
    assert moved > 0.9 * sum(w.numel() for w in after.values())


def test_the_first_step_is_that_of_adamw_at_a_tenth_of_the_learning_rate(
    run, store, tmp_path
):
    run("out", "--lr", 1, "--steps", 1, "--select", "full")
    before = weights_of(store / "qwen3-student")
    after = weights_of(tmp_path / "out" / "student")
    # After one step Adam's two moments cancel: all move by lr, after the decay.
    lr = 0.1
    moved = []
    for name, weight in before.items():
        moved.append((after[name] - weight * (1 - lr * 0.1)).abs().flatten())
    moved = torch.cat(moved)
    assert (moved - lr).abs().median() < 5e-5
    assert (moved < lr + 1e-5).all()


@pytest.mark.parametrize(
    "flag,value",
    [
        ("--max-new-tokens", 1),
        ("--top-k", 500),
        ("--budget", "1e-9"),
        ("--batch-size", 1),
        ("--micro-batch-size", 99),
    ],
)
def test_degenerate_settings_run_without_nan(run, flag, value):
    assert finite(run("out", flag, value, "--steps", 2))


def test_responses_of_one_token_and_responses_that_never_end_are_no_problem(
    run, tmp_path, capsys
):
    for name, ends, length in (("stops", list(range(V)), 1), ("never", None, 6)):
        model = model_of("qwen3", seed=1)
        model.config.eos_token_id = ends
        model.generation_config.eos_token_id = ends
        tokenizer = tokenizer_of(eos_token="<eos>" if ends else None)
        path = put(tmp_path / name, model, tokenizer)
        log = run(f"{name}-out", "--student", path, "--teacher", path)
        assert finite(log)
        for line in log:
            assert line["mean_length"] == length
            assert line["truncated"] == (0 if ends else 1)
    warning = "warning: no token that ends a response is known to both; all run to the "
    assert capsys.readouterr().err.count(warning) == 1  # of the second alone


def test_held_out_prompts_are_evaluated_and_all_others_trained_in_turn(
    run, tmp_path, monkeypatch
):
    calls = recorded_rollouts(monkeypatch)
    lines = [json.dumps({"prompt": f"w{3 + i}"}) + "\n" for i in range(12)]
    (tmp_path / "p.jsonl").write_text("".join(lines))
    run("out", "--prompts", tmp_path / "p.jsonl")
    before, *steps, after = ([ids for (ids,) in prompts] for prompts, _ in calls)
    assert before == after == [11, 12, 13, 14]
    assert sorted(steps[0] + steps[1]) == list(range(3, 11))
    assert steps[2] == steps[0]
    assert steps[0] + steps[1] != list(range(3, 11))  # shuffled


def test_after_the_last_prompt_a_batch_goes_on_with_the_first(run, monkeypatch):
    calls = recorded_rollouts(monkeypatch)
    run("out", "--batch-size", 3, "--steps", 5)  # 8 prompts are trained on
    prompts = []
    for batch, _ in calls:
        prompts += [tuple(ids) for ids in batch]
    trained = prompts[4:-4]  # without the evaluations
    assert len(trained) == 15 and len(set(trained[:8])) == 8
    assert trained[8:] == trained[:7]


def test_a_prompt_that_the_file_repeats_among_the_held_out_is_not_trained_on(
    run, tmp_path, monkeypatch, capsys
):
    calls = recorded_rollouts(monkeypatch)
    words = [3, 11, 4, 5, 14, 6, 11, 11, 12, 13, 14]  # the last four are held out
    lines = [json.dumps({"prompt": f"w{word}"}) + "\n" for word in words]
    (tmp_path / "p.jsonl").write_text("".join(lines))
    run("out", "--prompts", tmp_path / "p.jsonl")
    assert "p.jsonl: 3 prompts are held out, too" in capsys.readouterr().err
    before, *steps, _ = ([ids for (ids,) in prompts] for prompts, _ in calls)
    assert before == [11, 12, 13, 14]
    assert all(sorted(step) == [3, 4, 5, 6] for step in steps)


def test_where_too_few_prompts_are_not_held_out_one_line_says_so(run, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": "w5"}\n' * 12)
    says = "p.jsonl has 12 prompts, 0 of them for training; --batch-size and --eval-"
    with one_line(capsys, says):
        opd.run(run, "out", "--prompts", tmp_path / "p.jsonl")


def test_a_resumed_run_continues_bit_for_bit(run, tmp_path):
    whole = run("whole", "--steps", 5, "--save-every", 2)
    save = tmp_path / "whole" / "step-2"
    rest = run("rest", "--steps", 5, "--resume", save)
    assert timeless(rest) == timeless(whole[2:])
    assert same_weights(tmp_path / "whole" / "student", tmp_path / "rest" / "student")
    without = run("other", "--steps", 5, "--student", save)
    assert timeless(without)[:3] != timeless(rest)


KILL = """
import os, signal, sys, opd
real, calls = opd.torch.save, []
def save(state, path):
    calls.append(path)
    if len(calls) == 2:  # in the middle of the second save
        open(path, "wb").write(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    real(state, path)
opd.torch.save = save
opd.run(opd.main, opd.parse_args(sys.argv[1:]))
"""


def test_a_kill_in_the_middle_of_a_save_leaves_the_earlier_save_whole(
    run, store, tmp_path
):
    program = [sys.executable, "-c", KILL]
    program += flags(store, tmp_path / "out", "--save-every", 1)
    killed = subprocess.run(program, cwd=HERE, capture_output=True, timeout=100)
    assert killed.returncode == -signal.SIGKILL
    saves = [path.name for path in (tmp_path / "out").glob("step-*")]
    assert sorted(saves) == ["step-1", "step-2.partial"]
    rest = run("rest", "--resume", tmp_path / "out" / "step-1")
    assert [line["step"] for line in rest] == [1, 2]
    assert not (tmp_path / "rest" / "student" / "state.pt").exists()


@pytest.mark.parametrize(
    "owner,name,error",
    [
        (torch, "save", RuntimeError("PytorchStreamWriter failed writing file")),
        (
            transformers.PreTrainedModel,
            "save_pretrained",
            safetensors.SafetensorError("No space left on device"),
        ),
    ],
)
def test_a_full_disk_gives_one_line_and_keeps_the_earlier_save(
    run, tmp_path, capsys, monkeypatch, owner, name, error
):
    # Every library has its own exception for it.
    real = getattr(owner, name)
    calls = []

    def full(*args, **more):
        calls.append(args)
        if len(calls) == 2:
            raise error
        return real(*args, **more)

    monkeypatch.setattr(owner, name, full)
    says = f"step-2 could not be written.*{type(error).__name__}: {error}"
    with one_line(capsys, says, status=1):
        opd.run(run, "out", "--save-every", 1)
    assert weights_of(tmp_path / "out" / "step-1")
    assert not (tmp_path / "out" / "step-2").exists()


def test_ctrl_c_saves_the_student_says_where_and_exits_with_130(
    run, store, tmp_path, monkeypatch, capsys
):
    real = opd.rollout
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:  # one batch of evaluation, then two steps
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(opd, "rollout", interrupted)
    student = tmp_path / "out" / "student"
    with pytest.raises(SystemExit) as stop:
        opd.run(run, "out")
    assert stop.value.code == 130
    warning, error = capsys.readouterr().err.strip().splitlines()[-2:]
    assert warning == f"warning: stopped; the student, as it is now, is in {student}"
    assert error == "error: interrupted; what had been saved is intact"
    assert not same_weights(store / "qwen3-student", student)


def test_a_loss_that_is_not_finite_stops_with_the_step_and_keeps_the_saves(
    run, tmp_path, capsys
):
    more = ["--lr", "1e9", "--steps", 30, "--save-every", 1]
    with pytest.raises(SystemExit) as stop:
        opd.run(run, "out", *more)
    assert stop.value.code == 1
    warning, error = capsys.readouterr().err.strip().splitlines()[-2:]
    student = tmp_path / "out" / "student"
    assert warning == f"warning: stopped; the student, as it is now, is in {student}"
    says = r"error: step \d+: (loss.*no step.*lower --lr|nan.*learning rate too high\?)"
    assert re.fullmatch(says, error)
    assert weights_of(tmp_path / "out" / "step-1")

    # The student as it was before that step: that of the last save.
    last = max(tmp_path.glob("out/step-*"), key=lambda path: int(path.name[5:]))
    student = load_weights(tmp_path / "out" / "student")
    assert torch.equal(student, load_weights(last))


def test_a_second_run_never_touches_the_first(
    run, store, tmp_path, capsys, monkeypatch
):
    run("out", "--steps", 1)
    before = load_weights(tmp_path / "out" / "student")
    with one_line(capsys, "--out .*is not empty"):
        opd.run(run, "out", "--seed", 9)
    assert torch.equal(before, load_weights(tmp_path / "out" / "student"))

    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        args = opd.parse_args(flags(store, "x", "--steps", 1))
        args.out = None
        opd.main(args)
    assert (tmp_path / "runs/opd-1/student").exists()
    assert (tmp_path / "runs/opd-2/student").exists()


# ======================================================================================
# Models that are refused, and why
# ======================================================================================


def edited(path, to, file="config.json", **changes):
    """A copy of a model's folder, with some entries of one JSON file changed."""
    shutil.copytree(path, to)
    change(to / file, **changes)
    return str(to)


def untied(seed=0):
    """A model whose head is a weight of its own."""
    return model_of("qwen3", seed, tie_word_embeddings=False)


def test_a_classifier_is_refused_as_its_head_would_be_random(tmp_path):
    config = untied().config
    classifier = transformers.Qwen3ForSequenceClassification(config)
    path = put(tmp_path / "m", classifier)
    with pytest.raises(ValueError, match=f"{path}.* no weight lm_head.weight"):
        opd.load_pair(path, path)


def test_a_base_model_without_its_head_is_refused(store, tmp_path):
    path = put(tmp_path / "m", untied().model)
    with pytest.raises(ValueError, match=f"--teacher {path}.* lm_head.weight"):
        opd.load_pair(f"{store}/qwen3-student", path)


def test_a_model_with_a_layer_too_few_is_refused(store, tmp_path):
    path = edited(
        store / "qwen3-student",
        tmp_path / "m",
        num_hidden_layers=3,
        layer_types=["full_attention"] * 3,
    )
    with pytest.raises(ValueError, match=r"--student .* no weight model\.layers\.2\."):
        opd.load_pair(path, path)


def test_weights_of_another_shape_are_refused(store, tmp_path):
    path = edited(store / "qwen3-student", tmp_path / "m", intermediate_size=48)
    with pytest.raises(ValueError, match=f"--student {path}.*mismatch"):
        opd.load_pair(path, path)


def test_weights_under_a_foreign_prefix_are_refused(tmp_path):
    path = put(tmp_path / "m", untied())
    file = tmp_path / "m" / "model.safetensors"
    weights = {}
    for name, weight in safetensors.torch.load_file(file).items():
        weights[f"wrapped.{name}"] = weight
    safetensors.torch.save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match="no weight lm_head.weight"):
        opd.load_pair(path, path)


def test_weights_that_the_model_does_not_use_get_a_warning(tmp_path, capsys):
    path = put(tmp_path / "m", model_of("qwen3"))
    file = tmp_path / "m" / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    weights["value_head.weight"] = torch.zeros(1, 16)
    safetensors.torch.save_file(weights, file, {"format": "pt"})
    opd.load_pair(path, path)
    warning = f"warning: --teacher {path}: .*value_head.weight"
    assert re.search(warning, capsys.readouterr().err)


# ---- The probe: can its logits be recomputed here?


def probe(config):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.data.add_(torch.randn_like(weight))  # no bias stays zero
    opd.check_logits(model.eval())


@pytest.mark.parametrize(
    "family,more",
    [
        ("gpt_neox", {"intermediate_size": 32}),
        ("opt", {"ffn_dim": 32, "word_embed_proj_dim": 16}),
        ("bloom", {}),
        ("mamba", {"state_size": 4}),
        ("granite", {"intermediate_size": 32, "logits_scaling": 1.0}),
        ("gemma2", {"intermediate_size": 32, "final_logit_softcapping": None}),
        (
            "qwen3_moe",
            {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        ),
    ],
)
def test_sound_families_pass_the_probe(family, more):
    # ALiBi, learned positions, a recurrent state, experts: none minds our padding.
    probe(transformers.AutoConfig.for_model(family, **SIZES, **more))


def test_a_family_that_caps_its_logits_is_refused_even_where_the_cap_does_nothing(
    tmp_path,
):
    # Training may push logits of 1 up to the cap. At 1 no number shows it.
    for scale, name in ((30.0, "large"), (0.01, "small")):
        model = model_of("gemma2", scale=scale, final_logit_softcapping=30.0)
        path = put(tmp_path / name, model)
        with pytest.raises(ValueError, match=f"{path}.*gemma2.*final_logit_softcap"):
            opd.load_pair(path, path)


@pytest.mark.parametrize(
    "family,name",
    [
        ("cohere", "logit_scale"),
        ("cohere2", "logit_scale"),
        ("granite", "logits_scaling"),
    ],
)
def test_a_family_that_scales_its_logits_is_refused(family, name):
    sizes = {**SIZES, "intermediate_size": 32, "pad_token_id": 0, name: 0.25}
    config = transformers.AutoConfig.for_model(family, **sizes)
    with pytest.raises(ValueError, match=f"{family} models .* by {name}"):
        probe(config)


def test_a_family_that_does_not_show_its_hidden_states_is_refused():
    sizes = {**SIZES, "intermediate_size": 32, "intermediate_size_mlp": 32}
    config = transformers.Llama4TextConfig(**sizes, num_local_experts=2)
    with pytest.raises(ValueError, match="llama4_text .* not show their hidden states"):
        probe(config)


def test_a_cap_in_a_nested_config_is_found(monkeypatch):
    model = model_of("qwen3")
    text_config = transformers.Gemma2Config(final_logit_softcapping=30.0)
    monkeypatch.setattr(
        type(model.config), "get_text_config", lambda self, **_: text_config
    )
    with pytest.raises(ValueError, match="gemma2 .* final_logit_softcapping"):
        opd.check_logits(model)


def test_rwkv_is_refused_as_it_reads_the_padding():
    config = transformers.RwkvConfig(
        vocab_size=V, hidden_size=16, num_hidden_layers=2, context_length=64
    )
    with pytest.raises(ValueError, match="rwkv model, recomputed .* left padding"):
        probe(config)


def test_a_convolution_with_bias_is_refused_as_it_reads_the_padding_next_to_it():
    sizes = {**SIZES, "intermediate_size": 32}
    sizes["layer_types"] = ["conv", "full_attention"]
    probe(transformers.Lfm2Config(**sizes, conv_bias=False))
    with pytest.raises(ValueError, match="lfm2 model, recomputed .* left padding"):
        probe(transformers.Lfm2Config(**sizes, conv_bias=True))


@pytest.mark.parametrize("family", ["Bert", "XLNet"])
def test_models_that_are_no_decoders_are_refused_with_a_reason_that_is_true(family):
    sizes = {"vocab_size": V, "num_hidden_layers": 2, "num_attention_heads": 2}
    if family == "Bert":
        config = transformers.BertConfig(hidden_size=16, intermediate_size=32, **sizes)
    else:
        config = transformers.XLNetConfig(vocab_size=V, d_model=16, n_layer=2, n_head=2)
    with pytest.raises(ValueError, match=f"{family.lower()} model, .* are not its own"):
        probe(config)


def test_a_model_that_gives_nan_is_refused(tmp_path):
    model = model_of("qwen3")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = math.nan
    path = put(tmp_path / "m", model)
    with pytest.raises(ValueError, match="are not its own"):
        opd.load_pair(path, path)


def test_a_model_whose_generation_differs_from_its_forward_pass_is_refused(
    store, monkeypatch
):
    # As with MiniMax, whose linear attention treats padding otherwise in its cache.
    real = transformers.Qwen3ForCausalLM.forward

    def other_with_a_cache(self, *args, **more):
        output = real(self, *args, **more)
        if more.get("use_cache") and output.logits.shape[1] == 1:
            output.logits = output.logits + torch.linspace(0, 0.05, V)
        return output

    monkeypatch.setattr(transformers.Qwen3ForCausalLM, "forward", other_with_a_cache)
    with pytest.raises(ValueError, match="qwen3 model, generated under left padding"):
        load(store)


def test_a_kernel_that_rounds_differently_is_no_wrong_family(store, monkeypatch):
    real = transformers.Qwen3ForCausalLM.forward

    def noisy(self, *args, **more):
        output = real(self, *args, **more)
        noise = 1e-5 * torch.randn_like(output.logits)
        output.logits = output.logits * (1 + noise)
        return output

    monkeypatch.setattr(transformers.Qwen3ForCausalLM, "forward", noisy)
    assert load(store).vocab_size == V


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 4},
        {"stop_strings": ["w5"]},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"repetition_penalty": 3.0, "min_new_tokens": 4, "do_sample": True},
        {"eos_token_id": list(range(V))},
    ],
)
def test_the_checkpoints_own_generation_settings_do_not_disturb_the_probe(
    store, tmp_path, settings
):
    file = "generation_config.json"
    path = edited(store / "qwen3-student", tmp_path / "m", file, **settings)
    pair = opd.load_pair(path, path)
    for name, value in settings.items():
        assert getattr(pair.student.generation_config, name) == value
    assert draw(pair).ids.max() < V


# ---- Students that cannot be trained, files that cannot be read


@pytest.mark.parametrize("fault", ["frozen", "bf16", "int8"])
def test_a_student_that_is_not_trainable_as_assumed_is_refused_at_once(
    store, monkeypatch, fault
):
    real = opd.load_model

    def with_a_fault(flag, *more):  # as an adapter, or quantised layers, would be
        model, *rest = real(flag, *more)
        weight = model.model.norm.weight
        weight.requires_grad_(False)
        if fault == "bf16":
            weight.data = weight.data.bfloat16()
            weight.requires_grad_()
        if fault == "int8":
            weight.data = weight.data.to(torch.int8)
        return model, *rest

    monkeypatch.setattr(opd, "load_model", with_a_fault)
    says = "--student .*/qwen3-student: model.norm.weight cannot be trained"
    with pytest.raises(ValueError, match=says):
        load(store)


def test_two_models_in_memory_make_the_pair_that_their_files_make(store):
    loaded = load(store)
    teacher = loaded.teacher.requires_grad_(True)
    made = opd.make_pair(loaded.student, teacher, loaded.tokenizer, temperature=0.7)
    assert made.end_ids == loaded.end_ids != []
    assert made.vocab_size == loaded.vocab_size
    assert made.temperature == 0.7
    assert not any(weight.requires_grad for weight in made.teacher.parameters())


@pytest.mark.parametrize(
    "fault", ["frozen", "bf16", "capped", "no transformer", "twice"]
)
def test_two_models_in_memory_are_checked_as_those_of_files_are(store, fault):
    pair = load(store)
    weight = pair.student.model.norm.weight
    says = "the student: model.norm.weight cannot be trained"
    if fault == "frozen":
        weight.requires_grad_(False)
    if fault == "bf16":
        pair.student.bfloat16()
        says = "the student: model.* cannot be trained"
    if fault == "no transformer":
        pair = pair._replace(teacher=torch.nn.Linear(2, 2))
        says = "Linear is no language model"
    if fault == "twice":
        pair = pair._replace(teacher=pair.student)
        says = "one object"
    if fault == "capped":
        pair.teacher.config.final_logit_softcapping = 5.0
        says = "final_logit_softcapping"
    with pytest.raises(opd.InputError, match=says):
        opd.make_pair(pair.student, pair.teacher, pair.tokenizer)


def test_the_teacher_is_frozen_and_the_student_is_not(store):
    pair = load(store)
    assert all(weight.requires_grad for weight in pair.student.parameters())
    assert not any(weight.requires_grad for weight in pair.teacher.parameters())
    assert not pair.student.training and not pair.teacher.training


def cut_in_half(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:4000])


def git_lfs_pointer(folder):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (folder / "model.safetensors").write_text(text)


def config_that_raises(folder):
    change(folder / "config.json", num_attention_heads="two")


def quantised(folder):
    method = {"quant_method": "gptq", "bits": 4}
    change(folder / "config.json", quantization_config=method)


def an_adapter_alone(folder):
    (folder / "config.json").unlink()
    (folder / "model.safetensors").unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def pickled(folder):
    torch.save(weights_of(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def with_code(folder):
    names = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    change(folder / "config.json", model_type="own", auto_map=names)
    (folder / "code.py").write_text("raise RuntimeError('it was run')\n")


@pytest.mark.parametrize(
    "damage,says",
    [
        (cut_in_half, "SafetensorError"),
        (git_lfs_pointer, "SafetensorError"),
        (config_that_raises, "num_attention_heads"),
        (quantised, "ImportError"),
        (an_adapter_alone, "config.json"),
        (pickled, "safetensors"),
        (with_code, "custom code"),
    ],
)
def test_a_model_folder_that_cannot_be_loaded_gets_one_line_with_flag_and_path(
    run, store, tmp_path, capsys, damage, says
):
    shutil.copytree(store / "qwen3-student", tmp_path / "m")
    damage(tmp_path / "m")
    with one_line(capsys, f"^error: --teacher {tmp_path}/m on cpu: .*{says}"):
        opd.run(run, "out", "--teacher", tmp_path / "m")
    assert not (tmp_path / "out").exists()


# ---- Two vocabularies


def test_different_tokenizers_are_refused_with_a_token_that_differs(store, tmp_path):
    other = put(tmp_path / "other", model_of("qwen3"), tokenizer_of(V - 1))
    with pytest.raises(ValueError, match=f"'w{V - 1}' has the id {V - 1} .* and None"):
        opd.load_pair(f"{store}/qwen3-student", other)


def with_added(token, **special):
    tokenizer = tokenizer_of(**special)
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    return tokenizer


def test_tokenizers_that_differ_in_special_tokens_alone_get_one_warning(
    store, tmp_path, capsys
):
    path = put(tmp_path / "t", model_of("qwen3"), with_added("<think>"))
    pair = opd.load_pair(f"{store}/qwen3-student", path)
    (warning,) = re.findall("warning: .*", capsys.readouterr().err)
    assert "'<think>' has the id None in the student's tokenizer and 64" in warning
    assert pair.vocab_size == V


@pytest.mark.parametrize("owner", ["student", "teacher"])
@pytest.mark.parametrize(
    "special", [{"pad_token": "[PAD]"}, {"pad_token": None, "eos_token": "<EOT>"}]
)
def test_a_pad_or_an_end_that_only_one_model_has_is_harmless(
    store, tmp_path, owner, special
):
    # Its id, 64, is beyond the rows of the other model.
    own = model_of("qwen3", vocab=V + 1, seed=3)
    put(tmp_path / "m", own, tokenizer_of(**special))
    paths = {role: f"{store}/qwen3-{role}" for role in ("student", "teacher")}
    paths[owner] = str(tmp_path / "m")
    pair = opd.load_pair(paths["student"], paths["teacher"])
    batch = draw(pair)
    assert pair.vocab_size == V
    scores = scores_of(pair, batch, 4, 2)
    for values in scores.values():
        assert values[batch.mask].isfinite().all()
    is_end = torch.isin(batch.responses, torch.tensor(pair.end_ids))
    assert batch.responses[batch.mask & ~is_end].max() < V


@pytest.mark.parametrize("rows", [(V, V), (V + 9, V), (V, V + 9)])
def test_an_only_end_beyond_the_shared_rows_gets_a_warning_and_all_run_to_the_limit(
    tmp_path, capsys, rows
):
    paths = []
    for seed, vocab in enumerate(rows):
        model = model_of("qwen3", seed, vocab=vocab)
        model.config.eos_token_id = model.generation_config.eos_token_id = V
        tokenizer = tokenizer_of(eos_token="<EOT>", pad_token=None)
        paths.append(put(tmp_path / str(seed), model, tokenizer))
    pair = opd.load_pair(*paths)
    assert pair.end_ids == []
    warning = "warning: no token that ends a response is known to both; all run to the "
    assert capsys.readouterr().err.count(warning) == 1
    batch = draw(pair)
    assert batch.truncated.all() and batch.mask.all()
    assert batch.responses.max() < V


def test_an_end_id_of_minus_one_is_none(store, tmp_path):
    file = "generation_config.json"
    path = edited(store / "qwen3-student", tmp_path / "m", file, eos_token_id=-1)
    pair = opd.load_pair(path, path)
    assert pair.end_ids == [0]  # the tokenizer's
    assert draw(pair).ids.min() == 0


# ---- What belongs to a saved student, and to a run that goes on


def test_the_saved_student_keeps_its_own_generation_config(run, store, tmp_path):
    # Greedy with a temperature is no valid setting: many checkpoints have it.
    own = {
        "do_sample": False,
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 5,
        "repetition_penalty": 1.5,
        "eos_token_id": [0, 2],
    }
    file = "generation_config.json"
    path = edited(store / "qwen3-student", tmp_path / "m", file, **own)
    run("out", "--student", path, "--steps", 1)
    saved = json.loads((tmp_path / "out" / "student" / file).read_text())
    assert {name: saved[name] for name in own} == own


def test_that_the_saved_student_is_float32_is_said_where_it_is(run, tmp_path, capsys):
    student = put(tmp_path / "bf16", model_of("qwen3").bfloat16())
    run("out", "--student", student, "--steps", 1)
    saved = safetensors.torch.load_file(tmp_path / "out/student/model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    assert "student/ (float32)" in capsys.readouterr().out


@pytest.fixture(scope="session")
def saved(store, tmp_path_factory):
    """A run's save of step 2."""
    out = tmp_path_factory.mktemp("saved") / "out"
    opd.main(opd.parse_args(flags(store, out, "--save-every", 2)))
    return out / "step-2"


@pytest.mark.parametrize(
    "more,says",
    [
        ("--temperature 0.5", "--temperature was 1.0 before and is 0.5 now"),
        ("--batch-size 2", "--batch-size was 4 before and is 2 now"),
        ("--lr 1e-4", "--lr was 0.001 before and is 0.0001 now"),
        ("--select tip", "--select was teachability before and is tip now"),
        ("--budget 0.5", "--budget was 0.1"),
        ("--loss sampled", "--loss was reverse_kl"),
        ("--top-k 3", "--top-k was 16"),
        ("--max-new-tokens 5", "--max-new-tokens was 6"),
        ("--seed 1", "--seed was 0"),
        ("--student llama", "--student was .*qwen3-student"),
        ("--teacher llama", "--teacher was .*qwen3-teacher"),
        ("--prompts other.jsonl", "--prompts, or --eval-prompts, differ"),
        ("--eval-prompts 3", "--prompts, or --eval-prompts, differ"),
        ("--steps 2", "--steps 2: that save is of step 2"),
    ],
)
def test_a_run_that_would_go_on_otherwise_is_refused_with_the_flag(
    run, store, saved, loaded, tmp_path, capsys, monkeypatch, more, says
):
    monkeypatch.setattr(opd, "load_pair", lambda *_: loaded)  # once for all
    prompts_file(tmp_path / "other.jsonl", 13)
    flag, value = more.split()
    if value == "llama":
        value = f"{store}/llama{flag.replace('--', '-')}"
    if flag == "--prompts":
        value = tmp_path / value
    with one_line(capsys, says):
        opd.run(run, "out", "--resume", saved, flag, value)
    assert not (tmp_path / "out").exists()


def test_what_does_not_change_the_run_may_differ_when_it_goes_on(run, saved):
    more = ["--steps", 4, "--micro-batch-size", 2, "--save-every", 3]
    log = run("out", "--resume", saved, *more)
    assert [line["step"] for line in log] == [2, 3]


def test_a_folder_without_state_is_refused_before_any_model_is_loaded(
    run, saved, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(opd, "load_model", None)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "state.pt").write_bytes(b"half")
    for folder in (saved.parent / "student", tmp_path / "half", tmp_path / "none"):
        with one_line(capsys, f"--resume {folder}: no state.pt of this version"):
            opd.run(run, "out", "--resume", folder)
        assert not (tmp_path / "out").exists()


def test_a_save_with_a_flag_that_is_no_more_is_refused_with_the_flag():
    args = opd.parse_args([])
    settings = {**opd.resume_settings(args, []), "old_flag": 3}
    with pytest.raises(ValueError, match="--old-flag was 3 before and is None now"):
        opd.check_state({"settings": settings, "step": 1}, args, [])


# ---- How long prompt and response may be


def check_limit(pair, limit):
    opd.check_prompt(pair, [5, 6], limit - 2)
    with pytest.raises(ValueError, match=f"2 tokens.*more than the {limit} of the mod"):
        opd.check_prompt(pair, [5, 6], limit - 1)


@pytest.mark.parametrize(
    "name,config",
    [
        ("max_position_embeddings", transformers.LlamaConfig),
        ("n_positions", transformers.GPT2Config),
        ("max_seq_len", transformers.MptConfig),
    ],
)
def test_the_length_limit_is_found_under_each_of_its_names(store, name, config):
    pair = load(store)
    pair.student.config = config(**{name: 99})
    pair.teacher.config = config(**{name: 40})
    check_limit(pair, 40)
    pair.teacher.config = config(**{name: 99})
    check_limit(pair, 99)


def test_the_length_limit_of_a_nested_config_is_found(store):
    text = {"max_position_embeddings": 30, "hidden_size": 16}
    pair = load(store)
    pair.teacher.config = transformers.Gemma3Config(text_config=text)
    check_limit(pair, 30)


def test_no_length_limit_is_no_limit(store):
    pair = load(store)
    for model in (pair.student, pair.teacher):
        model.config = transformers.BloomConfig()
    opd.check_prompt(pair, [5, 6], 10**9)


def test_a_prompt_with_a_token_that_a_model_does_not_know_is_refused(store):
    pair = load(store)
    known = len(pair.student.get_input_embeddings().weight)
    opd.rollout(pair, [[known - 1]], 2)
    with pytest.raises(ValueError, match="one of the models does not know"):
        opd.rollout(pair, [[5], [known]], 2)


# ======================================================================================
# Prompts and answers
# ======================================================================================


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% for tool in tools or [] %}{{ tool['name'] }} {% endfor %}"
    "{% if enable_thinking %}w9{% else %}w8{% endif %}"
)


@pytest.fixture(scope="session")
def chat(loaded):
    """A pair whose tokenizer adds <s> before a text and has a chat template."""
    tokenizer = tokenizer_of(bos_token="<s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.chat_template = TEMPLATE
    return loaded._replace(tokenizer=tokenizer)


def read(tmp_path, pair, *records, max_new_tokens=6):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return opd.read_prompts(path, pair, max_new_tokens)


def message(content, role="w3"):  # w3, so that the role is a word of the vocabulary
    return {"role": role, "content": content}


def test_bos_is_added_once_whoever_brings_it(chat, tmp_path):
    chat.tokenizer.chat_template = "<s> " + TEMPLATE
    examples = read(
        tmp_path,
        chat,
        {"prompt": "w5 w6", "answer": "w7"},
        {"prompt": "<s> w5 w6"},
        {"messages": [message("w5 w6")]},
    )
    chat.tokenizer.chat_template = TEMPLATE
    assert examples == [
        {"prompt": [1, 5, 6], "answer": "w7"},
        {"prompt": [1, 5, 6], "answer": None},
        {"prompt": [1, 3, 5, 6, 8], "answer": None},
    ]


def test_an_eos_that_the_tokenizer_appends_is_taken_off_and_one_of_the_text_is_not(
    loaded, tmp_path
):
    # The student would write on after the end.
    tokenizer = tokenizer_of()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 0)]
    )
    pair = loaded._replace(tokenizer=tokenizer)
    assert tokenizer("w5").input_ids == [5, 0]
    (example,) = read(tmp_path, pair, {"prompt": "w5 w6"})
    assert example["prompt"] == [5, 6]

    pair.tokenizer.chat_template = TEMPLATE.replace("w8", "<eos>")
    (example,) = read(tmp_path, pair, {"messages": [message("w5")]})
    assert example["prompt"] == [3, 5, 0]


def test_the_template_is_given_the_records_tools_and_settings(chat, tmp_path):
    messages = [message("w5")]
    examples = read(
        tmp_path,
        chat,
        {"messages": messages},
        {"messages": messages, "chat_template_kwargs": {"enable_thinking": True}},
        {"messages": messages, "chat_template_kwargs": None, "tools": None},
        {"messages": messages, "tools": [{"name": "w20"}]},
    )
    prompts = [example["prompt"] for example in examples]
    assert prompts == [[3, 5, 8], [3, 5, 9], [3, 5, 8], [3, 5, 20, 8]]


def test_keys_that_are_not_used_are_named_once(chat, tmp_path, capsys):
    records = [{"prompt": "w5", "tools": [], "system": "w6"}] * 3
    records.append({"messages": [message("w5")], "id": 7, "answer": "w9"})
    read(tmp_path, chat, *records)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.endswith("p.jsonl: these keys are not used: id, system, tools\n")


@pytest.mark.parametrize(
    "record,says",
    [
        ({"messages": [{"from": "human", "value": "w5"}]}, "`role` and `content`"),
        ({"messages": [message("w5"), message("w6", "assistant")]}, "the assistant's"),
        ({"messages": [[message("w5")]]}, "`role` and `content`"),
        ({"messages": None}, "`messages` must be a list"),
        ({"messages": []}, "`messages` must be a list"),
        ({"messages": "w5"}, "`messages` must be a list"),
        ({"messages": {"role": "user", "content": "w5"}}, "`messages` must be a list"),
        ({"messages": [message(None)]}, "has no `content`"),
        ({"messages": [{"role": "user"}]}, "has no `content`"),
        ({"messages": [message("w5")], "chat_template_kwargs": 5}, "TypeError"),
        ({"messages": [message("w5")], "prompt": "w5"}, "either `prompt` or"),
        ({"prompt": None}, "`prompt` must be a text"),
        ({"prompt": ["w5"]}, "`prompt` must be a text"),
        ({"prompt": [message("w5")]}, "`prompt` must be a text"),
        ({"prompt": "w5", "answer": True}, "`answer` must be"),
        ({"prompt": "w5", "answer": ["w5"]}, "`answer` must be"),
        ({"prompt": "w5", "answer": " "}, "empty answer"),
        ({"prompt": "w5", "answer": ""}, "empty answer"),
        ({"prompt": "w5", "answer": "."}, "empty answer"),
        ({"prompt": "w5", "answer": "**"}, "empty answer"),
    ],
)
def test_a_record_that_would_be_misread_is_refused_with_its_line(
    chat, tmp_path, record, says
):
    with pytest.raises(ValueError, match=f"p.jsonl, line 2: .*{says}"):
        read(tmp_path, chat, {"prompt": "w5"}, record)


def test_a_token_that_only_one_model_knows_is_refused_with_its_line(loaded, tmp_path):
    pair = loaded._replace(tokenizer=with_added("<think>"))
    with pytest.raises(ValueError, match="line 2: .* does not know '<think>'"):
        read(tmp_path, pair, {"prompt": "w5"}, {"prompt": "w5 <think> w6"})


def test_a_prompt_and_its_response_may_just_fill_the_models_length(loaded, tmp_path):
    # 64 in all, and 6 for the response.
    record = {"prompt": " ".join(["w5"] * 58)}
    (example,) = read(tmp_path, loaded, record)
    assert len(example["prompt"]) == 58
    record["prompt"] += " w5"
    with pytest.raises(ValueError, match="line 1: .* 59 tokens; .* 6 .* the 64 of"):
        read(tmp_path, loaded, record)


def test_a_byte_order_mark_blank_lines_and_windows_line_ends_do_not_matter(
    loaded, tmp_path
):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "w5"}\r\n\r\n{"prompt": "w6"}\r\n')
    examples = opd.read_prompts(path, loaded, 6)
    assert [example["prompt"] for example in examples] == [[5], [6]]


def test_answers_may_be_json_numbers(loaded, tmp_path):
    records = [{"prompt": "w5", "answer": answer} for answer in (7, 0.5, 1e-7, 0)]
    examples = read(tmp_path, loaded, *records)
    for example, response in zip(examples, ("is 7.", "1/2", "0.0000001", "-0")):
        assert opd.is_right(response, example["answer"])


def test_that_an_answer_has_several_numbers_is_said_once(loaded, tmp_path, capsys):
    pair = loaded
    capsys.readouterr()
    single = ("7", "3/4", "1 234", "Apollo 11", "Paris")
    records = [{"prompt": "w5", "answer": answer} for answer in single]
    read(tmp_path, pair, *records)
    assert capsys.readouterr().err == ""
    records += [{"prompt": "w5", "answer": "(3, 4)"}] * 2
    read(tmp_path, pair, *records)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "p.jsonl, line 6: the answer has several numbers" in error


@pytest.mark.parametrize(
    "response,answer,right",
    [
        # one number: the last number of the response must be equal
        ("First 7, then 9.", "9", True),
        ("9 or 10", "9", False),
        ("no number at all", "9", False),
        ("", "9", False),
        ("nine 9s", "9", True),
        ("So it makes 1,234.", "1234", True),
        ("1 234", "1234", True),
        ("1234", "1 234", True),
        ("1\u00a0234\u202f567", "1234567", True),
        ("12,34", "1234", False),
        ("1, 234", "1234", False),
        ("1,2345", "12345", False),
        (r"\boxed{42}", "42", True),
        ("$42$", "42", True),
        ("**42**", "42", True),
        ("42", "$42$.", True),
        ("0.50 litres", "0.5", True),
        (".5", "0.5", True),
        ("0.5", ".5", True),
        ("5", ".5", False),
        (".5", "5", False),
        ("1.5", "5", False),
        ("from 5 to -3", "-3", True),
        ("from 5 to 3", "-3", False),
        ("from 5 to -3", "3", False),
        ("\u22125", "-5", True),
        ("-5", "\u22125", True),
        ("5", "\u22125", False),
        ("\u22125", "5", False),
        ("+5", "5", True),
        ("5-3", "3", True),
        ("3/4", "3/4", True),
        ("6/8", "3/4", True),
        ("0.75", "3/4", True),
        ("1/4", "3/4", False),
        ("4", "3/4", False),
        ("3/4", "4", False),
        ("-1/2", "1/2", False),
        ("1/2", "-1/2", False),
        ("-1/2", "-1/2", True),
        ("1/0", "1", False),
        ("1", "1/0", False),
        ("1/0", "1/0", True),  # as a word
        ("1e5", "100000", True),
        ("1e-5", "1e5", False),
        ("1e5", "1e-5", False),
        ("1e-5", "0.00001", True),
        ("5", "1e5", False),
        ("gpt4", "4", False),
        ("version 1.2.3", "3", False),
        # any other answer: the last words of the response must be its words
        ("It is Paris.", "Paris", True),
        ("It is **Paris**", "Paris", True),
        ("It is Paris", "**Paris**.", True),
        ("Paris is large", "Paris", False),
        ("", "Paris", False),
        ("the answer is (B)", "B", True),
        ("the answer is B.", "(B)", True),
        ("So it is NASA", "A", False),
        ("So it is A", "NASA", False),
        ("a casino", "no", False),
        ("no", "no", True),
        ("at 12:30", "11:30", False),
        ("at 11:30.", "11:30", True),
        ("(1, 4)", "(3, 4)", False),
        ("(3, 4)", "(3, 4)", True),
        ("Gemini 11", "Apollo 11", False),
        ("It was Apollo 11.", "Apollo 11", True),
        ("11", "Apollo 11", False),
        ("New\nYork", "New York", True),
        ("York", "New York", False),
    ],
)
def test_an_answer_is_compared_as_a_number_if_it_is_one_and_else_as_last_words(
    response, answer, right
):
    assert opd.is_right(response, answer) is right


# ======================================================================================
# Bad input
# ======================================================================================


@pytest.mark.parametrize(
    "more,says",
    [
        ("--budget 0", "above 0"),
        ("--budget 1.5", r"in \(0, 1\]"),
        ("--budget nan", "above 0"),
        ("--top-k 0", "1 or more"),
        ("--temperature 0", "above 0"),
        ("--temperature inf", "above 0"),
        ("--select best", "teachability"),
        ("--loss kl", "reverse_kl"),
        ("--steps 0", "1 or more"),
        ("--save-every 0", "1 or more"),
        ("--eval-prompts 0", "1 or more"),
        ("--micro-batch-size 0", "1 or more"),
        ("--max-new-tokens -1", "1 or more"),
        ("--lr -1", "above 0"),
        ("--batch-size x", "int"),
        ("--seed -3", "from 0 to 2147483647"),
        ("--seed 2147483648", "from 0 to 2147483647"),
        ("--frobnicate", ""),
    ],
)
def test_a_bad_flag_gets_one_line_that_names_it(store, tmp_path, capsys, more, says):
    with one_line(capsys, f"^error: .*{more.split()[0]}.*{says}"):
        opd.parse_args(flags(store, tmp_path / "out", *more.split()))


@pytest.mark.parametrize("given", ["--student x", "--teacher x --prompts y"])
def test_half_a_pair_is_refused(capsys, given):
    with one_line(capsys, "--student, --teacher and --prompts go together"):
        opd.parse_args(given.split())


@pytest.mark.parametrize(
    "content,says",
    [
        ("", "has 0 prompts, 0 of them for training; --batch-size and --eval-"),
        ('{"prompt": "w5"}\n' * 7, "has 7 prompts, 0 of them for"),
        ('{"prompt": "w5"}\nnot json\n', "line 2: JSONDecodeError"),
        ("[1]\n", "line 1: give an object"),
        ('{"text": "w5"}\n', "line 1: give an object"),
        ('{"prompt": 5}\n', "line 1: `prompt` must be a text"),
        ('{"prompt": "w5"}\n{"prompt": ""}\n', "line 2: the prompt has no token"),
        (json.dumps({"prompt": "w5 " * 60}) + "\n", "line 1: .* 60 tokens"),
        (b"\xff\xfe", "UTF-16"),
        ('{"prompt": "w5"}\n'.encode("utf-16"), "UTF-16"),
        (gzip.compress(b'{"prompt": "w5"}\n'), "compressed"),
        (
            '{"messages": [{"role": "user", "content": "w5"}]}\n',
            "line 1: .*chat.?template",
        ),
        ('{"prompt": "w5", "answer": " "}\n', "line 1: empty answer"),
    ],
)
def test_bad_prompts_get_one_line_with_the_place_and_leave_nothing(
    run, loaded, tmp_path, monkeypatch, content, says, capsys
):
    monkeypatch.setattr(opd, "load_pair", lambda *_: loaded)  # once for all
    if isinstance(content, str):
        content = content.encode()
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with one_line(capsys, f"^error: .*{path}.*{says}"):
        opd.run(run, "out", "--prompts", path)
    assert not (tmp_path / "out").exists()


def test_missing_paths_get_one_line_that_names_flag_and_path(run, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    for flag, path in (
        ("--student", tmp_path / "none"),
        ("--teacher", tmp_path / "file"),
        ("--prompts", "none.jsonl"),
        ("--prompts", tmp_path),
        ("--out", tmp_path / "file" / "out"),
        ("--out", tmp_path / "file"),
        ("--resume", tmp_path / "none"),
    ):
        with one_line(capsys, f"^error: {flag} {path}"):
            opd.run(run, "out", flag, path)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["abacus", "cuda:99"])
def test_a_device_that_is_not_there_gets_one_line_that_names_it(run, capsys, device):
    with one_line(capsys, f"^error: --student .* on {device}: "):
        opd.run(run, "out", "--device", device)


# ======================================================================================
# The terminal
# ======================================================================================


def accented_pair(folder):
    """A model whose words are written with a letter that ASCII and Latin-1 lack."""
    tokenizer = tokenizer_of(word="ŵ")
    lines = [json.dumps({"prompt": f"ŵ{3 + i}"}) + "\n" for i in range(12)]
    (folder / "p.jsonl").write_text("".join(lines))
    model = put(folder / "m", model_of("qwen3"), tokenizer)
    return ["--student", model, "--teacher", model, "--prompts", folder / "p.jsonl"]


@pytest.mark.parametrize(
    "encoding,shown", [("ascii", "?5"), ("latin-1", "?5"), ("utf-8", "ŵ5")]
)
def test_a_terminal_that_lacks_a_letter_shows_another_and_all_files_are_there(
    run, tmp_path, monkeypatch, encoding, shown
):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)  # strict
    more = accented_pair(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        opd.run(run, "out", *more, "--steps", 1)
    terminal.flush()
    printed = terminal.buffer.getvalue().decode(encoding)
    sample = re.search(r"^sample: .*", printed, re.M)[0]
    assert shown[0] + "11" in sample  # the first of the held-out prompts
    assert "held-out prompts" in printed
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["log.jsonl", "student", "summary.json"]


def test_a_reader_of_the_first_line_alone_does_not_end_the_training(store, tmp_path):
    program = [sys.executable, HERE / "opd.py", *flags(store, tmp_path / "out")]
    line = " ".join(map(str, program)) + " | head -1; echo ${PIPESTATUS[0]}"
    result = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=100
    )
    sample, status = result.stdout.splitlines()
    assert sample.startswith("sample: ")
    assert status == "0"
    assert "Exception" not in result.stderr and "Traceback" not in result.stderr
    log = (tmp_path / "out" / "log.jsonl").read_text()
    assert log.count("\n") == 3
    assert weights_of(tmp_path / "out" / "student")
    assert summary_of(tmp_path / "out")["after"]


@pytest.mark.parametrize(
    "error,status,says",
    [
        (opd.InputError("no such\nthing"), 2, "thing"),
        (OSError("disk"), 1, "disk"),
        (FloatingPointError("step 3"), 1, "step 3"),
        (torch.OutOfMemoryError("2 GiB"), 1, "--micro-batch-size"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_stops_the_program_from_outside_gets_a_line_and_a_status(
    capsys, error, status, says
):
    def program():
        raise error

    with one_line(capsys, says, status):
        opd.run(program)


@pytest.mark.parametrize("fault", [ZeroDivisionError, KeyError, ValueError])
def test_a_fault_of_the_programs_own_keeps_its_traceback(fault):
    def program():  # a ValueError is what unpacking too many values raises
        raise fault("too many values to unpack")

    with pytest.raises(fault):
        opd.run(program)


# ======================================================================================
# The demo
# ======================================================================================


def test_the_problems_of_the_demo_add_up_unless_their_writer_slips():
    clock = list(range(1, 25)) * 2
    wrong = Counter()
    for seed in range(400):
        dice = random.Random(seed)
        start = dice.randint(1, 24)
        step = dice.randint(2, 9)
        for slips in (0.0, 0.7):
            prompt, response, answer = opd.problem("bus", start, step, dice, slips)
            assert prompt == f"A bus starts at {start} and returns every {step} hours:"
            pattern = r"(\w+) \w+ adds (\d+) to (\d+) and gets (\d+)\."
            sums = re.findall(pattern, response)
            ordinals = [ordinal for ordinal, *_ in sums]
            assert ordinals == ["First", "Second", "Third", "Fourth"]
            hour = start
            for _, added, before, total in sums:
                assert (int(added), int(before)) == (step, hour)
                right = clock[hour + step - 1]
                hour = int(total)
                assert hour in (right, clock[right])  # at most one too high
                wrong[slips] += hour != right
            assert response.endswith(f" So it ends at {hour}.")
            assert int(answer) == clock[clock[start + 2 * step - 1] + 2 * step - 1]
            assert slips or opd.is_right(response, answer)
    assert wrong[0.0] == 0
    assert 0.25 < wrong[0.7] / 1600 < 0.45  # 0.7 of the hard half


def test_the_house_style_is_a_matter_of_one_word():
    _, plain, answer = opd.problem("bus", 5, 7, random.Random(0), style=0)
    _, house, same = opd.problem("bus", 5, 7, random.Random(0), style=1)
    assert house.count("obtains") == 4
    assert house.replace("obtains", "gets") == plain
    assert answer == same == "9"  # 5 + 28 = 33, and 33 - 24 = 9
    assert opd.is_right(plain, answer)


def interrupted(*_):
    raise KeyboardInterrupt


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with the demo's pair, after two steps of training for each model."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(opd, "tqdm", lambda steps, **_: list(steps)[:2])
        patch.setattr(opd, "show", print)

        with patch.context() as stopped:
            stopped.setattr(Path, "write_text", interrupted)
            with pytest.raises(KeyboardInterrupt):
                opd.build_pair()
        assert not opd.PAIR.exists()

        opd.check_demo()
    return folder


def test_the_demo_is_built_once_and_an_interrupted_build_is_not_mistaken_for_one(
    world, monkeypatch
):
    monkeypatch.chdir(world)
    monkeypatch.setattr(opd, "ByteLevelBPETokenizer", interrupted)  # not again
    pair, training, held_out = opd.prepare(opd.parse_args([]))
    assert len(training) == 576
    assert len(held_out) == 192

    cases = []
    for example in training + held_out:
        text = pair.tokenizer.decode(example["prompt"])
        cases.append(tuple(re.findall(r"\d+", text)))
    assert len(set(cases)) == 192  # four things for every sum
    assert not set(cases[:576]) & set(cases[576:])
    for word in ("gets", "obtains", *map(str, range(1, 25))):
        assert len(pair.tokenizer.tokenize(" " + word)) == 1


@pytest.mark.parametrize("part", ["student", "teacher", "prompts.jsonl", "world"])
def test_a_pair_that_lacks_a_part_gets_a_line_that_says_to_delete_it(
    world, tmp_path, monkeypatch, capsys, part
):
    # Also that of an earlier version, which had no mark of its world.
    shutil.copytree(world / opd.PAIR, tmp_path / opd.PAIR)
    (tmp_path / opd.PAIR / part).rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    with one_line(capsys, f"^error: {opd.PAIR} has no {part}: delete the folder"):
        opd.run(opd.main, opd.parse_args([]))
    assert not Path("runs/opd-1").exists()


def test_a_pair_of_another_version_gets_a_line_that_says_to_delete_it(
    world, tmp_path, monkeypatch, capsys
):
    shutil.copytree(world / opd.PAIR, tmp_path / opd.PAIR)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(opd, "problem", lambda thing: thing)  # other code, other world
    with one_line(capsys, f"^error: {opd.PAIR} was built by another version.*delete"):
        opd.run(opd.main, opd.parse_args([]))


def test_the_demos_settings_hold_without_a_pair_and_give_way_to_flags():
    args = opd.parse_args(["--steps", "7"])
    assert (args.steps, args.lr, args.batch_size) == (7, 3e-4, 12)
    args = opd.parse_args("--student a --teacher b --prompts c".split())
    assert (args.steps, args.lr, args.batch_size) == (200, 1e-6, 8)


# ======================================================================================
# diagnose.py: the statistics
# ======================================================================================

MEASURES = ("forward_kl", "reverse_kl", "overlap")


def clusters(n=12, each=5, seed=0):  # -> a generator, the context of each position
    return np.random.default_rng(seed), np.repeat(np.arange(n), each)


def drawn(context, draws, seed):  # -> [positions of a draw]
    """The bootstrap's draws, spelled out."""
    generator = np.random.default_rng(seed)
    contexts = context.max() + 1
    found = []
    for _ in range(draws):
        at = []
        for number in generator.integers(contexts, size=contexts):
            at += np.flatnonzero(context == number).tolist()
        found.append(at)
    return found


def data_of(gains, **kept):  # with groups {name: bool} for columns of `kept`
    return diagnose.Columns(gains, standardized={}, ranks={}, groups=kept)


def bootstrapped(table_of, context, count, seed):  # -> the rows of one table
    """diagnose.bootstrap with a function of positions in place of one of data."""
    columns = {"position": np.arange(len(context))}
    data = data_of(columns)

    def make_tables(data):
        return {"title": table_of(data.gains["position"])}

    return diagnose.bootstrap(make_tables, data, context, count, seed)["title"]


def z(values):
    return (values - values.mean()) / values.std()


def test_a_draw_has_as_many_contexts_as_the_sample_and_all_their_positions():
    # Contexts of 1 to 5 positions, whose positions do not stand together.
    generator = np.random.default_rng(0)
    context = generator.permutation(np.repeat(np.arange(5), [1, 2, 3, 4, 5]))
    received = []  # how often each position stands in a draw, first in the sample

    def count(positions):
        received.append(Counter(positions.tolist()))
        return {"row": {"column": len(positions)}}

    found = bootstrapped(count, context, 300, seed=1)["row"]["column"]
    assert found["value"] == 15
    assert received.pop(0) == Counter(range(15))
    assert len(received) == 300
    sizes = [sum(times.values()) for times in received]
    for name, share in (("low", 0.025), ("high", 0.975)):
        assert found[name] == pytest.approx(quantile(sizes, share), abs=0.5)

    frequencies = []
    for times in received:
        drawn_contexts = 0
        for number in range(5):
            members = np.flatnonzero(context == number)
            frequency = times[members[0]]
            assert all(times[i] == frequency for i in members)
            drawn_contexts += frequency
            frequencies.append(frequency)
        assert drawn_contexts == 5

    # Each draw lacks a third of the contexts: (4 / 5) ** 5. Some it has several times.
    assert frequencies.count(0) / len(frequencies) == pytest.approx(0.33, abs=0.05)
    assert max(frequencies) >= 4


def test_the_bootstrap_resamples_contexts_not_positions():
    # 20 contexts of 50 equal values: 20 independent ones, though 1000 positions.
    generator, context = clusters(20, 50)
    values = generator.normal(size=20)[context]

    def mean(positions):
        return {"row": {"mean": values[positions].mean()}}

    table = bootstrapped(mean, context, 2000, seed=1)
    assert bootstrapped(mean, context, 2000, seed=1) == table
    assert bootstrapped(mean, context, 2000, seed=2) != table
    found = table["row"]["mean"]
    assert found["value"] == values.mean()

    # Of a normal distribution, 95 % lie within 1.96 standard deviations.
    by_context = (found["high"] - found["low"]) / 2
    assert by_context == pytest.approx(1.96 * values.std() / math.sqrt(20), rel=0.15)
    by_position = []
    for _ in range(2000):
        by_position.append(generator.choice(values, 1000).mean())
    assert by_context > 5 * 1.96 * np.std(by_position)


def two_regressors(n=60):  # -> {name: [n]}, with means other than 0
    a, b = np.random.default_rng(0).normal(2, 3, size=(2, n))
    return {"a": a, "b": b}


def test_least_squares_agrees_with_lstsq():
    given = two_regressors()
    outcome = np.random.default_rng(1).normal(2, 3, size=60) + given["b"]
    X = np.column_stack([np.ones(60), given["a"], given["b"]])
    expected = np.linalg.lstsq(X, outcome, rcond=None)[0]
    columns = {**given, "outcome": outcome}
    both = diagnose.least_squares(columns, ["a", "b"], ["outcome", "a"])
    assert both["a"] == pytest.approx({"a": 1, "b": 0})
    found = both["outcome"]
    assert list(found) == ["a", "b"]
    assert list(found.values()) == pytest.approx(expected[1:].tolist())

    # Of the outcome's variance, the residuals have what is not explained.
    residuals = outcome - X @ expected
    share = 1 - residuals.var() / outcome.var()
    assert 0.1 < share < 0.9
    shares = diagnose.r_squared(columns, ["a", "b"], ["outcome", "a"])
    assert shares == pytest.approx({"outcome": share, "a": 1})


def test_least_squares_bears_a_regressor_that_is_constant_in_a_draw():
    x = np.random.default_rng(0).normal(size=48)
    columns = {"x": x, "constant": np.full(48, -0.4), "outcome": 5 * x}
    found = diagnose.least_squares(columns, ["x", "constant"], ["outcome"])["outcome"]
    assert found["x"] == pytest.approx(5)
    assert abs(found["constant"]) < 1e-6


def test_an_outcome_without_variance_is_not_explained_at_all():
    columns = {**two_regressors(), "constant": np.ones(60)}
    shares = diagnose.r_squared(columns, ["a", "b"], ["constant"])
    assert shares["constant"] == pytest.approx(0)


def mean_ranks_by_loops(values):
    ascending = sorted(values)
    places = {}
    for place, value in enumerate(ascending, start=1):
        places.setdefault(value, []).append(place)
    return [np.mean(places[value]) for value in values]


def rank_correlation_by_loops(x, y):
    ranks = mean_ranks_by_loops(x), mean_ranks_by_loops(y)
    return np.corrcoef(*ranks)[0, 1]


def test_equal_values_share_the_mean_of_their_ranks():
    assert diagnose.ascending_ranks(np.array([20, 10, 20])).tolist() == [2.5, 1, 2.5]
    values = np.random.default_rng(0).integers(0, 6, size=50)  # many ties
    assert diagnose.ascending_ranks(values).tolist() == mean_ranks_by_loops(
        values.tolist()
    )


def test_the_correlation_is_that_of_numpy():
    given = two_regressors()
    both = given["a"] - given["b"]
    expected = np.corrcoef(given["a"], both)[0, 1]
    assert diagnose.correlation(given["a"], both) == pytest.approx(expected)


def test_the_correlation_with_a_constant_is_zero():
    assert diagnose.correlation(np.ones(5), np.arange(5)) == 0


def test_mean_gains_are_those_worked_out_by_hand():
    gains = {
        "forward_kl": np.array([1.0, 2.0, 3.0, 10.0, 50.0]),
        "reverse_kl": np.array([5.0, 6.0, 10.0, 0.0, 50.0]),
        "overlap": np.zeros(5),
    }
    groups = {
        "all": np.ones(5, dtype=bool),
        "some": np.array([True, False, True, False, True]),
        "none": np.zeros(5, dtype=bool),
    }
    data = diagnose.at_positions(data_of(gains, **groups), np.array([0, 1, 2, 3]))
    found = diagnose.mean_gains(data, data.groups["all"])
    assert found == {"forward_kl": 4, "reverse_kl": 5.25, "overlap": 0}
    found = diagnose.mean_gains(data, data.groups["some"], ["reverse_kl"])
    assert found == {"reverse_kl": 7.5}
    found = diagnose.mean_gains(data, data.groups["none"])
    assert np.isnan(list(found.values())).all()
    # A position that was drawn twice counts twice.
    twice = diagnose.at_positions(data_of(gains, **groups), np.array([0, 3, 3]))
    assert diagnose.mean_gains(twice, twice.groups["all"])["forward_kl"] == 7


def test_a_draw_without_members_has_no_mean_gain_and_does_not_count():
    gains = {name: np.array([1.0, 2.0, 7.0]) for name in MEASURES}
    data = data_of(gains, group=np.array([True, True, False]))
    context = np.array([0, 0, 1])
    assert any(0 not in at for at in drawn(context, 50, seed=0))

    def make_tables(data):
        return {"title": {"row": diagnose.mean_gains(data, data.groups["group"])}}

    found = diagnose.bootstrap(make_tables, data, context, 50, seed=0)
    expected = {"value": 1.5, "low": 1.5, "high": 1.5}
    assert found == {"title": {"row": {name: expected for name in MEASURES}}}


def test_equal_groups_are_those_worked_out_by_hand():
    def members(values, groups, inside):
        labels = ["low", "middle", "high"][:groups]
        found = diagnose.equal_groups(values, inside, labels)
        assert list(found) == labels
        return [np.flatnonzero(member).tolist() for member in found.values()]

    values = np.array([5.0, 1.0, 9.0, 3.0, 7.0, 2.0])
    everywhere = np.ones(6, dtype=bool)
    assert members(values, 3, everywhere) == [[1, 5], [0, 3], [2, 4]]
    # Inside are 5, 9, 3, 7 and 2; of five in two groups, the first gets three.
    assert members(values, 2, values > 1) == [[0, 3, 5], [2, 4]]
    assert members(values, 3, values > 7) == [[2], [], []]
    assert members(values, 3, values > 9) == [[], [], []]


def test_intervals_are_percentiles_of_the_draws_alone():
    figures = iter(range(201))

    def make_table(positions):
        is_whole = sorted(positions.tolist()) == [0, 1, 2]
        return {"row": {"column": 1000 if is_whole else next(figures)}}

    # Context 0 has two positions, context 1 one: a draw of both is passed over.
    context = np.array([0, 0, 1])
    draws = drawn(context, 201, seed=0)
    others = sum(sorted(at) != [0, 1, 2] for at in draws)
    found = bootstrapped(make_table, context, 201, seed=0)["row"]["column"]
    results = [1000] * (201 - others) + list(range(others))
    assert found["value"] == 1000
    assert found["low"] == pytest.approx(quantile(results, 0.025))
    assert found["high"] == pytest.approx(quantile(results, 0.975))


def test_a_table_in_which_a_value_is_missing_is_refused():
    def make_table(positions):
        return {"a": {"x": 1.0}, "b": {"x": math.nan}}

    with pytest.raises(ValueError, match="too few positions"):
        bootstrapped(make_table, np.array([0, 1]), 5, seed=0)


# ======================================================================================
# diagnose.py: the tables
# ======================================================================================


def made_up(effect, c_of="before", contexts=60, each=30):
    """Positions out of thin air, whose gains D * C explains by `effect` at K = 16.

    C is that of before training, or with c_of="after" that of after it.
    """
    generator, context = clusters(contexts, each)
    n = len(context)
    before = {}
    after = {}
    for scores in (before, after):
        for k in (8, 16, 32):
            scores[f"divergence_{k}"] = generator.uniform(size=n)
            scores[f"compatibility_{k}"] = generator.uniform(size=n)
        for name in ("entropy", "teacher_entropy", *MEASURES):
            scores[name] = generator.uniform(size=n)
    before["progress"] = generator.uniform(size=n)
    before["context"] = context
    before["token"] = generator.integers(0, 9, size=n)

    c = {"before": before, "after": after}[c_of]["compatibility_16"]
    learnable = before["divergence_16"] * c
    gains = {}
    for name in MEASURES:
        of_context = 0.3 * generator.normal(size=contexts)
        of_position = 0.2 * generator.normal(size=n)
        gains[name] = effect * learnable + of_context[context] + of_position
    after["forward_kl"] = before["forward_kl"] - gains["forward_kl"]
    after["reverse_kl"] = before["reverse_kl"] - gains["reverse_kl"]
    after["overlap"] = before["overlap"] + gains["overlap"]

    args = SimpleNamespace(
        contexts=contexts,
        bootstrap=100,
        seed=1,
        top_k=16,
        ks=[8, 16, 32],
        budget=0.1,
    )
    return before, after, gains, args


def at_k(scores, k):
    """With this K's D and C under the names "divergence" and "compatibility"."""
    return {
        **scores,
        "divergence": scores[f"divergence_{k}"],
        "compatibility": scores[f"compatibility_{k}"],
    }


def decode_number(token):
    return f"t{token}"


EXPLAINED = "What explains the gain,"
LEAKED = "If C were measured after training,"
SHARES = "How much of the gain is explained, K=16"
RANKED = "Rank correlation with the gain, K=16"
QUARTERS = "Sure, yet in disagreement, by quarters of its {} part, K=16"
THIRDS = {
    8: "Sure, yet in disagreement (the paper's Q3), K=8",
    16: "Sure, yet in disagreement (the paper's Q3), K=16",
    32: "Sure, yet in disagreement (the paper's Q3), K=32",
}


def kept_at(share):  # -> title
    return f"Mean gain of the {share} that each method would keep, K=16"


def tabulated(before, after, _, args):  # -> {title: rows}
    gains = diagnose.gains_of(before, after)
    tables = diagnose.all_tables(before, after, gains, args, decode_number)
    return {table["title"]: table["rows"] for table in tables}


def values(cells):
    return [cell["value"] for cell in cells.values()]


def slopes_by_lstsq(columns, outcome):  # -> slopes, R2
    X = np.column_stack([np.ones(len(outcome)), *map(z, columns)])
    solution, residual, *_ = np.linalg.lstsq(X, z(outcome), rcond=None)
    return solution[1:], 1 - residual[0] / len(outcome)


def sure_yet_in_disagreement(h, d):  # -> positions of Q3
    inside = []
    for i in range(len(h)):
        if h[i] <= np.median(h) and d[i] >= np.median(d):
            inside.append(i)
    return inside


def groups_by_loops(inside, feature, groups):  # -> [positions], from low to high
    ascending = sorted(inside, key=lambda i: feature[i])
    found = []
    start = 0
    for group in range(groups):
        size = len(inside) // groups + (group < len(inside) % groups)
        found.append(ascending[start : start + size])
        start += size
    return found


def contrast_by_loops(inside, c, gain):
    lowest, _, highest = groups_by_loops(inside, c, 3)
    return np.mean(gain[highest]) - np.mean(gain[lowest])


class Recomputed:
    """The features of the made-up positions, with plain Python."""

    def __init__(self, before, after):
        self.h = self.tilde(before["entropy"])
        self.teacher = self.tilde(before["teacher_entropy"])
        self.d = self.tilde(before["divergence"])
        self.c = self.tilde(before["compatibility"])
        self.c_after = self.tilde(after["compatibility"])
        self.position = before["progress"]
        self.q3 = sure_yet_in_disagreement(self.h, self.d)

    def tilde(self, values):
        return np.array(normalized(values.tolist()))

    def split(self, c):  # the columns of the regression with this C
        return [self.h, self.d * c, self.d * (1 - c), self.position, self.teacher]

    def unsplit(self):
        return [self.h, self.d, self.h * self.d, self.position, self.teacher]


def four_outcomes(before, gains):
    ratio = []
    for gain, distance in zip(gains["forward_kl"], before["forward_kl"]):
        ratio.append(gain / (distance + 1e-12))
    low = quantile(ratio, 0.01)
    high = quantile(ratio, 0.99)
    relative = [min(max(share, low), high) for share in ratio]
    return {**gains, "relative": np.array(relative)}


@pytest.fixture(scope="module")
def planted():
    return made_up(0.5)


@pytest.fixture(scope="module")
def planted_tables(planted):
    return tabulated(*planted)


def test_the_decomposition_is_that_of_a_plain_recomputation(planted, planted_tables):
    before, after, gains, _ = planted
    for k in (8, 16, 32):
        explained = planted_tables[f"{EXPLAINED} K={k}"]
        assert list(explained) == [*MEASURES, "relative"]
        plain = Recomputed(at_k(before, k), at_k(after, k))
        for name, outcome in four_outcomes(at_k(before, 16), gains).items():
            slopes, _ = slopes_by_lstsq(plain.split(plain.c), outcome)
            cells = explained[name]
            assert list(cells) == ["learnable", "incompatible", "gap"]
            expected = [slopes[1], slopes[2], slopes[1] - slopes[2]]
            assert values(cells) == pytest.approx(expected, abs=1e-5)


def test_the_explained_shares_are_those_of_a_plain_recomputation(
    planted, planted_tables
):
    before, after, gains, _ = planted
    shares = planted_tables[SHARES]
    plain = Recomputed(at_k(before, 16), at_k(after, 16))
    outcomes = four_outcomes(at_k(before, 16), gains)
    assert list(shares) == list(outcomes)
    for name, outcome in outcomes.items():
        _, split = slopes_by_lstsq(plain.split(plain.c), outcome)
        _, unsplit = slopes_by_lstsq(plain.unsplit(), outcome)
        assert list(shares[name]) == ["split", "unsplit"]
        assert values(shares[name]) == pytest.approx([split, unsplit], abs=1e-5)


def test_the_leak_table_takes_c_alone_from_after_training(planted, planted_tables):
    before, after, gains, _ = planted
    for k in (8, 16, 32):
        leaked = planted_tables[f"{LEAKED} K={k}"]
        assert len(leaked) == 8
        plain = Recomputed(at_k(before, k), at_k(after, k))
        for name, outcome in four_outcomes(at_k(before, 16), gains).items():
            for when, c in (("before", plain.c), ("after", plain.c_after)):
                slopes, _ = slopes_by_lstsq(plain.split(c), outcome)
                gap = slopes[1] - slopes[2]
                contrast = contrast_by_loops(plain.q3, c, outcome)
                cells = leaked[f"C {when}, {name}"]
                assert list(cells) == ["gap", "most - least"]
                assert values(cells) == pytest.approx([gap, contrast], abs=1e-5)


def test_figures_inside_q3_are_those_of_a_plain_recomputation(planted, planted_tables):
    before, after, gains, _ = planted
    for k, title in THIRDS.items():
        plain = Recomputed(at_k(before, k), at_k(after, k))
        thirds = groups_by_loops(plain.q3, plain.c, 3)
        outcomes = four_outcomes(before, gains)
        labels = ["least compatible", "middle", "most compatible"]
        found = planted_tables[title]
        assert list(found) == [*labels, "most - least"]
        for label, members in zip(labels, thirds):
            expected = [np.mean(gain[members]) for gain in outcomes.values()]
            assert values(found[label]) == pytest.approx(expected, abs=1e-6)
        expected = []
        for gain in outcomes.values():
            expected.append(contrast_by_loops(plain.q3, plain.c, gain))
        assert list(found["most - least"]) == [*MEASURES, "relative"]
        assert values(found["most - least"]) == pytest.approx(expected, abs=1e-6)

    plain = Recomputed(at_k(before, 16), at_k(after, 16))
    parts = {"learnable": plain.d * plain.c, "incompatible": plain.d * (1 - plain.c)}
    for part, feature in parts.items():
        quarters = planted_tables[QUARTERS.format(part)]
        assert list(quarters) == ["lowest quarter", "second", "third", "highest"]
        groups = groups_by_loops(plain.q3, feature, 4)
        for cells, members in zip(quarters.values(), groups):
            expected = [np.mean(gain[members]) for gain in gains.values()]
            assert values(cells) == pytest.approx(expected, abs=1e-6)


def test_rank_correlations_are_those_of_a_plain_recomputation(planted, planted_tables):
    before, after, gains, _ = planted
    plain = Recomputed(at_k(before, 16), at_k(after, 16))
    orders = {
        "divergence": plain.d,
        "learnable": plain.d * plain.c,
        "incompatible": plain.d * (1 - plain.c),
        "entropy": plain.h,
        "tip": 1 - (1 - plain.h) * (1 - plain.d),
    }
    found = planted_tables[RANKED]
    assert list(found) == list(orders)
    for name, order in orders.items():
        expected = []
        for gain in gains.values():
            expected.append(rank_correlation_by_loops(order.tolist(), gain.tolist()))
        assert values(found[name]) == pytest.approx(expected, abs=1e-4)


def test_what_is_kept_is_that_of_a_plain_recomputation(planted, planted_tables):
    before, after, gains, args = planted
    tokens = planted_tables["What each method would keep at 10%, K=16"]
    plain = Recomputed(at_k(before, 16), at_k(after, 16))
    learnable = plain.d * plain.c
    n = len(plain.d)
    generator = torch.Generator().manual_seed(args.seed)
    ranked_by = {
        "full": np.zeros(n),
        "teachability": learnable,
        "teachability_entropy": 1 - (1 - plain.h) * (1 - learnable),
        "entropy": plain.h,
        "divergence": plain.d,
        "tip": 1 - (1 - plain.h) * (1 - plain.d),
        "compatibility": plain.c,
        "incompatible": plain.d * (1 - plain.c),
        "random": torch.rand(1, n, generator=generator)[0].numpy(),
    }
    assert set(ranked_by) == set(opd.METHODS) == set(tokens)

    for method, feature in ranked_by.items():
        best_first = sorted(range(n), key=lambda i: -np.float32(feature[i]))
        for share, count in (("3%", 54), ("5%", 90), ("10%", 180)):  # of 1800
            best = best_first if method == "full" else best_first[:count]
            expected = [np.mean(gain[best]) for gain in gains.values()]
            found = planted_tables[kept_at(share)]
            assert list(found) == list(opd.METHODS)
            assert values(found[method]) == pytest.approx(expected, abs=1e-6)
        counts = Counter(before["token"][sorted(best)].tolist())
        texts = []
        for token, count in counts.most_common(5):
            texts.append(f"'t{token}' {count / len(best):.0%}")
        assert tokens[method] == {"tokens": ", ".join(texts)}

    for k in (8, 32):  # with another K, by its D and C
        plain = Recomputed(at_k(before, k), at_k(after, k))
        best = sorted(range(n), key=lambda i: -np.float32(plain.d[i] * plain.c[i]))
        expected = [np.mean(gain[best[:180]]) for gain in gains.values()]
        title = kept_at("10%").replace("K=16", f"K={k}")
        found = planted_tables[title]["teachability"]
        assert values(found) == pytest.approx(expected, abs=1e-6)


def test_every_interval_is_that_of_its_figure_in_the_draws(planted, planted_tables):
    # Features, ranks and groups are those of the sample; their members are drawn.
    before, after, gains, args = planted
    plain = Recomputed(at_k(before, 16), at_k(after, 16))
    X = np.column_stack([np.ones(1800), *map(z, plain.split(plain.c))])
    gain = gains["overlap"]
    learnable = plain.d * plain.c
    rank = np.array(mean_ranks_by_loops(learnable.tolist()))
    rank_of_gain = np.array(mean_ranks_by_loops(gain.tolist()))
    lowest, _, highest = map(set, groups_by_loops(plain.q3, plain.c, 3))
    third_quarter = set(groups_by_loops(plain.q3, learnable, 4)[2])
    kept = set(sorted(range(1800), key=lambda i: -learnable[i])[:180])

    gaps = []
    shares = []
    contrasts = []
    quarters = []
    correlations = []
    means = []
    for at in drawn(before["context"], args.bootstrap, args.seed):
        slopes, residual, *_ = np.linalg.lstsq(X[at], z(gain)[at], rcond=None)
        gaps.append(slopes[2] - slopes[3])
        shares.append(1 - residual[0] / len(at) / z(gain)[at].var())
        most = np.mean([gain[i] for i in at if i in highest])
        least = np.mean([gain[i] for i in at if i in lowest])
        contrasts.append(most - least)
        quarters.append(np.mean([gain[i] for i in at if i in third_quarter]))
        correlations.append(np.corrcoef(rank[at], rank_of_gain[at])[0, 1])
        means.append(np.mean([gain[i] for i in at if i in kept]))

    tables = planted_tables
    leaked = tables[f"{LEAKED} K=16"]["C before, overlap"]
    for cell, figures in (
        (tables[f"{EXPLAINED} K=16"]["overlap"]["gap"], gaps),
        (tables[SHARES]["overlap"]["split"], shares),
        (tables[THIRDS[16]]["most - least"]["overlap"], contrasts),
        (leaked["gap"], gaps),
        (leaked["most - least"], contrasts),
        (tables[QUARTERS.format("learnable")]["third"]["overlap"], quarters),
        (tables[RANKED]["learnable"]["overlap"], correlations),
        (tables[kept_at("10%")]["teachability"]["overlap"], means),
    ):
        expected = [quantile(figures, 0.025), quantile(figures, 0.975)]
        assert [cell["low"], cell["high"]] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("method", opd.METHODS)
def test_every_method_keeps_as_many_positions_as_opd_select_would(method):
    # In floats 0.07 * 100 > 7 and 0.29 * 100 < 29. Of opd.select's extra position for
    # a response without one there is nothing here: 7 of 25 contexts have one at most.
    before, *_ = made_up(0.0, contexts=25, each=4)
    for budget, expected in ((0.07, 7), (0.29, 29), (0.001, 1), (1, 100)):
        scores = diagnose.of_k(before, 16)
        kept = diagnose.kept_by(method, scores, budget, torch.Generator())
        assert kept.sum() == (100 if method == "full" else expected)


def test_what_is_kept_by_chance_depends_on_the_seed():
    before, *_ = made_up(0.0, contexts=20, each=10)
    features = diagnose.make_features(before, 16)
    one = diagnose.make_groups(before, features, 16, seed=1)
    two = diagnose.make_groups(before, features, 16, seed=2)
    for budget in (0.05, 0.1):
        assert (one["random", budget] != two["random", budget]).any()
        assert (one["tip", budget] == two["tip", budget]).all()


def test_overlap_is_the_probability_that_both_models_agree_on():
    p = torch.tensor([0.5, 0.3, 0.2])
    q = torch.tensor([0.1, 0.3, 0.6])
    assert diagnose.overlap(p.log(), q.log()) == pytest.approx(0.1 + 0.3 + 0.2)
    assert diagnose.overlap(p.log(), p.log()) == pytest.approx(1)


def test_a_planted_effect_is_recovered():
    tables = tabulated(*made_up(1.0))
    explained = tables[f"{EXPLAINED} K=16"]
    for name in MEASURES:
        cells = explained[name]
        assert cells["learnable"]["low"] > 0.3
        assert abs(cells["incompatible"]["value"]) < 0.1
        assert cells["gap"]["low"] > 0
        assert tables[f"{LEAKED} K=16"][f"C before, {name}"]["gap"] == cells["gap"]
        assert tables[RANKED]["learnable"][name]["low"] > 0.2
        assert tables[THIRDS[16]]["most - least"][name]["low"] > 0
        kept = tables[kept_at("10%")]
        assert kept["teachability"][name]["low"] > kept["random"][name]["high"]


def test_an_absent_effect_is_not_found():
    # Each gap misses 0 by chance once in twenty times.
    tables = tabulated(*made_up(0.0))
    gaps = []
    for k in (8, 16, 32):
        for cells in tables[f"{EXPLAINED} K={k}"].values():
            gaps.append(cells["gap"])
        for cells in tables[f"{LEAKED} K={k}"].values():
            gaps.append(cells["gap"])
    for cells in tables[SHARES].values():
        assert max(values(cells)) < 0.02
    assert len(gaps) == 36
    assert sum(gap["low"] < 0 < gap["high"] for gap in gaps) >= 30


def test_an_effect_of_c_after_training_shows_in_the_leak_alone():
    before, after, gains, args = made_up(1.0, c_of="after")
    args.bootstrap = 200
    leaked = tabulated(before, after, gains, args)[f"{LEAKED} K=16"]
    for name in MEASURES:
        before_gap, before_contrast = leaked[f"C before, {name}"].values()
        after_gap, after_contrast = leaked[f"C after, {name}"].values()
        assert after_gap["low"] > 0.2
        assert after_contrast["low"] > 0.1
        assert abs(before_gap["value"]) < 0.1
        assert before_gap["low"] < 0 < before_gap["high"]
        assert before_contrast["low"] < 0 < before_contrast["high"]


def test_a_constant_feature_is_named_instead_of_printing_nan():
    before, after, gains, args = made_up(0.0)
    before["teacher_entropy"][:] = 1
    with pytest.raises(ValueError, match="teacher_entropy is the same"):
        tabulated(before, after, gains, args)


def test_a_group_without_positions_is_refused_instead_of_printing_nan():
    # No position is sure and in disagreement, if H and D have the same order.
    before, after, gains, args = made_up(0.0)
    for k in (8, 16, 32):
        before[f"divergence_{k}"] = before["entropy"]
    with pytest.raises(ValueError, match="too few positions"):
        tabulated(before, after, gains, args)


# ======================================================================================
# diagnose.py: the program
# ======================================================================================


def diagnosis(store, out, *more):  # -> report, positions, page
    more = ["--contexts", 12, "--bootstrap", 20, *more]
    diagnose.main(diagnose.parse_args(flags(store, out, *more)))
    positions = []
    for line in (out / "positions.jsonl").read_text().splitlines():
        positions.append(json.loads(line))
    report = json.loads((out / "report.json").read_text())
    return report, positions, (out / "report.html").read_text()


@pytest.fixture(scope="session")
def measured(store, tmp_path_factory):
    """A diagnosis with training; the trained student stays in out/step-5."""
    folder = tmp_path_factory.mktemp("measured")
    prompts_file(folder / "many.jsonl", 30)
    more = ["--prompts", folder / "many.jsonl", "--steps", 5, "--lr", "1e-2"]
    return folder, diagnosis(store, folder / "out", *more, "--save-every", 5)


def test_another_k_is_measured_beside_the_usual_three(measured, store, tmp_path):
    folder, _ = measured
    more = ["--after", folder / "out" / "student", "--top-k", 4]
    report, positions, _ = diagnosis(store, tmp_path / "out", *more)
    titles = [table["title"] for table in report["tables"]]
    for k in (4, 8, 16, 32):
        assert f"{EXPLAINED} K={k}" in titles
        assert f"compatibility_{k}" in positions[0]["after"]


def test_a_method_and_a_quantity_in_a_copy_of_opd_stand_in_the_report(
    measured, store, tmp_path, monkeypatch
):
    # As the README has it: one line in measure, two in rank, a name in METHODS.
    old_measure, old_rank = opd.measure, opd.rank

    def measure(student_logits, teacher_logits, k=16, tokens=None):
        scores = old_measure(student_logits, teacher_logits, k, tokens)
        scores["own_token"] = tokens.float()
        return scores

    def rank(method, scores, mask, generator=None):
        if method == "large_ids":
            return scores["own_token"]
        return old_rank(method, scores, mask, generator)

    monkeypatch.setattr(opd, "measure", measure)
    monkeypatch.setattr(opd, "rank", rank)
    monkeypatch.setattr(opd, "METHODS", (*opd.METHODS, "large_ids"))
    folder, _ = measured
    more = ["--prompts", folder / "many.jsonl", "--after", folder / "out" / "student"]
    report, positions, _ = diagnosis(store, tmp_path / "out", *more)
    lines = sorted(positions, key=lambda line: -line["before"]["token"])
    best = lines[: math.ceil(0.1 * len(lines))]
    expected = np.mean([line["gain"]["overlap"] for line in best])
    found = report["tables"][0]["rows"]["large_ids"]["overlap"]["value"]
    assert found == pytest.approx(expected)
    assert lines[0]["before"]["own_token"] == lines[0]["before"]["token"]


def test_the_simple_diagnosis_finds_the_gains_of_whole_models(store):
    pair = load(store)
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    before = load(store)
    other = model_of("qwen3", seed=5)

    def train():
        pair.student.load_state_dict(other.state_dict())

    torch.manual_seed(4)
    found = diagnose.simple_diagnosis(pair, prompts, train, 2, 0.05, max_new_tokens=9)
    torch.manual_seed(4)
    batch = opd.rollout(before, prompts, 9)
    scores = scores_of(before, batch, 2, 3)
    gains = {}  # {(response, token): gain}
    models = zip(one_by_one(before, prompts, batch), one_by_one(pair, prompts, batch))
    for row, ((p0, q, _), (p1, *_)) in enumerate(models):
        for t, logits_of in enumerate(zip(*map(as_lists, (p0, p1, q)))):
            p0_t, p1_t, q_t = map(softmax, logits_of)
            gains[row, t] = kl(p0_t, q_t) - kl(p1_t, q_t)
    assert set(found) == set(opd.METHODS)
    assert found["full"] == pytest.approx(np.mean(list(gains.values())), abs=1e-5)
    for method in ("teachability", "entropy"):
        ranks = opd.rank(method, scores, batch.mask).tolist()
        best_first = sorted(gains, key=lambda place: -ranks[place[0]][place[1]])
        number = math.ceil(len(gains) / 20)
        assert number < 3  # so that not each of the three responses keeps one
        kept = [gains[place] for place in best_first[:number]]
        assert found[method] == pytest.approx(np.mean(kept), abs=1e-5)
    assert abs(found["teachability"] - found["full"]) > 2e-4


def test_a_real_diagnosis_reports_everything_with_intervals(measured):
    _, (report, positions, page) = measured
    contexts = [line["before"]["context"] for line in positions]
    assert report["args"]["contexts"] == 12 == report["args"]["eval_prompts"]
    assert sorted(set(contexts)) == list(range(12))
    assert report["summary"].startswith(f"12 contexts, {len(positions)} positions. ")
    assert "12 held-out prompts." in report["summary"]
    assert set(report["versions"]) == {"torch", "transformers", "numpy"}

    assert "nan" not in json.dumps(report).lower()
    assert len(report["tables"]) == 19
    for table in report["tables"]:
        assert html.escape(table["title"]) in page
        first_row, *_ = table["rows"].values()
        for cells in table["rows"].values():
            assert list(cells) == list(first_row)
            for cell in cells.values():
                if isinstance(cell, dict):
                    assert cell["low"] <= cell["high"]

    assert "<script" not in page
    assert "http" not in page
    assert page.count('class="token"') == len(positions) + 3  # 3 in the legend


def test_the_terminal_shows_the_main_tables_in_110_columns(measured):
    _, (report, *_) = measured
    printed = report["tables"][:2]
    for table in printed:
        text = diagnose.as_text(table)
        assert max(map(len, text.splitlines())) <= 110
        assert text.startswith(table["title"] + "\n")
        for label in table["rows"]:
            assert f"\n{label} " in text
    titles = [table["title"] for table in printed]
    assert titles == [kept_at("10%"), f"{EXPLAINED} K=16"]


def test_a_table_in_text_is_aligned():
    rows = {
        "one": {"a": {"value": 0.5, "low": -0.25, "high": 1}, "b": "x, y"},
        "two": {"a": {"value": -0.5, "low": -1, "high": 0}, "b": "z"},
    }
    table = {"title": "T", "reading": "How to read.", "rows": rows}
    assert diagnose.as_text(table).splitlines() == [
        "T",
        "                           a     b",
        "one  +0.500 [-0.250, +1.000]  x, y",
        "two  -0.500 [-1.000, +0.000]     z",
        "> How to read.",
    ]


def test_a_number_too_small_for_three_decimals_is_not_printed_as_zero():
    for number, text in (
        (0, "+0.000"),
        (0.00004, "+4e-05"),
        (-0.0004, "-4e-04"),
        (0.0006, "+0.001"),
        (-1.2345, "-1.234"),
    ):
        assert diagnose.number_text(number) == text


def after_merging(probabilities, ends):
    """The ends' probabilities as one number, in the place of the first."""
    first, *others = ends
    merged = []
    for token, probability in enumerate(probabilities):
        if token == first:
            merged.append(sum(probabilities[end] for end in ends))
        elif token not in others:
            merged.append(probability)
    return merged


def measured_by_loops(p, q, tokens, k):  # -> {name: what positions.jsonl should say}
    union = top(p, k) | top(q, k)
    found = {
        "forward_kl": kl(q, p),
        "reverse_kl": kl(p, q),
        "overlap": sum(map(min, p, q)),
        "entropy": -sum(x * math.log(x) for x in p),
        "teacher_entropy": -sum(x * math.log(x) for x in q),
        "divergence": kl(restricted(q, union), restricted(p, union)),
        "compatibility": sum(q[v] for v in top(p, k)),
    }
    for who, probabilities in (("student", p), ("teacher", q)):
        likeliest = sorted(range(len(p)), key=lambda v: -probabilities[v])[:5]
        for place, v in enumerate(likeliest, start=1):
            found[f"{who}_choice_{place}"] = tokens[v]
    return found


def check_numbers(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-4), name


def check_positions(positions, prompts, before, after):
    """Each line against whole models, alone, without padding, before and after."""
    ends = before.end_ids
    tokens = [v for v in range(V) if v not in ends[1:]]
    for number, prompt in enumerate(prompts):
        here = []
        for line in positions:
            if line["before"]["context"] == number:
                here.append(line)
        ids = [line["before"]["token"] for line in here]
        student0, teacher = own_logits(before, prompt, ids)
        student1, _ = own_logits(after, prompt, ids)
        logits = zip(here, as_lists(student0), as_lists(student1), as_lists(teacher))
        for t, (line, p0, p1, q) in enumerate(logits):
            p0 = after_merging(softmax(p0), ends)
            p1 = after_merging(softmax(p1), ends)
            q = after_merging(softmax(q), ends)
            assert set(line) == {"text", "before", "after", "gain"}
            assert line["text"] == before.tokenizer.decode(ids[t])
            assert set(line["before"]) == set(line["after"])
            expected = {}
            later = {}
            for scores, p in ((expected, p0), (later, p1)):
                for k in (8, 16, 32):
                    at_k = measured_by_loops(p, q, tokens, k)
                    scores[f"divergence_{k}"] = at_k.pop("divergence")
                    scores[f"compatibility_{k}"] = at_k.pop("compatibility")
                    scores.update(at_k)
                scores["progress"] = t / max(len(here) - 1, 1)
                scores["token"] = ids[t]
                scores["context"] = number
            gain = {"overlap": later["overlap"] - expected["overlap"]}
            for name in ("forward_kl", "reverse_kl"):
                gain[name] = expected[name] - later[name]
            check_numbers(line["before"], expected)
            check_numbers(line["after"], later)
            check_numbers(line["gain"], gain)


def test_every_position_says_what_loops_over_both_models_say(store, measured):
    folder, (_, positions, _) = measured
    before = load(store)
    after = before._replace(
        student=load_student(folder / "out" / "step-5"),
    )
    prompts = []
    for line in (folder / "many.jsonl").read_text().splitlines()[-12:]:
        prompts.append(before.tokenizer(json.loads(line)["prompt"]).input_ids)
    check_positions(positions, prompts, before, after)

    # The student has changed: no figure of before can pass for one of after.
    moved = 0
    for line in positions:
        assert abs(line["gain"]["forward_kl"]) > 1e-3
        c_before = line["before"]["compatibility_8"]
        c_after = line["after"]["compatibility_8"]
        moved += abs(c_after - c_before) > 1e-2
    assert moved > len(positions) / 4


def load_student(folder):
    student, *_ = opd.load_model("--after", folder, torch.float32, "cpu")
    return student


def test_pairs_with_two_end_ids_are_measured_as_if_these_were_one(store, tmp_path):
    teacher = model_of("qwen3", seed=2)
    teacher.generation_config.eos_token_id = [2, 0]
    put(tmp_path / "teacher", teacher)
    put(tmp_path / "after", model_of("qwen3", seed=3))
    more = ["--teacher", tmp_path / "teacher", "--after", tmp_path / "after"]
    more += ["--batch-size", 2]  # so that the twelve contexts are two batches
    report, positions, _ = diagnosis(store, tmp_path / "out", *more)
    says = (
        "4 held-out prompts, some repeated (which the intervals ignore); the trained "
    )
    assert says in report["summary"]

    before = opd.load_pair(f"{store}/qwen3-student", tmp_path / "teacher")
    after = before._replace(student=load_student(tmp_path / "after"))
    assert before.end_ids == [0, 2]
    prompts = []
    for line in (store / "prompts.jsonl").read_text().splitlines()[-4:]:
        prompts.append(before.tokenizer(json.loads(line)["prompt"]).input_ids)
    check_positions(positions, 3 * prompts, before, after)

    # Apart, the two ends would have made a difference.
    apart = before._replace(end_ids=[0])
    with pytest.raises(AssertionError):
        check_positions(positions, 3 * prompts, apart, after)


def of_before(positions):
    return [(line["text"], line["before"]) for line in positions]


def diagnosis_of_unchanged(store, folder, out):
    more = ["--prompts", folder / "many.jsonl", "--eval-prompts", 12]
    return diagnosis(store, out, *more, "--after", store / "qwen3-student")


@pytest.fixture(scope="session")
def unchanged(store, measured):
    folder, _ = measured
    return diagnosis_of_unchanged(store, folder, folder / "unchanged")


def test_features_come_from_before_training_alone(store, measured, tmp_path):
    folder, (_, positions, _) = measured
    more = ["--prompts", folder / "many.jsonl", "--eval-prompts", 12]
    more += ["--after", store / "qwen3-teacher"]
    _, other, _ = diagnosis(store, tmp_path / "other", *more)
    assert of_before(other) == of_before(positions)
    # The teacher as the trained student leaves no distance to the teacher.
    for line in other:
        before = line["before"]
        for name in ("forward_kl", "reverse_kl"):
            assert line["gain"][name] == pytest.approx(before[name], abs=1e-5)
        rise = 1 - before["overlap"]
        assert line["gain"]["overlap"] == pytest.approx(rise, abs=1e-5)


def test_an_unchanged_student_gains_nothing(measured, unchanged):
    _, (_, positions, _) = measured
    report, same, _ = unchanged
    assert of_before(same) == of_before(positions)
    for line in same:
        assert line["gain"] == {name: 0 for name in MEASURES}
        assert line["after"] == line["before"]
    assert "not changed" in report["summary"]


def test_a_student_that_was_trained_earlier_gives_the_same_report(
    store, measured, tmp_path, capsys
):
    folder, (report, positions, _) = measured
    more = ["--prompts", folder / "many.jsonl", "--eval-prompts", 12]
    more += ["--after", folder / "out" / "step-5"]
    again, same, _ = diagnosis(store, tmp_path / "again", *more)
    assert same == positions
    assert again["tables"] == report["tables"]

    printed = capsys.readouterr().out
    assert printed.startswith(f"{again['summary']}\n")
    assert f"are in {tmp_path / 'again'}\n" in printed
    for number, table in enumerate(again["tables"]):
        if number < 2:
            assert f"\n{diagnose.as_text(table)}\n" in printed
        else:
            assert table["title"] not in printed


def test_a_reader_that_has_gone_ends_no_diagnosis(
    store, measured, unchanged, tmp_path, monkeypatch
):
    # `| head -1` leaves a pipe without a reader.
    folder, _ = measured
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        found = diagnosis_of_unchanged(store, folder, tmp_path / "out")
    assert found[0]["tables"] == unchanged[0]["tables"]
    assert found[1:] == unchanged[1:]


def test_the_files_are_complete_before_anything_is_printed(
    store, measured, unchanged, tmp_path, monkeypatch
):
    folder, _ = measured
    report, positions, page = unchanged
    out = tmp_path / "out"
    with pytest.raises(OSError, match="No space left"), monkeypatch.context() as patch:
        with open("/dev/full", "w") as full:
            patch.setattr(sys, "stdout", full)
            diagnosis_of_unchanged(store, folder, out)
    assert json.loads((out / "report.json").read_text())["tables"] == report["tables"]
    assert (out / "report.html").read_text() == page
    lines = (out / "positions.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == positions


def test_bad_input_to_the_diagnostic_gets_one_line(store, measured, tmp_path, capsys):
    folder, _ = measured
    put(tmp_path / "wide", model_of("qwen3", width=24))
    put(tmp_path / "other", model_of("qwen3"), tokenizer_of(V - 1))
    for flag, value, says in (
        ("--contexts", 2, "--contexts"),
        ("--contexts", 4, "--contexts 4: give 5 or more"),
        ("--bootstrap", 0, "--bootstrap"),
        ("--resume", tmp_path, "--after"),
        ("--after", tmp_path / "none", "--after"),
        ("--after", tmp_path / "wide", "other shapes"),
        ("--after", tmp_path / "other", "tokenizer"),
    ):
        argv = flags(store, tmp_path / "out", "--prompts", folder / "many.jsonl")
        with one_line(capsys, says):
            args = diagnose.parse_args([*argv, flag, str(value)])
            opd.run(diagnose.main, args)
    assert not (tmp_path / "out").exists()


def test_what_was_measured_is_kept_though_a_table_cannot_be_made(
    store, tmp_path, capsys
):
    # Responses of one token: all stand at position 0.
    more = ["--contexts", "5", "--max-new-tokens", "1"]
    more += ["--after", str(store / "qwen3-teacher")]
    args = diagnose.parse_args(flags(store, tmp_path / "out", *more))
    with one_line(capsys, "progress is the same at all positions"):
        opd.run(diagnose.main, args)
    positions = (tmp_path / "out" / "positions.jsonl").read_text()
    lines = [json.loads(line) for line in positions.splitlines()]
    assert [line["before"]["progress"] for line in lines] == [0] * 5


def test_training_is_full_and_keeps_held_out_prompts_unless_told_otherwise(
    store, monkeypatch
):
    def parsed(*more):
        return diagnose.parse_args(flags(store, "out", *more))

    args = parsed()
    assert args.select == "full"
    assert args.contexts == args.eval_prompts == 192
    assert args.ks == [16, 8, 32]
    assert args.bootstrap == 1000
    assert parsed("--contexts", 5, "--eval-prompts", 6).eval_prompts == 6
    assert parsed("--after", "student").eval_prompts == 4
    assert parsed("--select", "tip").select == "tip"
    assert parsed("--top-k", 4).ks == [4, 8, 16, 32]
    monkeypatch.setattr(sys, "argv", ["diagnose.py", *flags(store, "elsewhere")])
    assert diagnose.parse_args().out == "elsewhere"


# ======================================================================================
# diagnose.py: the page
# ======================================================================================


class Elements(html.parser.HTMLParser):
    """The elements of a page as a browser would find them: (tag, attributes)."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_the_page_shows_a_hostile_token_and_does_not_run_it():
    hostile = "<script>alert('x')</script>\" onmouseover=\"alert(1)\n "

    def decode(token):
        return hostile

    before, after, _, args = made_up(0.0, contexts=5, each=40)
    args.bootstrap = 20
    before["student_choice_1"] = before["teacher_choice_1"] = before["token"]
    gains = diagnose.gains_of(before, after)
    tables = diagnose.all_tables(before, after, gains, args, decode)
    responses = diagnose.token_map([[1]] * 5, before, gains, 16, decode)
    page = diagnose.as_page(tables, hostile, responses)

    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "\u21b5" in page
    assert "\u00b7" in page
    tips = []
    for tag, attributes in Elements(page).found:
        assert tag != "script"
        assert not any(name.startswith("on") for name in attributes)
        if attributes.get("class") == "token":
            tips.append(attributes["data-tip"])
    assert len(tips) == 3 + 200
    assert all(tip.startswith(repr(hostile)) for tip in tips[3:])


def test_the_legend_shows_both_colours_and_their_mixture():
    spans = []
    for tag, attributes in Elements(diagnose.as_page([], "", "")).found:
        if tag == "span":
            spans.append((attributes["style"], attributes["data-tip"]))
    blue = "--learnable:0.90;--incompatible:0.00"
    orange = "--learnable:0.00;--incompatible:0.90"
    mixture = "--learnable:0.40;--incompatible:0.40"
    assert spans == [
        (blue, "D * C, both rescaled to [0, 1]"),
        (orange, "D * (1 - C), both rescaled to [0, 1]"),
        (mixture, "the two add up to D, rescaled"),
    ]


def test_a_tooltip_has_the_numbers_and_the_first_choices_of_its_position():
    before = {
        "token": np.array([7, 8]),
        "entropy": np.array([0.0, 1.25]),
        "divergence_4": np.array([0.0, 2.25]),
        "compatibility_4": np.array([0.0, 0.5]),
        "student_choice_1": np.array([0, 1]),
        "student_choice_2": np.array([0, 2]),
        "teacher_choice_1": np.array([0, 2]),
        "teacher_choice_2": np.array([0, 3]),
    }
    gains = {"overlap": np.array([0.0, -0.5]), "reverse_kl": np.array([0.0, 0.125])}
    numbers = "entropy 1.25   divergence_4 2.25   compatibility_4 0.50"
    gained = "gain in overlap -0.500   gain in reverse_kl +0.125"
    assert diagnose.tooltip(1, before, gains, 4, decode_number).splitlines() == [
        f"'t8'   {numbers}   {gained}",
        "student: 't1'  't2'",
        "teacher: 't2'  't3'",
    ]


def test_the_map_has_both_colours_of_the_first_contexts():
    before, after, gains, _ = made_up(0.0, contexts=20, each=10)
    gains = diagnose.gains_of(before, after)
    before["student_choice_1"] = before["teacher_choice_1"] = before["token"]
    page = diagnose.token_map([[1]] * 20, before, gains, 16, decode_number)
    spans = []
    for _, attributes in Elements(page).found:
        if attributes.get("class") == "token":
            spans.append(attributes)
    assert len(spans) == 12 * 10
    plain = Recomputed(at_k(before, 16), at_k(after, 16))
    learnable = plain.d * plain.c
    incompatible = plain.d * (1 - plain.c)
    for i, attributes in enumerate(spans):
        shares = re.findall(r":([\d.]+)", attributes["style"])
        expected = [learnable[i] ** 0.5, incompatible[i] ** 0.5]
        assert [float(share) for share in shares] == pytest.approx(expected, abs=0.006)
        assert attributes["data-tip"].startswith(f"'t{before['token'][i]}' ")
        assert f"gain in overlap {gains['overlap'][i]:+.3f}" in attributes["data-tip"]


def test_a_table_of_the_page_has_every_label_and_every_cell():
    rows = {
        "one": {"a": {"value": 0.5, "low": -0.25, "high": 1}, "b": "z"},
        "<two>": {"a": {"value": -0.5, "low": -1, "high": 0}, "b": "'<b>' 9%"},
    }
    page = diagnose.table_html({"title": "T & U", "reading": "1 < 2.", "rows": rows})
    assert "<h2>T &amp; U</h2>" in page
    assert "<p>1 &lt; 2.</p>" in page
    text = re.search("<pre>(.*?)</pre>", page, re.S).group(1)
    assert html.unescape(text).splitlines() == [
        "                             a         b",
        "one    +0.500 [-0.250, +1.000]         z",
        "<two>  -0.500 [-1.000, +0.000]  '<b>' 9%",
    ]
    assert "<two>" not in page
    assert "<b>" not in page


# ======================================================================================
# The scripts of .evidence
# ======================================================================================


def script(name):  # -> {name: function}
    return runpy.run_path(str(HERE / ".evidence" / f"{name}.py"))


def test_the_evidence_tables_follow_from_reports_and_from_positions(
    measured, unchanged, capsys
):
    folder, (report, positions, _) = measured
    tables = script("tables")
    tables["main"]([folder / "out", folder / "unchanged"])
    printed = capsys.readouterr().out.splitlines()
    for table in report["tables"]:
        has_means = not table["title"].startswith("What each method would keep")
        assert printed.count(table["title"]) == has_means

    cells = report["tables"][1]["rows"]["reverse_kl"]
    unchanged = json.loads((folder / "unchanged" / "report.json").read_text())
    others = unchanged["tables"][1]["rows"]["reverse_kl"]
    mean = (cells["gap"]["value"] + others["gap"]["value"]) / 2
    spread = abs(cells["gap"]["value"] - others["gap"]["value"]) / math.sqrt(2)
    title = printed.index(report["tables"][1]["title"])
    assert re.split("  +", printed[title + 1].strip()) == list(cells)
    line = next(a for a in printed[title:] if a.startswith("reverse_kl "))
    assert f"{mean:+.3f} ± {spread:.3f} " in line

    again = [a.split() for a in printed if a.startswith("gap ")]
    assert len(again) == 2
    assert again[0][1:4] == [f"{mean:+.3f}", "±", f"{spread:.3f}"]
    assert len([a for a in printed if a.startswith("teacher_entropy ")]) == 1

    # Without the teacher's entropy, the last column, the slopes are others.
    before = {}
    for name in positions[0]["before"]:
        values_of = [line["before"][name] for line in positions]
        before[name] = np.array(values_of)
    before = at_k(before, 16)
    gain = np.array([line["gain"]["reverse_kl"] for line in positions])
    plain = Recomputed(before, before)
    slopes, _ = slopes_by_lstsq(plain.split(plain.c)[:-1], gain)
    found = tables["regression"](folder / "out", "teacher_entropy")
    entropy, learnable, incompatible, position = slopes
    gap = learnable - incompatible
    expected = [learnable, incompatible, entropy, position, gap]
    assert values(found) == pytest.approx(expected, abs=1e-4)
    assert abs(found["gap"]["value"] - cells["gap"]["value"]) > 1e-3


def test_evidence_counts_the_intervals_on_either_side_of_zero():
    cells = [
        {"value": 1, "low": 0.5, "high": 2},
        {"value": 3, "low": -1, "high": 4},
        {"value": -4, "low": -5, "high": -3},
        {"value": 4, "low": 3, "high": 5},
    ]
    over_diagnoses = script("tables")["over_diagnoses"]
    assert over_diagnoses(cells[:2]) == "+2.000 ± 1.414 1/0"
    assert over_diagnoses(cells) == "+1.000 ± 3.559 2/1"
    assert over_diagnoses(cells[:1]) == "+1.000 ± 0.000 1/0"


SETTINGS = {
    "select": "tip",
    "budget": 0.1,
    "seed": 0,
    "loss": "reverse_kl",
    "lr": 1e-6,
    "steps": 200,
    "student": "small",
    "teacher": "large",
    "prompts": "sums.jsonl",
    "temperature": 1.0,
}


def finished(folder, accuracy, reverse_kl=2.0, before=0.1, **settings):
    """A run of opd.py as compare.py finds it; accuracy None: there are no answers."""
    folder.mkdir()
    args = {**SETTINGS, "out": str(folder), **settings}
    results = {"reverse_kl": reverse_kl, "entropy": 1.0, "agreement": 0.75}
    summary = {"args": args, "before": {**results}, "after": {**results}}
    if accuracy is not None:
        summary["before"]["accuracy"] = before
        summary["after"]["accuracy"] = accuracy
    (folder / "summary.json").write_text(json.dumps(summary))


def compared(folder, capsys):  # -> [{column: cell}], and what is not finished
    folders = sorted(map(str, folder.iterdir()))
    script("compare")["main"](folders)
    head, _, *lines = capsys.readouterr().out.splitlines()
    unfinished = ""
    if lines[-1].startswith("not finished"):
        unfinished = lines[-1]
        lines = lines[:-2]  # an empty one stands between
    columns = [cell.strip() for cell in head.strip("|").split("|")]
    table = []
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert len(cells) == len(columns)
        table.append(dict(zip(columns, cells)))
    return table, unfinished


def row_of(table, method, **cells):
    found = []
    for row in table:
        if row["method"] == method and cells.items() <= row.items():
            found.append(row)
    assert len(found) == 1
    return found[0]


def test_compare_pairs_runs_by_seed_and_names_what_is_not_finished(tmp_path, capsys):
    for method, seed, right in (
        ("full", 0, 0.5),
        ("full", 1, 0.7),
        ("random", 0, 0.3),
        ("tip", 0, 0.4),
        ("tip", 1, 0.8),
    ):
        folder = tmp_path / f"{method}-{seed}"
        before = 0.1 + seed / 10
        finished(folder, right, before=before, select=method, seed=seed)
    (tmp_path / "broken").mkdir()
    table, unfinished = compared(tmp_path, capsys)

    assert unfinished == f"not finished: {tmp_path / 'broken'}"
    assert [row["method"] for row in table] == [
        "before training",
        "random",
        "tip",
        "full",
    ]
    # Of 0.4 and 0.8: mean 0.6, sample deviation 0.283. Minus full: -0.1 and 0.1.
    assert row_of(table, "tip") == {
        "method": "tip",
        "budget": "10%",
        "seeds": "2",
        "accuracy": "0.600 ± 0.283",
        "reverse_kl": "2.000 ± 0.000",
        "agreement": "0.750 ± 0.000",
        "compared in": "accuracy",
        "- full": "+0.000 ± 0.141",
        "- random": "+0.100 (1 of 2 seeds)",
    }
    assert row_of(table, "full")["budget"] == "100%"
    assert row_of(table, "full")["- full"] == "+0.000 ± 0.000"
    before = row_of(table, "before training")
    assert (before["budget"], before["seeds"]) == ("-", "2")
    assert before["accuracy"] == "0.150 ± 0.071"
    assert before["- full"] == "-0.450 ± 0.071"  # 0.1 - 0.5 and 0.2 - 0.7
    assert before["- random"] == "-"


@pytest.mark.parametrize(
    "name, value",
    [
        ("lr", 1e-4),
        ("steps", 100),
        ("loss", "forward_kl"),
        ("student", "smaller"),
        ("teacher", "larger"),
        ("prompts", "questions.jsonl"),
        ("temperature", 0.7),
        ("batch_size", 4),  # a flag that the others do not even have
    ],
)
def test_runs_that_differ_in_a_flag_are_no_baseline_of_each_other(
    name, value, tmp_path, capsys
):
    finished(tmp_path / "full", 0.5, select="full")
    finished(tmp_path / "random", 0.3, select="random")
    finished(tmp_path / "tip", 0.6)
    finished(tmp_path / "other", 0.9, **{name: value})
    table, _ = compared(tmp_path, capsys)
    usual = row_of(table, "tip", accuracy="0.600")
    other = row_of(table, "tip", accuracy="0.900")
    assert (usual["- full"], usual["- random"]) == ("+0.100", "+0.300")
    assert (other["- full"], other["- random"]) == ("-", "-")
    assert other["other flags"] == f"{name} {value}"
    assert usual["other flags"] == f"{name} {SETTINGS.get(name)}"

    finished(tmp_path / "other-full", 0.8, select="full", **{name: value})
    table, _ = compared(tmp_path, capsys)
    usual = row_of(table, "tip", accuracy="0.600")
    other = row_of(table, "tip", accuracy="0.900")
    assert (usual["- full"], other["- full"]) == ("+0.100", "+0.100")
    assert [row["method"] for row in table].count("before training") == 2


def test_random_selection_at_another_budget_is_no_baseline(tmp_path, capsys):
    finished(tmp_path / "random", 0.3, select="random", budget=0.05)
    finished(tmp_path / "tip", 0.6)
    finished(tmp_path / "tip-5", 0.7, budget=0.05)
    finished(tmp_path / "z-full", 0.5, select="full", budget=0.05)
    table, _ = compared(tmp_path, capsys)
    assert row_of(table, "tip", budget="10%")["- random"] == "-"
    assert row_of(table, "tip", budget="5%")["- random"] == "+0.400"
    assert row_of(table, "before training")["- random"] == "-"  # at which budget?
    # For full selection --budget means nothing.
    assert row_of(table, "tip", budget="10%")["- full"] == "+0.100"
    assert row_of(table, "full")["budget"] == "100%"
    assert "other flags" not in table[0]


def test_flags_that_do_not_change_the_training_make_no_new_row(tmp_path, capsys):
    finished(tmp_path / "a", 0.4, device="cpu", micro_batch_size=4, save_every=None)
    finished(tmp_path / "b", 0.6, seed=1, device="cuda", micro_batch_size=2, resume="x")
    table, _ = compared(tmp_path, capsys)
    assert row_of(table, "tip")["seeds"] == "2"
    assert "other flags" not in table[0]


def test_two_runs_with_the_same_settings_and_seed_are_refused(tmp_path):
    finished(tmp_path / "once", 0.4)
    finished(tmp_path / "twice", 0.5)
    folders = [str(tmp_path / "once"), str(tmp_path / "twice")]
    with pytest.raises(SystemExit) as stop:
        script("compare")["main"](folders)
    assert str(stop.value).startswith("error: ")
    for folder in folders:
        assert folder in str(stop.value)


def test_a_run_without_answers_is_compared_in_reverse_kl_in_the_same_columns(
    tmp_path, capsys
):
    texts = {"prompts": "texts.jsonl"}
    finished(tmp_path / "a-full", None, 1.5, select="full", **texts)
    finished(tmp_path / "a-tip", None, 1.25, **texts)
    finished(tmp_path / "b-full", 0.5, select="full")
    finished(tmp_path / "b-tip", 0.75)
    table, _ = compared(tmp_path, capsys)
    without = row_of(table, "tip", accuracy="-")
    assert without["reverse_kl"] == "1.250"
    assert without["agreement"] == "0.750"
    assert without["compared in"] == "reverse_kl"
    assert without["- full"] == "-0.250"
    answered = row_of(table, "tip", accuracy="0.750")
    assert answered["compared in"] == "accuracy"
    assert answered["- full"] == "+0.250"


@pytest.mark.parametrize("without", ["full", "tip", "tip-1"])
def test_accuracies_are_compared_only_where_all_runs_have_one(
    without, tmp_path, capsys
):
    # The prompts file had no answers yet when one of the runs was made.
    for name, seed, right, distance in (
        ("full", 0, 0.5, 1.5),
        ("tip", 0, 0.75, 1.25),
        ("tip-1", 1, 0.85, 1.0),
    ):
        accuracy = None if name == without else right
        select = name.removesuffix("-1")
        finished(tmp_path / name, accuracy, distance, select=select, seed=seed)
    table, _ = compared(tmp_path, capsys)
    row = row_of(table, "tip")
    assert row["compared in"] == "reverse_kl"
    assert row["- full"] == "-0.250 (1 of 2 seeds)"


# ======================================================================================
# README
# ======================================================================================


@pytest.fixture
def long_pair(tmp_path):
    """A pair whose response has many tokens, so that a tenth of it is several."""
    student = model_of("qwen3", seed=1, scale=12.0)
    teacher = model_of("qwen3", seed=2, scale=12.0)
    for model in (student, teacher):
        model.generation_config.eos_token_id = 63
        model.config.max_position_embeddings = 512
    tokenizer = tokenizer_of(eos_token="w63", pad_token="w63")
    student = put(tmp_path / "student", student, tokenizer)
    teacher = put(tmp_path / "teacher", teacher, tokenizer)
    pair = opd.load_pair(student, teacher)
    assert pair.end_ids == [63]
    return pair


def run_plainly(block, pair, prompt, names):
    """Run a step in plain PyTorch -> its names, and by how much the weights fell."""
    names = {"student": pair.student, "teacher": pair.teacher, **names}
    names["optimizer"] = torch.optim.SGD(pair.student.parameters(), lr=1.0)
    was = flat([w.detach().clone() for w in pair.student.parameters()])
    for w in pair.student.parameters():
        w.grad = torch.ones_like(w)  # left behind by something else: it may not count
    torch.manual_seed(3)
    exec(block, names)
    fell = was - flat([w.detach() for w in pair.student.parameters()])
    pair.student.zero_grad()
    with torch.no_grad():  # as it was, for the program's step
        start = 0
        for w in pair.student.parameters():
            w.copy_(was[start : start + w.numel()].view_as(w))
            start += w.numel()

    torch.manual_seed(3)
    batch = opd.rollout(pair, [prompt], 256)
    if "ids" in names:
        assert batch.ids.tolist() == names["ids"].tolist()
    assert batch.mask.sum() > 30
    return names, fell, batch


def test_the_plain_block_of_the_readme_is_a_step_of_opd(long_pair):
    block = r"```python\n(# One step of selective OPD.*?)```"
    block = re.search(block, README, re.S)[1]
    prompt = [5, 6, 7]
    given = {"prompt_ids": torch.tensor([prompt])}
    own = long_pair.student.generation_config  # it must not count
    own.temperature, own.top_k, own.top_p, own.repetition_penalty = 0.5, 3, 0.5, 2.0
    names, fell, batch = run_plainly(block, long_pair, prompt, given)
    scores = scores_of(long_pair, batch, 16, 1)
    for name in ("divergence", "compatibility"):
        assert torch.allclose(scores[name][0], names[name], atol=1e-4)
    ranks = opd.rank("teachability", scores, batch.mask)
    keep = opd.select(ranks, batch.mask, 0.1)
    assert sorted(names["kept"].tolist()) == [t for _, t in sorted(places(keep))]

    ours, loss, norm = update_of(long_pair, batch, keep, 1)
    assert names["loss"].item() == pytest.approx(loss, abs=1e-4)
    assert torch.allclose(ours, fell, atol=1e-4)


def test_the_simple_step_is_a_step_of_opd(long_pair):
    block = "loss = simple_step(student, teacher, optimizer, prompt)\n"
    block += "was_training = student.training"
    prompt = [5, 6, 7]
    given = {"simple_step": opd.simple_step, "prompt": torch.tensor([prompt])}
    long_pair.student.train()  # which it must end: dropout would change p
    own = long_pair.student.generation_config  # nor may these count
    own.temperature, own.top_k, own.top_p, own.repetition_penalty = 0.5, 3, 0.5, 2.0
    names, fell, batch = run_plainly(block, long_pair, prompt, given)
    ranks = opd.rank("teachability", scores_of(long_pair, batch, 16, 1), batch.mask)
    keep = opd.select(ranks, batch.mask, 0.1)
    ours, loss, norm = update_of(long_pair, batch, keep, 1)
    assert names["loss"] == pytest.approx(loss, abs=1e-4)
    assert torch.allclose(ours, fell, atol=1e-4)
    assert not names["was_training"]


def test_the_three_tokens_of_the_readme_are_right(capsys):
    block = re.search(r"```python\n([^`]*?requires_grad_[^`]*?)```", README)[1]
    exec(block, {})
    *lines, last = capsys.readouterr().out.splitlines()
    printed = []
    for line in lines:
        printed.append([float(number) for number in line.split()])

    # The same by hand, at K = 2: the student considers the first two tokens.
    unsure = [0.70, 0.28, 0.01, 0.01]
    sure = [0.9985, 0.0009, 0.0005, 0.0001]
    D = []
    C = []
    for row, p, q in (
        (printed[0], unsure, unsure),
        (printed[1], unsure, [0.15, 0.83, 0.01, 0.01]),
        (printed[2], sure, [0.29, 0.005, 0.005, 0.70]),
    ):
        scores = plain_scores(p, q, 2)
        D.append(scores[1])
        C.append(scores[2])
        gradient = []
        for x, y in zip(p, q):
            gradient.append(x * (math.log(x / y) - kl(p, q)))
        expected = [scores[1], scores[2], kl(p, q), *gradient]
        assert row == pytest.approx(expected, abs=6e-4)

    # The first table has what the block prints, the second what is rescaled.
    rows = re.findall(r"^\| (?:agrees|wants)[^|]*\|(.*)\|$", README, re.M)
    rows, ranked = rows[:3], rows[3:]
    assert len(ranked) == 3
    for row, numbers in zip(rows, printed):
        cells = re.split(r"[|,]", row.replace("*", ""))
        assert [float(cell) for cell in cells] == numbers
    assert last == "[0.0, 0.116, 0.0] [False, True, False]"
    assert f"\n    {last}\n" in README
    for row, *expected in zip(ranked, D, C, normalized(D), normalized(C)):
        d, c, d_tilde, c_tilde = expected
        cells = re.split(r"\|", row.replace("*", ""))
        found = [float(cell) for cell in cells]
        expected = [d, c, d * c, d_tilde, c_tilde, d_tilde * c_tilde]
        assert found == pytest.approx(expected, abs=6e-3)


@pytest.mark.parametrize("how", ["flag", "attribute"])
def test_full_keeps_all_however_it_is_asked_for(store, tmp_path, how):
    args = opd.parse_args(flags(store, tmp_path / "out", "--steps", 1))
    if how == "flag":
        args = opd.parse_args(
            flags(store, tmp_path / "out", "--steps", 1, "--select", "full")
        )
        assert args.budget == 1
    args.select = "full"
    opd.main(args)
    line = json.loads((tmp_path / "out" / "log.jsonl").read_text())
    assert line["kept"] == line["valid"]


def test_full_with_a_smaller_budget_is_refused(store, capsys):
    with one_line(capsys, "--budget 0.5: --select full keeps all"):
        opd.parse_args(flags(store, "out", "--select", "full", "--budget", 0.5))


def test_a_rule_that_returns_true_and_false_is_refused(run):
    def unsure(scores, mask):
        return scores["entropy"] > 1

    with pytest.raises(ValueError, match="must be numbers; multiply True"):
        run("out", method=unsure)


def test_a_rule_that_asks_for_what_is_not_measured_is_told_so(run):
    def sure(scores, mask):
        return -scores["teacher_entropy"]

    with pytest.raises(ValueError, match="KeyError 'teacher_entropy'; measured are"):
        run("out", method=sure)


def test_a_rule_with_the_name_of_another_is_refused(run):
    def entropy(scores, mask):
        return scores["entropy"]

    with pytest.raises(ValueError, match="there is a method entropy already"):
        run("out", method=entropy)


def commands_of_the_readme():  # -> [(program, its flags)], with variables replaced
    text = README.replace("\\\n", " ")
    for name, value in re.findall(r"^ *(\w+)=\((.+)\)$", text, re.M):
        text = text.replace(f'"${{{name}[@]}}"', value)
    return re.findall(r"(?:python|bash) (\S+\.(?:py|sh))([^`|&;>#\n]*)", text)


def test_the_lines_of_the_readme_for_a_copy_of_rank_work():
    lines = README.split("In a copy of `opd.py`", 1)[1].split("\n\n")[1]
    refusal = "    raise ValueError("
    source = inspect.getsource(opd.rank)
    assert source.count(refusal) == 1
    names = dict(vars(opd))
    exec(source.replace(refusal, f"{lines}\n{refusal}"), names)

    scores, mask = grids()
    scores["teacher_entropy"] = torch.linspace(0, 0.2, mask.numel()).view(mask.shape)
    expected = opd.rank("teachability", scores, mask)
    expected[scores["teacher_entropy"] >= 0.1] = 0
    assert torch.equal(names["rank"]("teacher_is_sure", scores, mask), expected)
    assert 0 < (expected > 0).sum() < mask.sum()


def test_every_command_and_flag_of_the_readme_is_understood_and_every_file_there():
    parsers = {"opd.py": opd.parse_args, "diagnose.py": diagnose.parse_args}
    found = commands_of_the_readme()
    assert set(parsers) <= {program for program, _ in found}
    given = re.findall(r"`--([a-z-]+)", README)
    for program, flags in found:
        assert (HERE / program).exists()
        given += re.findall(r"--([a-z-]+)", flags)
        if program in parsers:
            parsers[program](flags.split())  # a value that it refuses is an exit
    known = {"help", *vars(diagnose.parse_args([]))}  # those of opd.py, too
    assert {flag.replace("-", "_") for flag in given} <= known
    paths = re.findall(r"\.(?:figures|evidence)/[\w.-]*\w", README)
    assert [path for path in paths if not (HERE / path).exists()] == []
    assert len(re.findall(r"!\[[^]]*\]\(\.figures/", README)) >= 1


# ======================================================================================
# TRL: .evidence/trl_trainer.py, the selection inside it; skipped if not installed
# ======================================================================================


def trainer_of(folder, size, accumulation=1, steps=1):  # -> Pair, trainer
    pytest.importorskip("trl")
    from datasets import Dataset

    path = HERE / ".evidence" / "trl_trainer.py"
    spec = importlib.util.spec_from_file_location("trl_trainer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pair = opd.load_pair(f"{folder}/student", f"{folder}/teacher")
    config = module.DistillationConfig(
        output_dir=f"{folder}/out",
        per_device_train_batch_size=size,
        max_steps=steps,
        beta=1.0,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        max_completion_length=6,
        temperature=1.0,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        activation_checkpointing=False,
        shuffle_dataset=False,
    )
    prompts = [{"prompt": f"w{3 + i} w9" + " w8" * (i % 3)} for i in range(24)]
    trainer = module.SelectiveDistillationTrainer(
        model=pair.student,
        teacher_model=pair.teacher,
        args=config,
        train_dataset=Dataset.from_list(prompts),
        eval_dataset=Dataset.from_list(prompts),
        processing_class=pair.tokenizer,
    )
    return pair, trainer


def as_rollout(batch):  # TRL's batch -> ours
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    mask = batch["completion_mask"] > 0
    return opd.Rollout(ids, attention, batch["completion_ids"], mask, mask.all(1))


def selection_of_opd(pair, rollout):
    scores = scores_of(pair, rollout, 16, 99)
    return opd.select(opd.rank("teachability", scores, rollout.mask), rollout.mask, 0.1)


def test_trl_trains_on_the_mask_and_with_the_gradient_of_opd(tmp_path):
    uneven_pair(tmp_path)
    pair, trainer = trainer_of(tmp_path, 8)
    trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    rollout = as_rollout(batch)
    keep = batch["tool_mask"] > 0
    assert torch.equal(keep & rollout.mask, selection_of_opd(pair, rollout))
    assert batch["num_items_in_batch"] == keep.sum() < rollout.mask.sum()
    trainer.compute_loss(trainer.model, batch).backward()
    theirs = flat([w.grad for w in pair.student.parameters()])
    # TRL's loss cannot merge the 12 ends that both models share.
    ours = gradient(pair._replace(end_ids=[0]), rollout, keep, 8)
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.999
    assert float(ours.norm()) == pytest.approx(float(theirs.norm()), rel=0.01)


def test_in_trl_the_budget_is_that_of_all_accumulated_batches_and_evaluation_keeps_all(
    tmp_path,
):
    uneven_pair(tmp_path)
    pair, trainer = trainer_of(tmp_path, 4, accumulation=2)
    trainer.model.train()
    trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    first, second = trainer._buffered_inputs
    whole = {}
    for key in first:
        if first[key].dim() > 1:
            whole[key] = torch.cat([first[key], second[key]])
    keep = whole["tool_mask"] > 0
    # In the shuffled order, too.
    assert torch.equal(keep, selection_of_opd(pair, as_rollout(whole)))
    assert first["num_items_in_batch"] == keep.sum()
    assert second["num_items_in_batch"] == keep.sum()
    trainer.model.eval()
    batch = trainer._prepare_inputs(next(iter(trainer.get_eval_dataloader())))
    assert "tool_mask" not in batch


def test_in_trl_a_pair_that_ends_with_different_tokens_is_refused(tmp_path):
    pytest.importorskip("trl")
    _, teacher = uneven_pair(tmp_path)
    teacher.generation_config.eos_token_id = [0, 20]
    put(tmp_path / "teacher", teacher)
    _, trainer = trainer_of(tmp_path, 8)
    trainer.model.train()
    with pytest.raises(ValueError, match="20.*unteach"):
        trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


PROCESS = """
import sys, torch, test_opd
folder = sys.argv[1]
pair, trainer = test_opd.trainer_of(folder, 4, steps=2)
batches = []
real = trainer._generate_and_score_completions

def recorded(inputs):
    batches.append(real(inputs))
    return batches[-1]

trainer._generate_and_score_completions = recorded
trainer.train()
weights = test_opd.flat(pair.student.parameters())
torch.save((batches, weights), f"{folder}/rank-{trainer.accelerator.process_index}.pt")
torch.distributed.destroy_process_group()  # else its threads may abort the exit
"""


def test_in_trl_two_processes_select_together_and_stay_the_same(tmp_path):
    pytest.importorskip("trl")
    uneven_pair(tmp_path)
    (tmp_path / "process.py").write_text(PROCESS)
    command = (
        f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node=2"
    )
    result = subprocess.run(
        [*command.split(), tmp_path / "process.py", tmp_path],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    mine, weights = torch.load(tmp_path / "rank-0.pt")
    other, others_weights = torch.load(tmp_path / "rank-1.pt")
    assert len(mine) == 2
    assert torch.equal(weights, others_weights)
    assert not torch.equal(weights, load_weights(tmp_path / "student"))

    # The first step, when both still have the student's own weights.
    first = [mine[0], other[0]]
    for batch in first:
        for key, value in batch.items():  # to one width: prompts of 8, responses of 6
            if value.dim() > 1:
                left = 8 - value.shape[1] if "prompt" in key else 0
                right = 0 if "prompt" in key else 6 - value.shape[1]
                batch[key] = torch.nn.functional.pad(value, (left, right))
    whole = {}
    for key in mine[0]:
        if mine[0][key].dim() > 1:
            whole[key] = torch.cat([mine[0][key], other[0][key]])
    both = as_rollout(whole)
    keep = whole["tool_mask"] > 0
    assert not torch.equal(both.ids[:4], both.ids[4:])
    pair = opd.load_pair(f"{tmp_path}/student", f"{tmp_path}/teacher")
    assert torch.equal(keep, selection_of_opd(pair, both))
    ranked = math.ceil(0.1 * int(both.mask.sum()))
    assert ranked <= keep.sum() <= ranked + len(keep)
    assert (keep.sum(1) > 0).all()
    assert all(batch["num_items_in_batch"] == keep.sum() for batch in first)
