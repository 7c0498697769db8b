"""The fixed-context diagnostic: which disagreement did the student really learn?

opd.py trains on positions that it expects to teach much. Whether they do can be seen by
looking at the same positions twice, before training (theta0) and after it (theta1):

  1. freeze          the student before training writes responses: the contexts
  2. measure_before  at each position of them, compare the teacher with theta0
  3. opd.train       on all positions, makes theta1 of theta0; or load_trained takes a
                     student that was trained earlier (--after)
  4. measure_gains   compare the teacher with theta1, at the same positions: how much
                     nearer to the teacher did the student come at each?
  5. report          which quantities of theta0 foretell these gains?

`python diagnose.py` does all five for the demo of opd.py; `--after runs/opd-1/student`
spares the training. Its tables are printed; a page for the browser has more.

The gain G of a position is above 0 where theta1 is nearer. It is measured in three
ways; two of the tables add a fourth:

  forward_kl  the fall of KL(teacher || student), in nats: the paper's measure
  reverse_kl  the fall of KL(student || teacher), in nats: what training minimises
  overlap     the rise of sum_v min(p(v), q(v)), in [-1, 1]: by how much a token that
              the student samples looks more like one of the teacher's
  relative    the fall of forward_kl as a share of what it was, as in the paper's code

Figures have 95 % intervals from a cluster bootstrap. It asks how different a figure
might be, had other responses been sampled. Draw as many contexts as there are, with
replacement, each with all its positions, and compute the figure anew. Repeat that 1,000
times: the middle 95 % of the results are the interval. Whole contexts are drawn, since
the positions of one response resemble each other. Drawn one by one they would count as
independent evidence, and the interval would be too narrow.

The file goes from the measuring (steps 1 to 4) to statistics, analysis, wording and the
command line; the last part draws the page and can be skipped.

Notation as in opd.py: p is the student's next-token distribution, q the teacher's; H, D
and C are entropy, divergence and compatibility; K is the number of top tokens that D
and C look at. Shapes: V tokens in the vocabulary, N positions in all contexts together,
n some of them. Arrays are numpy's. Source: arXiv 2605.26844, fixed-context analysis.
"""

import argparse
import html
import json
import math
import sys
import textwrap
from collections import Counter, defaultdict

import numpy as np
import torch
from tqdm import tqdm

import opd


def main(args):
    """The five steps. `scores` know theta0 alone; G and `later` know theta1, too."""
    pair, training, held_out = opd.prepare(args)
    trained = None
    if args.after:
        trained = load_trained(pair, args)  # early, as it may be refused
    out = opd.new_folder(args.out, "diagnosis")

    prompts = []
    for i in range(args.contexts):
        example = held_out[i % len(held_out)]  # from the start again if too few
        prompts.append(example["prompt"])

    batches = freeze(pair, prompts, args)  # step 1
    scores = measure_before(pair, batches, args)  # step 2
    if trained is None:
        opd.train(pair, training, args, out)  # step 3
        trained = pair  # its student is theta1 now
    G, later = measure_gains(trained, batches, scores, args)  # step 4

    summary = describe(len(held_out), G, args)
    report(pair, prompts, scores, G, later, summary, args, out)  # step 5


# ======================================================================================
# Steps 1 to 4: what is measured at the positions of the frozen contexts
# ======================================================================================


def freeze(pair, prompts, args):  # -> [opd.Rollout]
    """Step 1: the student before training samples one response to each prompt."""
    torch.manual_seed(args.seed)
    batches = []
    size = 4 * args.batch_size  # as in opd.evaluate
    for start in tqdm(range(0, len(prompts), size), "sampling contexts", disable=None):
        part = prompts[start : start + size]
        batches.append(opd.rollout(pair, part, args.max_new_tokens))
    return batches


def overlap(student_logits, teacher_logits):  # [..., V], [..., V] -> [...]
    """sum_v min(p(v), q(v)), in [0, 1]: the probability that both models agree on."""
    p = student_logits.float().softmax(-1)
    q = teacher_logits.float().softmax(-1)
    return torch.minimum(p, q).sum(-1)


def measure_distance(student_logits, teacher_logits):  # [n, V] twice -> {measure: [n]}
    """How far the student is from the teacher: what G is the change of."""
    return {
        "forward_kl": opd.forward_kl(student_logits, teacher_logits),
        "reverse_kl": opd.reverse_kl(student_logits, teacher_logits),
        "overlap": overlap(student_logits, teacher_logits),
    }


def logits_of_contexts(pair, batches, args):
    """What opd.logits_in_chunks yields, for one batch of contexts after the other.

    The N positions come context by context, each from left to right. That order is
    always the same, so that arrays of theta0 and theta1 can be subtracted.
    """
    for batch in tqdm(batches, "scoring contexts", disable=None):
        yield from opd.logits_in_chunks(pair, batch, args.micro_batch_size)


