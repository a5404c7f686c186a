"""Kinds of task: what a row of each kind is, how its views are written, what a wrong answer to it must satisfy.

base.py              `Example`, `Task`, `Rejected`: the interface
rejected.py          the refusal of a row or of a reply
columns.py           which column is what, and of which kind rows are
open_answer.py       any question with an answer in words
multiple_choice.py   ScienceQA, CoS-E, GPQA, rows with choices
code.py              MBPP, HumanEval, rows with tests
tools.py             ToolAlpaca
views.py             the texts of every view, around any task
instructions.py      induced instructions: what is asked for, what is accepted
text.py              reading of what models write
reading.py           from raw rows to examples, with a count of what was dropped
"""

from unisd.tasks.base import Example, Rejected, Task
from unisd.tasks.columns import Columns, kind_of
from unisd.tasks.reading import KINDS, Reading, make_task, read_rows

__all__ = ["KINDS", "Columns", "Example", "Reading", "Rejected", "Task", "kind_of", "make_task", "read_rows"]
