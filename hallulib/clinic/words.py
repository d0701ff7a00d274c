"""The words of the clinic world and its writers, as words.yaml and styles.yaml list them."""

from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import yaml


@dataclass(frozen=True)
class Writer:
    """Who words a note: sentence templates per section, misleading sentences per topic, and how
    often one of each topic slips in."""

    style: str
    sentences: dict[str, list[str]]
    misleading: dict[str, list[str]]
    distractor_rate: float = 0.15


def _read(name: str) -> dict[str, Any]:
    return yaml.safe_load(files("hallulib.clinic").joinpath(name).read_text("utf-8"))


WORDS = _read("words.yaml")
_STYLES = _read("styles.yaml")
HELD_OUT_STYLE: str = _STYLES["held_out"]
WRITERS = {
    style: Writer(style, sentences, _STYLES["misleading"])
    for style, sentences in _STYLES["styles"].items()
}
SEEN_STYLES = [style for style in WRITERS if style != HELD_OUT_STYLE]
