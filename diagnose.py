"""The fixed-context diagnostic: which disagreement did the student really learn?

opd.py trains on tokens that it expects to teach much. Whether they do can be seen by
looking at the same tokens twice, before training and after it:

  1. freeze            the student before training writes responses: the contexts
  2. measure_contexts  both models' next-token predictions at each of their positions
  3. opd.train         on all positions; or load_trained takes a student that was
                       trained earlier (--after)
  4. measure_contexts  the same positions once more, now with the trained student
  5. report            the gain of a position is how much nearer to the teacher the
                       student came there. What, known before training, predicts it?

`python diagnose.py` does all five for the demo of opd.py. `--after OUT/student` skips
the training: OUT is a run of `opd.py --select full`. Four tables are printed, and a
page for the browser has more. What they ask, on three made-up positions (D and C are
rescaled to [0, 1]; the gains are what the paper would expect):

                           D     C    learnable    incompatible    gain
                                        D * C       D * (1 - C)
     the result "17"      .5     1       .5              0          .9
     the word "gets"       1     0        0              1           0
     the name "Ben"        0     1        0              0           0

  gain_of_kept    If one of the three is kept, which? Divergence keeps "gets", which
                  gains 0, and teachability keeps "17", which gains .9.
                  The demo: so it is in reverse KL and overlap, not in forward KL.
  explain         What predicts the gain? It rises with the learnable part, and not with
                  the incompatible one.
                  The demo: in forward KL the other way round, as "gets" gains there.
                  In reverse KL it depends on the controls (finding 5 of the README).
  compare_thirds  Of two positions with little entropy and much D, say "17" and "gets",
                  does the more compatible one gain more?
                  The demo: no. In forward KL it gains less, else about the same.
  leak            What if C is measured after training? Suppose that "gets" has gained.
                  What it learned is among the trained student's top K: so C is 1, and
                  the gain is put down to the learnable part.
                  The demo: with K = 32 this turns the answer of `explain` round.

A gain is above 0 where the student came nearer. It is measured in several ways:

  forward_kl  the fall of KL(teacher || student), in nats: the paper's measure
  reverse_kl  the fall of KL(student || teacher), in nats: what training minimises
  overlap     the rise of sum_v min(p(v), q(v)), in [-1, 1], the probability that both
              models agree on
  relative    the fall of forward_kl as a share of what it was, as in the paper's code
              (only in `explain` and `leak`)

Notation as in opd.py: p is the student's next-token distribution, q the teacher's. D is
the divergence, C the compatibility, K the number of top tokens that these two look at:
16, and for comparison 8 and 32.
Shapes: V tokens in the vocabulary, N positions in all contexts together, n some of
them. Arrays are numpy's. Source: arXiv 2605.26844, fixed-context analysis.
"""

import argparse
import html
import json
import sys
import textwrap
from collections import Counter, defaultdict

import numpy as np
import torch
from tqdm import tqdm

import opd


def main(args):
    """The five steps."""
    pair, training, held_out = opd.prepare(args)
    trained = None
    if args.after:
        trained = load_trained(pair, args)  # if it is refused, then at once
    out = opd.new_folder(args.out, "diagnosis")

    prompts = []
    for i in range(args.contexts):
        example = held_out[i % len(held_out)]  # from the start again if too few
        prompts.append(example["prompt"])

    # 1. Freeze contexts.
    batches = freeze(pair, prompts, args)

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
# 1. Measuring: steps 1 to 4
# ======================================================================================


def freeze(pair, prompts, args):  # -> [opd.Rollout]
    """The student before training samples one response to each prompt."""
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


