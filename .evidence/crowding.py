"""Why does --select divergence destroy the demo's student, and teachability does not?

Of what divergence keeps, 85 % are the word "gets". So a part of what it keeps is trained
on, in place of all:

    divergence    all that it keeps
    gets          "gets" alone
    others        all but "gets"
    company       all but "gets", and as many other tokens, by chance, as there were "gets"
    no-gets       all that it keeps if it may not keep "gets": a tenth of other tokens
    sgd           all that it keeps, with plain gradient descent in place of AdamW
    sgd-teachable the same for what teachability keeps
    largest-loss  not divergence: a tenth by the loss itself, the reverse KL
    largest-gradient  a tenth by the norm of the loss's gradient on the logits

From the project's folder:

    python .evidence/crowding.py others 0      # seed 0, into runs/crowding/others-0
    python .evidence/crowding.py               # a table of all finished runs
"""

import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, ".")
import opd

FOLDER = Path("runs/crowding")
VARIANTS = (
    "divergence",
    "gets",
    "others",
    "company",
    "no-gets",
    "sgd",
    "sgd-teachable",
    "largest-loss",
    "largest-gradient",
)


def train(variant, seed):
    opd.check_demo()
    tokenizer = opd.transformers.AutoTokenizer.from_pretrained(opd.DEMO["student"])
    gets = tokenizer.convert_tokens_to_ids("Ġgets")

    def measure_more(student_logits, teacher_logits, k, tokens):
        scores = opd.measure(student_logits, teacher_logits, k, tokens)
        scores["is_gets"] = (tokens == gets).float()
        logp = student_logits.log_softmax(-1)
        logq = teacher_logits.log_softmax(-1)
        gradient = logp.exp() * (logp - logq - scores["reverse_kl"][..., None])
        scores["gradient"] = gradient.norm(dim=-1)
        return scores

    def divergence_without_gets(scores, mask):
        D = opd.robust_normalize(scores["divergence"], mask)
        return D - 2 * scores["is_gets"]  # below all others

    def largest_loss(scores, mask):
        return scores["reverse_kl"]

    def largest_gradient(scores, mask):
        return scores["gradient"]

    def train_on(batch, keep):  # in place of what is kept
        is_gets = batch.responses == gets
        if variant == "gets":
            return keep & is_gets
        if variant == "others":
            return keep & ~is_gets
        if variant == "company":
            chance = torch.rand(keep.shape)
            chance[keep | is_gets | ~batch.mask] = -1
            number = (keep & is_gets).sum()
            company = torch.zeros_like(keep)
            company.view(-1)[chance.flatten().topk(number).indices] = True
            return (keep & ~is_gets) | company
        return keep

    update = opd.update

    def update_on(pair, optimizer, batch, teacher_hidden, keep, *settings):
        keep = train_on(batch, keep)
        if not keep.any():
            return 0.0, 0.0  # no update in this step
        return update(pair, optimizer, batch, teacher_hidden, keep, *settings)

    def sgd(parameters, lr, **adam_settings):
        return torch.optim.SGD(parameters, lr=lr)

    opd.update = update_on
    flags = {"select": "divergence", "seed": seed, "out": FOLDER / f"{variant}-{seed}"}
    method = None
    if variant == "no-gets":
        method = divergence_without_gets
    if variant == "largest-loss":
        method = largest_loss
    if variant == "largest-gradient":
        method = largest_gradient
    if variant.startswith("sgd"):
        torch.optim.AdamW = sgd
        flags["lr"] = 0.1
    if variant == "sgd-teachable":
        flags["select"] = "teachability"
    argv = []
    for name, value in flags.items():
        argv += [f"--{name}", str(value)]
    opd.main(opd.parse_args(argv), method, measure_more)


def show(variant):
    summaries = []
    for path in sorted(FOLDER.glob(f"{variant}-[0-9]/summary.json")):
        summaries.append(json.loads(path.read_text()))
    if not summaries:
        return
    cells = []
    for name in ("accuracy", "reverse_kl"):
        values = [summary["after"][name] for summary in summaries]
        spread = statistics.stdev(values) if len(values) > 1 else 0
        cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
    print(f"| {variant} | {len(summaries)} |", " | ".join(cells), "|")


def show_share_of_gets():  # of what largest-loss keeps, in the first and the last steps
    shares = {"first": [], "last": []}
    for path in sorted(FOLDER.glob("largest-loss-[0-9]/log.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        kept = [line["kept_is_gets"] for line in lines]
        shares["first"].append(statistics.mean(kept[:10]))
        shares["last"].append(statistics.mean(kept[-10:]))
    for name, values in shares.items():
        if values:
            share = statistics.mean(values)
            print(f'largest-loss keeps {share:.0%} "gets" in the {name} ten steps')


if len(sys.argv) == 3:
    opd.run(train, sys.argv[1], int(sys.argv[2]))
else:
    print("| trained on | seeds | right | reverse KL |")
    print("|---|---|---|---|")
    for variant in VARIANTS:
        show(variant)
    show_share_of_gets()