def add_chunk(found, measured):  # {name: [arrays]}, {name: [n, ...] tensor}
    """Put what was measured in one chunk at the end of each name's list."""
    for name, values in measured.items():
        if values.is_floating_point():
            values = values.double()  # for long sums
        found[name].append(values.cpu().numpy())


def join_chunks(found):  # {name: [arrays]} -> {name: [N, ...]}
    """One long array of each name's list."""
    return {name: np.concatenate(parts) for name, parts in found.items()}


def token_places(batches):  # -> {"id", "context", "position": [N]}
    """Each position's token and context, and where it stands there, from 0 to 1."""
    ids = []
    context = []
    position = []
    number = 0
    for batch in batches:
        for tokens, mask in zip(batch.responses, batch.mask):
            response = tokens[mask].tolist()
            last = max(len(response) - 1, 1)
            for t, token in enumerate(response):
                ids.append(token)
                context.append(number)
                position.append(t / last)
            number += 1
    return {
        "id": np.array(ids),
        "context": np.array(context),
        "position": np.array(position),
    }


def measure_before(pair, batches, args):
    """Step 2: all that may explain the gains, measured at theta0 alone.

    Returns {name: [N]}: distances and entropies in nats; D and C for each K, as "D16"
    and "C16"; the results of `token_places`; and, [N, 5], the five likeliest tokens of
    both models.
    """
    how_many = min(5, pair.vocab_size)
    found = defaultdict(list)
    for student_logits, teacher_logits, _ in logits_of_contexts(pair, batches, args):
        measured = measure_distance(student_logits, teacher_logits)
        measured["H"] = opd.entropy(student_logits)
        measured["H_teacher"] = opd.entropy(teacher_logits)
        for k in args.ks:  # K = 8, 16, 32 and --top-k
            measured[f"D{k}"] = opd.divergence(student_logits, teacher_logits, k)
            measured[f"C{k}"] = opd.compatibility(student_logits, teacher_logits, k)
        measured["student_choices"] = student_logits.topk(how_many).indices
        measured["teacher_choices"] = teacher_logits.topk(how_many).indices
        add_chunk(found, measured)

    return {**join_chunks(found), **token_places(batches)}


def load_trained(pair, args):  # -> Pair with the student of --after
    """Step 3 for a student trained earlier. ValueError if it does not fit --student."""
    student, tokenizer, _ = opd.load_model(
        "--after", args.after, torch.float32, args.device
    )
    shapes = [weight.shape for weight in student.parameters()]
    expected = [weight.shape for weight in pair.student.parameters()]
    if shapes != expected or tokenizer.get_vocab() != pair.tokenizer.get_vocab():
        raise ValueError(
            f"--after {args.after} has another tokenizer or other shapes than --student"
        )
    return pair._replace(student=student)


def measure_gains(trained, batches, scores, args):  # -> {measure: [N]}, {name: [N]}
    """Step 4: G, and C once more, now of theta1 ("C16_after").

    C of theta1 must not be used to explain the gains: it has seen the outcome. One
    table, `leak`, shows what one would conclude with it.
    """
    found = defaultdict(list)
    for student_logits, teacher_logits, _ in logits_of_contexts(trained, batches, args):
        measured = measure_distance(student_logits, teacher_logits)
        for k in args.ks:
            c_after = opd.compatibility(student_logits, teacher_logits, k)
            measured[f"C{k}_after"] = c_after
        add_chunk(found, measured)
    later = join_chunks(found)

    G = {
        "forward_kl": scores["forward_kl"] - later.pop("forward_kl"),
        "reverse_kl": scores["reverse_kl"] - later.pop("reverse_kl"),
        "overlap": later.pop("overlap") - scores["overlap"],  # more of it is nearer
    }
    return G, later


# ======================================================================================
# Step 5, statistics in plain numpy. A figure is an array of 1 + draws values: that of
# the sample itself, then one for each bootstrap draw.
#
# A thousand draws of all positions would be slow. But the figures are made of sums over
# positions, so we sum within each context once. A draw is then a weighted sum of these,
# and a context's weight is how often the draw contains it: weights @ sum_of_context.
# An example with the contexts a, b and c:
#
#                     a  b  c
#   sum_of_context  [ 2, 5, 1 ]   weights @ sum_of_context:
#   weights       [ [ 1, 1, 1 ],     2 + 5 + 1 = 8    the sample
#                   [ 2, 0, 1 ] ]    2 + 2 + 1 = 5    a draw of a, c and a again
# ======================================================================================


def cluster_weights(contexts, draws, seed):  # -> weights [1 + draws, contexts]
    """How often each context counts. Row 0 is the sample itself: all count once.

    In the other rows, draws with replacement, a context counts 0, 1, 2, ... times.
    """
    generator = np.random.default_rng(seed)
    chances = np.full(contexts, 1 / contexts)
    times_drawn = generator.multinomial(contexts, chances, size=draws)
    return np.vstack([np.ones(contexts), times_drawn])


