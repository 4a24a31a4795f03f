"""Rewards that can be checked: verifiers, their composition, judges, and the tasks that they check."""
