"""The fixed-context diagnostic: which disagreement did the student really learn?

  1. contexts  sample responses from the student before training, theta0, and freeze them
  2. before    score each of their positions with the teacher and theta0              score_contexts
  3. train     theta0 -> theta1 by opd.py's own loop, or take a student trained earlier (--after)
  4. after     score the same positions with theta1. The gain of a position, in nats:
               G = KL(teacher || theta0) - KL(teacher || theta1), same context, full vocabulary
  5. report    which quantities of theta0 explain G?           features, statistics, tables, as_page

What explains is measured at theta0 alone. Intervals are 95 % percentile cluster bootstraps over
contexts, as the positions of one response are not independent. Arrays are numpy's, one entry per
position (N). Source: arXiv 2605.26844, fixed-context analysis.
"""
import argparse, html, json, math, sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import opd

REGRESSORS = ("H", "D_learn", "D_incompat", "position", "H_teacher")
BASELINE = ("H", "D", "H*D", "position", "H_teacher")

# ---- Scores and features.
def score_contexts(pair, batches, args, function):  # -> one [N, ...] for each result
    """function(student_logits, teacher_logits, tokens) at every valid position of the rollouts."""
    size = args.micro_batch_size or args.batch_size
    results = [opd.measure(pair, batch, size, function)[0]
               for batch in tqdm(batches, desc="scoring contexts", disable=None)]
    columns = (torch.cat(column).cpu().numpy() for column in zip(*results))
    return [x.astype(float) if x.dtype == np.float32 else x for x in columns]

def features(scores, k):  # {name: [N]} raw, of theta0 -> {name: [N]}
    """H, D and C normalised robustly over all positions, and what the paper makes of them."""
    def tilde(values):
        row = torch.tensor(values)[None]
        return opd.robust_normalize(row, torch.ones_like(row) > 0)[0].double().numpy()
    h, teacher, d, c = (tilde(scores[name]) for name in ("H", "H_teacher", f"D{k}", f"C{k}"))
    return {"H": h, "D": d, "C": c, "H*D": h * d, "D_learn": d * c, "D_incompat": d * (1 - c),
            "TIP": 1 - (1 - h) * (1 - d), "position": scores["position"], "H_teacher": teacher}

# ---- Statistics. weights [1 + draws, contexts] says how often each context counts.
def cluster_weights(contexts, draws, seed):  # -> [1 + draws, contexts]
    """Row 0 is the sample itself; every other row resamples whole contexts with replacement."""
    draw = np.random.default_rng(seed).multinomial(contexts, np.full(contexts, 1 / contexts), draws)
    return np.vstack([np.ones(contexts), draw])

def estimate(values):  # [1 + draws] -> {"value", "low", "high"}
    """The sample's value, and the 2.5 % and 97.5 % quantiles of its bootstrap draws."""
    if not np.isfinite(values[0]):
        opd.fail("there are too few positions for the report's groups; use more --contexts")
    low, high = np.nanquantile(values[1:], [0.025, 0.975])
    return {"value": float(values[0]), "low": float(low), "high": float(high)}

def zscore(values):  # [N] -> [N] of mean 0 and variance 1; a constant becomes zeros
    return (values - values.mean()) / max(values.std(), 1e-12)

def ols(regressors, outcome, context, weights):  # [N] each -> slopes [1 + draws, p], R2 [1 + draws]
    """Least squares with intercept for every row of weights, from moments summed by context."""
    Z = np.column_stack([np.ones(len(outcome)), *map(zscore, regressors), zscore(outcome)])
    moments = np.zeros((weights.shape[1], Z.shape[1], Z.shape[1]))
    np.add.at(moments, context, Z[:, :, None] * Z[:, None, :])
    moments = np.tensordot(weights, moments, 1)  # [1 + draws, p + 2, p + 2]
    XX, Xy, yy = moments[:, :-1, :-1], moments[:, :-1, -1], moments[:, -1, -1]
    beta = (np.linalg.pinv(XX, hermitian=True) @ Xy[:, :, None])[:, :, 0]
    total, residual = yy - Xy[:, 0] ** 2 / XX[:, 0, 0], yy - (beta * Xy).sum(-1)
    return beta[:, 1:], 1 - residual / np.where(total > 1e-12, total, np.inf)

