"""The fixed-context diagnostic: which disagreement did the student really learn?

opd.py trains on tokens that it takes to be teachable. To find out which tokens are, let
all of them be trained on, so that each has its chance, and look at the same text twice,
before training and after it. (A new text would have other tokens: there would be
nothing to compare.)

  1. sample_contexts   the student, before training, writes responses; a prompt with its
                       response is called a context
  2. measure_contexts  both models read them, and are compared at every position
  3. opd.train         on all positions, unless --select says otherwise. (With --after
                       nothing is trained: the student of an earlier run is measured)
  4. measure_contexts  the same positions once more, now with the trained student
  5. report            how much nearer to the teacher did the student come, and where?

How much nearer it came at a position is called the gain there. It is measured in three
ways, since they differ:

  forward_kl  the fall of KL(teacher || student), in nats: the paper's measure
  reverse_kl  the fall of KL(student || teacher), in nats: what training lowers
  overlap     the rise of sum_v min(p(v), q(v)), the probability common to both

For example, at the demo's "gets" the teacher would rather say "obtains", with .71. In
training this word becomes 90 times likelier, but no more than one in ten thousand.
Forward KL weighs that by the teacher's .71: a gain of .71 * log(90) = 3.2 nats. Reverse
KL weighs it by the student's probability, which is still tiny: no gain.

Two tables are printed; the page, report.html, has more. The first says, for each
selection method, how much those positions gain that it would keep. Two rows of the demo
(seed 0):

                             forward_kl               reverse_kl
  full          +0.292 [+0.284, +0.301]  +0.196 [+0.181, +0.211]
  teachability  +0.411 [+0.328, +0.488]  +1.930 [+1.789, +2.074]

Over all positions, KL(student || teacher) fell by .196 nats on average; over the tenth
that teachability would keep, by 1.930. In brackets are 95 % intervals.

The second asks: where the gain is larger, is there more of the learnable part of the
disagreement, or more of the incompatible one? `explain` makes it, and shows a row.

Three warnings. Where D is large, there is much to gain, as D is nearly the forward KL
before training. The intervals are about other contexts, not about another training. And
what goes together with a gain need not be its cause.

Notation as in opd.py: p is the student's next-token distribution, q the teacher's. The
K of D and C is 16; the page has the main tables with 8 and with 32, too.
Shapes: V tokens in the vocabulary, N positions in all contexts together, n some of
them. Arrays are numpy's. Source: arXiv 2605.26844, fixed-context analysis.

Parts 1 to 5 are the diagnostic; parts 6 to 8 write it down, and may be skipped.
"""

import argparse
import html
import json
import sys
import textwrap
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import opd

# ======================================================================================
# 1. The diagnostic on one page
# ======================================================================================


def simple_diagnosis(
    pair, prompts, train_student, k=16, budget=0.1, max_new_tokens=256
):
    """For each method: the mean gain of the positions that it would keep.

    For reading: the program calls `main`. This leaves out the other measures of gain,
    the intervals, the regression and the page. train_student() is a function of yours
    that trains pair.student in place.
    """
    # 1. Contexts: the student's responses, a batch [B, R].
    batch = opd.rollout(pair, prompts, max_new_tokens)

    # 2. Measure them before training: {name: [B, R]}.
    before, _ = opd.score(pair, batch, k)

    # 3. Train.
    train_student()

    # 4. Measure the same responses again.
    after, _ = opd.score(pair, batch, k)

    # 5. The gain: by how much did KL(student || teacher) fall at each position?
    gain = before["reverse_kl"] - after["reverse_kl"]  # [B, R], in nats
    gain = gain[batch.mask]  # [N], without padding

    # What would each method keep, going by what was measured before training?
    flat = {name: values[batch.mask] for name, values in before.items()}  # [N] each
    means = {}
    for method in opd.METHODS:
        keep = kept_by(method, flat, budget)  # [N] bool
        means[method] = gain[keep].mean().item()
    return means


def kept_by(method, scores, budget, generator=None):  # {name: [N]} -> [N] bool
    """What a method would keep of the positions of all contexts together.

    They stand in one row, as if they were one response. So no response is granted a
    position of its own, as in training, and all methods keep equally many.
    """
    one_row = {name: torch.as_tensor(values)[None] for name, values in scores.items()}
    mask = torch.ones_like(one_row["entropy"], dtype=torch.bool)  # [1, N]
    if method == "full":
        return mask[0]
    ranks = opd.rank(method, one_row, mask, generator)
    return opd.select(ranks, mask, budget)[0]


def main(args):
    """The same five steps, as the program takes them."""
    pair, training, held_out = opd.prepare(args)
    trained = None
    if args.after:
        # Now, so that a wrong folder fails before the work.
        trained = load_trained(pair, args)
    out = opd.new_folder(args.out, "diagnosis")

    prompts = []
    for i in range(args.contexts):
        example = held_out[i % len(held_out)]  # starts over if there are too few
        prompts.append(example["prompt"])

    # 1. Sample contexts.
    batches = sample_contexts(pair, prompts, args)

    # 2. Measure them before training.
    before = measure_contexts(pair, batches, args)  # {name: [N]}

    # 3. Train, on all positions (--select full) unless asked otherwise.
    if trained is None:
        opd.train(pair, training, args, out)
        opd.save(pair, out / "student")
        trained = pair  # opd.train has changed the student in place

    # 4. Measure the same contexts again.
    after = measure_contexts(trained, batches, args)

    # 5. Report.
    report(pair, prompts, len(held_out), before, after, args, out)


