"""The fixed-context diagnostic: which disagreement did the student really learn?

  1. freeze     responses of the student before training, theta0: the contexts
  2. before     score each of their positions with the teacher and theta0
  3. theta1     train by opd.py's own loop, on all positions, or take a trained student (--after)
  4. gains      score the same positions with theta1: how much nearer to the teacher is each?
  5. report     which quantities of theta0 explain the gain G?

G is measured in three ways: as the fall of KL(teacher || student), the paper's, and of KL(student
|| teacher), what training minimises, both in nats over the full vocabulary; and as the rise of the
overlap, sum_v min(p(v), q(v)): by how much a sample would look more like the teacher's. Intervals
are 95 % percentile cluster bootstraps over contexts, as the positions of one response are not
independent. Arrays are numpy's, one entry per position (N). Source: arXiv 2605.26844.
"""
import argparse, html, json, math, sys
from collections import Counter, defaultdict
from pathlib import Path
import numpy as np
import torch
from tqdm import tqdm
import opd

REGRESSORS = ("H", "D_learn", "D_incompat", "position", "H_teacher")
BASELINE = ("H", "D", "H*D", "position", "H_teacher")
MEASURES = ("forward_kl", "reverse_kl", "overlap")

def overlap(student_logits, teacher_logits):  # [..., V], [..., V] -> [...]
    """sum_v min(p(v), q(v)), in [0, 1]: the share of probability that both models agree on."""
    p, q = student_logits.float().softmax(-1), teacher_logits.float().softmax(-1)
    return torch.minimum(p, q).sum(-1)

# ---- Steps 1 to 4: what is measured at the positions of the frozen contexts.
def freeze(pair, held_out, args):  # -> rollouts of the student before training
    torch.manual_seed(args.seed)
    prompts = [held_out[i % len(held_out)][0] for i in range(args.contexts)]
    starts = range(0, len(prompts), 4 * args.batch_size)  # as in opd.evaluate
    return [opd.rollout(pair, prompts[i:i + 4 * args.batch_size], args.max_new_tokens)
            for i in tqdm(starts, "sampling contexts", disable=None)]

def score_contexts(pair, batches, args, function):  # -> one [N, ...] for each result
    """function(student_logits, teacher_logits, tokens) at every valid position of the rollouts."""
    results = [opd.measure(pair, batch, args.micro_batch_size, function)
               for batch in tqdm(batches, "scoring contexts", disable=None)]
    columns = (torch.cat(column).cpu().numpy() for column in zip(*results))
    return [x.astype(float) if x.dtype == np.float32 else x for x in columns]

def before(pair, batches, args):  # -> {name: [N]}, first choices of both models [N, 5] each
    """All that explains, measured at theta0 alone; D and C for each support K."""
    supports, best = args.supports, min(5, pair.width)
    *values, mine, theirs = score_contexts(pair, batches, args, lambda p, q, y: (
        opd.forward_kl(p, q), opd.reverse_kl(p, q), overlap(p, q), opd.entropy(p), opd.entropy(q),
        *(f(p, q, k) for f in (opd.divergence, opd.compatibility) for k in supports),
        y, p.topk(best).indices, q.topk(best).indices))
    scores = dict(zip([*MEASURES, "H", "H_teacher", *(f"{z}{k}" for z in "DC" for k in supports),
                       "id"], values))
    lengths = torch.cat([batch.mask.sum(-1) for batch in batches]).tolist()
    scores["context"] = np.repeat(np.arange(len(lengths)), lengths)
    scores["position"] = np.concatenate([np.arange(n) / max(n - 1, 1) for n in lengths])
    return scores, (mine, theirs)

def gains(pair, batches, scores, args):  # -> {measure: [N]}, above 0 where theta1 is nearer
    forward, reverse, common = score_contexts(pair, batches, args, lambda p, q, y: (
        opd.forward_kl(p, q), opd.reverse_kl(p, q), overlap(p, q)))
    return {"forward_kl": scores["forward_kl"] - forward,
            "reverse_kl": scores["reverse_kl"] - reverse, "overlap": common - scores["overlap"]}

# ---- Statistics. weights [1 + draws, contexts] says how often each context counts.
def features(scores, k):  # {name: [N]} raw, of theta0 -> {name: [N]}
    """H, D and C normalised robustly over all positions, and what the paper makes of them."""
    def tilde(values):
        row = torch.tensor(values)[None]
        return opd.robust_normalize(row, torch.ones_like(row) > 0)[0].double().numpy()
    h, teacher, d, c = (tilde(scores[name]) for name in ("H", "H_teacher", f"D{k}", f"C{k}"))
    f = {"H": h, "D": d, "C": c, "H*D": h * d, "D_learn": d * c, "D_incompat": d * (1 - c),
         "TIP": 1 - (1 - h) * (1 - d), "position": scores["position"], "H_teacher": teacher}
    for name in REGRESSORS + BASELINE:
        if np.ptp(f[name]) < 1e-12:
            opd.fail(f"{name} (K = {k}) is the same at all positions and makes the regression "
                     "singular; use more contexts or longer responses")
    return f

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