def measure_chunk(student_logits, teacher_logits, tokens, ks):  # -> {name: [n]}
    """All that is measured at n positions, in nats but for overlap and C.

    D and C for each K of `ks`: see `at_k`. The five likeliest tokens of both models,
    [n, 5], are for the page.
    """
    five = min(5, student_logits.shape[-1])
    measured = {
        "token": tokens,
        "forward_kl": opd.forward_kl(student_logits, teacher_logits),
        "reverse_kl": opd.reverse_kl(student_logits, teacher_logits),
        "overlap": overlap(student_logits, teacher_logits),
        "entropy": opd.entropy(student_logits),
        "teacher_entropy": opd.entropy(teacher_logits),
        "student_choices": student_logits.topk(five).indices,
        "teacher_choices": teacher_logits.topk(five).indices,
    }
    for k in ks:
        D = opd.divergence(student_logits, teacher_logits, k)
        C = opd.compatibility(student_logits, teacher_logits, k)
        measured[f"divergence_{k}"] = D
        measured[f"compatibility_{k}"] = C
    return measured


def at_k(measured, k):  # {name: [N]} -> {name: [N]}
    """With this K's D and C under the names "divergence" and "compatibility"."""
    return {
        **measured,
        "divergence": measured[f"divergence_{k}"],
        "compatibility": measured[f"compatibility_{k}"],
    }


def locate(mask):  # [B, R] bool -> [B, R] twice
    """Where a position stands: in which response, and how far into it, from 0 to 1."""
    response = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)
    tokens_before = mask.cumsum(-1) - 1
    length = mask.sum(-1, keepdim=True)
    progress = tokens_before.double() / (length - 1).clamp(min=1)
    return response, progress


def measure_contexts(pair, batches, args):  # -> {name: [N]}
    """`measure_chunk`, and "context" and "progress" from `locate`.

    The N positions come context by context, left to right.
    """
    parts = defaultdict(list)
    contexts = 0
    for batch in tqdm(batches, "scoring contexts", disable=None):
        size = args.micro_batch_size
        student_hidden = opd.all_hidden_states(pair.student, batch, size)
        teacher_hidden = opd.all_hidden_states(pair.teacher, batch, size)
        scores = opd.score(  # it hands args.ks on to measure_chunk
            pair, batch, student_hidden, teacher_hidden, args.ks, measure_chunk
        )
        response, scores["progress"] = locate(batch.mask)
        scores["context"] = contexts + response
        contexts += len(batch.mask)
        for name, values in scores.items():
            parts[name].append(values[batch.mask].cpu().numpy())

    measured = {}
    for name, arrays in parts.items():
        values = np.concatenate(arrays)
        if values.dtype == np.float32:
            values = values.astype(np.float64)  # for long sums
        measured[name] = values
    return measured


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


def gains_of(before, after):  # -> {measure: [N]}
    """How much nearer to the teacher the student came."""
    return {
        "forward_kl": before["forward_kl"] - after["forward_kl"],
        "reverse_kl": before["reverse_kl"] - after["reverse_kl"],
        "overlap": after["overlap"] - before["overlap"],  # more of it is nearer
    }


def with_relative(gains, before):  # -> {measure: [N]}, with "relative"
    """A fourth gain, from the paper's code: which share of the forward KL is gone.

    Where it had been tiny, this share may be hugely negative; so it is clipped at its
    1 % and 99 % quantiles.
    """
    share = gains["forward_kl"] / (before["forward_kl"] + 1e-12)
    low, high = np.quantile(share, [0.01, 0.99])
    return {**gains, "relative": np.clip(share, low, high)}


# ======================================================================================
# 2. Statistics, in plain numpy. How different might a figure be, had the student
#    written other responses? The bootstrap asks that, and answers with an interval.
# ======================================================================================


def bootstrap(statistic, arrays, context, draws, seed):
    """A statistic of arrays, and its 95 % interval: {"value", "low", "high"}.

    A draw takes as many contexts as there are, with replacement: one may be drawn
    twice, and another not at all. The statistic is computed anew for each draw; the
    middle 95 % of the results are the interval. Whole contexts are drawn, since the
    positions of one response resemble each other. Drawn one by one they would count as
    independent evidence, and the interval would be too narrow.

    `arrays` have a row for each of the N positions, and context [N] says to which
    context it belongs. statistic(*arrays) is a number or an array of them.
    """
    generator = np.random.default_rng(seed)
    positions_of = []
    for number in np.unique(context):
        positions_of.append(np.flatnonzero(context == number))

    results = []
    for _ in range(draws):
        drawn = generator.integers(len(positions_of), size=len(positions_of))
        index = np.concatenate([positions_of[number] for number in drawn])
        results.append(statistic(*[array[index] for array in arrays]))

    # Without nan: by chance, a draw may contain no position of a group.
    low, high = np.nanquantile(results, [0.025, 0.975], axis=0)
    return {"value": statistic(*arrays), "low": low, "high": high}