# ======================================================================================
# 2. Measuring: steps 1 to 4
# ======================================================================================


def sample_contexts(pair, prompts, args):  # -> [opd.Rollout]
    """The student before training samples one response to each prompt."""
    torch.manual_seed(args.seed)
    batches = []
    size = 4 * args.batch_size  # without gradients more fit in at once
    for start in tqdm(range(0, len(prompts), size), "sampling contexts", disable=None):
        part = prompts[start : start + size]
        batches.append(opd.rollout(pair, part, args.max_new_tokens))
    return batches


def overlap(student_logits, teacher_logits):  # [..., V], [..., V] -> [...]
    """sum_v min(p(v), q(v)), in [0, 1]: the probability that both models share."""
    p = student_logits.float().softmax(-1)
    q = teacher_logits.float().softmax(-1)
    return torch.minimum(p, q).sum(-1)


def measure_chunk(student_logits, teacher_logits, ks, tokens):  # -> {name: [n]}
    """All that is measured at n positions, in nats except for overlap and C.

    First what opd.measure measures (so that a quantity of your own, added there, is in
    the report, too), but with D and C for each K of `ks`. The last ten are the five
    likeliest tokens of each model, for the page: `opd.score` takes one number for each
    position, so each of the ten has a name.
    """
    measured = opd.measure(student_logits, teacher_logits, ks[0], tokens)
    del measured["divergence"], measured["compatibility"]  # these, for each K:
    for k in ks:
        D = opd.divergence(student_logits, teacher_logits, k)
        C = opd.compatibility(student_logits, teacher_logits, k)
        measured[f"divergence_{k}"] = D
        measured[f"compatibility_{k}"] = C
    measured["token"] = tokens
    measured["forward_kl"] = opd.forward_kl(student_logits, teacher_logits)
    measured["overlap"] = overlap(student_logits, teacher_logits)
    measured["teacher_entropy"] = opd.entropy(teacher_logits)

    five = min(5, student_logits.shape[-1])
    student_top = student_logits.topk(five).indices  # [n, 5]
    teacher_top = teacher_logits.topk(five).indices
    for i in range(five):
        measured[f"student_choice_{i + 1}"] = student_top[:, i]
        measured[f"teacher_choice_{i + 1}"] = teacher_top[:, i]
    return measured


def locate(mask):  # [B, R] bool -> [B, R] twice
    """Where a position stands: in which response, and how far into it, from 0 to 1."""
    response = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)
    tokens_before = mask.cumsum(-1) - 1
    length = mask.sum(-1, keepdim=True)
    progress = tokens_before.double() / (length - 1).clamp(min=1)
    return response, progress


def measure_contexts(pair, batches, args):  # -> {name: [N]}
    """What `measure_chunk` measures, and "context" and "progress" from `locate`.

    The N positions come context by context, left to right.
    """
    parts = defaultdict(list)
    first_context = 0  # the number of the batch's first context
    for batch in tqdm(batches, "scoring contexts", disable=None):
        # All K at once, so that the models read the text only once.
        scores, _ = opd.score(
            pair, batch, args.ks, args.micro_batch_size, measure_fn=measure_chunk
        )
        response, progress = locate(batch.mask)
        scores["context"] = first_context + response
        scores["progress"] = progress
        first_context += len(batch.mask)
        for name, values in scores.items():
            parts[name].append(values[batch.mask].cpu().numpy())

    measured = {}
    for name, arrays in parts.items():
        values = np.concatenate(arrays)
        if values.dtype == np.float32:
            values = values.astype(np.float64)  # for long sums
        measured[name] = values
    return measured


# ======================================================================================
# 3. What the tables are made from
#
#    The report compares positions: which gain most? So each quantity becomes a column
#    with a row for each position, in one of four `Columns`. Some of these, at three
#    tokens of the README's response (demo, seed 0, N = 9005):
#
#             gains         gains         standardized    ranks        groups
#      token  "forward_kl"  "reverse_kl"  "incompatible"  "learnable"  "divergence", 0.1
#      Ada           0.001         0.001           -0.32       5498.0  False
#      gets          3.213         0.005            3.17        451.5  True
#      22            1.947         6.311           -0.32       8852.0  False
#
#    (Of the learnable part, "gets" has nothing. So have 901 other tokens, and all of
#    them share the mean of the ranks 1 to 902.)
#
#    The tables of part 4 are made from the rows. Part 5 draws contexts by chance and
#    makes the tables again from their rows, to see how much the numbers change.
# ======================================================================================

MEASURES = ("forward_kl", "reverse_kl", "overlap")  # of the gain
ALL_GAINS = (*MEASURES, "relative")  # see `relative_gain`
BUDGETS = (0.03, 0.05, 0.1)
THIRDS = ("least compatible", "middle", "most compatible")
QUARTERS = ("lowest quarter", "second", "third", "highest")


