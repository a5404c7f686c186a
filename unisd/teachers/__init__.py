"""Teachers: the model itself, under weights that depend on the settings (docs/training.md, "Teachers").

A teacher scores every view (teacher, auxiliary and negative contexts). `Teacher.scoring(model)` yields the module to
run, in eval mode and without gradients, and puts everything back when it is left, by an exception too. Teachers that
borrow the student's module (all but the copies in `full`) must run before the student's forward pass: its autograd
graph would refer to weights that are swapped underneath it.
"""

from unisd.teachers.base import EMATeacher, SelfTeacher, Teacher, trained_parameters
from unisd.teachers.checkpoint import STATE_FILE, STATE_FOLDER, Average, is_sharded_average, load_teacher, save_teacher
from unisd.teachers.export import put_average, read_average
from unisd.teachers.full import BaseTeacher, FullEMATeacher
from unisd.teachers.lora import AdapterEMATeacher, MergedEMATeacher
from unisd.teachers.make import make_teacher, teacher_of_run
from unisd.teachers.sharded import ShardedBaseTeacher, ShardedEMATeacher
from unisd.teachers.updates import TeacherUpdates

__all__ = [
    "STATE_FILE",
    "STATE_FOLDER",
    "AdapterEMATeacher",
    "Average",
    "BaseTeacher",
    "EMATeacher",
    "FullEMATeacher",
    "MergedEMATeacher",
    "SelfTeacher",
    "ShardedBaseTeacher",
    "ShardedEMATeacher",
    "Teacher",
    "TeacherUpdates",
    "is_sharded_average",
    "load_teacher",
    "make_teacher",
    "put_average",
    "read_average",
    "save_teacher",
    "teacher_of_run",
    "trained_parameters",
]
