"""Personalization methods: bind a subject's photos to an identifier.

A method is one file with `train`; see `dreambooth`.
"""
