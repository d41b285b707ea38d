"""Which tokens of a dialogue are answers: by hand, for templates of every sort, and the same when asked."""

import pytest
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lorakit.data import Dialogues, Turn
from lorakit.errors import DataError, LorakitError, UsageError
from lorakit.tasks.template import Template, Text, chosen_template, cut
from tiny_chat import CHATML, VOCABULARY, tokenizer

LLAMA = (  # as Llama 2: no generation prompt, refuses a system turn, ends by end-of-text
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn here') }}"
    "{% elif m.role == 'user' %}{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
THINKS = (  # as Qwen 3: only the last answer has thoughts before it
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ 'so\\n' }}{% endif %}{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
NO_MARK = (
    "{% for m in messages %}{{ '# ' + m.role + '\\n' + m.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '# assistant\\n' }}{% endif %}"
)
NO_SYSTEM = "{% for m in messages if m.role != 'system' %}{{ m.role + m.content + eos_token }}{% endfor %}"
NO_PREFIX = CHATML.replace("<|im_start|>assistant\\n' }}{% endif", "now speak' }}{% endif")
TEMPLATES = {"plain": "", "chatml": CHATML, "llama": LLAMA, "thinks": THINKS, "no mark": NO_MARK}


def one(*turns):
    return Dialogues((tuple(Turn(*turn) for turn in turns),), "data.jsonl", (7,))


ASKED = ("user", "sort rain and bread")
TWO = (ASKED, ("assistant", "weather then food"), ("user", "again"), ("assistant", "food"))


def words(ids):
    return [VOCABULARY[token] for token in ids]


def marked(text):
    """The tokens of a text, those to learn in brackets."""
    return " ".join(f"[{w}]" if k in text.learned else w for k, w in enumerate(words(text.ids))).replace("\n", "/")


def written(template, *turns, bos=False):
    (texts,) = Template(tokenizer(bos=bos), template).texts(one(*turns))
    return [marked(text) for text in texts]


def test_the_plain_template_is_what_the_documentation_says():
    assert written("", *TWO[:2]) == ["sort rain and bread / [weather] [then] [food] [</s>]"]
    assert written("", ("system", "be brief"), *TWO, bos=True) == [
        "<s> be brief / sort rain and bread / [weather] [then] [food] [</s>] again / [food] [</s>]"
    ]


def test_chatml_learns_the_answer_and_its_mark_and_not_the_line_break_behind():
    assert written(CHATML, *TWO[:2]) == [
        "<|im_start|> user / sort rain and bread <|im_end|> / <|im_start|> assistant / "
        "[weather] [then] [food] [<|im_end|>]"
    ]
    assert written(CHATML, ("system", "be brief"), *TWO) == [
        "<|im_start|> system / be brief <|im_end|> / <|im_start|> user / sort rain and bread <|im_end|> / "
        "<|im_start|> assistant / [weather] [then] [food] [<|im_end|>] / <|im_start|> user / again <|im_end|> / "
        "<|im_start|> assistant / [food] [<|im_end|>]"
    ]


def test_a_template_without_a_generation_prompt_and_with_end_of_text():
    assert written(LLAMA, *TWO) == [
        "<s> <unk> sort rain and bread <unk> [weather] [then] [food] [</s>] <s> <unk> again <unk> [food] [</s>]"
    ]


def test_answers_that_are_written_otherwise_when_they_are_last_become_texts_of_their_own():
    assert written(THINKS, *TWO) == [
        "<|im_start|> user / sort rain and bread <|im_end|> / <|im_start|> assistant / "
        "[so] [/] [weather] [then] [food] [<|im_end|>]",
        "<|im_start|> user / sort rain and bread <|im_end|> / <|im_start|> assistant / weather then food <|im_end|> / "
        "<|im_start|> user / again <|im_end|> / <|im_start|> assistant / [so] [/] [food] [<|im_end|>]",
    ]


def test_a_template_without_a_mark_gets_end_of_text_behind_the_last_answer():
    assert written(NO_MARK, *TWO) == [
        "<unk> user / sort rain and bread / <unk> assistant / [weather] [then] [food] [/] "
        "<unk> user / again / <unk> assistant / [food] [/] [</s>]"
    ]


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_is_asked_for_by_the_very_tokens_that_stood_before_it_in_training(name):
    template = Template(tokenizer(bos=True), TEMPLATES[name])
    for turns in (TWO[:2], TWO):
        data = one(*turns)
        text = template.texts(data)[0][-1]
        (question,) = template.questions(data.asked())
        assert question == text.ids[: text.answer]
        assert text.answer in text.learned
        assert text.ids[text.learned[-1]] in template.ends


def test_the_ends_are_the_mark_of_the_template_and_end_of_text():
    assert {words(sorted(Template(tokenizer(), t).ends)) == ["</s>"] for t in ("", LLAMA, NO_MARK)} == {True}
    assert words(sorted(Template(tokenizer(), CHATML).ends)) == ["</s>", "<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "turns", "parts"),
    [
        (LLAMA, (("system", "be"), *TWO), ["row 7", "no system turn here"]),
        (NO_SYSTEM, (("system", "be brief"), *TWO), ["row 7", "leaves out a part of turn 1 (system)", "plain"]),
        (NO_PREFIX, TWO, ["row 7", "does not write an answer behind", "--template plain"]),
        (CHATML.replace("message.content", "message.content.split()[0]"), TWO, ["leaves out a part of turn 1"]),
        ("{% broken", TWO, ["row 7", "refuses it"]),
    ],
)
def test_a_dialogue_that_the_template_does_not_write_whole_is_refused(template, turns, parts):
    with pytest.raises(DataError) as caught:
        Template(tokenizer(), template).texts(one(*turns))
    for part in ("data.jsonl", *parts):
        assert part in str(caught.value)


def test_an_earlier_answer_may_be_shortened_by_its_template():
    drops = CHATML.replace("message.content", "(message.content if loop.last or message.role == 'user' else 'so')")
    assert [text.split("assistant / ")[-1] for text in written(drops, *TWO)] == [
        "[weather] [then] [food] [<|im_end|>]",
        "[food] [<|im_end|>]",
    ]


def test_a_tokenizer_without_end_of_text_or_a_prompt_without_tokens_is_refused():
    endless = tokenizer()
    endless.eos_token = None
    with pytest.raises(LorakitError, match="no end-of-text token.*eos_token in its tokenizer_config"):
        Template(endless, "").texts(one(*TWO))
    silent = tokenizer()
    silent.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("sort\n", behavior="removed")
    with pytest.raises(DataError, match=r"row 7: nothing before its answer"):
        Template(silent, "").texts(one(("user", "sort"), ("assistant", "food")))


def test_the_template_is_the_bases_own_unless_plain_is_asked_for():
    assert chosen_template(tokenizer(CHATML), "auto") == CHATML
    assert chosen_template(tokenizer(CHATML), "plain") == ""
    assert chosen_template(tokenizer(), "auto") == ""
    with pytest.raises(UsageError, match="unknown template 'chatml'; use one of auto, plain"):
        chosen_template(tokenizer(), "chatml")


def byte_level():
    """A byte-level BPE, as GPT-2, Llama 3 and Qwen have it: no byte is lost."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(["def f(x):\n    return x\n", "sort the rain and the bread then again"] * 4, trainer)
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|end|>", additional_special_tokens=["<|im_start|>", "<|im_end|>"]
    )


@pytest.mark.parametrize("answer", [" return x\n", "def f(x):\n\treturn 'é 雨'\n\n", "\n", "  the rain"])
@pytest.mark.parametrize("template", ["", CHATML], ids=["plain", "chatml"])
def test_with_a_byte_level_tokenizer_the_learned_tokens_are_the_answer_to_the_byte(answer, template):
    fast = byte_level()
    (text,) = Template(fast, template).texts(
        one(("user", "write\n it "), ("assistant", "x"), ASKED, ("assistant", answer))
    )[0]
    last = [token for k, token in zip(text.learned, (text.ids[k] for k in text.learned)) if k >= text.answer]
    assert fast.decode(last) == answer + ("<|im_end|>" if template else "<|end|>")
    assert fast.decode(text.ids[: text.answer]).endswith("bread\n" if not template else "<|im_start|>assistant\n")


TEXT = Text(tuple(range(100, 120)), (*range(5, 8), *range(12, 20)), 12)  # 12 before the last answer, which has 8


@pytest.mark.parametrize("most", range(2, 21))
def test_a_cut_text_fits_begins_later_and_always_learns_something(most):
    for bos in (None, 100):
        found = cut(TEXT, most, bos)
        assert len(found.ids) == min(most, 20)
        assert found.answer >= 1
        assert found.answer in found.learned
        assert all(found.ids[place - 1] == found.ids[place] - 1 for place in found.learned), "a predecessor was cut"
        answer = found.ids[found.answer :]
        assert answer == tuple(range(112, 112 + len(answer)))
        assert len(answer) == 8 or len(answer) >= most * 3 // 4
        assert found.ids[0] == 100 if bos and most > 10 else True


def test_what_is_cut_first_is_the_beginning():
    assert cut(TEXT, 14) == Text(tuple(range(106, 120)), (1, *range(6, 14)), 6)
    assert cut(TEXT, 14, bos=100) == Text((100, *range(107, 120)), tuple(range(6, 14)), 6)
    assert cut(TEXT, 4) == Text((111, 112, 113, 114), (1, 2, 3), 1)