def group_mean(outcome, member, context, weights):  # [N], [N] bool -> [1 + draws]
    """Mean outcome of the members; nan in a draw that has none."""
    sums, counts = (weights @ np.bincount(context, x, weights.shape[1])
                    for x in (outcome * member, member))
    return sums / np.where(counts > 0, counts, np.nan)

def quantile_group(values, groups):  # [N] -> [N] in 0 .. groups - 1, of equal size
    order = np.argsort(values, kind="stable")
    return np.argsort(order) * groups // len(values)

def spearman(x, y, context, weights):  # [N], [N] -> [1 + draws]
    """Rank correlation of the resampled positions, with mean ranks for ties."""
    def ranks(place, w):  # place: which distinct value; w: how often each position counts
        tied = np.bincount(place, w)
        return (np.cumsum(tied) - (tied - 1) / 2)[place]
    def correlate(w):
        a, b = (ranks(place, w) for place in places)
        a, b = a - np.average(a, weights=w), b - np.average(b, weights=w)
        return (w * a * b).sum() / max(math.sqrt((w * a * a).sum() * (w * b * b).sum()), 1e-12)
    places = [np.unique(z, return_inverse=True)[1] for z in (x, y)]
    return np.array([correlate(row[context]) for row in weights])

def statistics(scores, G, supports, top_k, weights, seed):  # -> the numbers of the report
    """All five parts, from the scores {name: [N]} of theta0 (`context` among them) and G [N]."""
    context, report = scores["context"], defaultdict(dict)
    average = lambda member: group_mean(G, member, context, weights)
    ratio = G / (scores["forward_kl"] + 1e-12)
    ratio = np.clip(ratio, *np.quantile(ratio, [0.01, 0.99]))  # winsorised: its left tail is heavy
    for k in supports:
        f = features(scores, k)
        for name in REGRESSORS + BASELINE:
            if np.ptp(f[name]) < 1e-12:
                opd.fail(f"{name} (K = {k}) is the same at all positions and makes the regression "
                         "singular; use more contexts or longer responses")
        for part, outcome in (("decomposition", G), ("decomposition_relative", ratio)):
            slopes, r2 = ols([f[name] for name in REGRESSORS], outcome, context, weights)
            _, baseline = ols([f[name] for name in BASELINE], outcome, context, weights)
            report[part][str(k)] = {
                "learn": estimate(slopes[:, 1]), "incompat": estimate(slopes[:, 2]),
                "gap": estimate(slopes[:, 1] - slopes[:, 2]), "r2": estimate(r2),
                "r2_baseline": estimate(baseline)}
        # Q3: the student is sure (H below the median) and yet in disagreement (D above it).
        q3 = np.flatnonzero((f["H"] <= np.median(f["H"])) & (f["D"] >= np.median(f["D"])))
        def member(name, groups, group):  # [N] bool: in Q3, and there in that group by `name`
            chosen = np.zeros(len(G), bool)
            chosen[q3[quantile_group(f[name][q3], groups) == group]] = True
            return chosen
        gap = average(member("C", 3, 2)) - average(member("C", 3, 0))
        report["q3"][str(k)] = {"top_minus_bottom": estimate(gap)} | {
            f"{name} quartile {g + 1}": estimate(average(member(name, 4, g)))
            for name in ("D_learn", "D_incompat") for g in range(4)}
        if k == top_k:
            report["rank_correlation"] = {
                name: estimate(spearman(f[name], G, context, weights))
                for name in ("D", "D_learn", "D_incompat", "H", "TIP")}
    H, D, C = (torch.tensor(scores[name])[None] for name in ("H", f"D{top_k}", f"C{top_k}"))
    for method in opd.METHODS:
        generator = torch.Generator().manual_seed(seed)
        order = opd.position_scores(method, H, D, C, torch.ones_like(H) > 0, generator)[0]
        order = order.sort(descending=True, stable=True).indices
        for budget in (0.03, 0.05, 0.1):  # the same count for all: no extra position per response
            kept = np.zeros(len(G), bool)
            kept[order[:len(G) if method == "full" else math.ceil(budget * len(G))]] = True
            report["matched"].setdefault(str(budget), {})[method] = estimate(average(kept))
    return dict(report)

