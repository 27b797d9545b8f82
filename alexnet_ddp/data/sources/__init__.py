"""Sources of images: what they contain and how it is found."""
