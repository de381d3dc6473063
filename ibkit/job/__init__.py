"""The main job: its stages, what it will cost, and the command line."""
