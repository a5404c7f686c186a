"""The frame of the views of a row: inside the chat template or outside of it, all of them alike.

Where one view is read inside the template and another outside, their divergence measures the frame. A string goes
into the user message of the template (frame "chat"), or stays the bare text it is (frame "given"). A conversation is
always rendered by the template.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from unisd.turns import Prompt

FRAMES = ("auto", "chat", "given")
"""Values of `UniSDConfig.prompt_frame`."""

_PROBE = "unisd"


def is_conversation(value: Any) -> bool:
    """Whether the value is a non-empty list of messages, each with a role and a content."""
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(isinstance(message, Mapping) and {"role", "content"} <= set(message) for message in value)
    )


@dataclass(frozen=True)
class PromptFrame:
    """Reading of prompts that are strings.

    Attributes:
        name: "chat" or "given".
        has_template: whether the tokenizer has a chat template, without which there are no conversations.
        turn_end: what the template puts after a user's content; "" if nothing that would tell a rendered string.
        generation: the same with the generation prompt.
    """

    name: str = "given"
    has_template: bool = True
    turn_end: str = field(default="", repr=False)
    generation: str = field(default="", repr=False)

    @classmethod
    def of(cls, setting: str, tokenizer: Any, template_options: Mapping[str, Any] | None = None) -> PromptFrame:
        """The frame that `UniSDConfig.prompt_frame` means with this tokenizer.

        Args:
            setting: one of `FRAMES`.
            tokenizer: with or without a chat template.
            template_options: further arguments of `apply_chat_template`, as the run passes them.

        Raises:
            ValueError: "chat" without a chat template.
        """
        has_template = getattr(tokenizer, "chat_template", None) is not None
        if setting == "chat" and not has_template:
            raise ValueError(
                "prompt_frame='chat' puts prompts into the chat template, but the tokenizer has none; set "
                "tokenizer.chat_template, or prompt_frame='given'"
            )
        if setting == "given" or not has_template:
            return cls("given", has_template)
        ends = [_after_content(tokenizer, generation, template_options or {}) for generation in (False, True)]
        return cls("chat", has_template, *ends)

    def apply(self, views: Mapping[str, Any]) -> dict[str, Prompt]:
        """The views of one row, all in this frame.

        Args:
            views: by name, the student's "prompt" first.

        Raises:
            ValueError, TypeError: a view, named, that is neither a text nor a conversation, or is in another frame
                than the prompt and cannot be put into its.
        """
        for name, view in views.items():
            self._check_form(name, view)
        prompt = views["prompt"]
        if self.name == "chat":
            for name, view in views.items():
                self._check_not_rendered(name, view)
            inside = {name: _inside(name, view, prompt) for name, view in views.items() if name != "prompt"}
            return {"prompt": _inside("prompt", prompt, ""), **inside}
        for name, view in views.items():
            if isinstance(view, str) != isinstance(prompt, str):
                raise ValueError(
                    f"the {name} is {_form(view)} while the prompt is {_form(prompt)}, so that one would be read "
                    "inside the chat template and the other outside; give both the same form"
                    + (", or set prompt_frame='chat'" if self.has_template else "")
                )
        return dict(views)

    def _check_form(self, name: str, view: Any) -> None:
        if isinstance(view, str):
            if not view.strip():
                raise ValueError(f"the {name} is empty")
        elif not is_conversation(view):
            raise TypeError(
                f"the {name} must be a string or a list of messages with 'role' and 'content', got {_form(view)}"
            )
        elif not self.has_template:
            raise ValueError(
                f"the {name} is a conversation, but the tokenizer has no chat template; set tokenizer.chat_template, "
                "or give strings"
            )

    def _check_not_rendered(self, name: str, view: Prompt) -> None:
        if not isinstance(view, str):
            return
        if (self.turn_end and self.turn_end in view) or (self.generation and view.rstrip().endswith(self.generation)):
            raise ValueError(
                f"the {name} is a string to which the chat template was applied already (it holds "
                f"{self.turn_end or self.generation!r}) and would go into it once more; give the bare text, or set "
                "prompt_frame='given'"
            )


def _inside(name: str, view: Prompt, prompt: Prompt) -> Prompt:
    """The view as a conversation: a string becomes the last user message, after what precedes that in the prompt."""
    if not isinstance(view, str):
        return view
    if isinstance(prompt, str):
        return [{"role": "user", "content": view}]
    *earlier, last = prompt
    if last["role"] != "user":
        raise ValueError(
            f"the {name} is a string, which can only take the place of the prompt's last message if that is the "
            f"user's, but its role is {last['role']!r}; give messages"
        )
    return [*earlier, {**last, "content": view}]


def _form(value: Any) -> str:
    if isinstance(value, str):
        return "a string"
    if is_conversation(value):
        return "a conversation"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}" + (f" {type(value[0]).__name__}" if len(value) else " items")
    return f"{type(value).__name__} {value!r:.60}"


def _after_content(tokenizer: Any, generation: bool, options: Mapping[str, Any]) -> str:
    """Text that a rendered user message has after its content; "" where that is no mark of a template."""
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": _PROBE}], tokenize=False, **{**options, "add_generation_prompt": generation}
    )
    end = rendered.rpartition(_PROBE)[2].strip()
    # A word or two signs may stand in any text.
    return "" if len(end) < 4 or end.isalnum() else end
