"""The diagnostic's tables in the README: mean ± sample deviation over diagnoses, and in
how many of them the interval lies above and below 0. From the project's folder:

    python .evidence/tables.py runs/diagnoses/*
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, ".")
import diagnose


def over_diagnoses(cells):  # one estimate of every diagnosis -> text
    values = [cell["value"] for cell in cells]
    above = sum(cell["low"] > 0 for cell in cells)
    below = sum(cell["high"] < 0 for cell in cells)
    spread = np.std(values, ddof=1) if len(values) > 1 else 0
    return f"{np.mean(values):+.3f} ± {spread:.3f} {above}/{below}"


def print_table(title, columns, rows):  # rows {label: [text]}
    print()
    print(title)
    print(" " * 34 + "".join(f"{name:>28}" for name in columns))
    for label, texts in rows.items():
        print(f"{label:34}" + "".join(f"{text:>28}" for text in texts))


def print_report_tables(folders):
    reports = []
    for folder in folders:
        text = (folder / "report.json").read_text()
        reports.append(json.loads(text))

    for number, table in enumerate(reports[0]["tables"]):
        first_row = next(iter(table["rows"].values()))
        if "tokens" in first_row:
            continue  # they have no mean
        rows = {}
        for label, cells in table["rows"].items():
            texts = []
            for column in cells:
                same = []
                for report in reports:
                    other = report["tables"][number]["rows"][label]
                    same.append(other[column])
                texts.append(over_diagnoses(same))
            rows[label] = texts
        print_table(table["title"], first_row, rows)


def read_positions(folder):  # -> what was measured before, and the gains: {name: [N]}
    lines = []
    for line in (folder / "positions.jsonl").read_text().splitlines():
        lines.append(json.loads(line))
    before = {}
    for name in lines[0]["before"]:
        before[name] = np.array([line["before"][name] for line in lines])
    gains = {}
    for name in lines[0]["gain"]:
        gains[name] = np.array([line["gain"][name] for line in lines])
    return before, gains


def regression(folder, without):  # -> {name: estimate} of the slopes, and of the gap
    """The decomposition in reverse KL at K = 16 again, perhaps without a regressor."""
    before, gains = read_positions(folder)
    data = diagnose.make_data(before, gains, k=16, seed=0)
    names = [name for name in diagnose.REGRESSORS if name != without]

    def make_tables(data):
        slopes = diagnose.least_squares(data.standardized, names, ["reverse_kl"])["reverse_kl"]
        gap = slopes["learnable"] - slopes["incompatible"]
        return {"slopes": {"reverse_kl": {**slopes, "gap": gap}}}

    tables = diagnose.bootstrap(make_tables, data, before["context"], 1000, seed=0)
    return tables["slopes"]["reverse_kl"]


def print_regressions(folders):
    for without in (None, "teacher_entropy"):
        found = [regression(folder, without) for folder in folders]
        rows = {}
        for name in found[0]:
            rows[name] = [over_diagnoses([slopes[name] for slopes in found])]
        title = "Slopes in reverse KL, K = 16"
        if without is not None:
            title += f", without {without}"
        print_table(title, ["slope"], rows)


def main(folders):
    print_report_tables(folders)
    print_regressions(folders)


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])
