"""The one exception family: every error says what happened, where, and the next action."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class HallulibError(Exception):
    """Base of all errors a reader can act on.

    `str(error)` is "what\\nNext: next_step", so a traceback in a notebook shows both.
    """

    def __init__(self, what: str, next_step: str) -> None:
        super().__init__(what, next_step)
        self.what = what
        self.next_step = next_step

    def __str__(self) -> str:
        return f"{self.what}\nNext: {self.next_step}"


class RecipeError(HallulibError):
    """A recipe file or override has an unknown key or a value of the wrong kind."""


class ParameterError(HallulibError):
    """A notebook was given a parameter that it does not declare, or one of the wrong type."""


class MissingArtifact(HallulibError):
    """A stage needs an artifact that no finished stage has written."""


class StaleArtifact(HallulibError):
    """An artifact is not the one its producer recorded, or its producer's inputs have changed."""


class CorruptedManifest(HallulibError):
    """`manifest.json` cannot be read."""


class RunMismatch(HallulibError):
    """The run folder belongs to another recipe."""


class StorageError(HallulibError):
    """The disk is full, or the folder cannot be written."""


class ChecksumMismatch(HallulibError):
    """A shipped or downloaded file is not the one its checksum describes."""


class DataError(HallulibError):
    """Data rows are missing, malformed or too few."""


class ModelError(HallulibError):
    """A model cannot be loaded, or cannot be trained as asked."""


class GateFailed(HallulibError):
    """A check that always runs has found the training to be wrong."""


class NotebookFailed(HallulibError):
    """A notebook stopped before its end."""


class SessionError(HallulibError):
    """An assessment session cannot be opened or continued."""


_CAUSES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than this system allows",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "there is no permission for it",
    errno.EPERM: "there is no permission for it",
}
# Rust libraries (safetensors, tokenizers) report "... (os error 28)" in an exception of their own.
_RUST_OS_ERROR = re.compile(r"\(os error (\d+)\)")
# torch.save reports nothing but where it stopped.
_TORCH_WRITE_ERROR = "inline_container"


@contextmanager
def storage_guard(path: str | Path) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk below `path` into a StorageError.

    Any other error passes through unchanged.
    """
    try:
        yield
    except HallulibError:
        raise
    except Exception as error:
        cause = _storage_cause(error)
        if cause is None:
            raise
        from hallulib.paths import display_path

        raise StorageError(
            f"Cannot write to {display_path(path)}: {cause}.",
            "Free some space or choose another folder with run_dir; finished stages are kept "
            "and the same command continues.",
        ) from error


def _storage_cause(error: BaseException | None) -> str | None:
    """What is wrong with the disk, looking through chained exceptions; None if nothing is."""
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        match = _RUST_OS_ERROR.search(str(error))
        if number is None and match:
            number = int(match.group(1))
        if number in _CAUSES:
            return _CAUSES[number]
        if isinstance(error, RuntimeError) and _TORCH_WRITE_ERROR in str(error):
            return "a file could not be written to its end (is the disk full?)"
        error = error.__cause__ or error.__context__
    return None
