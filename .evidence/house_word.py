"""How often trained students of the embedded pair say "obtains" where they say that or "gets", in one
sample for each held-out prompt: python .evidence/house_word.py runs/evidence/full-1-0/student
"""

import sys
import torch

sys.path.insert(0, ".")
import opd

opd.transformers.logging.disable_progress_bar()
for folder in sys.argv[1:]:
    pair = opd.load_pair(folder, opd.DEMO["teacher"])
    _, held_out = opd.prepare(opd.parse_args([]))[1:]
    torch.manual_seed(0)
    batch = opd.rollout(
        pair, [prompt for prompt, _ in held_out], opd.DEMO["max_new_tokens"]
    )
    words = pair.tokenizer.convert_tokens_to_ids(["Ġgets", "Ġobtains"])
    gets, obtains = ((opd.tokens(batch) == word).sum().item() for word in words)
    print(
        f"{folder}: {obtains} of {gets + obtains}, {obtains / max(gets + obtains, 1):.0%}"
    )
