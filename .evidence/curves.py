"""The README's figure: reverse KL over the training steps, and right answers.

Five ways to select a tenth (or all) of the tokens of the demo's pair, five seeds each,
from runs/evidence. Needs matplotlib. Writes .figures/curves.svg.

    python .evidence/curves.py
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np

RUNS = {  # label, folder's beginning, colour
    "all tokens": ("full-1", "#000000"),
    "teachability 10 %": ("teachability-0.1", "#0072b2"),
    "random 10 %": ("random-0.1", "#999999"),
    "entropy 10 %": ("entropy-0.1", "#009e73"),
    "divergence 10 %": ("divergence-0.1", "#d55e00"),
}
SMOOTHED_OVER = 9  # steps

plt.rcParams.update({"font.size": 11, "svg.hashsalt": "opd", "figure.facecolor": "w"})
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), width_ratios=(3, 2))

accuracies_before = {}  # by seed: the same for all methods
for number, (label, (beginning, colour)) in enumerate(RUNS.items()):
    curves = []
    accuracies = []
    for path in sorted(Path("runs/evidence").glob(f"{beginning}-?/summary.json")):
        lines = (path.parent / "log.jsonl").read_text().splitlines()
        kl = np.array([json.loads(line)["kl_all"] for line in lines])
        window = np.ones(SMOOTHED_OVER)
        steps_in_window = np.convolve(np.ones(len(kl)), window, "same")
        curves.append(np.convolve(kl, window, "same") / steps_in_window)
        summary = json.loads(path.read_text())
        accuracies.append(summary["after"]["accuracy"])
        accuracies_before[path.parent.name[-1]] = summary["before"]["accuracy"]

    curves = np.array(curves)
    mean = curves.mean(0)
    spread = curves.std(0, ddof=1)
    steps = np.arange(len(mean))
    left.plot(steps, mean, color=colour, label=label)
    left.fill_between(
        steps, mean - spread, mean + spread, color=colour, alpha=0.15, lw=0
    )

    right.bar(number, np.mean(accuracies), color=colour, alpha=0.35)
    right.plot([number] * len(accuracies), accuracies, "o", color=colour, ms=4)

left.set_yscale("log")
ticks = (0.2, 0.5, 1, 2, 5)
left.set_yticks(ticks, ticks)
left.minorticks_off()
left.set_xlabel("training step")
left.set_ylabel("kl_all, in nats")
left.legend(frameon=False, fontsize=10)
before = np.mean(list(accuracies_before.values()))
right.axhline(before, color="black", lw=1, ls=":")
right.text(4.45, before + 0.01, "before", ha="right", fontsize=10)
right.set_xticks(range(len(RUNS)), RUNS, rotation=30, ha="right")
right.set_ylabel("share of right answers")
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
figure.savefig(".figures/curves.svg", metadata={"Date": None})
