"""What a run needs, what there is, and what to do where they differ. Looked at or measured, not guessed."""