class Columns(NamedTuple):
    """Each field is {name: [N]}, with a row for each position."""

    gains: dict  # the names are ALL_GAINS. For the tables of means
    standardized: dict  # gains and features with mean 0, variance 1. For regressions
    ranks: dict  # gains and features, 1 for the lowest. For rank correlations
    groups: dict  # bool: is it in this group? The names are from `make_groups`


def gains_of(before, after):  # -> {measure: [N]}
    """How much nearer to the teacher the student came."""
    return {
        "forward_kl": before["forward_kl"] - after["forward_kl"],
        "reverse_kl": before["reverse_kl"] - after["reverse_kl"],
        "overlap": after["overlap"] - before["overlap"],  # more of it is nearer
    }


def relative_gain(before, gains):  # -> [N]
    """A fourth gain, of the paper's code: the share of the forward KL that is gone.

    From 2 nats to 1.5, the gain is .5 and this share is .25. Where the KL had been tiny
    it may be hugely negative; so it is clipped at its 1 % and 99 % quantiles.
    """
    share = gains["forward_kl"] / (before["forward_kl"] + 1e-12)
    low, high = np.quantile(share, [0.01, 0.99])
    return np.clip(share, low, high)


def normalize(values):  # [N] -> [N] in [0, 1]
    """opd.robust_normalize over all positions of all contexts."""
    row = torch.tensor(values)[None]  # [1, N]
    everywhere = torch.ones_like(row, dtype=torch.bool)
    return opd.robust_normalize(row, everywhere)[0].double().numpy()


def make_features(before, k):  # {name: [N]} -> {name: [N]}
    """What may explain the gain, all from before training, with the D and C of K = k.

    All lie in [0, 1]. With small letters, h, d and c are H, D and C, rescaled as in
    opd.py.
    """
    h = normalize(before["entropy"])
    d = normalize(before[f"divergence_{k}"])
    c = normalize(before[f"compatibility_{k}"])
    return {
        "entropy": h,
        "divergence": d,
        "compatibility": c,
        "entropy * divergence": h * d,
        "learnable": d * c,  # the teacher reweights tokens that the student considers
        "incompatible": d * (1 - c),  # it wants others; the two add up to d
        "tip": opd.soft_or(h, d),
        "progress": before["progress"],
        "teacher_entropy": normalize(before["teacher_entropy"]),
    }


def zscore(values):  # [N] -> [N]
    """Rescaled to mean 0 and variance 1; a constant becomes zeros."""
    return (values - values.mean()) / max(values.std(), 1e-12)


def ascending_ranks(values):  # [N] -> [N]
    """1 for the lowest value; equal values share the mean of their ranks.

    10, 20, 20 get 1, 2.5, 2.5: the last two share the second and the third place.
    """
    ordered = np.sort(values)
    lower = np.searchsorted(ordered, values, side="left")  # how many: 0, 1, 1
    up_to = np.searchsorted(ordered, values, side="right")  # lower or equal: 1, 3, 3
    first_place = lower + 1
    last_place = up_to
    return (first_place + last_place) / 2


def equal_groups(values, eligible, labels):  # [N], [N] bool -> {label: [N] bool}
    """Groups of equal size, one for each label, from the lowest values to the highest.

    Only `eligible` positions belong to one. With values 5, 1, 9, 3, 7, of which the
    last is not eligible, two groups are {1, 3} and {5, 9}.
    """
    positions = np.flatnonzero(eligible)
    ascending = positions[np.argsort(values[positions], kind="stable")]
    groups = {}
    for label, members in zip(labels, np.array_split(ascending, len(labels))):
        groups[label] = np.zeros(len(values), dtype=bool)
        groups[label][members] = True
    return groups


def of_k(before, k):  # {name: [N]} -> {name: [N]}
    """With the names of opd.measure: "divergence" and "compatibility", of this K."""
    scores = dict(before)
    scores["divergence"] = before[f"divergence_{k}"]
    scores["compatibility"] = before[f"compatibility_{k}"]
    return scores


def make_groups(before, features, k, seed):  # -> {group: [N] bool}
    """What each method would keep, and equal groups where the student is sure.

    ("tip", 0.1) is what tip keeps with 10 %. ("learnable", "highest") is the quarter
    with most of the learnable part, of the positions where the student is sure.
    """
    groups = {}
    for budget in BUDGETS:
        for method in opd.METHODS:
            generator = torch.Generator().manual_seed(seed)  # for "random"
            kept = kept_by(method, of_k(before, k), budget, generator)
            groups[method, budget] = kept.numpy()

    # Where the entropy is at most its median, and D at least its own, the student is
    # rather sure and yet disagrees. (Two medians make four quadrants; the paper's Q3 is
    # this one. Half of all positions are above a median, so many of them may disagree
    # by next to nothing.)
    h = features["entropy"]
    d = features["divergence"]
    sure_yet_in_disagreement = (h <= np.median(h)) & (d >= np.median(d))
    for name, labels in (
        ("compatibility", THIRDS),
        ("learnable", QUARTERS),
        ("incompatible", QUARTERS),
    ):
        of_name = equal_groups(features[name], sure_yet_in_disagreement, labels)
        for label in labels:
            groups[name, label] = of_name[label]
    return groups


