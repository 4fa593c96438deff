"""Declared experiments: loading them, grids, the ladder of sizes and follow-up runs."""
