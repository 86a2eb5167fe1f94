"""Small faults in the package, and whether tests find them."""
