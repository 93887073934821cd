r"""The chat template: the one definition of how a conversation is written down.

Training, every engine and every export take it from here, which is what makes the prompt served equal to the prompt
trained on. A conversation of the template `internlm2-chat` reads

    <s><|im_start|>system\n{system}<|im_end|><|im_start|>user\n{question}<|im_end|><|im_start|>assistant\n{answer}<|im_end|>

without a newline after `<|im_end|>`. The model is taught each answer and the stop token that closes it.

Source: `internvl_chat/internvl/conversation.py` (separator style MPT) of OpenGVLab/InternVL, commit 2410d1db.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from deadpan.data.records import Turn
from deadpan.errors import DeadpanError, did_you_mean

IMAGE_START, IMAGE_TOKEN, IMAGE_END = "<img>", "<IMG_CONTEXT>", "</img>"


@dataclass(frozen=True)
class Piece:
    """A stretch of a written conversation.

    Attributes:
        text: The characters.
        markup: Whether control tokens in it are meant; in text from people they are plain characters.
        answer: Whether the model is to say it.
    """

    text: str
    markup: bool = False
    answer: bool = False


@dataclass(frozen=True)
class Template:
    """How turns become one string.

    Attributes:
        name: The name that official checkpoints carry in `config.json`.
        system: The system sentence, or None for no system turn.
        system_open: What opens the system turn.
        user_open: What opens a question.
        assistant_open: What opens an answer.
        end: What closes any turn; it begins with the stop token.
        stop: The token that ends an answer.
    """

    name: str
    system: str | None
    system_open: str
    user_open: str
    assistant_open: str
    end: str
    stop: str

    def pieces(self, turns: Sequence[Turn]) -> list[Piece]:
        """Write turns down; a conversation that ends with a question is left open for the answer.

        Text is stripped, as the official training code does.
        """
        pieces = []
        if self.system is not None:
            pieces += [
                Piece(self.system_open, markup=True),
                Piece(self.system),
                Piece(self.end, markup=True),
            ]
        for turn in turns:
            answer = turn.role == "gpt"
            pieces.append(Piece(self.assistant_open if answer else self.user_open, markup=True))
            pieces.append(Piece(turn.text.strip(), answer=answer))
            if answer:
                pieces.append(Piece(self.stop, markup=True, answer=True))
                pieces.append(Piece(self.end.removeprefix(self.stop), markup=True))
            else:
                pieces.append(Piece(self.end, markup=True))
        if turns[-1].role == "human":
            pieces.append(Piece(self.assistant_open, markup=True))
        return [piece for piece in pieces if piece.text]

    def jinja(self, picture: str) -> str:
        """The same template in Jinja, for tools that read `chat_template`.

        Args:
            picture: What the reading tool expects in place of a picture.
        """
        q = _quote
        system = f"{q(self.system_open)} + {{}} + {q(self.end)}"
        default = "" if self.system is None else "{{- " + system.format(q(self.system)) + " -}}"
        given = "{{- " + system.format("text(messages[0].content)") + " -}}"
        return (
            "{%- macro text(content) -%}"
            "{%- if content is string -%}{{- content | trim -}}"
            "{%- else -%}"
            "{%- set ns = namespace(all='') -%}"
            "{%- for part in content -%}"
            "{%- if part.type == 'text' -%}{%- set ns.all = ns.all + part.text -%}"
            f"{{%- else -%}}{{%- set ns.all = ns.all + {q(picture + chr(10))} -%}}{{%- endif -%}}"
            "{%- endfor -%}"
            "{{- ns.all | trim -}}"
            "{%- endif -%}"
            "{%- endmacro -%}"
            "{{- bos_token or '' -}}"
            f"{{%- if messages[0].role == 'system' -%}}{given}{{%- else -%}}{default}{{%- endif -%}}"
            "{%- for message in messages if message.role != 'system' -%}"
            "{%- if message.role == 'assistant' -%}"
            f"{{{{- {q(self.assistant_open)} -}}}}{{%- else -%}}{{{{- {q(self.user_open)} -}}}}"
            "{%- endif -%}"
            f"{{{{- text(message.content) + {q(self.end)} -}}}}"
            "{%- endfor -%}"
            f"{{%- if add_generation_prompt -%}}{{{{- {q(self.assistant_open)} -}}}}{{%- endif -%}}"
        )

    def to_json(self) -> dict[str, str | None]:
        return asdict(self)


def _quote(text: str | None) -> str:
    """A Jinja string literal (JSON's escapes are a subset of Jinja's)."""
    return json.dumps(text, ensure_ascii=False)


_SENTENCE_2 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。"
)
_SENTENCE_2_5 = (
    "你是书生·万象，英文名是InternVL，"
    "是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)


def _chatml(name: str, system: str, end: str) -> Template:
    return Template(
        name=name,
        system=system,
        system_open="<|im_start|>system\n",
        user_open="<|im_start|>user\n",
        assistant_open="<|im_start|>assistant\n",
        end=end,
        stop="<|im_end|>",
    )


TEMPLATES = {
    template.name: template
    for template in (
        _chatml("internlm2-chat", _SENTENCE_2, "<|im_end|>"),
        _chatml("Hermes-2", _SENTENCE_2, "<|im_end|>"),
        _chatml("internvl2_5", _SENTENCE_2_5, "<|im_end|>\n"),
        Template(
            name="phi3-chat",
            system=_SENTENCE_2,
            system_open="<|system|>\n",
            user_open="<|user|>\n",
            assistant_open="<|assistant|>\n",
            end="<|end|>",
            stop="<|end|>",
        ),
    )
}


def named(name: str, where: str) -> Template:
    """The official template of a name.

    Raises:
        DeadpanError: If the name is unknown.
    """
    if name not in TEMPLATES:
        raise DeadpanError(
            f"The chat template {name!r} is unknown.",
            where=where,
            fix=did_you_mean(name, TEMPLATES),
        )
    return TEMPLATES[name]


def recognise(jinja: str, bos: str, where: str) -> Template:
    """Find the known template that a checkpoint's Jinja template writes.

    Raises:
        DeadpanError: If it writes conversations as none of them does.
    """
    turns = [Turn("human", "q1"), Turn("gpt", "a1"), Turn("human", "q2")]
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles[turn.role], "content": turn.text} for turn in turns]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    try:
        written = environment.from_string(jinja).render(
            messages=messages, bos_token=bos, add_generation_prompt=True
        )
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        # What an expression within the template may raise, beside Jinja's own.
        raise DeadpanError(f"The chat template cannot be rendered: {error}.", where=where) from None
    for template in TEMPLATES.values():
        for candidate in (template, replace(template, system=None)):
            if written.removeprefix(bos) == "".join(p.text for p in candidate.pieces(turns)):
                return candidate
    raise DeadpanError(
        "The checkpoint's chat template is none that deadpan knows.",
        where=where,
        expected="one of " + ", ".join(TEMPLATES),
        found=repr(written),
        fix="use the checkpoint in its official layout, whose config.json names the template",
    )
