"""The gates of the SAPO family: smooth f(r) with f'(1) = 1 at the top, which closes on both sides of r = 1.

arXiv 2511.20347 (sigmoid) and arXiv 2602.19345 (the others). With x = r - 1 and temperature tau:

    sigmoid    f = (4/tau) sigmoid(tau x)                       f' = sech^2(tau x / 2)
    erf        f = 1 + sqrt(pi/2)/tau erf(tau x / sqrt 2)       f' = exp(-(tau x)^2 / 2)
    arctan     f = 1 + arctan(tau x) / tau                      f' = 1 / (1 + (tau x)^2)
    softsign   f = 1 + x / sqrt(1 + (tau x)^2)                  f' = (1 + (tau x)^2)^(-3/2)

Each function gives f(r) - f(1) and f'(r): without its constant, which has no gradient, f is 0 on-policy whatever the
gate and tau. 4 sigmoid(2u) = 2 + 2 tanh(u), so of the sigmoid (2/tau) tanh(tau x / 2) is left.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

GateName = Literal["sigmoid", "erf", "arctan", "softsign"]
#: (x, tau), both [T] -> (f(r) - f(1), f'(r)), both [T]. Finite for every finite x; f' may underflow to 0.
Gate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def sigmoid(x: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    u = tau * x / 2
    return 2 / tau * torch.tanh(u), torch.cosh(u) ** -2  # 1 - tanh^2 would subtract nearly equal numbers


def erf(x: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    u = tau * x
    return math.sqrt(math.pi / 2) / tau * torch.erf(u / math.sqrt(2)), torch.exp(-(u**2) / 2)


def arctan(x: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    u = tau * x
    return torch.arctan(u) / tau, 1 / (1 + u**2)


def softsign(x: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    root = torch.hypot(torch.ones_like(x), tau * x)
    return x / root, root**-3


GATES: dict[GateName, Gate] = {"sigmoid": sigmoid, "erf": erf, "arctan": arctan, "softsign": softsign}
