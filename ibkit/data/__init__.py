"""Subjects and prompts: what a model is personalized on and what it is asked to draw."""
