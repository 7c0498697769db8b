"""The README's first picture: one response of a diagnosis, as the report draws it.

    python .evidence/token_map.py runs/diagnosis-1 16 > map.html    # the 17th context
    chromium --headless --screenshot=map.png --window-size=790,158 \\
        --force-device-scale-factor=2 map.html
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, ".")
import diagnose
import opd
import tables

PAGE = """<!doctype html><meta charset="utf-8"><style>{style}
body {{ padding: 0.5rem 1rem; }}</style>
<p>{legend} stronger for more</p>
{response}
"""


def main(folder, number):
    args = json.loads((folder / "report.json").read_text())["args"]
    prompts = []
    for line in Path(args["prompts"]).read_text().splitlines():
        prompts.append(json.loads(line)["prompt"])
    prompt = prompts[-args["eval_prompts"] :][number]
    tokenizer = opd.transformers.AutoTokenizer.from_pretrained(args["student"])

    before, gains = tables.read_positions(folder)
    before["context"] = np.where(before["context"] == number, 0, -1)  # the first, alone

    legend = [
        diagnose.token_span("learnable", 0.9, 0, ""),
        diagnose.token_span("incompatible", 0, 0.9, ""),
    ]
    response = diagnose.token_map(
        [tokenizer(prompt).input_ids], before, gains, args["top_k"], tokenizer.decode
    )
    print(PAGE.format(style=diagnose.STYLE, legend=" ".join(legend), response=response))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
