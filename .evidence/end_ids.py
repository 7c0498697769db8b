"""What if student and teacher end their responses with different tokens?

The demo's teacher is changed in one thing: it ends with a token of its own, which the
student never uses. Then the student is trained, once with both ends scored as one event,
as opd.py does, and once with each end scored as the token that it is.

    python .evidence/end_ids.py build          # that teacher, in runs/ends/teacher
    python .evidence/end_ids.py together 0     # seed 0, into runs/ends/together-0
    python .evidence/end_ids.py apart 0
    python .evidence/end_ids.py                # a table of all finished runs
"""

import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, ".")
import opd

FOLDER = Path("runs/ends")
TEACHER = FOLDER / "teacher"
OTHER_END = "Ā"  # the byte 0: a token that no text of the demo contains


def build_teacher():
    pair = opd.load_pair(opd.DEMO["student"], opd.DEMO["teacher"])
    own_end = pair.tokenizer.eos_token_id
    other_end = pair.tokenizer.convert_tokens_to_ids(OTHER_END)

    rows = pair.teacher.get_output_embeddings().weight.data
    rows[[own_end, other_end]] = rows[[other_end, own_end]]
    pair.teacher.generation_config.eos_token_id = other_end
    pair.teacher.save_pretrained(TEACHER)
    pair.tokenizer.save_pretrained(TEACHER)


def logits_with_ends_apart(pair, model, hidden):  # in place of opd.next_token_logits
    logits = model.get_output_embeddings()(hidden)
    return logits[:, : pair.vocab_size].float() / pair.temperature


def train(how, seed):
    if how == "apart":
        opd.next_token_logits = logits_with_ends_apart
    flags = {**opd.DEMO, "teacher": TEACHER, "select": "full", "seed": seed}
    flags["out"] = FOLDER / f"{how}-{seed}"
    argv = []
    for name, value in flags.items():
        argv += ["--" + name.replace("_", "-"), str(value)]
    opd.main(opd.parse_args(argv))


def show(how):
    summaries = []
    for path in sorted(FOLDER.glob(f"{how}-*/summary.json")):
        summaries.append(json.loads(path.read_text()))
    for when in ("before", "after"):
        cells = []
        for name in ("accuracy", "mean_length", "truncated", "reverse_kl"):
            values = [summary[when][name] for summary in summaries]
            spread = statistics.stdev(values) if len(values) > 1 else 0
            cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
        print(f"| {how}, {when} | {len(summaries)} |", " | ".join(cells), "|")


if len(sys.argv) == 3:
    opd.run(train, sys.argv[1], int(sys.argv[2]))
elif sys.argv[1:] == ["build"]:
    if not TEACHER.exists():
        opd.run(build_teacher)
else:
    print("| ends scored | seeds | right | length | cut off | reverse KL |")
    print("|---|---|---|---|---|---|")
    show("apart")
    show("together")
