"""Reinforcement learning and other feedback-driven fine-tuning. A method is one file with `train`; see `ddpo`."""
