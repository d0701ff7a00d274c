"""Several processes of one stage, as `accelerate launch` starts them: who am I, wait, gather.

With one process, the usual case, nothing of this does anything.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from io import StringIO
from typing import Any

# The others wait while the main process writes, judges or samples: longer than torch's 10 minutes.
PATIENCE = timedelta(hours=12)


def count_processes() -> int:
    """Return how many processes work on this stage together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def process_rank() -> int:
    """Return which of them this is."""
    return int(os.environ.get("RANK", 0))


def is_main_process() -> bool:
    """Whether this process writes what there is one of: manifest, adapter, metrics."""
    return process_rank() == 0


def wait_for_all() -> None:
    """Go on when every process has come to this point."""
    gather_from_all(None)


def gather_from_all(value: Any) -> list[Any]:
    """Return this value of every process, in the order of their ranks."""
    if count_processes() == 1:
        return [value]
    import torch
    from accelerate import PartialState

    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    PartialState(cpu=on_cpu or not torch.cuda.is_available(), timeout=PATIENCE)
    found: list[Any] = [None] * count_processes()
    torch.distributed.all_gather_object(found, value)
    return found


@contextmanager
def speak_once() -> Iterator[None]:
    """Within the block only the main process prints and shows progress bars."""
    if is_main_process():
        yield
    else:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield
