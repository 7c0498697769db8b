"""Held-out results of finished runs of opd.py, as a Markdown table:

    python .evidence/compare.py runs/evidence/*

A row is one setting: the mean ± sample deviation over its seeds. Two runs stand in one
row only if all their flags agree, but for those in FREE. Flags that differ between rows
have a column. Differences from full OPD, and from random selection at the same budget,
are paired by seed, and only between runs whose other flags are the same. They are in
accuracy where there are answers, else in reverse KL.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

# Flags that may differ within a setting: the seed is what we average over, and the
# others do not change what is trained.
FREE = ("seed", "out", "device", "save_every", "resume", "micro_batch_size")
RESULTS = ("accuracy", "reverse_kl", "agreement")


def read_run(folder):  # -> a dict, or None if the run is not finished
    path = Path(folder) / "summary.json"
    if not path.exists():
        return None
    summary = json.loads(path.read_text())  # complete: opd.py renames it into place

    settings = {}
    for name, value in summary["args"].items():
        if name not in FREE:
            settings[name] = value
    if settings["select"] == "full":
        settings["budget"] = 1  # whatever --budget said, all were kept
    return {
        "folder": folder,
        "seed": summary["args"]["seed"],
        "settings": settings,
        "before": summary["before"],
        "after": summary["after"],
    }


def key_of(settings, **changes):  # equal settings have equal keys
    return json.dumps({**settings, **changes}, sort_keys=True)


def group_runs(runs):  # -> {key of the settings: {seed: run}}
    groups = defaultdict(dict)
    for run in runs:
        group = groups[key_of(run["settings"])]
        if run["seed"] in group:
            other = group[run["seed"]]
            sys.exit(
                f"error: {other['folder']} and {run['folder']} have the same settings "
                "and seed; name one of them"
            )
        group[run["seed"]] = run
    return groups


def differing_flags(runs):  # -> names of flags that are not the same in all runs
    names = []
    for run in runs:
        for name in run["settings"]:
            if name not in names and name not in ("select", "budget"):
                names.append(name)

    differing = []
    for name in names:
        values = {json.dumps(run["settings"].get(name)) for run in runs}
        if len(values) > 1:
            differing.append(name)
    return differing


def show(values, sign=""):  # numbers, one a seed -> text
    if not values:
        return "-"
    text = f"{np.mean(values):{sign}.3f}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1):.3f}"
    return text


def results(group, when):  # {seed: run}, "before" or "after" -> {result: its text}
    texts = {}
    for name in RESULTS:
        values = []
        for run in group.values():
            if name in run[when]:
                values.append(run[when][name])
        texts[name] = show(values)
    return texts


def measure_of(*groups):  # -> what differences between these groups are taken of
    for group in groups:
        for run in group.values():
            if "accuracy" not in run["after"]:
                return "reverse_kl"
    return "accuracy"


def difference(group, when, baseline, measure):  # {seed: run} twice -> text
    values = []
    for seed, run in group.items():
        if seed in baseline:
            other = baseline[seed]["after"]
            values.append(run[when][measure] - other[measure])

    text = show(values, "+")
    if 0 < len(values) < len(group):
        text += f" ({len(values)} of {len(group)} seeds)"
    return text


def make_row(group, when, groups, differing):  # -> {column: text}
    settings = next(iter(group.values()))["settings"]
    full = groups.get(key_of(settings, select="full", budget=1), {})
    random = groups.get(key_of(settings, select="random"), {})

    row = {
        "method": settings["select"],
        "budget": f"{settings['budget']:.0%}",
        "seeds": str(len(group)),
    }
    if when == "before":
        row["method"] = "before training"
        row["budget"] = "-"
        random = {}  # it would depend on a budget
    if differing:
        flags = [f"{name} {settings.get(name)}" for name in differing]
        row["other flags"] = ", ".join(flags)
    row.update(results(group, when))
    measure = measure_of(group, full, random)
    row["compared in"] = measure
    row["- full"] = difference(group, when, full, measure)
    row["- random"] = difference(group, when, random, measure)
    return row


def before_training(runs):  # -> {key without method and budget: {seed: run}}
    """One run for each seed, as method and budget do not matter before training."""
    groups = defaultdict(dict)
    for run in runs:
        key = key_of(run["settings"], select=None, budget=None)
        groups[key].setdefault(run["seed"], run)
    return groups


def order(group):  # rows by other flags, then budget, then method
    settings = next(iter(group.values()))["settings"]
    others = key_of(settings, select=None, budget=None)
    return others, settings["budget"], settings["select"]


def main(folders):
    runs = []
    unfinished = []
    for folder in folders:
        run = read_run(folder)
        if run is None:
            unfinished.append(folder)
        else:
            runs.append(run)

    groups = group_runs(runs)
    differing = differing_flags(runs)
    rows = []
    for group in before_training(runs).values():
        rows.append(make_row(group, "before", groups, differing))
    for group in sorted(groups.values(), key=order):
        rows.append(make_row(group, "after", groups, differing))

    if rows:
        columns = list(rows[0])
        print(f"| {' | '.join(columns)} |")
        print("|---" * len(columns) + "|")
    for row in rows:
        print(f"| {' | '.join(row.values())} |")
    if unfinished:
        print()
        print("not finished:", ", ".join(unfinished))


if __name__ == "__main__":
    main(sys.argv[1:])
