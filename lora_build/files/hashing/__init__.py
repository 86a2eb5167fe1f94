"""SHA-256 of files: taken while they are read, checked against what was promised, remembered between builds."""
