"""Files: what they say, where they lie, and how they are read, hashed and written."""
