"""A text-to-image model as the methods see it, and how pictures are drawn with it."""