# ---- The report: a list of tables, shown as text and as a page.
def tables(report, top_k):  # -> [(title, how to read it, [(label, estimate, the paper's figure)])]
    paper = {"learn": "paper 0.086-0.087", "incompat": "paper 0.043-0.045"}
    names = {"learn": "D_learn", "incompat": "D_incompat", "gap": "D_learn - D_incompat",
             "r2": "R2", "r2_baseline": "R2 with H, D, H*D"}
    q3, matched = report["q3"], report["matched"]
    return [(
        f"Decomposition of {outcome}", "Standard deviations that it rises with one more of each. "
        "Gap above 0: learnable disagreement is learned more.",
        [(f"K={k} {names[name]}", e, paper.get(name, ""))
         for k, fit in report[part].items() for name, e in fit.items()])
        for part, outcome in (("decomposition", "G in nats"),
                              ("decomposition_relative", "G / KL before, winsorised"))
    ] + [(
        "Sure, and yet in disagreement (H below, D above the median)", "Mean G in nats. Top - "
        "bottom above 0: where they are more compatible, positions improve more.",
        [(f"K={k} top - bottom third of C", q3[k]["top_minus_bottom"], "") for k in q3] + [
            (f"K={top_k} {name}", e, "") for name, e in q3[str(top_k)].items() if "quart" in name]),
        ("Rank correlation with G (Spearman)", "What orders positions by their gain? D is the raw "
         "disagreement.", [(name, e, "") for name, e in report["rank_correlation"].items()])
    ] + [(
        f"Mean G of the {float(budget):.0%} of positions that each method would keep", "In nats, "
        "at the same count for all; `full` is the mean over all positions.",
        [(method, e, "") for method, e in matched[budget].items()]) for budget in matched]

def print_report(report, top_k):
    print(f"{report['contexts']} contexts, {report['positions']} positions. {report['note']}")
    for title, reading, rows in tables(report, top_k):
        print(f"\n{title}\n{reading}")
        for label, e, paper in rows:
            print(f"  {label:30}{e['value']:9.4f}  [{e['low']:8.4f}, {e['high']:8.4f}]  {paper}")

STYLE = """
:root{--ink:#1a1a1a;--paper:#fff;--faint:#707070;--line:#ddd;--learn:0,114,178;--other:213,94,0}
@media(prefers-color-scheme:dark){:root{--ink:#eee;--paper:#161616;--faint:#999;--line:#333}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:60rem;
margin:auto;padding:1rem 1rem 9rem}.faint{color:var(--faint)}.n{text-align:right}
table{display:block;overflow-x:auto;border-collapse:collapse;font-size:.9rem}
td{border-top:1px solid var(--line);padding:.15rem .4rem;white-space:nowrap}
svg{width:clamp(4rem,20vw,14rem);height:1.1rem}rect{fill:rgb(var(--learn))}line{stroke:var(--ink);
stroke-width:1.5;vector-effect:non-scaling-stroke}.map{font:15px/1.9 ui-monospace,monospace;
overflow-wrap:anywhere;border-top:1px solid var(--line)}.t{--l:rgba(var(--learn),var(--a));
--o:rgba(var(--other),var(--b));white-space:pre-wrap;background:linear-gradient(var(--l),
var(--l)),linear-gradient(var(--o),var(--o))}.t:hover,.t:focus{outline:2px solid var(--ink)}
.t:hover::after,.t:focus::after{content:attr(data-tip);position:fixed;left:0;right:0;bottom:0;
padding:.7rem 1rem;background:var(--ink);color:var(--paper);font-size:.85rem;line-height:1.4}
"""

def visible(text):  # escaped, as a token may spell anything; spaces and newlines can be seen
    return html.escape(text).replace(" ", "\u00b7").replace("\n", "\u21b5\n")

def token_map(contexts):  # [(prompt, [(token, D_learn, D_incompat, what pointing at it shows)])]
    def span(token, learn, incompat, tip):
        return (f'<span class="t" tabindex="0" style="--a:{learn:.2f};--b:{incompat:.2f}" '
                f'data-tip="{html.escape(tip)}">{visible(token)}</span>')
    return "".join(f'<p class="map"><span class="faint">{visible(prompt)}</span><wbr>'
                   + "<wbr>".join(span(*token) for token in tokens) for prompt, tokens in contexts)