def estimate(values):  # [1 + draws] -> {"value", "low", "high"}
    """The sample's value and its 95 % interval. ValueError if there is no value."""
    if not np.isfinite(values[0]):
        raise ValueError(
            "there are too few positions for the report's groups; use more --contexts"
        )
    # nan: by chance, a draw may contain no position of a group.
    low, high = np.nanquantile(values[1:], [0.025, 0.975])
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


def group_mean(values, member, context, weights):  # [N], [N] bool -> [1 + draws]
    """Mean of the members' values; nan in a draw that contains no member.

    `context` [N] is the number of each position's context.
    """
    sum_of_context = np.bincount(context, weights=values * member)  # [contexts]
    count_of_context = np.bincount(context, weights=member)  # [contexts]
    sums = weights @ sum_of_context  # [1 + draws]
    counts = weights @ count_of_context  # [1 + draws]
    return sums / np.where(counts > 0, counts, np.nan)


def quantile_group(values, groups, inside):  # [N], [N] bool -> [N]
    """The number of each position's group: 0 for the lowest values, and -1 if outside.

    The positions inside are sorted and cut into groups of equal size. For example, with
    values 5, 1, 9, 3, 7 of which the last is outside, two groups are 1, 0, 1, 0, -1.
    """
    members = np.flatnonzero(inside)
    ascending = members[np.argsort(values[members], kind="stable")]
    group = np.full(len(values), -1)
    place = np.arange(len(members))  # 0 for the lowest value inside
    group[ascending] = place * groups // max(len(members), 1)
    return group


def zscore(values):  # [N] -> [N]
    """Rescaled to mean 0 and variance 1; a constant becomes zeros."""
    return (values - values.mean()) / max(values.std(), 1e-12)


def least_squares(features, names, outcome, context, weights):
    """Regress outcome [N] on features[name] [N], with an intercept.

    Returns {name: slopes [1 + draws]} and the sample's R2, a number. ValueError for a
    feature that is the same everywhere; it says which.

    All are z-scored, so that slopes can be compared: once, on the sample, and not anew
    in each draw. Then the plain version would be, for each draw: repeat each context's
    positions as often as the draw contains it, and call np.linalg.lstsq on these. The
    same slopes follow from sums over positions alone, as the comments below explain.
    """
    columns = [np.ones(len(outcome))]  # the intercept
    for name in names:
        if np.ptp(features[name]) < 1e-12:
            raise ValueError(
                f"{name} is the same at all positions, so its share in the gain cannot "
                "be found; use more contexts or longer responses"
            )
        columns.append(zscore(features[name]))
    X = np.column_stack(columns)  # [N, 1 + names]
    y = zscore(outcome)  # [N]

    # The slopes solve (X'X) slopes = X'y, where X' is X transposed. Both X'X and X'y
    # are sums over positions, of products of two columns of X, or of a column and y.
    # So these, too, are summed within each context first.
    XX_of_context = []
    Xy_of_context = []
    for number in range(weights.shape[1]):
        X_here = X[context == number]
        y_here = y[context == number]
        XX_of_context.append(X_here.T @ X_here)
        Xy_of_context.append(X_here.T @ y_here)
    XX_of_context = np.array(XX_of_context)  # [contexts, 1 + names, 1 + names]
    Xy_of_context = np.array(Xy_of_context)  # [contexts, 1 + names]

    solutions = []
    for times in weights:  # how often each context counts in this draw
        # Sums over contexts of times * XX_of_context, and of times * Xy_of_context.
        XX = np.tensordot(times, XX_of_context, axes=1)
        Xy = np.tensordot(times, Xy_of_context, axes=1)

        # lstsq, not solve: in a draw of few contexts a regressor may be constant.
        solution = np.linalg.lstsq(XX, Xy, rcond=None)[0]
        solutions.append(solution)
    solutions = np.array(solutions)  # [1 + draws, 1 + names]

    slopes = {}
    for i, name in enumerate(names, start=1):  # column 0 is the intercept
        slopes[name] = solutions[:, i]
    r2 = np.var(X @ solutions[0])  # explained variance, as y has variance 1
    return slopes, float(r2)


def mean_ranks(level, times):  # [N], [N] -> [N]
    """Ranks in a draw that contains each position `times` times.

    `level` is 0 at positions with the lowest value, 1 at those with the next, and so
    on. Positions of one level share the mean of their ranks. For example, the values
    10, 20, 20 have the levels 0, 1, 1. Counted once each, they have the ranks 1, 2 and
    3, of which the last two share 2.5. With the first counted twice, as in 10, 10, 20,
    20, the ranks are 1.5, 3.5, 3.5.
    """
    equals = np.bincount(level, weights=times)  # [levels] size of each level
    last_rank = np.cumsum(equals)
    mean_rank = last_rank - (equals - 1) / 2
    return mean_rank[level]


