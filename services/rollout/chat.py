"""Prompts and replies become token ids: as they stand, or through the chat template of the policy's tokenizer.

    text, no template       the text's tokens
    text, template          system message if there is one, the text as the user's message, then the assistant's turn
    chat, template          its messages, then the assistant's turn
    chat, no template       refused

What the policy sampled is never decoded and encoded again: a reply in the middle of a response is encoded alone.
Control tokens that stand in a message or a reply are plain text there; a prompt without template is taken as it stands,
for it may be a chat that somebody has written down already.
"""

from typing import Any

from jinja2 import TemplateError

from sapo_learner.errors import ConfigError
from services.rollout.control_tokens import ControlTokens
from services.runtime.sampling_settings import ChatSettings
from services.tasks import Prompt

_TURN = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands for the assistant's turn; in no template


class Chat:
    def __init__(self, tokenizer: Any, settings: ChatSettings) -> None:
        """tokenizer: a transformers tokenizer."""
        self._tokenizer, self._settings, self._control = tokenizer, settings, ControlTokens(tokenizer)
        self.template = settings.template == "auto" and bool(tokenizer.chat_template)

    def encode(self, prompt: Prompt, *, task: str = "") -> list[int]:
        """Token ids of a prompt, up to where the policy goes on. Raises ConfigError, which names the task where it is
        given, for what has no such form."""
        if isinstance(prompt.content, str) and not self.template:
            ids: list[int] = self._tokenizer.encode(prompt.content)  # with what the tokenizer puts before a text
            return ids
        return self._control.ids(*self._written(prompt, task))

    def check(self, prompt: Prompt, *, task: str = "") -> None:
        """Raises what `encode` raises for what has no such form, in a fraction of its time."""
        if not isinstance(prompt.content, str) or self.template:
            self._written(prompt, task)

    def _written(self, prompt: Prompt, task: str) -> tuple[str, dict[str, str]]:
        where = f"task {task}, prompt {prompt.id}" if task else f"prompt {prompt.id}"
        if isinstance(prompt.content, str):
            system = [{"role": "system", "content": self._settings.system}] if self._settings.system else []
            return self._rendered([*system, {"role": "user", "content": prompt.content}], where)
        if not self.template:
            what = "chat.template is none" if self._settings.template == "none" else "the tokenizer has no template"
            raise ConfigError(
                f"the prompt is a chat, and {what}", where=where,
                fix="use a policy with a chat template, or prompts that are texts",
            )  # fmt: skip
        return self._rendered([each.model_dump() for each in prompt.content], where)

    def reply(self, text: str, role: str) -> list[int]:
        """Token ids of what the task says after a turn that the policy ended: all between that end and its next turn.

        Raises ConfigError when the template does not write a turn's end down as the policy samples it.
        """
        if not self.template:
            return self._control.plain(text)
        turn = {"role": "assistant", "content": _TURN}
        said = [{"role": "user", "content": "?"}, turn, {"role": role, "content": text}]
        whole, instead = self._rendered(said, "a reply")
        _, found, rest = whole.partition(_TURN + self._tokenizer.eos_token)
        if not found:
            raise ConfigError(
                f"the chat template does not end the assistant's turn with {self._tokenizer.eos_token!r}, the token "
                "that ends a response", where="tokenizer", fix="set its eos_token, or use a task of a single turn",
            )  # fmt: skip
        return self._control.ids(rest, instead)

    def _rendered(self, messages: list[dict[str, str]], where: str) -> tuple[str, dict[str, str]]:
        """What the template makes of them, and what stands there for control tokens in them."""
        plain, instead = self._control.replaced(messages)
        try:
            text: str = self._tokenizer.apply_chat_template(
                plain, add_generation_prompt=True, tokenize=False, **self._settings.options
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise ConfigError(
                f"the chat template cannot write it: {' '.join(str(error).split())}", where=where,
                fix="mend the prompt's messages, or chat.options",
            ) from None  # fmt: skip
        return text, instead
