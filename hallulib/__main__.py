"""`python -m hallulib ...`: see `python -m hallulib --help`."""

from hallulib.cli import main

if __name__ == "__main__":
    main()
