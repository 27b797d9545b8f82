"""The whole run on disk, or nothing: files, identity, the process that writes, and what is found again."""
