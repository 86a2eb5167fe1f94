"""Planning: what will be done, decided from headers and configs alone, without torch."""