def make_data(before, gains, k, seed):  # {name: [N]} twice -> Columns
    """All that the tables are made from, with the D and C of this K.

    InputError for a feature that is the same everywhere: it can explain nothing.
    """
    gains = {**gains, "relative": relative_gain(before, gains)}
    features = make_features(before, k)
    for name, values in features.items():
        if np.ptp(values) < 1e-12:
            raise opd.InputError(
                f"{name} is the same at all positions, so no slope can be found "
                "for it; use more contexts or longer responses"
            )

    standardized = {}
    ranks = {}
    for name, values in {**features, **gains}.items():
        standardized[name] = zscore(values)
        ranks[name] = ascending_ranks(values)
    return Columns(gains, standardized, ranks, make_groups(before, features, k, seed))


# ======================================================================================
# 4. The tables: plain numbers, {row: {column: number}}, from the data of n positions.
#    After each function: what stands above and below its table.
# ======================================================================================

CAPTIONS = {}  # {name of the table: (title, how to read it)}


def mean_gains(data, group, names=MEASURES):  # [n] bool -> {name of the gain: mean}
    """The mean gains of a group's members; nan if it has none."""
    members = np.flatnonzero(group)
    means = {}
    for name in names:
        values = data.gains[name][members]
        means[name] = values.mean() if len(values) else np.nan
    return means


def gain_of_kept(data, budget):
    """For each method: the mean gain of the positions that it would keep."""
    table = {}
    for method in opd.METHODS:
        table[method] = mean_gains(data, data.groups[method, budget])
    return table


CAPTIONS["kept"] = (
    "Mean gain of the 10% that each method would keep",
    """For each method, the mean gain of the positions that it would keep if all
    contexts were one batch: equally many for each (full keeps all), whatever --budget
    the training had. Of equal ranks, those of the first contexts are kept: the top 5 %
    of entropy, of D and of C are all 1.""",
)
for percent in (3, 5):
    CAPTIONS[f"kept at {percent}%"] = (
        f"Mean gain of the {percent}% that each method would keep",
        """As with 10%, but mind the ties: with so few, entropy and divergence, and what
        is made of them, keep the first contexts' positions and not the best.""",
    )


# A linear regression predicts the gain from the two parts of d, which are in question,
# and from three controls, as in the paper. (An unsure student, say, or an early
# position may gain more whatever the teacher wants, and the two parts must not get the
# credit for that.)
REGRESSORS = ("learnable", "incompatible", "entropy", "progress", "teacher_entropy")

# The paper's baseline: d as a whole, and its product with the entropy, so that there
# are five again. If that explains as much, the split is no better at forecasting.
UNSPLIT = (
    "divergence",
    "entropy * divergence",
    "entropy",
    "progress",
    "teacher_entropy",
)


def least_squares(z, regressors, outcomes):  # -> {outcome: {regressor: slope}}
    """The slopes with which intercept + sum of slope * regressor misses least.

    Least: the sum of squares of what is missed at the n positions. z is {name: [n]};
    regressors and outcomes are names in it.
    """
    ones = np.ones_like(z[outcomes[0]])
    X = np.column_stack([ones] + [z[name] for name in regressors])  # [n, 1 + ...]
    Y = np.column_stack([z[name] for name in outcomes])  # [n, outcomes]
    solution = np.linalg.lstsq(X, Y, rcond=None)[0]  # [1 + regressors, outcomes]

    slopes = {}
    for i, name in enumerate(outcomes):
        slopes[name] = dict(zip(regressors, solution[1:, i]))  # without the intercept
    return slopes


def explain(data):
    """Which part of the disagreement goes with the gain, learnable or incompatible?

    In the paper, the first has the larger slope. A row of the demo (seed 0), where that
    is not so, without its intervals:

                  learnable  incompatible     gap
      forward_kl     -0.053        +1.014  -1.067

    One standard deviation more of the incompatible part, with the other four columns
    being equal, goes with a gain in forward KL that is 1.014 standard deviations
    larger. (That is far: the part is -0.32 nearly everywhere, and 3.17 at "gets".)

    Never trust one slope alone. Two columns that go together can share a gain in many
    ways. At "gets" the incompatible part and the teacher's entropy are both large; they
    add +1.75 and -1.35 there to the forecast of the gain in reverse KL.
    """
    table = {}
    for name, slopes in least_squares(data.standardized, REGRESSORS, ALL_GAINS).items():
        table[name] = {
            "learnable": slopes["learnable"],
            "incompatible": slopes["incompatible"],
            "gap": slopes["learnable"] - slopes["incompatible"],
        }
    return table


CAPTIONS["explained"] = (
    "What explains the gain",
    """The slope .3 in the column "learnable" says: where the learnable part of D is one
    standard deviation larger, and the incompatible part and three controls are the
    same, the gain is .3 standard deviations larger. gap = learnable - incompatible. In
    forward_kl, the paper has .086 and .043. "relative" is the share of the forward KL
    that is gone. Mind that a slope may be large only to make up for that of another
    column: at tokens where both are large, they cancel.""",
)