def group_means(values, member):  # [n, F], [n, groups] bool -> [groups, F]
    """Mean of each column of `values` over each group's members; nan if it has none."""
    means = np.full((member.shape[1], values.shape[1]), np.nan)
    for group in range(len(means)):
        if member[:, group].any():
            means[group] = values[member[:, group]].mean(0)
    return means


def least_squares(X, Y):  # [n, regressors], [n, outcomes] -> [regressors, outcomes]
    """The slopes for which X @ slopes comes nearest to Y."""
    # The same as np.linalg.lstsq(X, Y), but ten times faster, as X.T @ X is small. (It
    # loses digits if columns of X are much alike. In float64 enough of them are left.)
    return np.linalg.lstsq(X.T @ X, X.T @ Y, rcond=None)[0]


def correlations(X, Y):  # [n, A], [n, B] -> [A, B]
    """Pearson's correlation of each column of X with each of Y; of a constant, 0."""
    X = X - X.mean(0)
    Y = Y - Y.mean(0)
    scale = np.outer(np.sqrt((X**2).sum(0)), np.sqrt((Y**2).sum(0)))
    return X.T @ Y / np.maximum(scale, 1e-12)


def zscore(values):  # [N] -> [N]
    """Rescaled to mean 0 and variance 1; a constant becomes zeros."""
    return (values - values.mean()) / max(values.std(), 1e-12)


def mean_ranks(values):  # [N] -> [N]
    """1 for the lowest value; equal values share the mean of their ranks.

    10, 20, 20 get 1, 2.5, 2.5: the last two share the second and the third place.
    """
    _, level, equals = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(equals)  # the last rank of each level of values
    mean = last - (equals - 1) / 2
    return mean[level]


def equal_groups(values, groups, inside):  # [N], [N] bool -> [N, groups] bool
    """Members of `groups` groups of equal size, from the lowest values to the highest.

    Only positions `inside` belong to one. With values 5, 1, 9, 3, 7, of which the last
    is outside, two groups are {1, 3} and {5, 9}.
    """
    positions = np.flatnonzero(inside)
    ascending = positions[np.argsort(values[positions], kind="stable")]
    member = np.zeros((len(values), groups), dtype=bool)
    for group, own in enumerate(np.array_split(ascending, groups)):
        member[own, group] = True
    return member


# ======================================================================================
# 3. Analysis. Each function makes the rows of one table, {label: {column: cell}}. A
#    cell is an estimate, a number or a text. What the tables ask is said at the top.
# ======================================================================================


def normalize(values):  # [N] -> [N] in [0, 1]
    """opd.robust_normalize over all positions of all contexts."""
    row = torch.tensor(values)[None]  # [1, N]
    everywhere = torch.ones_like(row, dtype=torch.bool)
    return opd.robust_normalize(row, everywhere)[0].double().numpy()


def make_features(before):  # {name: [N]} -> {name: [N]}
    """What may explain the gain: measured quantities, rescaled to [0, 1], and more."""
    h = normalize(before["entropy"])
    d = normalize(before["divergence"])
    c = normalize(before["compatibility"])
    return {
        "entropy": h,
        "D": d,
        "C": c,
        "entropy * D": h * d,
        "learnable": d * c,  # the teacher reweights tokens that the student considers
        "incompatible": d * (1 - c),  # it wants other tokens; the two add up to D
        "tip": 1 - (1 - h) * (1 - d),  # soft OR of entropy and D, as in opd.rank
        "progress": before["progress"],
        "teacher_entropy": normalize(before["teacher_entropy"]),
    }


def columns_of(gains):  # {measure: [N]} -> [N, measures]
    return np.column_stack(list(gains.values()))


