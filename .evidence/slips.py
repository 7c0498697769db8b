"""Where the student has slipped, does its teacher still know the result of a sum?

    python diagnose.py --out runs/slips && python .evidence/slips.py runs/slips

Reads positions.jsonl of a diagnosis of the demo's pair. A sum counts as "after a slip"
once an earlier result in the same response was wrong.
"""

import json
import re
import sys
from collections import defaultdict
from pathlib import Path

from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("runs/pair/student")
responses = defaultdict(list)
for line in (Path(sys.argv[1]) / "positions.jsonl").open():
    position = json.loads(line)
    responses[position["before"]["context"]].append(position)

student_right = defaultdict(list)
teacher_right = defaultdict(list)
for positions in responses.values():
    place = "before any slip"
    text = ""
    for position in positions:
        addends = re.search(r"adds (\d+) to (\d+) and gets$", text)
        if addends:
            result = str((int(addends[1]) + int(addends[2]) - 1) % 24 + 1)
            said = position["text"].strip()
            first_choice = position["before"]["teacher_choice_1"]
            student_right[place].append(said == result)
            teacher_right[place].append(
                tokenizer.decode(first_choice).strip() == result
            )
            if said != result:
                place = "after a slip"
        text += position["text"]

print(f"{'':16}{'sums':>6}{'student':>9}{'teacher':>9}")
for place, right in student_right.items():
    count = len(right)
    share = sum(right) / count
    print(f"{place:16}{count:6}{share:9.3f}{sum(teacher_right[place]) / count:9.3f}")
