"""Templates: what they write, and that their Jinja form writes the same."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jinja2 import Environment
from jinja2.sandbox import ImmutableSandboxedEnvironment

from deadpan.data.records import Turn
from deadpan.errors import DeadpanError
from deadpan.processing.processor import Processor, load_processor
from deadpan.processing.template import (
    IMAGE_END,
    IMAGE_START,
    IMAGE_TOKEN,
    TEMPLATES,
    Piece,
    Template,
    named,
    recognise,
)
from make_tiny_model import make_official

BRACKETED = IMAGE_START + IMAGE_TOKEN + IMAGE_END
SYSTEM_2 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。"
)
SYSTEM_2_5 = (
    "你是书生·万象，英文名是InternVL，"
    "是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
ONE = [Turn("human", "q1"), Turn("gpt", "a1")]
OPEN = [*ONE, Turn("human", "q2")]

WRITTEN = {
    "internlm2-chat": (
        f"<|im_start|>system\n{SYSTEM_2}<|im_end|><|im_start|>user\nq1<|im_end|>"
        "<|im_start|>assistant\na1<|im_end|>",
        "<|im_start|>user\nq2<|im_end|><|im_start|>assistant\n",
    ),
    "internvl2_5": (
        f"<|im_start|>system\n{SYSTEM_2_5}<|im_end|>\n<|im_start|>user\nq1<|im_end|>\n"
        "<|im_start|>assistant\na1<|im_end|>\n",
        "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n",
    ),
    "phi3-chat": (
        f"<|system|>\n{SYSTEM_2}<|end|><|user|>\nq1<|end|><|assistant|>\na1<|end|>",
        "<|user|>\nq2<|end|><|assistant|>\n",
    ),
}
WRITTEN["Hermes-2"] = WRITTEN["internlm2-chat"]
"""For each template: a closed conversation, and what another question adds."""

EVERY = pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)


def text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_every_template_is_tested() -> None:
    assert WRITTEN.keys() == TEMPLATES.keys()


@EVERY
def test_a_template_writes_conversations_as_the_official_code_does(template: Template) -> None:
    closed, more = WRITTEN[template.name]
    assert text(template.pieces(ONE)) == closed
    assert text(template.pieces(OPEN)) == closed + more


@EVERY
def test_the_answer_and_its_stop_token_are_what_the_model_is_to_say(template: Template) -> None:
    turns = [*OPEN, Turn("gpt", "a2")]
    said = [(p.text, p.markup) for p in template.pieces(turns) if p.answer]
    assert said == [("a1", False), (template.stop, True), ("a2", False), (template.stop, True)]
    people = [p.text for p in template.pieces(turns) if not p.markup]
    assert people == [template.system, "q1", "a1", "q2", "a2"]
    assert template.end.startswith(template.stop)


@EVERY
def test_text_is_stripped_at_its_ends_only(template: Template) -> None:
    ragged = [Turn("human", "\n q \n 1 \t"), Turn("gpt", "\u3000a\n\n1 \n")]
    neat = [Turn("human", "q \n 1"), Turn("gpt", "a\n\n1")]
    assert template.pieces(ragged) == template.pieces(neat)


@EVERY
def test_without_a_system_sentence_there_is_no_system_turn(template: Template) -> None:
    written = text(replace(template, system=None).pieces(ONE))
    assert written == text(template.pieces(ONE)).removeprefix(
        f"{template.system_open}{template.system}{template.end}"
    )
    assert "system" not in written


def test_an_unknown_template_is_an_error_that_names_near_ones() -> None:
    with pytest.raises(DeadpanError, match="'internlm2-chatt' is unknown") as caught:
        named("internlm2-chatt", "here/config.json")
    assert caught.value.where == "here/config.json"
    assert caught.value.fix == "did you mean 'internlm2-chat' or 'internvl2_5'?"
    assert named("phi3-chat", "") is TEMPLATES["phi3-chat"]


# What tools render with: transformers' settings, and jinja2's defaults.
ENVIRONMENTS: dict[str, Environment] = {
    "transformers": ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True),
    "plain": Environment(),
}
PICTURE_PART = {"type": "image"}
AWKWARD = "Say \"{{ bos_token }}\" \\ {% raw %}\n'dry' \\n 😂 {# only #}"

MESSAGES: dict[str, tuple[str | None, list[Turn], list[dict[str, Any]]]] = {
    # the system sentence (None: the template's own), the turns, and the messages that mean the same
    "default system": (None, ONE, [{"role": "user", "content": "q1"}]),
    "given system": (
        AWKWARD,
        ONE,
        [{"role": "system", "content": AWKWARD}, {"role": "user", "content": "q1"}],
    ),
    "picture first": (
        None,
        [Turn("human", "<image>\n q1 "), Turn("gpt", "a1")],
        [{"role": "user", "content": [PICTURE_PART, {"type": "text", "text": " q1 "}]}],
    ),
    "picture last, parts, ragged text": (
        None,
        [Turn("human", "\n\nLook, {{ 1 }}: <image>\n"), Turn("gpt", "a1")],
        [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "\n\nLook,"},
                    {"type": "text", "text": " {{ 1 }}: "},
                    PICTURE_PART,
                ],
            }
        ],
    ),
    "two pictures": (
        "dry",
        [Turn("human", "<image>\n<image>\nq1"), Turn("gpt", "a1")],
        [
            {"role": "system", "content": [{"type": "text", "text": "dry"}]},
            {"role": "user", "content": [PICTURE_PART] * 2 + [{"type": "text", "text": "q1"}]},
        ],
    ),
}
ANSWER = {"role": "assistant", "content": "\na1 "}
AGAIN = {"role": "user", "content": "q2 😂\n…"}


@pytest.fixture(scope="module")
def processors(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Processor]:
    """For each template a processor whose tokenizer has its tokens."""
    made = {"internlm2-chat": tiny}
    for name, model in (("Hermes-2", "Qwen2ForCausalLM"), ("phi3-chat", "Phi3ForCausalLM")):
        made[name] = make_official(tmp_path_factory.mktemp("family") / name, model)
    found = {name: load_processor(folder) for name, folder in made.items()}
    qwen = found["Hermes-2"]
    found["internvl2_5"] = Processor(qwen.tokenizer, TEMPLATES["internvl2_5"], qwen.tile_policy)
    return found


@EVERY
@pytest.mark.parametrize("environment", ENVIRONMENTS)
@pytest.mark.parametrize("case", MESSAGES)
def test_the_jinja_form_gives_the_ids_that_training_makes(
    processors: dict[str, Processor], template: Template, environment: str, case: str
) -> None:
    system, turns, messages = MESSAGES[case]
    base = processors[template.name]
    assert base.template == template
    used = template if system is None else replace(template, system=system)
    processor = Processor(base.tokenizer, used, base.tile_policy)
    tokenizer, image = base.tokenizer, base.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    # The default stands in the Jinja form, and a system message replaces it.
    rendering = ENVIRONMENTS[environment].from_string(template.jinja(BRACKETED))
    counts = [2] * sum(turn.text.count("<image>") for turn in turns)
    for conversation, written, opened in (
        (turns[:1], messages, True),
        (turns, [*messages, ANSWER], False),
        ([*turns, Turn("human", AGAIN["content"])], [*messages, ANSWER, AGAIN], True),
    ):
        rendered = rendering.render(
            messages=written, bos_token=tokenizer.bos_token, add_generation_prompt=opened
        )
        found = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        trained, _ = processor.encode(conversation, counts, case)
        # A picture is one token in the rendered text; tools repeat it as the tiles demand.
        assert trained.count(image) == sum(counts) * base.tile_policy.tokens_per_tile
        assert found == [
            token for i, token in enumerate(trained) if token != image or trained[i - 1] != image
        ]


@EVERY
@pytest.mark.parametrize("bos", ["", "<s>"])
@pytest.mark.parametrize("system", ["default", None])
def test_a_template_is_recognised_by_its_jinja_form(
    template: Template, bos: str, system: str | None
) -> None:
    template = template if system == "default" else replace(template, system=None)
    found = recognise(template.jinja("<image>"), bos, "here")
    # Two names stand for one way of writing; which one comes back makes no difference.
    assert replace(found, name=template.name) == template
    assert found.name in TEMPLATES


def test_a_template_that_others_wrote_is_recognised() -> None:
    jinja = """{% for message in messages %}
        {{- '<|im_start|>' ~ message['role'] ~ '\n' }}
        {%- if message['content'] is string %}{{ message['content'] }}{% endif %}
        {{- '<|im_end|>\n' }}
    {%- endfor %}
    {%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
    assert recognise(jinja, "", "here") == replace(TEMPLATES["internvl2_5"], system=None)


@pytest.mark.parametrize(
    ("jinja", "what"),
    [
        ("{{ messages[0].content }}", "none that deadpan knows"),
        ("", "none that deadpan knows"),
        ("{% if %}", "cannot be rendered"),
        ("{{ raise_exception('no') }}", "cannot be rendered"),
        ("{{ messages.__class__.__mro__ }}", "cannot be rendered"),
    ],
    ids=["other", "empty", "syntax", "undefined", "unsafe"],
)
def test_an_unknown_jinja_form_is_an_error(jinja: str, what: str) -> None:
    with pytest.raises(DeadpanError, match=what) as caught:
        recognise(jinja, "<s>", "here")
    assert caught.value.where == "here"
    if "knows" in what:
        assert caught.value.expected == "one of " + ", ".join(TEMPLATES)
        assert caught.value.found == repr("q1" if jinja else "")