def estimates(statistic, arrays, context, args, labels, columns):  # -> rows
    """What `bootstrap` finds, as a table: a label for each row, a name for each column.

    `statistic` returns [labels, columns]. InputError if a value is missing.
    """
    found = bootstrap(statistic, arrays, context, args.bootstrap, args.seed)
    if np.isnan(found["value"]).any():
        raise opd.InputError(
            "there are too few positions for the report's groups; use more --contexts"
        )
    rows = {}
    for i, label in enumerate(labels):
        rows[label] = {}
        for j, column in enumerate(columns):
            rows[label][column] = {
                "value": float(found["value"][i, j]),
                "low": float(found["low"][i, j]),
                "high": float(found["high"][i, j]),
            }
    return rows


def kept_by(method, before, budget, seed):  # -> [N] bool
    """What `method` would keep of all contexts, as opd.py does it in a batch.

    Here all contexts stand in one row, as if they were one response. So opd.select adds
    no position for a response that has none, and the count is the same for all methods.
    """
    scores = {}
    for name in ("entropy", "divergence", "compatibility"):
        scores[name] = torch.tensor(before[name])[None]  # [1, N]
    mask = torch.ones_like(scores["entropy"], dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)  # for "random"
    ranks = opd.rank(method, scores, mask, generator)
    if method == "full":
        budget = 1
    return opd.select(ranks, mask, budget)[0].numpy()


def gain_of_kept(before, gains, budget, args):  # -> rows
    """Mean gain of what each method would keep, at the same count for all."""
    kept = []  # the groups of `group_means`; a position may be in several of them
    for method in opd.METHODS:
        kept.append(kept_by(method, before, budget, args.seed))
    return estimates(
        group_means,
        [columns_of(gains), np.column_stack(kept)],
        before["context"],
        args,
        labels=opd.METHODS,
        columns=list(gains),
    )


def kept_tokens(before, budget, seed, decode):  # -> rows
    """The five tokens that each method keeps most often, with their share."""
    rows = {}
    for method in opd.METHODS:
        tokens = before["token"][kept_by(method, before, budget, seed)]
        texts = []
        for token, count in Counter(tokens.tolist()).most_common(5):
            texts.append(f"{decode(token)!r} {count / len(tokens):.0%}")
        rows[method] = {"tokens": ", ".join(texts)}
    return rows


# The regression's question is about the learnable and the incompatible part of D. The
# other three are controls: an unsure student, or an early position, may gain more
# whatever the teacher says, and the two parts must not get the credit for that. UNSPLIT
# is the paper's baseline: D as a whole, and its product with the entropy.
REGRESSORS = ("learnable", "incompatible", "entropy", "progress", "teacher_entropy")
UNSPLIT = ("D", "entropy * D", "entropy", "progress", "teacher_entropy")


def design(features, names):  # -> X [N, 1 + names]
    """A column of ones, then the named features, z-scored so that slopes compare.

    InputError for a feature that is the same everywhere: it has no slope.
    """
    columns = [np.ones(len(features["D"]))]
    for name in names:
        if np.ptp(features[name]) < 1e-12:
            raise opd.InputError(
                f"{name} is the same at all positions, so its share in the gain cannot "
                "be found; use more contexts or longer responses"
            )
        columns.append(zscore(features[name]))
    return np.column_stack(columns)


def slopes_and_gap(X, Y):  # X as `design` makes it for REGRESSORS -> [outcomes, 3]
    """The slopes of the learnable and the incompatible part, and their difference."""
    slope = dict(zip(("ones", *REGRESSORS), least_squares(X, Y)))  # {name: [outcomes]}
    gap = slope["learnable"] - slope["incompatible"]
    return np.column_stack([slope["learnable"], slope["incompatible"], gap])


def r2(X, Y):  # -> [outcomes]
    """The share of each outcome's variance (1, as it is z-scored) that is explained."""
    return (X @ least_squares(X, Y)).var(0)


