"""Control tokens that stand as text in what a data set or a tool gives, such as <|im_end|>: kept plain text.

A chat template writes them itself, and it writes contents beside them; encoded as one text, the two are the same. So
contents go through the template with a character of private use in place of each, and the places where that comes out
are encoded on their own (a SentencePiece tokenizer may put a space before such a place). Control tokens are those that
a tokenizer marks as special; <think> often is not one, and templates read it in contents.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sapo_learner.errors import ConfigError

_PRIVATE = range(0xE000, 0xF900)  # Unicode's characters of private use


class ControlTokens:
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = (str(each.content) for each in tokenizer.added_tokens_decoder.values() if each.special)
        names = {*added, *map(str, tokenizer.all_special_tokens)} - {""}
        longest_first = sorted(names, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def replaced(self, messages: Sequence[Mapping[str, str]]) -> tuple[list[dict[str, str]], dict[str, str]]:
        """Messages without control tokens in any of their values, and what stands for each."""
        everything = "\n".join(value for each in messages for value in each.values())
        found = sorted(set(self._pattern.findall(everything)))
        free = (chr(code) for code in _PRIVATE if chr(code) not in everything)
        instead = dict(zip(found, free, strict=False))
        plain = [
            {key: self._pattern.sub(lambda match: instead[match[0]], value) for key, value in each.items()}
            for each in messages
        ]
        return plain, {character: name for name, character in instead.items()}

    def ids(self, text: str, instead: Mapping[str, str]) -> list[int]:
        """Of what a template has made of `replaced` messages: its own control tokens are such, theirs plain text."""
        if not instead:
            return self._encode(text)
        pieces = re.split(f"([{''.join(instead)}])", text)
        ids = [self.plain(instead[piece]) if piece in instead else self._encode(piece) for piece in pieces]
        return [each for piece in ids for each in piece]

    def plain(self, text: str) -> list[int]:
        """Of a text in which nothing is a control token. Raises ConfigError where the tokenizer can only make one."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        # Characters that the tokenizer does not know give the token for unknown ones, which is no harm.
        for name in {*self._pattern.findall(text)} - {self._tokenizer.unk_token}:
            if self._tokenizer.convert_tokens_to_ids(name) in ids:
                raise ConfigError(
                    f"a message or reply holds {name!r}, which the tokenizer can only write as its control token",
                    where="tokenizer", fix="take it out of the text",
                )  # fmt: skip
        return ids

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids
