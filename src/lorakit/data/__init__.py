"""Data: rows of every task from files, and batches of them. Every fault of a file is named with its row."""

from lorakit.data.dialogues import Dialogues, Turn, load_dialogues
from lorakit.data.documents import Documents, load_documents
from lorakit.data.label_sets import LabelSets, load_label_sets
from lorakit.data.questions import Questions, load_questions
from lorakit.data.rated import Rated, load_rated
from lorakit.data.rows import Part, Rows, Splits
from lorakit.data.sources import load_rows, load_splits
from lorakit.data.tagged import Tagged, load_tagged
from lorakit.data.translations import Translations, load_translations

__all__ = [
    "Dialogues",
    "Documents",
    "LabelSets",
    "Part",
    "Questions",
    "Rated",
    "Rows",
    "Splits",
    "Tagged",
    "Translations",
    "Turn",
    "load_dialogues",
    "load_documents",
    "load_label_sets",
    "load_questions",
    "load_rated",
    "load_rows",
    "load_splits",
    "load_tagged",
    "load_translations",
]
