"""Write opd.py as an assignment: ten functions are left to write.

python .evidence/assignment.py > my_opd.py
OPD=my_opd pytest -k mathematics

Their signatures and docstrings stay, their bodies go. The second command runs the tests
of these ten against my_opd.py; `-k mathematics_entropy` runs those that are named after one.
"""

import ast
from pathlib import Path

FUNCTIONS = (
    "entropy",
    "reverse_kl",
    "forward_kl",
    "divergence",
    "compatibility",
    "robust_normalize",
    "rank",
    "select",
    "token_loss",
    "update",
)


def assignment(source):
    lines = source.splitlines()
    for statement in reversed(ast.parse(source).body):  # from the end: numbers stay
        if isinstance(statement, ast.FunctionDef) and statement.name in FUNCTIONS:
            docstring = statement.body[0]
            task = f'    raise NotImplementedError("{statement.name}: yours to write")'
            lines[docstring.end_lineno : statement.end_lineno] = [task]
    return "\n".join(lines)


if __name__ == "__main__":
    print(assignment((Path(__file__).parent.parent / "opd.py").read_text()))
