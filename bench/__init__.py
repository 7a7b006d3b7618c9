"""Figures of the orchestrator, each beside the raw CLI in the same run: ``python -m bench``, or ``make bench``."""