def correlation(x, y, times):  # [N], [N], [N] -> a number
    """Pearson's correlation, with each position counted `times` times."""
    x = x - np.average(x, weights=times)
    y = y - np.average(y, weights=times)
    covariance = (times * x * y).sum()
    scale = math.sqrt((times * x * x).sum() * (times * y * y).sum())
    return covariance / max(scale, 1e-12)


def spearman(x, y, context, weights):  # [N], [N] -> [1 + draws]
    """Rank correlation: 1 if both order the positions in the same way."""
    # Ranks are no sums. But the values need to be sorted only once, for all draws.
    _, level_x = np.unique(x, return_inverse=True)
    _, level_y = np.unique(y, return_inverse=True)

    correlations = []
    for times_of_context in weights:
        times = times_of_context[context]  # [N], the same for all of a context
        ranks_x = mean_ranks(level_x, times)
        ranks_y = mean_ranks(level_y, times)
        correlations.append(correlation(ranks_x, ranks_y, times))
    return np.array(correlations)


# ======================================================================================
# Step 5, analysis. Each function that makes a table returns two things: its rows,
# {label: {column: cell}}, and the list of the labels that the terminal prints; the page
# has all rows. A cell is an estimate, a number or a text.
# ======================================================================================

# The question is about D_learn and D_incompat, the two parts of D. All else is there so
# that the two do not get the credit for it: H, as an unsure student may learn more
# anywhere; the place in the response and the teacher's entropy, as in the paper. The
# baseline has D as a whole, and its interaction with H; the two parts replace both.
REGRESSORS = ("H", "D_learn", "D_incompat", "position", "H_teacher")
UNSPLIT = ("H", "D", "H*D", "position", "H_teacher")  # the baseline


def normalize(values):  # [N] -> [N] in [0, 1]
    """opd.robust_normalize over all positions of all contexts."""
    row = torch.tensor(values)[None]  # [1, N]
    everywhere = torch.ones_like(row, dtype=torch.bool)
    return opd.robust_normalize(row, everywhere)[0].double().numpy()


def make_features(scores, k):  # {name: [N]} -> {name: [N]}
    """What may explain G: scores, normalised to [0, 1], and what is made of them."""
    h = normalize(scores["H"])
    d = normalize(scores[f"D{k}"])
    c = normalize(scores[f"C{k}"])
    return {
        "H": h,
        "D": d,
        "C": c,
        "H*D": h * d,  # their interaction
        "D_learn": d * c,  # the teacher reweights tokens that the student considers
        "D_incompat": d * (1 - c),  # it wants other tokens; the two add up to D
        "TIP": 1 - (1 - h) * (1 - d),  # soft OR of H and D, as in opd.rank
        "position": scores["position"],
        "H_teacher": normalize(scores["H_teacher"]),
    }


def with_relative(G, scores):  # {measure: [N]} -> the same, and "relative": [N]
    """A fourth measure, from the paper's code: which share of the forward KL is gone.

    Where it had been tiny, this share may be hugely negative; so it is clipped at its
    1 % and 99 % quantiles.
    """
    ratio = G["forward_kl"] / (scores["forward_kl"] + 1e-12)
    low, high = np.quantile(ratio, [0.01, 0.99])
    return {**G, "relative": np.clip(ratio, low, high)}


def decomposition(scores, G, ks, top_k, weights):  # -> rows, labels
    """Which part of the disagreement goes with G, learnable or incompatible?"""
    context = scores["context"]
    rows = {}
    printed = []
    for name, outcome in with_relative(G, scores).items():
        for k in ks:
            features = make_features(scores, k)
            slopes, r2 = least_squares(features, REGRESSORS, outcome, context, weights)
            sample = weights[:1]  # no draws, as R2 gets no interval
            _, unsplit_r2 = least_squares(features, UNSPLIT, outcome, context, sample)
            label = f"{name}, K={k}"
            rows[label] = {
                "D_learn": estimate(slopes["D_learn"]),
                "D_incompat": estimate(slopes["D_incompat"]),
                "gap": estimate(slopes["D_learn"] - slopes["D_incompat"]),
                "R2": r2,
                "R2, D": unsplit_r2,
            }
            if k == top_k:
                printed.append(label)
    return rows, printed


def is_sure_yet_disagrees(features):  # {name: [N]} -> [N] bool
    """Low H and high D: sure, yet in disagreement (the paper's quadrant Q3)."""
    is_sure = features["H"] <= np.median(features["H"])
    disagrees = features["D"] >= np.median(features["D"])
    return is_sure & disagrees


def contrast_by_compatibility(features, outcome, context, weights):  # -> [1 + draws]
    """Among positions sure, yet in disagreement: does outcome rise with C?

    The mean outcome of their most compatible third, less that of the least.
    """
    third = quantile_group(features["C"], 3, is_sure_yet_disagrees(features))
    top = group_mean(outcome, third == 2, context, weights)
    bottom = group_mean(outcome, third == 0, context, weights)
    return top - bottom