def explain(before, gains, args):  # -> rows
    """Which part of the disagreement goes with the gain, learnable or incompatible?

    The gain is predicted by a weighted sum, slope * regressor. A gap above 0 says that
    learnable disagreement is learned more. R2 says how much the sum explains.
    """
    gains = with_relative(gains, before)
    features = make_features(before)
    # Made once, from the sample: a draw only chooses rows. So a slope keeps its unit.
    X = design(features, REGRESSORS)
    Y = np.column_stack([zscore(gain) for gain in gains.values()])
    rows = estimates(
        slopes_and_gap,
        [X, Y],
        before["context"],
        args,
        labels=list(gains),
        columns=("learnable", "incompatible", "gap"),
    )

    split = r2(X, Y)
    unsplit = r2(design(features, UNSPLIT), Y)
    for i, name in enumerate(gains):
        rows[name]["R2"] = float(split[i])
        rows[name]["R2 unsplit"] = float(unsplit[i])
    return rows


def sure_yet_in_disagreement(features):  # {name: [N]} -> [N] bool
    """Low entropy and high D, each split at its median.

    That makes four quadrants; the paper calls this one Q3.
    """
    sure = features["entropy"] <= np.median(features["entropy"])
    in_disagreement = features["D"] >= np.median(features["D"])
    return sure & in_disagreement


def thirds_and_contrast(gains, thirds):  # [n, F], [n, 3] bool -> [4, F]
    """Mean gain of each third, then last minus first."""
    means = group_means(gains, thirds)
    return np.vstack([means, means[2] - means[0]])


def compare_thirds(before, gains, args):  # -> rows
    """Where the student is sure yet disagrees: is more gained where C is larger?"""
    features = make_features(before)
    thirds = equal_groups(features["C"], 3, sure_yet_in_disagreement(features))
    return estimates(
        thirds_and_contrast,
        [columns_of(gains), thirds],
        before["context"],
        args,
        labels=("least compatible", "middle", "most compatible", "most - least"),
        columns=list(gains),
    )


def compare_quarters(before, gains, part, args):  # -> rows
    """Where the student is sure yet disagrees: is more gained where a part of D is?"""
    features = make_features(before)
    quarters = equal_groups(features[part], 4, sure_yet_in_disagreement(features))
    return estimates(
        group_means,
        [columns_of(gains), quarters],
        before["context"],
        args,
        labels=("lowest quarter", "second", "third", "highest"),
        columns=list(gains),
    )


def leak(before, after, gains, args):  # -> rows
    """Two of the figures above, with C of before training and, wrongly, of after it.

    Why wrongly? Say the teacher wants a token that the student does not consider: C is
    0, and all of D incompatible. Training teaches it, against the hypothesis. But now
    the token stands in the trained student's top K. With C from there, 1, the position
    counts as learnable: what spoke against the hypothesis now speaks for it.
    """
    leaky = {**before, "compatibility": after["compatibility"]}

    rows = {}
    for when, scores in (("before", before), ("after", leaky)):
        explained = explain(scores, gains, args)
        thirds = compare_thirds(scores, with_relative(gains, before), args)
        for name in explained:
            rows[f"C {when}, {name}"] = {
                "gap": explained[name]["gap"],
                "most - least": thirds["most - least"][name],
            }
    return rows


def rank_correlations(before, gains, args):  # -> rows
    """What orders the positions as their gains do? Ranks are those of the sample."""
    features = make_features(before)
    names = ("D", "learnable", "incompatible", "entropy", "tip")
    X = np.column_stack([mean_ranks(features[name]) for name in names])
    Y = np.column_stack([mean_ranks(gain) for gain in gains.values()])
    return estimates(
        correlations,
        [X, Y],
        before["context"],
        args,
        labels=names,
        columns=list(gains),
    )


# ======================================================================================
# 4. The report: the same tables for the terminal, the files and the page
# ======================================================================================


