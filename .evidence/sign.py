"""Why C after training turns the sign: C at the word "gets", before and after.

    python .evidence/sign.py runs/diagnoses/*

Reads positions.jsonl of diagnoses of the demo's pair. Means over all places with "gets".
"""

import json
import sys
from pathlib import Path
from statistics import mean

K = (16, 32)
head = "".join(f"{f'C before, K={k}':>16}{f'C after, K={k}':>16}" for k in K)
print(f"{'':20}{head}{'forward KL':>12}{'reverse KL':>12}")
for folder in sys.argv[1:]:
    places = []
    for line in (Path(folder) / "positions.jsonl").open():
        position = json.loads(line)
        if position["text"] == " gets":
            places.append(position)

    row = f"{folder[-20:]:20}"
    for k in K:
        for when in ("before", "after"):
            row += f"{mean(p[when][f'compatibility_{k}'] for p in places):16.3f}"
    for measure in ("forward_kl", "reverse_kl"):
        row += f"{mean(p['gain'][measure] for p in places):+12.3f}"
    print(row)