def mean_gains(G, member, context, weights):  # -> {measure: estimate}, one row
    """Mean gain of the members, in each measure."""
    row = {}
    for name, gain in G.items():
        row[name] = estimate(group_mean(gain, member, context, weights))
    return row


def sure_yet_in_disagreement(scores, G, ks, top_k, weights):  # -> rows, labels
    """Mean G of this group, by compatibility and by either part of the disagreement."""
    context = scores["context"]
    rows = {}
    printed = []
    for k in ks:
        features = make_features(scores, k)
        row = {}
        for name, gain in G.items():
            draws = contrast_by_compatibility(features, gain, context, weights)
            row[name] = estimate(draws)
        label = f"top - bottom third of C, K={k}"
        rows[label] = row
        if k == top_k:
            printed.append(label)

    features = make_features(scores, top_k)
    for part in ("D_learn", "D_incompat"):
        quarter = quantile_group(features[part], 4, is_sure_yet_disagrees(features))
        for i in range(4):
            label = f"{part}, quarter {i + 1}, K={top_k}"
            rows[label] = mean_gains(G, quarter == i, context, weights)
    return rows, printed


def gap_and_contrast(features, outcome, context, weights):  # -> one row
    slopes, _ = least_squares(features, REGRESSORS, outcome, context, weights)
    gap = slopes["D_learn"] - slopes["D_incompat"]
    contrast = contrast_by_compatibility(features, outcome, context, weights)
    return {
        "gap": estimate(gap),
        "Q3, top - bottom third of C": estimate(contrast),
    }


def leak(scores, later, G, ks, top_k, weights):  # -> rows, labels
    """Two of the figures above, with C of theta0 and, wrongly, with C of theta1.

    All else is of theta0 both times. H and D, and so who is sure and yet disagrees, do
    not change.
    """
    context = scores["context"]
    outcomes = with_relative(G, scores)
    rows = {}
    printed = []
    for k in ks:
        leaky_scores = {**scores, f"C{k}": later[f"C{k}_after"]}
        features_when_c = {
            "before": make_features(scores, k),
            "after": make_features(leaky_scores, k),
        }
        for name, outcome in outcomes.items():
            for when, features in features_when_c.items():
                label = f"{name}, C {when}, K={k}"
                rows[label] = gap_and_contrast(features, outcome, context, weights)
                if k == top_k:
                    printed.append(label)
    return rows, printed


def rank_correlations(scores, G, top_k, weights):  # -> rows, labels
    """What orders the positions as their gains do?"""
    features = make_features(scores, top_k)
    rows = {}
    for order in ("D", "D_learn", "D_incompat", "H", "TIP"):
        rows[order] = {}
        for name, gain in G.items():
            draws = spearman(features[order], gain, scores["context"], weights)
            rows[order][name] = estimate(draws)
    return rows, list(rows)  # all are printed


def kept_by(method, scores, k, budget, seed):  # -> [N] bool
    """What `method` would keep of all contexts, as opd.py does it in a batch.

    Here all contexts stand in one row, as if they were one response. So opd.select adds
    no position for a response that has none, and the count is the same for all methods.
    """
    raw = {
        "entropy": torch.tensor(scores["H"])[None],  # [1, N]
        "divergence": torch.tensor(scores[f"D{k}"])[None],
        "compatibility": torch.tensor(scores[f"C{k}"])[None],
    }
    mask = torch.ones_like(raw["entropy"], dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)  # for "random"
    ranks = opd.rank(method, raw, mask, generator)
    if method == "full":
        budget = 1
    return opd.select(ranks, mask, budget)[0].numpy()


def matched_budgets(scores, G, top_k, seed, weights):  # -> rows, labels
    """Mean G of what each method would keep, at the same count for all (Table 8)."""
    choices = [("full", 1)]
    for budget in (0.03, 0.05, 0.1):
        for method in opd.METHODS:
            if method != "full":
                choices.append((method, budget))

    rows = {}
    printed = []
    for method, budget in choices:
        kept = kept_by(method, scores, top_k, budget, seed)
        label = f"{budget:.0%} {method}"
        rows[label] = mean_gains(G, kept, scores["context"], weights)
        if budget in (1, 0.1):
            printed.append(label)
    return rows, printed


def kept_tokens(scores, top_k, budget, seed, decode):  # -> rows, labels
    """The five tokens that each method keeps most often, with their share."""
    rows = {}
    for method in opd.METHODS:
        ids = scores["id"][kept_by(method, scores, top_k, budget, seed)]
        texts = []
        for token, count in Counter(ids.tolist()).most_common(5):
            texts.append(f"{decode(token)!r} {count / len(ids):.0%}")
        rows[method] = {"tokens": ", ".join(texts)}
    return rows, []  # none is printed


