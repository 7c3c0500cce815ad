"""The evidence: does it find the right training examples? Run part by part, e.g. ``python -m experiments.ladder``."""
