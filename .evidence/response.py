"""The response of the README's first picture in numbers, where both models disagree.

    python .evidence/response.py
"""

import sys

import torch

sys.path.insert(0, ".")
import opd

TEXT = (
    "A bus starts at 13 and returns every 8 hours: First Ada adds 8 to 13 and gets 21. "
    "Second Cleo adds 8 to 21 and gets 5. Third Dan adds 8 to 5 and gets 13. Fourth Ada "
    "adds 8 to 13 and gets 22. So it ends at 22."
)

pair = opd.load_pair("runs/pair/student", "runs/pair/teacher")
ids = pair.tokenizer(TEXT, return_tensors="pt").input_ids
prompt_length = 1 + ids[0].tolist().index(pair.tokenizer.convert_tokens_to_ids(":"))
with torch.no_grad():
    student_logits = pair.student(ids).logits[0, prompt_length - 1 : -1]
    teacher_logits = pair.teacher(ids).logits[0, prompt_length - 1 : -1]
p = student_logits.softmax(-1)
q = teacher_logits.softmax(-1)
scores = opd.measure(student_logits, teacher_logits, k=16)

print(f"{'token':10}{'D':>8}{'C':>8}{'loss':>8}   the teacher's choice, with q and p; p of the token")
for i, token in enumerate(ids[0, prompt_length:]):
    wanted = q[i].argmax()
    if scores["divergence"][i] > 1:
        print(
            f"{pair.tokenizer.decode(token):10}{scores['divergence'][i]:8.2f}"
            f"{scores['compatibility'][i]:8.3f}{scores['reverse_kl'][i]:8.2f}"
            f"   {pair.tokenizer.decode(wanted)}: {q[i, wanted]:.2f}, "
            f"{p[i, wanted]:.2g}; {p[i, token]:.2f}"
        )