# ======================================================================================
# Step 5, wording: the same tables for the files, the terminal and the page
# ======================================================================================


def make_table(title, reading, rows, printed):  # -> one table of report.json
    """`reading` says how to read it. All rows have the columns of the first.

    The page shows all rows, the terminal those whose labels are `printed`. A cell is a
    text, a number, or an estimate: {"value", "low", "high"}.
    """
    first_row = next(iter(rows.values()))
    return {
        "title": title,
        "reading": reading,
        "columns": list(first_row),
        "rows": {label: list(row.values()) for label, row in rows.items()},
        "printed": printed,
    }


def all_tables(scores, G, later, args, decode):  # -> a list of tables
    """Everything that the report says in numbers, and how to read it.

    The star hands make_table both of what a function returns, rows and labels.
    """
    weights = cluster_weights(args.contexts, args.bootstrap, args.seed)
    k = args.top_k
    return [
        make_table(
            "What explains G?",
            "By how many standard deviations G rises with one more of each. Gap > 0: "
            "learnable disagreement is learned more. The paper has, in forward_kl, "
            "D_learn .086 to .087 and D_incompat .043 to .045. R2 is the share of G "
            "that is explained; R2, D: with D unsplit.",
            *decomposition(scores, G, args.ks, k, weights),
        ),
        make_table(
            "If C were measured after training",
            "C before: as in the tables above and below. C after is a leak: what was "
            "learned stands in the trained student's top K by then, so C knows already "
            "what it is asked to foretell. Only C before can choose positions.",
            *leak(scores, later, G, args.ks, k, weights),
        ),
        make_table(
            "Sure, yet in disagreement (Q3)",
            "Mean G of positions with H at most, D at least its median. Top - bottom "
            "> 0: where the teacher's advice is more compatible, more is gained.",
            *sure_yet_in_disagreement(scores, G, args.ks, k, weights),
        ),
        make_table(
            "Rank correlation with G",
            "Spearman's: 1 if ordered by gain, 0 if unrelated. D is raw disagreement.",
            *rank_correlations(scores, G, k, weights),
        ),
        make_table(
            "Mean G of what is kept",
            "Of the positions that each method would keep, equally many for each.",
            *matched_budgets(scores, G, k, args.seed, weights),
        ),
        make_table(
            f"What each method keeps at {args.budget:.0%}",
            "Its most frequent tokens, and their share.",
            *kept_tokens(scores, k, args.budget, args.seed, decode),
        ),
    ]


def describe(held_out, G, args):  # number of held-out prompts -> a sentence
    positions = len(G["forward_kl"])
    text = f"{args.contexts} contexts, {positions} positions. "
    text += f"{held_out} held-out prompts"
    if held_out < args.contexts:
        text += ", some repeated"
    if args.after:
        text += f"; theta1 is {args.after}"
    if not G["forward_kl"].any():
        text += "; G is 0 everywhere: this student has not changed"
    return text + "."


def cell_text(cell):
    if isinstance(cell, str):
        return cell
    if isinstance(cell, float):
        return f"{cell:.3f}"
    return f"{cell['value']:+.3f} [{cell['low']:+.2f}, {cell['high']:+.2f}]"


def as_quote(text):  # -> its lines, for a terminal of 100 columns
    return textwrap.fill(text, 98, initial_indent="> ", subsequent_indent="> ")


def as_text(table):  # -> its main rows, for a terminal of 100 columns
    grid = [[table["title"], *table["columns"]]]
    for label in table["printed"]:
        texts = [cell_text(cell) for cell in table["rows"][label]]
        grid.append([label, *texts])

    widths = []
    for column in range(len(grid[0])):
        widths.append(max(len(row[column]) for row in grid))

    lines = []
    for row in grid:
        line = row[0].ljust(widths[0])
        for text, width in zip(row[1:], widths[1:]):
            line += "  " + text.rjust(width)
        lines.append(line)
    return "\n".join([*lines, as_quote(table["reading"])])


def position_lines(scores, G, later, decode):  # -> the text of positions.jsonl
    columns = {}
    for name, values in scores.items():
        if values.ndim == 1:  # the first choices [N, 5] are for the page alone
            columns[name] = values
    for name, gain in G.items():
        columns[f"gain_{name}"] = gain
    columns.update(later)

    lines = []
    for i, token in enumerate(scores["id"].tolist()):
        line = {"token": decode(token)}
        for name, values in columns.items():
            line[name] = values[i].item()
        lines.append(json.dumps(line) + "\n")
    return "".join(lines)


