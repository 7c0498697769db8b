"""What does each regressor add to the predicted gain in reverse KL, at which tokens?

    python diagnose.py && python .evidence/weights.py runs/diagnosis-1

Reads positions.jsonl of a diagnosis of the demo's pair. A cell is a mean over all tokens of
a kind, in standard deviations of the gain: what a regressor adds there (its slope times
its z-score), their sum, which is what the regression predicts, and the real gain.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, ".")
import diagnose
import opd
import tables

before, gains = tables.read_positions(Path(sys.argv[1]))
z = diagnose.make_data(before, gains, k=16, seed=0).standardized
slopes = diagnose.least_squares(z, diagnose.REGRESSORS, ["reverse_kl"])["reverse_kl"]

tokenizer = opd.transformers.AutoTokenizer.from_pretrained(opd.DEMO["student"])
texts = np.array([tokenizer.decode(token).strip() for token in before["token"]])
kinds = {
    "gets": texts == "gets",
    "names": np.isin(texts, ["Ada", "Ben", "Cleo", "Dan"]),
    "hours": np.char.isdigit(texts),
}
kinds["others"] = ~np.logical_or.reduce(list(kinds.values()))

print(
    f"{'':8}" + "".join(f"{name:>17}" for name in (*slopes, "predicted", "real gain"))
)
print(f"{'slope':8}" + "".join(f"{slope:+17.2f}" for slope in slopes.values()))
for kind, these in kinds.items():
    parts = [slopes[name] * z[name][these].mean() for name in slopes]
    numbers = [*parts, sum(parts), z["reverse_kl"][these].mean()]
    print(f"{kind:8}" + "".join(f"{number:+17.2f}" for number in numbers))
