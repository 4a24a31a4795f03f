"""Rehearsal trains language-model agents that keep learning, and tells whether the learning signal is real."""

__version__ = "0.1.0"