def all_tables(before, after, args, decode):  # {name: [N]} twice -> a list of tables
    """Everything that the report says in numbers, and how to read it.

    Some are printed; the page has all.
    """
    tables = []

    def add(title, reading, rows, printed=False):
        table = {"title": title, "reading": reading, "rows": rows, "printed": printed}
        tables.append(table)

    k = args.top_k
    gains = gains_of(before, after)
    before = at_k(before, k)
    after = at_k(after, k)

    add(
        f"Mean gain of the 10% that each method would keep, K={k}",
        "Of all contexts together, equally many for each method; full keeps all. Of "
        "equal ranks the earlier are kept: the top 5 % of entropy, D or C are all 1.",
        gain_of_kept(before, gains, 0.1, args),
        printed=True,
    )
    add(
        f"What explains the gain? K={k}",
        "Slopes: by how many standard deviations the gain rises with one more of a "
        "part of D, all else equal. gap = learnable - incompatible: above 0, learnable "
        "disagreement is learned more. The paper has .086 and .043 in forward_kl. R2: "
        "the share of the gain that is explained, with D in two parts and unsplit.",
        explain(before, gains, args),
        printed=True,
    )
    add(
        f"Sure, yet in disagreement (the paper's Q3), K={k}",
        "Mean gain of the positions with entropy at most, and D at least, its median, "
        "in three equal groups, from the lowest C to the highest. If the last "
        "row is above 0, more is gained where the teacher's advice is more compatible.",
        compare_thirds(before, gains, args),
        printed=True,
    )
    add(
        f"If C were measured after training, K={k}",
        "C before: as in the other tables. C after is a leak: by then, what was "
        "learned stands in the trained student's top K, so C knows what it is asked to "
        "predict. Only C before can choose positions. most - least: as in Q3 above.",
        leak(before, after, gains, args),
        printed=True,
    )
    add(
        f"Rank correlation with the gain, K={k}",
        "Spearman's: 1 if a quantity orders positions by gain, 0 if it is unrelated.",
        rank_correlations(before, gains, args),
    )
    for budget in (0.03, 0.05):
        add(
            f"Mean gain of the {budget:.0%} that each method would keep, K={k}",
            "As above, for a smaller budget.",
            gain_of_kept(before, gains, budget, args),
        )
    add(
        f"What each method would keep at 10%, K={k}",
        "Its most frequent tokens, and their share.",
        kept_tokens(before, 0.1, args.seed, decode),
    )
    for part in ("learnable", "incompatible"):
        add(
            f"Sure, yet in disagreement, by quarters of its {part} part, K={k}",
            "Mean gain, from the quarter with the least of it to that with the most.",
            compare_quarters(before, gains, part, args),
        )
    for other in args.ks:
        if other == k:
            continue
        add(
            f"What explains the gain? K={other}",
            "As above, with another number of top tokens.",
            explain(at_k(before, other), gains, args),
        )
        add(
            f"If C were measured after training, K={other}",
            "As above, with another number of top tokens.",
            leak(at_k(before, other), at_k(after, other), gains, args),
        )
        add(
            f"Sure, yet in disagreement, K={other}",
            "As above, with another number of top tokens.",
            compare_thirds(at_k(before, other), gains, args),
        )
    return tables


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


def cell_text(cell):
    if isinstance(cell, str):
        return cell
    if isinstance(cell, float):
        return f"{cell:.3f}"
    return f"{cell['value']:+.3f} [{cell['low']:+.2f}, {cell['high']:+.2f}]"


def as_quote(text):  # -> its lines, for a terminal of 100 columns
    return textwrap.fill(text, 98, initial_indent="> ", subsequent_indent="> ")


def as_text(table):  # -> its rows, for a terminal of 100 columns
    first_row = next(iter(table["rows"].values()))
    grid = [["", *first_row]]
    for label, cells in table["rows"].items():
        grid.append([label, *map(cell_text, cells.values())])

    widths = []
    for column in range(len(grid[0])):
        widths.append(max(len(row[column]) for row in grid))

    lines = [table["title"]]
    for row in grid:
        line = row[0].ljust(widths[0])
        for text, width in zip(row[1:], widths[1:]):
            line += "  " + text.rjust(width)
        lines.append(line)
    return "\n".join([*lines, as_quote(table["reading"])])