def r_squared(z, regressors, outcomes):  # -> {outcome: share of its variance}
    """How much of each outcome do the regressors explain?"""
    shares = {}
    for name, slopes in least_squares(z, regressors, outcomes).items():
        fitted = np.zeros_like(z[name])  # without the intercept: it has no variance
        for regressor, slope in slopes.items():
            fitted += slope * z[regressor]
        shares[name] = fitted.var() / max(z[name].var(), 1e-12)
    return shares


def explained_shares(data):
    """R2 with D in its two parts, and with D unsplit: does the split explain more?"""
    split = r_squared(data.standardized, REGRESSORS, ALL_GAINS)
    unsplit = r_squared(data.standardized, UNSPLIT, ALL_GAINS)
    table = {}
    for name in ALL_GAINS:
        table[name] = {"split": split[name], "unsplit": unsplit[name]}
    return table


CAPTIONS["shares"] = (
    "How much of the gain is explained",
    """R2, the share of the gain's variance that the regression explains: with D split
    into its two parts; and unsplit, with D and its product with the entropy in their
    place.""",
)


def compare_thirds(data):
    """Where the student is sure yet disagrees: does a larger C gain more?"""
    table = {}
    for third in THIRDS:
        table[third] = mean_gains(data, data.groups["compatibility", third], ALL_GAINS)
    table["most - least"] = {}
    for name in ALL_GAINS:
        most = table["most compatible"][name]
        table["most - least"][name] = most - table["least compatible"][name]
    return table


CAPTIONS["thirds"] = (
    "Sure, yet in disagreement (the paper's Q3)",
    """Of the positions where the student's entropy is at most the median and D at least
    the median: their mean gain in three equal groups, from the lowest C to the highest.
    In the last row, above 0 says that more is gained where the teacher's advice is more
    compatible, as the paper has it; below 0, less. (D may differ between the groups,
    too.)""",
)


def leak(with_C_before, with_C_after):  # {name of the table: rows} twice -> rows
    """Two figures of the main tables, with C of before training and, wrongly, of after.

    Why wrongly? Say the teacher wants a token that the student does not consider: C is
    low, and the disagreement incompatible. Training teaches it all the same, which
    contradicts the hypothesis. But now the token stands in the trained student's top K.
    With C from there, which is high, the position counts as learnable: what spoke
    against the hypothesis now speaks for it.
    """
    rows = {}
    for when, found in (("before", with_C_before), ("after", with_C_after)):
        for name in ALL_GAINS:
            rows[f"C {when}, {name}"] = {
                "gap": found["explained"][name]["gap"],
                "most - least": found["thirds"]["most - least"][name],
            }
    return rows


CAPTIONS["leak"] = (
    "If C were measured after training",
    """Two figures from above (gap, most - least), with C from before training and with
    C from after it. The latter is a leak: by then, what was learned stands in the
    trained student's top K, so C already contains part of the answer. Only C from
    before can choose positions.""",
)


def compare_quarters(data, part):
    """Where the student is sure yet disagrees: does more of this part gain more?"""
    table = {}
    for quarter in QUARTERS:
        table[quarter] = mean_gains(data, data.groups[part, quarter])
    return table


for part in ("learnable", "incompatible"):
    CAPTIONS[part] = (
        f"Sure, yet in disagreement, by quarters of its {part} part",
        "From the quarter with the least of it to that with the most.",
    )


def correlation(x, y):  # [n], [n] -> number
    """Pearson's correlation; of a constant, 0."""
    x = x - x.mean()
    y = y - y.mean()
    scale = np.sqrt((x**2).sum() * (y**2).sum())
    return (x * y).sum() / max(scale, 1e-12)


def rank_correlations(data):
    """What orders the positions as their gains do? (Spearman's: of the ranks.)"""
    table = {}
    ranks = data.ranks
    for feature in ("divergence", "learnable", "incompatible", "entropy", "tip"):
        table[feature] = {}
        for name in MEASURES:
            table[feature][name] = correlation(ranks[feature], ranks[name])
    return table


CAPTIONS["correlations"] = (
    "Rank correlation with the gain",
    """Spearman's: 1 if a quantity orders the positions as the gain does, -1 if the
    other way round, near 0 if it does neither.""",
)


# ======================================================================================
# 5. Intervals: how much may a number owe to chance?
# ======================================================================================


def drawn_positions(context, count, seed):  # [N] -> yields [n], `count` times
    """Draw contexts by chance, and yield the positions of all of them.

    context [N] says to which context each position belongs. As many contexts are drawn
    as there are, with replacement: one may come twice, another not at all.
    """
    positions_of = []  # of each context
    for i in np.unique(context):
        positions_of.append(np.flatnonzero(context == i))

    generator = np.random.default_rng(seed)
    for _ in range(count):
        contexts = generator.integers(len(positions_of), size=len(positions_of))
        yield np.concatenate([positions_of[i] for i in contexts])