def kept_by(method, scores, k, share, seed):  # -> [N] bool
    """What `method` would keep: the same count for all, with no extra position per response."""
    H, D, C = (torch.tensor(scores[name])[None] for name in ("H", f"D{k}", f"C{k}"))
    ranks = opd.position_scores(method, H, D, C, torch.ones_like(H) > 0,
                                torch.Generator().manual_seed(seed))[0]
    best = ranks.sort(descending=True, stable=True).indices
    kept = np.zeros(len(best), bool)
    kept[best[:len(best) if method == "full" else math.ceil(share * len(best))]] = True
    return kept

# ---- Step 5: the report, a list of tables (title, how to read it, columns, {label: cells}). A cell
# is an estimate or a text. They are shown in the terminal and as a page.
def decomposition(scores, G, supports, weights):  # -> a table
    rows, context = {}, scores["context"]
    ratio = G["forward_kl"] / (scores["forward_kl"] + 1e-12)
    ratio = np.clip(ratio, *np.quantile(ratio, [0.01, 0.99]))  # winsorised: its left tail is heavy
    for name, outcome in (G | {"forward_kl, relative": ratio}).items():
        for k in supports:
            f = features(scores, k)
            slopes, r2 = ols([f[x] for x in REGRESSORS], outcome, context, weights)
            _, baseline = ols([f[x] for x in BASELINE], outcome, context, weights)
            learn, incompat = slopes[:, 1], slopes[:, 2]
            rows[f"{name}, K={k}"] = [*map(estimate, (learn, incompat, learn - incompat)),
                                      f"{r2[0]:.3f}", f"{baseline[0]:.3f}"]
    return ("What explains G?", "Standard deviations that G rises with one more of each; gap above "
            "0: learnable disagreement is learned more. The paper, forward KL: D_learn 0.086 to "
            "0.087, D_incompat 0.043 to 0.045. R2, and R2 with D and H*D in their place.",
            ["D_learn", "D_incompat", "gap", "R2", "with D, H*D"], rows)

def inside_q3(scores, mean, supports, top_k):  # -> a table
    rows = {}
    for k in supports:
        f = features(scores, k)
        q3 = np.flatnonzero((f["H"] <= np.median(f["H"])) & (f["D"] >= np.median(f["D"])))
        def group(name, groups, which):  # [N]: 1 in that group of Q3 by `name`, else 0
            member = np.zeros(len(f["H"]))
            member[q3[quantile_group(f[name][q3], groups) == which]] = 1
            return member
        rows[f"K={k} top - bottom third of C"] = mean(group("C", 3, 2), group("C", 3, 0))
        if k == top_k:
            rows |= {f"K={k} {name} quartile {i + 1}": mean(group(name, 4, i))
                     for name in ("D_learn", "D_incompat") for i in range(4)}
    return ("Sure, and yet in disagreement (H below, D above the median)", "Mean G; top - bottom "
            "above 0: the more compatible positions gain more.", MEASURES, rows)

def tables(scores, G, args, decode):
    """All of the report: G explained, inside Q3, ranked, by matched budgets; what is kept."""
    weights = cluster_weights(args.contexts, args.bootstrap, args.seed)
    context, K, f = scores["context"], args.top_k, features(scores, args.top_k)
    def mean(member, other=None):  # mean G of the members, less that of the others
        draws = ([group_mean(g, m, context, weights) for m in (member, other) if m is not None]
                 for g in G.values())
        return [estimate(values[0] - sum(values[1:])) for values in draws]
    keep = lambda method, share: kept_by(method, scores, K, share, args.seed)
    kept = {method: scores["id"][keep(method, args.budget)].tolist() for method in opd.METHODS}
    return [
        decomposition(scores, G, args.supports, weights),
        inside_q3(scores, mean, args.supports, K),
        ("Rank correlation with G (Spearman)", "What orders positions by their gain? D is the raw "
         "disagreement.", MEASURES, {
             name: [estimate(spearman(f[name], g, context, weights)) for g in G.values()]
             for name in ("D", "D_learn", "D_incompat", "H", "TIP")}),
        ("Mean G of the positions that each method would keep", "At the same count for all.",
         MEASURES, {"100% full": mean(keep("full", 1))} | {
             f"{share:.0%} {method}": mean(keep(method, share))
             for share in (0.03, 0.05, 0.1) for method in opd.METHODS[1:]}),
        (f"What each method keeps at {args.budget:.0%}", "Its most frequent tokens, and their "
         "share.", ["tokens"], {method: [", ".join(
             f"{decode(token)!r} {count / len(ids):.0%}"
             for token, count in Counter(ids).most_common(5))] for method, ids in kept.items()})]

