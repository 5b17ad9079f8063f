"""Training: the loop, the update and its parts, evaluation, and the work directory."""
