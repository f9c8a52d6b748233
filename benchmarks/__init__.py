"""Measurements of clha-fast: every number in the README comes from a script in here."""
