"""The command line knows every task, every column that a task reads, and every setting of its own."""

from lorakit.cli.common import COLUMNS, FORMS, TASK_WORDS
from lorakit.cli.fit import _CHOICES
from lorakit.tasks.task import TASKS


def test_every_task_is_explained_and_its_columns_have_flags():
    assert set(TASK_WORDS) == set(TASKS.names())
    assert {column for name in TASKS.names() for column in TASKS[name].columns} == {*COLUMNS, *FORMS}


def test_every_choice_of_a_task_has_a_flag_and_a_default_in_its_note():
    assert {choice for name in TASKS.names() for choice in TASKS[name].choices} == {
        flag.replace("-", "_") for flag in _CHOICES
    }
    for name in TASKS.names():
        assert {*TASKS[name].choices} <= {*TASKS[name].__dataclass_fields__}