def as_text(tables):
    for title, reading, columns, rows in tables:
        yield f"\n{title}\n{reading}"
        for label, cells in {"": columns, **rows}.items():
            texts = [cell if isinstance(cell, str) else "{value:+.3f} [{low:+.2f}, {high:+.2f}]"
                     .format(**cell) for cell in cells]
            yield f"  {label:24}" + "".join(map("{:>24}".format, texts[:3])) + "  ".join(
                ["", *texts[3:]])

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

def bar(cell, low, width):  # an estimate on the scale of its column, with whiskers
    zero, value, left, right = (
        100 * (x - low) / width for x in (0, cell["value"], cell["low"], cell["high"]))
    return (f'<td><svg viewBox="0 0 100 10" preserveAspectRatio="none"><rect y="2" height="6" '
            f'x="{min(zero, value):.2f}" width="{abs(value - zero):.2f}"/><line y1="5" y2="5" '
            f'x1="{left:.2f}" x2="{right:.2f}"/><line x1="{zero:.2f}" x2="{zero:.2f}" y1="0" '
            f'y2="10"/></svg> {cell["value"]:+.3f} <span class="faint">{cell["low"]:+.3f} to '
            f'{cell["high"]:+.3f}</span>')

def as_page(tables, summary, contexts):
    """One self-contained page: no script, and nothing is loaded from elsewhere."""
    parts = []
    for title, reading, columns, rows in tables:
        shown = []
        for column in zip(*rows.values()):
            ends = [0] + [c[end] for c in column if isinstance(c, dict) for end in ("low", "high")]
            scale = min(ends), max(max(ends) - min(ends), 1e-9)
            shown.append([bar(c, *scale) if isinstance(c, dict) else f"<td>{html.escape(c)}"
                          for c in column])
        parts += [f"<h2>{html.escape(title)}</h2><p>{html.escape(reading)}<table><tr><td>",
                  *(f"<td>{html.escape(name)}" for name in columns),
                  *(f"<tr><td>{html.escape(label)}{''.join(cells)}"
                    for label, cells in zip(rows, zip(*shown))), "</table>"]
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>What was learned?</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style>
<h1>Which disagreement was learned?</h1>
<p>A student wrote these responses; its teacher disagrees at many of their tokens. <b>Learnable</b>
disagreement reweights tokens that the student already considers; <b>incompatible</b> disagreement
wants tokens that it does not. G is how much nearer to the teacher a position came through training:
the fall of KL(teacher || student) or KL(student || teacher) in nats, or the rise of the overlap of
both distributions. {html.escape(summary)} Whiskers: 95 % cluster bootstrap over contexts.
<h2>Token map</h2><p><span class="t" style="--a:.9;--b:0">learnable</span> <span class="t"
style="--a:0;--b:.9">incompatible</span> <span class="t" style="--a:.4;--b:.4">some of both</span>,
stronger for more; prompts are grey, \u00b7 a space, \u21b5 a newline. Point at a token, or tap it.
{token_map(contexts)}
{"".join(parts)}</html>"""

def token_rows(scores, firsts, G, top_k, decode):  # -> a row of token_map for each position
    f = features(scores, top_k)
    for n, token in enumerate(map(decode, scores["id"].tolist())):
        tip = f"{token!r}   H {scores['H'][n]:.2f}   D {scores[f'D{top_k}'][n]:.2f}   "
        tip += f"C {scores[f'C{top_k}'][n]:.2f}   G "
        tip += ", ".join(f"{name} {g[n]:+.3f}" for name, g in G.items())
        for who, top in zip(("student", "teacher"), firsts):
            tip += f"\n{who}: " + "  ".join(repr(decode(i)) for i in top[n].tolist())
        yield token, f["D_learn"][n], f["D_incompat"][n], tip

def report(pair, batches, scores, firsts, G, args, note, out):
    """The tables to the terminal; with the token map and every position, to files in `out`."""
    decode = pair.tokenizer.decode
    rows = list(token_rows(scores, firsts, G, args.top_k, decode))
    prompts = [decode(ids[:-batch.mask.shape[1]][mask[:-batch.mask.shape[1]] == 1])
               for batch in batches for ids, mask in zip(batch.ids, batch.attention)][:12]
    contexts = [(prompt, [row for row, at in zip(rows, scores["context"]) if at == context])
                for context, prompt in enumerate(prompts)]
    columns = scores | {f"gain_{name}": g for name, g in G.items()}
    lines = (json.dumps({"token": row[0]} | {name: z[n].item() for name, z in columns.items()})
             for n, row in enumerate(rows))
    summary, parts = f"{args.contexts} contexts, {len(rows)} positions. {note}", tables(
        scores, G, args, decode)
    whole = {"summary": summary, "tables": parts, "args": vars(args),
             "versions": {m.__name__: m.__version__ for m in (torch, opd.transformers, np)}}
    print(summary, *as_text(parts), sep="\n")
    for name, text in {"positions.jsonl": "\n".join(lines) + "\n",
                       "report.json": json.dumps(whole),
                       "report.html": as_page(parts, summary, contexts)}.items():
        (out / f"{name}.partial").write_text(text, encoding="utf-8")
        (out / f"{name}.partial").rename(out / name)  # never half a report
    print(f"\nreport.html, report.json and positions.jsonl are in {out}")

# ---- The program.
def compare(runs):
    """Markdown: held-out results of finished runs of opd.py, mean ± sample deviation over seeds,
    and differences of the first, paired by seed, from full OPD and from random."""
    cells, missing = defaultdict(dict), []  # {(budget, method): {seed: values}}
    for run in runs:
        try:
            summary = json.loads((Path(run) / "summary.json").read_text())
            args, known = summary["args"], summary["after"]
            keys = [key for key in ("accuracy", "reverse_kl", "agreement") if key in known]
            cell = 1 if args["select"] == "full" else args["budget"], args["select"]
            for place, when in ((cell, "after"), ((0, "before training"), "before")):
                cells[place][args["seed"]] = [summary[when][key] for key in keys]
        except (OSError, ValueError, KeyError):
            missing.append(run)
    def show(values, sign=""):
        spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
        return f"{np.mean(values):{sign}.3f}{spread}" if values else "-"
    if cells:
        columns = ["method", "budget", "seeds", *keys, f"{keys[0]} - full", f"{keys[0]} - random"]
        print("|", " | ".join(columns), "|\n" + "|---" * len(columns) + "|")
    for (budget, method), seeds in sorted(cells.items()):
        row = [show(column) for column in zip(*seeds.values())]
        for other in (cells.get((1, "full"), {}), cells.get((budget, "random"), {})):
            row.append(show([values[0] - other[seed][0] for seed, values in seeds.items()
                             if seed in other], "+"))
        print(f"| {method} | {budget:.0%} | {len(seeds)} |", " | ".join(row), "|")
    if missing:
        print("\nnot finished:", *missing)

def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--contexts", type=int, default=300, help="responses to freeze and measure")
    add("--after", help="a trained version of --student (default: train one now)")
    add("--bootstrap", type=int, default=1000, help="resamples behind each interval")
    add("--compare", nargs="+", metavar="RUN", help="only tabulate these finished runs of opd.py")
    args = opd.parse_args(["--select", "full", *(sys.argv[1:] if argv is None else argv)], parser)
    if args.contexts < 5 or args.resume:
        opd.fail("--contexts must be 5 or more; --resume is opd.py's, whose student --after takes")
    if not args.after:
        args.eval_prompts = max(args.eval_prompts, args.contexts)
    args.supports = sorted({8, 16, 32, args.top_k})
    return args

def load_after(pair, args):  # -> the pair with the trained student
    student, tokenizer, _ = opd.load_model("--after", args.after, torch.float32, args.device)
    shapes = [[w.shape for w in model.parameters()] for model in (student, pair.student)]
    if shapes[0] != shapes[1] or tokenizer.get_vocab() != pair.tokenizer.get_vocab():
        opd.fail(f"--after {args.after} has another tokenizer or other shapes than --student")
    return pair._replace(student=student)

def main(argv=None):
    """Steps 1 to 5 of the docstring at the top."""
    args = parse_args(argv)
    if args.compare:
        return compare(args.compare)
    pair, training, held_out = opd.prepare(args)
    later = load_after(pair, args) if args.after else pair  # that one is trained in place
    out = opd.new_folder(args.out, "diagnosis")
    batches = freeze(pair, held_out, args)
    scores, firsts = before(pair, batches, args)
    if not args.after:
        opd.train(pair, training, args, out)
    G = gains(later, batches, scores, args)
    note = f"{len(held_out)} held-out prompts" + ", some repeated" * (len(held_out) < args.contexts)
    if not G["forward_kl"].any():
        note += "; G is 0 everywhere: this student has not changed"
    report(pair, batches, scores, firsts, G, args, note + ".", out)

if __name__ == "__main__":
    opd.run(main)
