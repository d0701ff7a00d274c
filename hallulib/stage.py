"""Goes with the merge: `stage` lives in `hallulib.run`."""

from hallulib.run import stage as stage
