"""Wrong lines that tests/mutants.py plants: each file a place of the library."""
