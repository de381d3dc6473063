"""ibkit: a notebook-driven research kit for instruction-following personalized text-to-image generation."""

__version__ = "0.2.0"