def at_positions(data, positions):  # Columns of N positions, [n] -> Columns of n
    """The rows of these positions. One that was drawn twice is there twice."""
    drawn = {}
    for field, columns in data._asdict().items():
        drawn[field] = {
            name: values.take(positions) for name, values in columns.items()
        }
    return Columns(**drawn)


def bootstrap(make_tables, data, context, count, seed):
    """Tables with a 95 % interval for each number.

    With other prompts and responses, a number would have come out a little differently.
    How much, the contexts at hand can tell: they stand for all that there might be. All
    numbers are computed again, `count` times, each time from contexts drawn from these:

      three contexts with the mean gains        .1  .2  .6    mean .30
      three of them, drawn with replacement     .6  .1  .6    mean .43
      once more                                 .2  .2  .1    mean .17
      ...

    The middle 95 % of the means are the interval. It says nothing of another training:
    for that, run other seeds. Why are contexts drawn, and not positions? If all the
    positions of a response gained the same, there would be as many independent numbers
    as contexts, and drawing positions would feign many more. (In the demo four prompts
    ask for the same sums, so its intervals are probably too narrow even so.) Scales,
    ranks and groups are those of all positions, and are not found anew in each draw.

    make_tables(data) -> {table: {row: {column: number}}}. In what is returned, a cell
    is {"value": .30, "low": .10, "high": .60}. InputError if a value is nan.
    """
    tables = make_tables(data)
    check_numbers(tables)
    others = []
    for positions in drawn_positions(context, count, seed):
        others.append(make_tables(at_positions(data, positions)))

    for table, rows in tables.items():
        for row, cells in rows.items():
            for column, value in cells.items():
                results = [other[table][row][column] for other in others]
                cells[column] = cell_of(value, results)
    return tables


def check_numbers(tables):
    for table, rows in tables.items():
        for row, cells in rows.items():
            if np.isnan(list(cells.values())).any():
                raise opd.InputError(
                    f"the table {table!r} has no number for {row!r}: there are too few "
                    "positions for the report's groups; use more --contexts"
                )


def cell_of(value, results):  # a number, and those of the draws -> {name: number}
    # A draw may contain no position of a group by chance: its nan is left out.
    low, high = np.nanquantile(results, [0.025, 0.975]).tolist()
    return {"value": float(value), "low": low, "high": high}


# ======================================================================================
# 6. The report
# ======================================================================================


def main_tables(data):  # -> {name of the table: rows}
    return {
        "kept": gain_of_kept(data, 0.1),
        "explained": explain(data),
        "thirds": compare_thirds(data),
    }


def more_tables(data):  # -> {name of the table: rows}
    return {
        "shares": explained_shares(data),
        "correlations": rank_correlations(data),
        "kept at 3%": gain_of_kept(data, 0.03),
        "kept at 5%": gain_of_kept(data, 0.05),
        "learnable": compare_quarters(data, "learnable"),
        "incompatible": compare_quarters(data, "incompatible"),
    }


def kept_tokens(before, k, seed, decode):  # -> rows
    """The five tokens that each method keeps most often, with their share."""
    rows = {}
    for method in opd.METHODS:
        generator = torch.Generator().manual_seed(seed)  # for "random"
        kept = kept_by(method, of_k(before, k), 0.1, generator).numpy()
        tokens = before["token"][kept]
        texts = []
        for token, count in Counter(tokens.tolist()).most_common(5):
            texts.append(f"{decode(token)!r} {count / len(tokens):.0%}")
        rows[method] = {"tokens": ", ".join(texts)}
    return rows


CAPTIONS["tokens"] = (
    "What each method would keep at 10%",
    "Its most frequent tokens, and their share.",
)


def all_tables(before, after, gains, args, decode):  # {name: [N]} thrice -> tables
    """Everything that the report says in numbers, as it is written to report.json."""

    def with_intervals(make_tables, scores, k):
        data = make_data(scores, gains, k, args.seed)
        context = before["context"]
        return bootstrap(make_tables, data, context, args.bootstrap, args.seed)

    with_captions = []
    for k in args.ks:  # --top-k is the first
        tables = with_intervals(main_tables, before, k)

        # Once more, but wrongly with C from after training.
        name = f"compatibility_{k}"
        before_with_C_after = {**before, name: after[name]}
        with_C_after = with_intervals(main_tables, before_with_C_after, k)
        tables["leak"] = leak(tables, with_C_after)

        if k == args.top_k:  # all the others, too
            tables.update(with_intervals(more_tables, before, k))
            tables["tokens"] = kept_tokens(before, k, args.seed, decode)

        for name, rows in tables.items():
            title, reading = CAPTIONS[name]
            reading = " ".join(reading.split())  # in one line
            table = {"title": f"{title}, K={k}", "reading": reading, "rows": rows}
            with_captions.append(table)
    return with_captions


def what_was_measured(held_out_count, before, after, args):  # -> text
    positions = len(before["forward_kl"])
    text = f"{args.contexts} contexts, {positions} positions. "
    text += f"{held_out_count} held-out prompts"
    if held_out_count < args.contexts:
        text += ", some repeated (which the intervals ignore)"
    if args.after:
        text += f"; the trained student is {args.after}"
    if np.array_equal(before["forward_kl"], after["forward_kl"]):
        text += "; no gain anywhere: this student has not changed"
    return text + "."


