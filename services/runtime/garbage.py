"""When Python searches for cyclic garbage: not while a process loads its modules, and not when it ends.

Loading torch and transformers makes a million objects, none of them garbage. Searched as often as Python does by itself
(every 700), that is a third of the processor time of a process' start, and all of them are searched again at its end.
"""

import gc

WHILE_LOADING = 100_000  # new objects between two searches
_BY_ITSELF = gc.get_threshold()


def loading() -> None:
    """Search seldom, until `loaded`; a command that only computes something and ends may leave it at that."""
    gc.set_threshold(WHILE_LOADING, *_BY_ITSELF[1:])


def loaded() -> None:
    """What there is now stays to the end: search as usual, but never again among it."""
    gc.freeze()
    gc.set_threshold(*_BY_ITSELF)


def ending() -> None:
    """The kernel takes everything back at once."""
    gc.freeze()
