"""Goes with the merge: what was here lives in `hallulib.stages`."""

from hallulib import stages
from hallulib.stages import PACKAGE as PACKAGE
from hallulib.stages import STAGES as STAGES
from hallulib.stages import library_versions as library_versions


def hash_code(spec: stages.StageSpec) -> str:
    return stages.hash_code(stages.find_code(spec.code))