def number_text(x):  # +0.123, or +1e-04 for what would be +0.000
    return f"{x:+.0e}" if 0 < abs(x) < 0.0005 else f"{x:+.3f}"


def cell_text(cell):
    if isinstance(cell, str):  # a text, as in `kept_tokens`
        return cell
    low = number_text(cell["low"])
    high = number_text(cell["high"])
    return f"{number_text(cell['value'])} [{low}, {high}]"


def rows_text(rows):  # -> the lines of a table, in columns
    first_row = next(iter(rows.values()))
    grid = [["", *first_row]]
    for label, cells in rows.items():
        grid.append([label, *map(cell_text, cells.values())])

    widths = []
    for column in range(len(grid[0])):
        widths.append(max(len(line[column]) for line in grid))

    lines = []
    for texts in grid:
        line = texts[0].ljust(widths[0])
        for text, width in zip(texts[1:], widths[1:]):
            line += "  " + text.rjust(width)
        lines.append(line)
    return "\n".join(lines)


def as_text(table):  # -> for a terminal of 110 columns
    lines = textwrap.wrap(table["reading"], 102)
    reading = "\n".join(f"> {line}" for line in lines)
    return f"{table['title']}\n{rows_text(table['rows'])}\n{reading}"


def position_lines(before, after, gains, decode):  # -> the text of positions.jsonl
    """One object for each position, with all that was measured there."""
    lines = []
    for i, token in enumerate(before["token"].tolist()):
        line = {
            "text": decode(token),
            "gain": values_at(gains, i),
            "before": values_at(before, i),
            "after": values_at(after, i),
        }
        lines.append(json.dumps(line) + "\n")
    return "".join(lines)


def values_at(scores, i):  # {name: [N]} -> {name: number}
    values = {}
    for name, array in scores.items():
        values[name] = array[i].tolist()
    return values


def report(pair, prompts, held_out_count, before, after, args, out):
    """Step 5: write the files, then print, so that a broken terminal harms nothing."""
    # Save first what took long to measure: a table may fail, with too few positions.
    decode = pair.tokenizer.decode
    gains = gains_of(before, after)
    lines = position_lines(before, after, gains, decode)
    opd.write_file(out / "positions.jsonl", lines)

    summary = what_was_measured(held_out_count, before, after, args)
    tables = all_tables(before, after, gains, args, decode)
    content = {
        "summary": summary,
        "tables": tables,
        "args": vars(args),
        "versions": {
            "torch": torch.__version__,
            "transformers": opd.transformers.__version__,
            "numpy": np.__version__,
        },
    }
    opd.write_file(out / "report.json", json.dumps(content))

    responses = token_map(prompts, before, gains, args.top_k, decode)
    opd.write_file(out / "report.html", as_page(tables, summary, responses))

    opd.show(summary)
    for table in tables[:2]:  # what is kept, and what explains the gain
        opd.show("\n" + as_text(table))
    opd.show(f"\nreport.html, report.json and positions.jsonl are in {out}")
    opd.show("The page has more: a map of the tokens, more tables, other K.")


# ======================================================================================
# 7. The page: one file, no script, nothing loaded from elsewhere. May be skipped.
# ======================================================================================

MAP_CONTEXTS = 12  # so many responses stand in the token map

STYLE = """
:root { --ink: #1a1a1a; --paper: #fff; --faint: #707070; --line: #ddd; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #eee; --paper: #161616; --faint: #999; --line: #333; }
}
body {
  max-width: 72rem; margin: auto; padding: 1rem 1rem 9rem;
  font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
}
p { max-width: 60rem; }
.faint { color: var(--faint); }

pre { overflow-x: auto; }  /* a narrow screen scrolls the table, not the page */

/* The token map. Each token brings how strong its two colours are. */
.map {
  padding-top: 0.5rem; border-top: 1px solid var(--line);
  font: 15px/1.9 ui-monospace, monospace; overflow-wrap: anywhere;
}
.token {
  --blue: rgba(0, 114, 178, var(--learnable));
  --orange: rgba(213, 94, 0, var(--incompatible));
  white-space: pre-wrap;
  background:
    linear-gradient(var(--blue), var(--blue)),
    linear-gradient(var(--orange), var(--orange));
}
.token:hover, .token:focus { outline: 2px solid var(--ink); }

/* The box at the bottom: what pointing at a token shows. */
.token:hover::after, .token:focus::after {
  content: attr(data-tip); white-space: pre-wrap;
  position: fixed; bottom: 0; left: 0; right: 0; padding: 0.7rem 1rem;
  color: var(--paper); background: var(--ink); font-size: 0.85rem; line-height: 1.4;
}
"""


def visible(text):
    """Escaped, as a token may spell anything; with signs for spaces and line ends."""
    return html.escape(text).replace(" ", "\u00b7").replace("\n", "\u21b5\n")


