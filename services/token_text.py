"""Tokens as the pieces of text that they add, which may be none: a character can take several tokens."""

from collections.abc import Callable, Sequence

UNFINISHED = "�"  # what a decoder makes of the first bytes of a character


def pieces(decode: Callable[[list[int]], str | None], prompt: Sequence[int], tokens: Sequence[int]) -> list[str | None]:
    """One for each of `tokens`; joined they are the text that goes on after the prompt. None where there is no decoder.

    A token's text can depend on the one before it, so that each is decoded behind the last whole piece.
    """
    ids, begin, read = [*prompt, *tokens], 0, len(prompt)
    found: list[str | None] = []
    for end in range(len(prompt) + 1, len(ids) + 1):
        before, now = decode(ids[begin:read]), decode(ids[begin:end])
        if before is None or now is None:
            found.append(None)
        elif now.endswith(UNFINISHED) and end < len(ids):
            found.append("")
        else:
            found.append(now[len(before) :])
            begin, read = read, end
    return found
