"""Personalization and feedback-driven fine-tuning. A method is one file with a record, and one line in
`records.METHODS`; see `dreambooth` and `ddpo`.
"""