def token_span(text, learnable, incompatible, note):  # text, [0, 1] twice, text -> HTML
    style = f"--learnable:{learnable:.2f};--incompatible:{incompatible:.2f}"
    return (
        f'<span class="token" tabindex="0" style="{style}" '
        f'data-tip="{html.escape(note)}">{visible(text)}</span>'
    )


def tooltip(i, before, gains, k, decode):  # -> text about position i
    text = decode(before["token"][i].item())
    numbers = []
    for name in ("entropy", f"divergence_{k}", f"compatibility_{k}"):
        numbers.append(f"{name} {before[name][i]:.2f}")
    for name, gain in gains.items():
        numbers.append(f"gain in {name} {gain[i]:+.3f}")
    lines = [f"{text!r}   {'   '.join(numbers)}"]
    for who in ("student", "teacher"):
        texts = []
        for name in before:
            if name.startswith(f"{who}_choice"):
                texts.append(repr(decode(before[name][i].item())))
        lines.append(f"{who}: {'  '.join(texts)}")
    return "\n".join(lines)


def token_map(prompts, before, gains, k, decode):  # -> HTML
    """The first contexts, token by token, coloured by both parts of D."""
    features = make_features(before, k)
    paragraphs = []
    for number, prompt in enumerate(prompts[:MAP_CONTEXTS]):
        spans = [f'<span class="faint">{visible(decode(prompt))}</span>']
        for i in np.flatnonzero(before["context"] == number):
            # The square root, so that weak colours can be seen beside strong ones.
            span = token_span(
                decode(before["token"][i].item()),
                features["learnable"][i] ** 0.5,
                features["incompatible"][i] ** 0.5,
                tooltip(i, before, gains, k, decode),
            )
            spans.append(span)
        paragraphs.append('<p class="map">' + "<wbr>".join(spans) + "</p>")
    return "\n".join(paragraphs)


def table_html(table):  # a table of report.json -> HTML
    return (
        f"<h2>{html.escape(table['title'])}</h2>\n"
        f"<p>{html.escape(table['reading'])}</p>\n"
        f"<pre>{html.escape(rows_text(table['rows']))}</pre>\n"
    )


def as_page(tables, summary, responses):  # -> HTML; `responses` is the token map's
    legend = [
        token_span("learnable", 0.9, 0, "D * C, both rescaled to [0, 1]"),
        token_span("incompatible", 0, 0.9, "D * (1 - C), both rescaled to [0, 1]"),
        token_span("some of both", 0.4, 0.4, "the two add up to D, rescaled"),
    ]
    numbers = [table_html(table) for table in tables]
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>What was learned?</title>
<style>{STYLE}</style>

<h1>Which disagreement was learned?</h1>
<p>A student wrote these responses; its teacher disagrees at some of their tokens.
<b>Learnable</b> disagreement reweights tokens that the student already considers;
<b>incompatible</b> disagreement wants tokens that it does not. The gain is how much
nearer to the teacher the student came through training: the fall of
KL(teacher || student) or of KL(student || teacher) in nats, or the rise of the overlap
of both distributions. {html.escape(summary)}
In brackets: 95 % intervals from a bootstrap over contexts.</p>

<h2>Token map</h2>
<p>{" ".join(legend)}
Stronger for more. Prompts are grey, \u00b7 is a space, \u21b5 a line end. Point at a
token, or tap it.</p>
{responses}

{"".join(numbers)}
</html>
"""


# ======================================================================================
# 8. The command line
# ======================================================================================


def load_trained(pair, args):  # -> Pair with the student of --after
    """Step 3 for a student trained earlier. InputError if it does not fit --student."""
    student, tokenizer = opd.load_model(
        "--after", args.after, torch.float32, args.device
    )
    shapes = [weight.shape for weight in student.parameters()]
    expected = [weight.shape for weight in pair.student.parameters()]
    if shapes != expected or tokenizer.get_vocab() != pair.tokenizer.get_vocab():
        raise opd.InputError(
            f"--after {args.after} has another tokenizer or other shapes than --student"
        )
    return pair._replace(student=student)


def parse_args(argv=None):
    """The flags of opd.py, and those of the diagnostic."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    group = parser.add_argument_group("the diagnostic (training is on all positions)")
    add = group.add_argument
    add(
        "--contexts",
        type=int,
        default=192,
        help="responses to freeze and measure; as many prompts are held out",
    )
    add("--after", help="a trained version of --student (default: train one now)")
    add("--bootstrap", type=int, default=1000, help="draws behind each interval")

    if argv is None:
        argv = sys.argv[1:]
    args = opd.parse_args(["--select", "full", *argv], parser)  # a later --select wins
    if args.contexts < 5:
        parser.error(f"--contexts {args.contexts}: give 5 or more")
    if args.resume:
        parser.error("--resume is for opd.py, whose student --after takes")

    # Contexts are responses to held-out prompts, so as many are held out. (Not with
    # --after: that student was trained earlier, on all prompts but --eval-prompts.)
    if not args.after:
        args.eval_prompts = max(args.eval_prompts, args.contexts)
    args.ks = [args.top_k]  # for D and C
    for k in (8, 16, 32):
        if k != args.top_k:
            args.ks.append(k)
    return args


if __name__ == "__main__":
    opd.run(main, parse_args())