def report(pair, prompts, scores, G, later, summary, args, out):
    """Step 5: write the files, then print, so that a broken terminal harms nothing."""
    # First what took long to measure: a table may fail, as with too few positions.
    decode = pair.tokenizer.decode
    positions = position_lines(scores, G, later, decode)
    opd.write_file(out / "positions.jsonl", positions)

    tables = all_tables(scores, G, later, args, decode)
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

    responses = token_map(prompts, scores, G, args.top_k, decode)
    opd.write_file(out / "report.html", as_page(tables, summary, responses))

    opd.show(summary)
    for table in tables:
        if table["printed"]:
            opd.show("\n" + as_text(table))
    opd.show(f"\nreport.html, report.json and positions.jsonl are in {out}")
    opd.show("The page has more: other K and budgets, quarters, tokens kept, a map.")


# ======================================================================================
# The command line
# ======================================================================================


def number_of_contexts(text):
    number = int(text)
    if number < 5:
        raise argparse.ArgumentTypeError(f"{text} is less than 5")
    return number


def parse_args(argv=None):
    """The flags of opd.py, and those of the diagnostic."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    group = parser.add_argument_group("the diagnostic (training is on all positions)")
    add = group.add_argument
    add(
        "--contexts",
        type=number_of_contexts,
        default=300,
        help="responses to freeze and measure",
    )
    add("--after", help="a trained version of --student (default: train one now)")
    add("--bootstrap", type=int, default=1000, help="draws behind each interval")

    if argv is None:
        argv = sys.argv[1:]
    args = opd.parse_args(["--select", "full", *argv], parser)  # a later --select wins
    if args.resume:
        parser.error("--resume is for opd.py, whose student --after takes")

    # A prompt for each context. With --after they stay as they were, since that student
    # may have been trained on all but --eval-prompts of them.
    if not args.after:
        args.eval_prompts = max(args.eval_prompts, args.contexts)
    args.ks = sorted({8, 16, 32, args.top_k})
    return args


# ======================================================================================
# Step 5, the page: one file, no script, nothing loaded from elsewhere. May be skipped.
# ======================================================================================

MAP_CONTEXTS = 12  # so many responses stand in the token map

STYLE = """
/* Colours. Blue and orange differ for colour-blind readers, too. */
:root {
  --ink: #1a1a1a;
  --paper: #ffffff;
  --faint: #707070;
  --line: #dddddd;
  --learnable: 0, 114, 178;
  --incompatible: 213, 94, 0;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #eeeeee;
    --paper: #161616;
    --faint: #999999;
    --line: #333333;
  }
}

/* Text. The room at the end is for the box of the last token. */
body {
  max-width: 72rem;
  margin: auto;
  padding: 1rem 1rem 9rem;
  font: 16px/1.5 system-ui, sans-serif;
  color: var(--ink);
  background: var(--paper);
}
p {
  max-width: 60rem;
}
.faint {
  color: var(--faint);
}

/* Tables. A narrow screen scrolls the table, not the page. */
table {
  display: block;
  overflow-x: auto;
  border-collapse: collapse;
  font-size: 0.9rem;
}
th,
td {
  padding: 0.15rem 0.4rem;
  border-top: 1px solid var(--line);
  font-weight: normal;
  text-align: left;
  white-space: nowrap;
}
th {
  color: var(--faint);
}

/* Bars. The drawing is stretched to its width, its lines are not. */
svg {
  width: 6rem;
  height: 1.1rem;
  vertical-align: middle;
}
rect {
  fill: rgb(var(--learnable));
}
line {
  stroke: var(--ink);
  stroke-width: 1.5;
  vector-effect: non-scaling-stroke;
}

/* The token map. Each token brings how strong its two colours are. */
.map {
  padding-top: 0.5rem;
  border-top: 1px solid var(--line);
  font: 15px/1.9 ui-monospace, monospace;
  overflow-wrap: anywhere;
}
.token {
  --blue: rgba(var(--learnable), var(--learn));
  --orange: rgba(var(--incompatible), var(--incompat));
  white-space: pre-wrap;
  background:
    linear-gradient(var(--blue), var(--blue)),
    linear-gradient(var(--orange), var(--orange));
}
.token:hover,
.token:focus {
  outline: 2px solid var(--ink);
}

