"""The command line knows every task, and every column that a task reads."""

from lorakit.cli.common import COLUMNS, FORMS, TASK_WORDS
from lorakit.tasks.task import TASKS


def test_every_task_is_explained_and_its_columns_have_flags():
    assert set(TASK_WORDS) == set(TASKS.names())
    assert {column for name in TASKS.names() for column in TASKS[name].columns} == {*COLUMNS, *FORMS}
