"""The command line knows every task, every column that a task reads, and every setting of its own."""

from inspect import Parameter, signature
from pathlib import Path

import pytest

from lorakit.adapter import Adapter
from lorakit.cli.common import COLUMNS, FORMS, TASK_WORDS
from lorakit.cli.fit import _CHOICES
from lorakit.errors import UsageError
from lorakit.fit.use import predict
from lorakit.tasks.task import TASKS


def test_every_task_is_explained_and_its_columns_have_flags():
    assert set(TASK_WORDS) == set(TASKS.names())
    assert {column for name in TASKS.names() for column in TASKS[name].columns} == {*COLUMNS, *FORMS}


def test_a_table_may_have_a_column_for_every_argument_of_a_reader():
    for name in TASKS.names():
        source, answers, *more = signature(TASKS[name].read).parameters.values()
        assert (source.kind, answers.name) == (Parameter.POSITIONAL_ONLY, "answers")
        assert [one.kind for one in more] == [Parameter.VAR_KEYWORD]
        assert "answers" not in TASKS[name].columns


def test_one_text_by_itself_is_no_list_of_texts(tmp_path):
    file = tmp_path / "x.csv"
    file.write_text("text\nhello\n")
    for name in TASKS.names():
        run = Adapter({}, {}), object.__new__(TASKS[name])
        for alone in ("hello", b"hello", Path("hello"), {"text": "hello"}):
            with pytest.raises(UsageError, match="hello.* stands alone, and predict takes a list") as refused:
                predict(run, alone)
            assert "read(" not in str(refused.value)
        with pytest.raises(UsageError, match=rf"TASKS\['{name}'\].read\("):
            predict(run, str(file))


def test_every_choice_of_a_task_has_a_flag_and_a_default_in_its_note():
    assert {choice for name in TASKS.names() for choice in TASKS[name].choices} == {
        flag.replace("-", "_") for flag in _CHOICES
    }
    for name in TASKS.names():
        assert {*TASKS[name].choices} <= {*TASKS[name].__dataclass_fields__}