/* The box at the bottom: what pointing at a token shows. */
.token:hover::after,
.token:focus::after {
  content: attr(data-tip);
  position: fixed;
  bottom: 0;
  left: 0;
  right: 0;
  padding: 0.7rem 1rem;
  color: var(--paper);
  background: var(--ink);
  font-size: 0.85rem;
  line-height: 1.4;
}
"""


def visible(text):
    """Escaped, as a token may spell anything; with signs for spaces and line ends."""
    return html.escape(text).replace(" ", "\u00b7").replace("\n", "\u21b5\n")


def token_span(token, learn, incompat, tip):  # text, [0, 1], [0, 1], text -> HTML
    style = f"--learn:{learn:.2f};--incompat:{incompat:.2f}"
    return (
        f'<span class="token" tabindex="0" style="{style}" '
        f'data-tip="{html.escape(tip)}">{visible(token)}</span>'
    )


def tooltip(i, scores, G, top_k, decode):  # -> text about position i
    token = decode(scores["id"][i].item())
    h = scores["H"][i]
    d = scores[f"D{top_k}"][i]
    c = scores[f"C{top_k}"][i]
    gain_texts = [f"{name} {gain[i]:+.3f}" for name, gain in G.items()]
    numbers = f"H {h:.2f}   D {d:.2f}   C {c:.2f}   G {', '.join(gain_texts)}"
    lines = [f"{token!r}   {numbers}"]
    for who in ("student", "teacher"):
        choices = scores[f"{who}_choices"][i].tolist()
        tokens = [repr(decode(choice)) for choice in choices]
        lines.append(f"{who}: {'  '.join(tokens)}")
    return "\n".join(lines)


def token_map(prompts, scores, G, top_k, decode):  # -> HTML
    """The first contexts, token by token: blue for D_learn, orange for D_incompat."""
    features = make_features(scores, top_k)
    paragraphs = []
    for number, prompt in enumerate(prompts[:MAP_CONTEXTS]):
        spans = [f'<span class="faint">{visible(decode(prompt))}</span>']
        for i in np.flatnonzero(scores["context"] == number):
            token = decode(scores["id"][i].item())
            learn = features["D_learn"][i]
            incompat = features["D_incompat"][i]
            tip = tooltip(i, scores, G, top_k, decode)
            spans.append(token_span(token, learn, incompat, tip))
        paragraphs.append('<p class="map">' + "<wbr>".join(spans) + "</p>")
    return "\n".join(paragraphs)


def bar(cell, low, high):  # an estimate, the ends of its column's scale -> HTML
    """A bar from 0 to the value, a whisker over the interval, and the numbers."""

    def place(number):  # on a drawing 100 wide
        return 100 * (number - low) / max(high - low, 1e-9)

    zero = place(0)
    value = place(cell["value"])
    start = min(zero, value)
    length = abs(value - zero)
    left = place(cell["low"])
    right = place(cell["high"])
    return (
        '<svg viewBox="0 0 100 10" preserveAspectRatio="none">'
        f'<rect x="{start:.2f}" y="2" width="{length:.2f}" height="6"/>'
        f'<line x1="{left:.2f}" y1="5" x2="{right:.2f}" y2="5"/>'
        f'<line x1="{zero:.2f}" y1="0" x2="{zero:.2f}" y2="10"/>'
        f"</svg> {cell['value']:+.3f} "
        f'<span class="faint">{cell["low"]:+.3f} to {cell["high"]:+.3f}</span>'
    )


def table_html(table):  # a table of report.json -> HTML
    # All bars of a column have one scale, with 0 in it.
    scales = []
    for column in range(len(table["columns"])):
        ends = [0]
        for cells in table["rows"].values():
            if isinstance(cells[column], dict):
                ends += [cells[column]["low"], cells[column]["high"]]
        scales.append((min(ends), max(ends)))

    lines = [
        f"<h2>{html.escape(table['title'])}</h2>",
        f"<p>{html.escape(table['reading'])}</p>",
        "<table>",
    ]
    head = "<th></th>"
    for name in table["columns"]:
        head += f"<th>{html.escape(name)}</th>"
    lines.append(f"<tr>{head}</tr>")

    for label, cells in table["rows"].items():
        row = f"<td>{html.escape(label)}</td>"
        for cell, (low, high) in zip(cells, scales):
            if isinstance(cell, dict):
                row += f"<td>{bar(cell, low, high)}</td>"
            else:
                row += f"<td>{html.escape(cell_text(cell))}</td>"
        lines.append(f"<tr>{row}</tr>")
    lines.append("</table>\n")
    return "\n".join(lines)


def as_page(tables, summary, responses):  # -> HTML; `responses` is the token map's
    legend = [
        token_span("learnable", 0.9, 0, "D_learn = D * C"),
        token_span("incompatible", 0, 0.9, "D_incompat = D * (1 - C)"),
        token_span("some of both", 0.4, 0.4, "D = D_learn + D_incompat"),
    ]
    numbers = [table_html(table) for table in tables]
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>What was learned?</title>
<style>{STYLE}</style>

<h1>Which disagreement was learned?</h1>
<p>A student wrote these responses; its teacher disagrees at many of their tokens.
<b>Learnable</b> disagreement reweights tokens that the student already considers;
<b>incompatible</b> disagreement wants tokens that it does not. G is how much nearer
to the teacher a position came through training: the fall of KL(teacher || student)
or of KL(student || teacher) in nats, or the rise of the overlap of both distributions.
{html.escape(summary)}
Whiskers: 95 % cluster bootstrap over contexts.</p>

<h2>Token map</h2>
<p>{" ".join(legend)}
Stronger for more. Prompts are grey, \u00b7 is a space, \u21b5 a line end. Point at a
token, or tap it.</p>
{responses}

{"".join(numbers)}
</html>
"""


if __name__ == "__main__":
    opd.run(main, parse_args())
