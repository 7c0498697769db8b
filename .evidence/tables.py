"""The diagnostic's tables in section 4 of the README: mean ± sample deviation over the diagnoses whose
folders are named, and in how many the interval lies above and below 0. From the project's folder:

    python .evidence/tables.py runs/diagnoses/*
"""

import json, sys
from pathlib import Path
import numpy as np

sys.path.insert(0, ".")
import diagnose


def shown(cells):  # one estimate of every diagnosis
    values = [cell["value"] for cell in cells]
    above, below = sum(cell["low"] > 0 for cell in cells), sum(
        cell["high"] < 0 for cell in cells
    )
    spread = np.std(values, ddof=1) if len(values) > 1 else 0
    return f"{np.mean(values):+.3f} ± {spread:.3f} {above}/{below}"


def show(title, columns, rows):
    print(f"\n{title}\n{'':28}" + "".join(f"{name:>24}" for name in columns))
    for label, cells in rows.items():
        print(f"{label:28}" + "".join(f"{cell:>24}" for cell in cells))


def regression(
    folder, without=None, k=16
):  # -> estimates: the slope of each regressor, and the gap
    """The decomposition in reverse KL once more, from positions.jsonl, perhaps without a regressor."""
    lines = [json.loads(line) for line in open(folder / "positions.jsonl")]
    scores = {name: np.array([line[name] for line in lines]) for name in lines[0]}
    weights = diagnose.cluster_weights(scores["context"].max() + 1, 1000, seed=0)
    f, names = diagnose.features(scores, k), [
        x for x in diagnose.REGRESSORS if x != without
    ]
    slopes, _ = diagnose.ols(
        [f[name] for name in names],
        scores["gain_reverse_kl"],
        scores["context"],
        weights,
    )
    slope = dict(zip(names, slopes.T))
    gap = slope["D_learn"] - slope["D_incompat"]
    return {
        name: diagnose.estimate(draws) for name, draws in (slope | {"gap": gap}).items()
    }


folders = [Path(folder) for folder in sys.argv[1:]]
reports = [
    json.loads((folder / "report.json").read_text())["tables"] for folder in folders
]
for same in list(zip(*reports))[:-1]:  # the last one holds texts
    title, _, columns, rows = same[0]
    show(
        title,
        columns,
        {
            label: [
                shown(cells)
                for cells in zip(*(table[3][label] for table in same))
                if isinstance(cells[0], dict)
            ]
            for label in rows
        },
    )
for without in (None, "H_teacher"):
    found = [regression(folder, without) for folder in folders]
    show(
        f"Slopes in reverse KL, K = 16, without: {without}",
        found[0],
        {"": [shown([slopes[name] for slopes in found]) for name in found[0]]},
    )
