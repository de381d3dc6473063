"""Builds everything the pocket world ships: `python -m ibkit.pocket.build` (seeded, staged, resumable, CPU or GPU).

One file per stage, in the order they run: data, autoencoder, clip, judge, counter, dino, subject, reward, unet, card.
"""
