"""The one exception family: every error says what happened, where, and the next action."""


class HallulibError(Exception):
    """An error that a reader can act on; `str(error)` is "what\\nNext: next_step"."""

    def __init__(self, what: str, next_step: str) -> None:
        super().__init__(what, next_step)
        self.what = what
        self.next_step = next_step

    def __str__(self) -> str:
        return f"{self.what}\nNext: {self.next_step}"


class RecipeError(HallulibError):
    """A recipe, an override or a notebook's parameter is unknown or of the wrong kind."""


class MissingArtifact(HallulibError):
    """A stage needs an artifact that no finished stage has written, or that has changed since."""


class DataError(HallulibError):
    """Data rows are missing, malformed or too few."""


class GateFailed(HallulibError):
    """A check that always runs has found the training to be wrong."""


class SessionError(HallulibError):
    """An assessment session cannot be opened or continued."""
