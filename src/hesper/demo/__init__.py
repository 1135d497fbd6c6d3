"""The demo: a small vision transformer is trained on real digits, pruned within a budget, evaluated and timed."""

from hesper.demo.story import Story, tell

__all__ = ["Story", "tell"]