def position_lines(before, after, decode):  # -> the text of positions.jsonl
    """One object for each position, with all that was measured there."""
    gains = gains_of(before, after)
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
    # First what took long to measure: a table may fail, as with too few positions.
    decode = pair.tokenizer.decode
    lines = position_lines(before, after, decode)
    opd.write_file(out / "positions.jsonl", lines)

    summary = what_was_measured(held_out_count, before, after, args)
    tables = all_tables(before, after, args, decode)
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

    gains = gains_of(before, after)
    responses = token_map(prompts, at_k(before, args.top_k), gains, decode)
    opd.write_file(out / "report.html", as_page(tables, summary, responses))

    opd.show(summary)
    for table in tables:
        if table["printed"]:
            opd.show("\n" + as_text(table))
    opd.show(f"\nreport.html, report.json and positions.jsonl are in {out}")
    opd.show("The page has more: a map of the tokens, rank correlations, other K.")


# ======================================================================================
# 5. The command line
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
        default=192,
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
    args.ks = sorted({8, 16, 32, args.top_k})  # for D and C
    return args


# ======================================================================================
# 6. The page: one file, no script, nothing loaded from elsewhere. May be skipped.
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

/* A narrow screen scrolls the table, not the page. */
table { display: block; overflow-x: auto; border-collapse: collapse; }
th, td {
  padding: 0.15rem 0.6rem; border-top: 1px solid var(--line);
  font-weight: normal; text-align: left; white-space: nowrap;
}
th { color: var(--faint); }

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


def token_span(text, learnable, incompatible, tip):  # text, [0, 1] twice, text -> HTML
    style = f"--learnable:{learnable:.2f};--incompatible:{incompatible:.2f}"
    return (
        f'<span class="token" tabindex="0" style="{style}" '
        f'data-tip="{html.escape(tip)}">{visible(text)}</span>'
    )


def tooltip(i, before, gains, decode):  # -> text about position i
    text = decode(before["token"][i].item())
    numbers = []
    for name in ("entropy", "divergence", "compatibility"):
        numbers.append(f"{name} {before[name][i]:.2f}")
    for name, gain in gains.items():
        numbers.append(f"gain in {name} {gain[i]:+.3f}")
    lines = [f"{text!r}   {'   '.join(numbers)}"]
    for who in ("student", "teacher"):
        choices = before[f"{who}_choices"][i].tolist()
        texts = [repr(decode(choice)) for choice in choices]
        lines.append(f"{who}: {'  '.join(texts)}")
    return "\n".join(lines)


def token_map(prompts, before, gains, decode):  # -> HTML
    """The first contexts, token by token, coloured by both parts of D."""
    features = make_features(before)
    paragraphs = []
    for number, prompt in enumerate(prompts[:MAP_CONTEXTS]):
        spans = [f'<span class="faint">{visible(decode(prompt))}</span>']
        for i in np.flatnonzero(before["context"] == number):
            # The root, so that weak colours can be seen beside strong ones.
            span = token_span(
                decode(before["token"][i].item()),
                features["learnable"][i] ** 0.5,
                features["incompatible"][i] ** 0.5,
                tooltip(i, before, gains, decode),
            )
            spans.append(span)
        paragraphs.append('<p class="map">' + "<wbr>".join(spans) + "</p>")
    return "\n".join(paragraphs)


def table_html(table):  # a table of report.json -> HTML
    lines = [
        f"<h2>{html.escape(table['title'])}</h2>",
        f"<p>{html.escape(table['reading'])}</p>",
        "<table>",
    ]
    first_row = next(iter(table["rows"].values()))
    head = "<th></th>"
    for name in first_row:
        head += f"<th>{html.escape(name)}</th>"
    lines.append(f"<tr>{head}</tr>")

    for label, cells in table["rows"].items():
        row = f"<td>{html.escape(label)}</td>"
        for cell in cells.values():
            row += f"<td>{html.escape(cell_text(cell))}</td>"
        lines.append(f"<tr>{row}</tr>")
    lines.append("</table>\n")
    return "\n".join(lines)


def as_page(tables, summary, responses):  # -> HTML; `responses` is the token map's
    legend = [
        token_span("learnable", 0.9, 0, "D * C"),
        token_span("incompatible", 0, 0.9, "D * (1 - C)"),
        token_span("some of both", 0.4, 0.4, "the two add up to D"),
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


if __name__ == "__main__":
    opd.run(main, parse_args())
