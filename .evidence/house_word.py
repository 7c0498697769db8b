"""How often do trained students of the embedded pair write "obtains"?

One sample for each held-out prompt; counted where they say "obtains" or "gets".

    python .evidence/house_word.py runs/evidence/full-1-0/student
"""

import sys

import torch

sys.path.insert(0, ".")
import opd

opd.transformers.logging.disable_progress_bar()
args = opd.parse_args([])
_, _, held_out = opd.prepare(args)
prompts = [example["prompt"] for example in held_out]

for folder in sys.argv[1:]:
    pair = opd.load_pair(folder, args.teacher)
    torch.manual_seed(0)
    batch = opd.rollout(pair, prompts, args.max_new_tokens)
    written = batch.responses[batch.mask]
    gets = (written == pair.tokenizer.convert_tokens_to_ids("Ġgets")).sum().item()
    obtains = (written == pair.tokenizer.convert_tokens_to_ids("Ġobtains")).sum().item()
    share = obtains / max(gets + obtains, 1)
    print(f"{folder}: {obtains} of {gets + obtains}, {share:.0%}")