def as_page(report, top_k, contexts):
    """One self-contained page: no script, and nothing is loaded from elsewhere."""
    parts = []
    for title, reading, rows in tables(report, top_k):
        low = min(0, *(e["low"] for _, e, _ in rows))
        width = max(1e-9, *(e["high"] for _, e, _ in rows)) - low
        parts.append(f"<h2>{html.escape(title)}</h2><p>{html.escape(reading)}<table>")
        for label, e, paper in rows:
            zero, value, left, right = (
                100 * (x - low) / width for x in (0, e["value"], e["low"], e["high"]))
            parts.append(
                f'<tr><td>{html.escape(label)}<td><svg viewBox="0 0 100 10" '
                f'preserveAspectRatio="none"><rect x="{min(zero, value):.2f}" y="2" height="6" '
                f'width="{abs(value - zero):.2f}"/><line x1="{left:.2f}" x2="{right:.2f}" y1="5" '
                f'y2="5"/><line x1="{zero:.2f}" x2="{zero:.2f}" y1="0" y2="10"/></svg>'
                f'<td class="n">{e["value"]:.4f}<td class="faint">{e["low"]:.4f} to {e["high"]:.4f}'
                f'<td class="faint">{paper}')
        parts.append("</table>")
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>What was learned?</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style>
<h1>Which disagreement was learned?</h1>
<p>A student wrote these responses; its teacher disagrees at many of their tokens. <b>Learnable</b>
disagreement reweights tokens that the student already considers; <b>incompatible</b> disagreement
wants tokens that it does not. G is how much KL(teacher || student) fell at a position through
training, in nats. {report["contexts"]} contexts, {report["positions"]} positions.
{html.escape(report["note"])} Whiskers: 95 % cluster bootstrap over contexts.
<h2>Token map</h2><p><span class="t" style="--a:.9;--b:0">learnable</span> <span class="t"
style="--a:0;--b:.9">incompatible</span> <span class="t" style="--a:.4;--b:.4">some of both</span>,
stronger for more; prompts are grey, \u00b7 a space, \u21b5 a newline. Point at a token, or tap it.
{token_map(contexts)}
{"".join(parts)}</html>"""

# ---- The program.
def compare(runs):
    """Markdown: held-out results of finished runs of opd.py, mean ± sample deviation over seeds,
    and their differences, paired by seed, from full OPD and from random."""
    keys = ("reverse_kl", "agreement", "reference_nll", "reference_accuracy")
    cells, missing = defaultdict(dict), []
    for run in runs:
        try:
            summary = json.loads((Path(run) / "summary.json").read_text())
            args = summary["args"]
            cell = args["select"], 1 if args["select"] == "full" else args["budget"]
            for place, when in ((cell, "after"), (("before training", 0), "before")):
                cells[place][args["seed"]] = [summary[when].get(key, math.nan) for key in keys]
        except (OSError, ValueError, KeyError):
            missing.append(run)
    def show(values, sign=""):
        spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
        return f"{np.mean(values):{sign}.3f}{spread}" if values else "missing"
    columns = ["method", "budget", "seeds", *keys]
    columns += [f"{key} - {other}" for other in ("full", "random") for key in keys]
    print("|", " | ".join(columns), "|\n" + "|---" * len(columns) + "|")
    for (method, budget), seeds in sorted(cells.items(), key=lambda item: (item[0][1], item[0][0])):
        row = [show([values[i] for values in seeds.values()]) for i in range(len(keys))]
        for other in (cells.get(("full", 1), {}), cells.get(("random", budget), {})):
            row += [show([values[i] - other[seed][i] for seed, values in seeds.items()
                          if seed in other], "+") for i in range(len(keys))]
        print(f"| {method} | {budget:.0%} | {len(seeds)} |", " | ".join(row), "|")
    if missing:
        print("\nnot finished:", *missing)

def main(argv=None):
    """Steps 1 to 5 of the docstring at the top."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--contexts", type=int, default=300, help="responses to freeze and measure")
    add("--after", help="a trained version of --student (default: train one now)")
    add("--bootstrap", type=int, default=1000, help="resamples behind each interval")
    add("--compare", nargs="+", metavar="RUN", help="only tabulate these finished runs of opd.py")
    args = opd.parse_args(["--select", "full", *(sys.argv[1:] if argv is None else argv)], parser)
    if args.compare:
        return compare(args.compare)
    if args.contexts < 5 or args.resume:
        opd.fail("--contexts must be 5 or more; --resume is opd.py's, whose student --after takes")
    if not args.after:
        args.eval_prompts = max(args.eval_prompts, args.contexts)
    pair, training, held_out = opd.prepare(args)
    student = pair.student
    if args.after:
        student, tokenizer, _ = opd.load_model("--after", args.after, torch.float32, args.device)
        shapes = [[w.shape for w in model.parameters()] for model in (student, pair.student)]
        if shapes[0] != shapes[1] or tokenizer.get_vocab() != pair.tokenizer.get_vocab():
            opd.fail(f"--after {args.after} has another tokenizer or other shapes than --student")
    out = opd.new_folder(args.out, "diagnosis")
    note = f"{len(held_out)} held-out prompts" + ", some repeated" * (len(held_out) < args.contexts)

    torch.manual_seed(args.seed)
    prompts = [held_out[i % len(held_out)][0] for i in range(args.contexts)]
    starts = tqdm(range(0, len(prompts), args.batch_size), desc="sampling contexts", disable=None)
    batches = [opd.rollout(pair, prompts[i:i + args.batch_size], args.max_new_tokens)
               for i in starts]
    supports, best = sorted({8, 16, 32, args.top_k}), min(5, pair.width)
    *values, student_top, teacher_top = score_contexts(pair, batches, args, lambda p, q, y: (
        opd.forward_kl(p, q), opd.reverse_kl(p, q), opd.entropy(p), opd.entropy(q),
        *(f(p, q, k) for f in (opd.divergence, opd.compatibility) for k in supports),
        p.topk(best).indices, q.topk(best).indices))
    lengths = torch.cat([batch.mask.sum(-1) for batch in batches]).cpu().numpy()
    scores = dict(zip(["forward_kl", "reverse_kl", "H", "H_teacher",
                       *(f"{name}{k}" for name in "DC" for k in supports)], values))
    scores["context"] = np.repeat(np.arange(len(lengths)), lengths)
    scores["position"] = np.concatenate([np.arange(n) / max(n - 1, 1) for n in lengths])

    if not args.after:
        opd.train(pair, training, args, out)
    forward_after, reverse_after = score_contexts(
        pair._replace(student=student), batches, args,
        lambda p, q, y: (opd.forward_kl(p, q), opd.reverse_kl(p, q)))
    G = scores["forward_kl"] - forward_after
    note += "." if G.any() else "; G is 0 everywhere: this student has not changed."
    weights = cluster_weights(len(lengths), args.bootstrap, args.seed)
    report = {"contexts": len(lengths), "positions": len(G), "note": note,
              **statistics(scores, G, supports, args.top_k, weights, args.seed), "args": vars(args),
              "versions": {m.__name__: m.__version__ for m in (torch, opd.transformers, np)}}

    decode, f = pair.tokenizer.decode, features(scores, args.top_k)
    ids = torch.cat([opd.tokens(batch) for batch in batches]).cpu().numpy()
    columns = scores | {"forward_kl_after": forward_after, "reverse_kl_after": reverse_after,
                        "G": G, "id": ids}
    lines, shown = [], [(decode(prompt), []) for prompt in prompts[:12]]
    for n in range(len(G)):
        line = {name: column[n].item() for name, column in columns.items()}
        line["token"] = decode(line["id"])
        lines.append(json.dumps(line) + "\n")
        if line["context"] < len(shown):
            tip = (f"{line['token']!r}   H {line['H']:.2f}   D {line[f'D{args.top_k}']:.2f}   "
                   f"C {line[f'C{args.top_k}']:.2f}   G {line['G']:+.3f}")
            for who, top in (("student", student_top), ("teacher", teacher_top)):
                tip += f"\n{who}: " + "  ".join(repr(decode(i)) for i in top[n].tolist())
            shown[line["context"]][1].append(
                (line["token"], f["D_learn"][n], f["D_incompat"][n], tip))
    print_report(report, args.top_k)
    for name, text in {"positions.jsonl": "".join(lines), "report.json": json.dumps(report),
                       "report.html": as_page(report, args.top_k, shown)}.items():
        (out / f"{name}.partial").write_text(text, encoding="utf-8")
        (out / f"{name}.partial").rename(out / name)  # never half a report
    print(f"\nreport.html, report.json and positions.jsonl are in {out}")

if __name__ == "__main__":
    opd.run(main)
