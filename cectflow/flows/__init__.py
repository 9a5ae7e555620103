"""Flows: one story per door. Command line and MLproject entry points both tell these."""
