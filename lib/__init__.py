"""The library under the four chapters. It imports no chapter."""
