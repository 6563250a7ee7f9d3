"""Stage 1: a model and pictures become channel scales."""
