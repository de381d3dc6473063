"""Personalization and feedback-driven fine-tuning. A method is one file with `train`; see `dreambooth` and `ddpo`."""
