"""How a word that the student never says is learned after all: slowly, then at once.

The mean probability of "obtains" at the places of "gets", after each save of runs of the
demo, on responses that the student wrote before training. From the project's folder:

    python opd.py --select full --lr 1e-3 --save-every 10 --out runs/obtains-0
    python .evidence/obtains.py runs/obtains-0
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, ".")
import opd


@torch.no_grad()
def main(runs):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pair = opd.load_pair("runs/pair/student", "runs/pair/teacher")
    gets = pair.tokenizer.convert_tokens_to_ids("Ġgets")
    obtains = pair.tokenizer.convert_tokens_to_ids("Ġobtains")
    examples = opd.read_prompts("runs/pair/prompts.jsonl", pair, max_new_tokens=64)
    prompts = [example["prompt"] for example in examples[-96:]]
    batch = opd.rollout(pair, prompts, max_new_tokens=64)
    at = batch.mask & (batch.responses == gets)

    def show(step, student):
        hidden = opd.hidden_states(student, batch)[at]
        p = opd.next_token_logits(pair, student, hidden).softmax(-1)
        print(f"{step:6}  {p[:, obtains].mean():.1e}")

    for run in runs:
        print(run)
        show(0, pair.student)
        saves = Path(run).glob("step-*")
        for save in sorted(saves, key=lambda path: int(path.name[5:])):
            student, _ = opd.load_model("--student", save, torch.float32, "cpu")
            show(int(save.name[5:]), student)


if __name__ == "__main__":
    main(sys.argv[1:])
