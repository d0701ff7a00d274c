"""hallulib: the small package behind the course. Light on purpose: importing it loads no torch."""

__version__ = "0.1.0"
