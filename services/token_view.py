"""A group's responses as coloured text. What matters can be read without colours, too: on paper, in a file, by ear.

Of the text nothing reaches the terminal that would steer it: control characters are written out.
"""

from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.text import Text

CLOSED_BELOW = 0.5
"""Of the weight's maximum, which is 1 where the policy has not moved."""
TOOL = "dim"
# Chosen to be told apart by the colour-blind; dark on light, light on dark, whatever the terminal's own colours are.
LOW, LOWER, HIGHER, HIGH = "white on #0072B2", "black on #A6CEE3", "black on #FDD49E", "black on #E69F00"
SHUT, NARROW, HALF = "white on #B2182B", "black on #F4A582", "black on #FDDBC7"
VERSIONS = ("", LOWER, "black on #E69F00", "black on #66C2A5", "black on #CC79A7", "black on #F0E442", LOW)

Scale = tuple[tuple[float, ...], tuple[str, ...], tuple[str, ...]]  # edges, a style and words between each two
_WEIGHT: Scale = (
    (0.2, CLOSED_BELOW, 0.9), (SHUT, NARROW, HALF, ""), ("below 0.2", "0.2 to 0.5", "0.5 to 0.9", "above"),
)  # fmt: skip
SCALES: dict[str, Scale] = {
    "gate": _WEIGHT,
    "coefficient": _WEIGHT,
    "ratio": (
        (0.5, 0.8, 1.25, 2.0), (LOW, LOWER, "", HIGHER, HIGH),
        ("below 0.5", "0.5 to 0.8", "0.8 to 1.25", "1.25 to 2", "above"),
    ),
    "advantage": (
        (-1.0, -1e-12, 1e-12, 1.0), (LOW, LOWER, "", HIGHER, HIGH), ("below -1", "-1 to 0", "0", "0 to 1", "above"),
    ),
    "logprob": (
        (-4.6, -2.3, -0.7, -0.1), (SHUT, NARROW, HALF, LOWER, ""),
        ("below -4.6 (1 %)", "to -2.3 (10 %)", "to -0.7 (50 %)", "to -0.1 (90 %)", "above"),
    ),
}  # fmt: skip
VALUES = {"gate": "gate_weight", "logprob": "behaviour_logprob"}
TITLES = {
    "gate": "gate weight", "coefficient": "coefficient of the plain policy gradient (this objective has no gate)",
    "ratio": "importance ratio", "advantage": "advantage", "logprob": "behaviour log-prob, nats",
    "version": "policy version",
}  # fmt: skip


def show(console: Console, answer: dict[str, Any]) -> None:
    """Print what `services.group_tokens.look` gave."""
    versions = sorted({token["version"] for each in answer["responses"] for token in each["tokens"]})
    for line in (*_head(answer), _legend(answer, versions, coloured=console.is_terminal), Text()):
        console.print(line, soft_wrap=True)
    prompt = Text(_written(answer["prompt"]["text"], answer["prompt"]["tokens"]))
    console.print(Text("prompt", "bold"), prompt, sep="\n", soft_wrap=True)
    for response in answer["responses"]:
        tokens = _coloured(response["tokens"], answer, versions, marks=not console.is_terminal)
        console.print(Text(), Text(_summary(response), "bold"), tokens, sep="\n", soft_wrap=True)


def _head(answer: dict[str, Any]) -> Iterator[Text]:
    step = "no known step" if answer["step"] is None else f"step {answer['step']}"
    yield Text(f"entry {answer['entry']}, draw {answer['draw']}, task {answer['task']}, {step}")
    yield Text(said_of_policy(answer))
    if answer["advantages_note"]:
        yield Text(f"advantages: {answer['advantages_note']}")


def said_of_policy(answer: dict[str, Any]) -> str:
    """Which policy the weights are of, or why there are none; "" where none was asked for."""
    policy = answer["policy"]
    if policy is None:
        reason = answer["note"]
        return f"no policy to compare with: {reason}; shown by {answer['by']}" if reason else "as it was recorded"
    step, then = policy["step"], policy["trained_under"]
    if step is None:
        return f"policy: {policy['kind']}, as was asked for; the group was trained under that of step {then}"
    if step == then:
        return f"policy: the {policy['kind']} of step {step}, which the group was trained under"
    return (
        f"policy: the {policy['kind']} of step {step}, the nearest that is kept; the group was trained under that of "
        f"step {then}, which `sapo replay RUN --until {then} --out DIR` makes again, for --policy DIR"
    )


def _legend(answer: dict[str, Any], versions: list[int], *, coloured: bool) -> Text:
    by, legend = answer["by"], Text()
    marked = answer["weight"] is not None
    by = answer["weight"] if by == "gate" and marked else by
    if coloured:
        legend.append(f"{TITLES[by]}: ")
        if by == "version":
            bands = [(str(version), _version_style(version, versions)) for version in versions]
        else:
            bands = [*zip(SCALES[by][2], SCALES[by][1], strict=True)]
        for words, style in bands:
            legend.append(f" {words} ", style).append(" ")
        legend.append(" tool output ", TOOL)
        if marked:
            legend.append(" ").append(f"weight below {CLOSED_BELOW:g}", "underline")
    else:
        legend.append("marks: {not sampled by the policy}")
        legend.append(f" [weight below {CLOSED_BELOW:g}]" if marked else "")
    return legend


def _summary(response: dict[str, Any]) -> str:
    tokens, advantage = response["tokens"], response["advantage"]
    versions = sorted({token["version"] for token in tokens})
    closed = sum(map(is_closed, tokens))
    return ", ".join([
        f"response {response['response']}: reward {response['reward']:g}",
        "no advantage" if advantage is None else f"advantage {advantage:+.3f}",
        f"ended by {response['finish_reason']}", f"{len(tokens)} tokens",
        f"version {versions[0]}" + (f" to {versions[-1]}" if len(versions) > 1 else ""),
        *([f"{closed} with a weight below {CLOSED_BELOW:g}"] if closed else []),
    ])  # fmt: skip


def is_closed(token: dict[str, Any]) -> bool:
    return token["gate_weight"] is not None and bool(token["advantage"]) and token["gate_weight"] < CLOSED_BELOW


def _coloured(tokens: list[dict[str, Any]], answer: dict[str, Any], versions: list[int], *, marks: bool) -> Text:
    """marks: brackets in place of underlining and dim letters, for where there is no terminal."""
    text = Text()
    for token in tokens:
        written, closed = _written(token["text"], [token["id"]]), is_closed(token)
        if not token["mask"]:
            text.append(f"{{{written}}}" if marks else written, TOOL)
        elif marks:
            text.append(f"[{written}]" if closed else written)
        else:
            text.append(written, f"{_style(token, answer, versions)} {'underline' if closed else ''}".strip())
    return text


def _style(token: dict[str, Any], answer: dict[str, Any], versions: list[int]) -> str:
    by = answer["by"]
    if by == "version":
        return _version_style(token["version"], versions)
    value = token[VALUES.get(by, by)]
    edges, styles, _ = SCALES[by]
    return "" if value is None else styles[bisect_right(edges, value)]


def _version_style(version: int, versions: list[int]) -> str:
    return VERSIONS[versions.index(version) % len(VERSIONS)]


def _written(text: str | None, ids: list[int]) -> str:
    """As it is, but that an end of line can be seen and control characters are written out; without a text, the ids."""
    if text is None:
        return " ".join(map(str, ids)) + " "
    return "".join(each if each.isprintable() else _control(each) for each in text)


def _control(character: str) -> str:
    if character == "\n":
        return "\\n\n"
    return character if character == "\t" else character.encode("unicode_escape").decode()
