"""Captions for a subject's photos, with {} where its word stands."""

# The captions for objects that Textual Inversion trains with; CLIP's authors wrote them for ImageNet's classes.
_KINDS = {
    "a photo of {}": "a, the, my, one, a clean, a dirty, the cool, the clean, a nice, the nice, the small, the weird, "
    "the large, a cool, a small",
    "a rendering of {}": "a",
    "a rendition of {}": "a, the",
    "a cropped photo of {}": "a, the",
    "a close-up photo of {}": "a, the",
    "a good photo of {}": "a, the",
    "a dark photo of {}": "the",
    "a bright photo of {}": "the",
    "the photo of {}": "a",
}
TEMPLATES = {
    "objects": tuple(kind.format(f"{words} {{}}") for kind, said in _KINDS.items() for words in said.split(", ")),
    "plain": ("a {}", "a photo of a {}", "a picture of a {}"),
}
