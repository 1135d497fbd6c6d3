"""Measuring: paired evaluation, timing in turns, and what a sample lets one promise."""
