"""Chat templates are rendered in a sandbox, with limits, and never see what people write."""

import sys
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mbq_export.errors import FormatError
from mbq_export.families import chat
from mbq_export.families.chat import skeleton
from tests.families.random_models import SAMPLE


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(SAMPLE)


EACH = "{% for m in messages %}[{{ m['role'] }}]{% for c in m['content'] %}{{ c.text }}{% endfor %}</s>{% endfor %}"


def test_seams_between_template_and_people_are_known(tokenizer: Any) -> None:
    template = EACH + "{% if add_generation_prompt %}[assistant]{% endif %}"
    form = skeleton(tokenizer, template, images=0, turns=1)
    pieces = form.fill([("hi", "hello")], "bye")
    assert [(piece.origin, piece.text) for piece in pieces] == [
        ("template", "[user]"),
        ("prompt", "hi"),
        ("template", "</s>[assistant]"),
        ("answer", "hello"),
        ("template", "</s>[user]"),
        ("prompt", "bye"),
        ("template", "</s>[assistant]"),
    ]
    assert (form.lead, form.ending) == ("", "</s>")


def test_lead_is_what_training_put_between_the_question_and_the_answer(tokenizer: Any) -> None:
    template = (SAMPLE / "chat_template.jinja").read_text()
    assert skeleton(tokenizer, template, images=1, turns=0).lead == " "


def test_template_code_never_sees_what_people_write(tokenizer: Any) -> None:
    template = EACH + "{{ messages[0].content[0].text | length }}"
    pieces = skeleton(tokenizer, template, images=0, turns=0).fill([], "{{ 7 * 7 }}" * 9)
    assert "{{ 7 * 7 }}" * 9 in [piece.text for piece in pieces]
    assert not any("49" in piece.text for piece in pieces)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "SecurityError"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ nothing.at.all }}", "UndefinedError"),
        ("{{ messages[0].content[0].text + 1 }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ raise_exception('no pictures') }}", "no pictures"),
        ("hello", "leaves out, repeats or reorders"),
        (EACH + EACH, "leaves out, repeats or reorders"),
        ("{{ 'x' * 2000000 }}", "wrote more than"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    ],
)
def test_template_that_cannot_be_used_is_refused_with_the_reason(
    tokenizer: Any, template: str, said: str
) -> None:
    with pytest.raises(FormatError) as caught:
        skeleton(tokenizer, template, images=0, turns=0)
    assert caught.value.code == "E4205"
    assert said in caught.value.message


@pytest.mark.parametrize("body", ["", "{{ 'x' }}", "{% set y = j %}"])
def test_template_that_never_ends_is_stopped(
    tokenizer: Any, body: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "LONGEST_S", 0.2)
    loops = (
        "{% for i in range(90000) %}{% for j in range(90000) %}" + body + "{% endfor %}{% endfor %}"
    )
    start = time.thread_time()
    with pytest.raises(FormatError, match=r"ran for more than 0\.2 s"):
        skeleton(tokenizer, loops, images=0, turns=0)
    assert time.thread_time() - start < 5


def test_trace_function_of_a_debugger_is_put_back(tokenizer: Any) -> None:
    def debugger(*_: object) -> None:
        return None

    before = sys.gettrace()
    sys.settrace(debugger)
    try:
        skeleton(tokenizer, EACH, images=0, turns=0)
        assert sys.gettrace() is debugger
    finally:
        sys.settrace(before)


def test_template_of_the_sample_reads_no_file(tokenizer: Any, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    with pytest.raises(FormatError, match="The chat template cannot be used"):
        skeleton(tokenizer, f"{{% include '{secret}' %}}", images=0, turns=0)
