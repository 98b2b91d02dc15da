"""Iterative algorithms. They take callables and know no operator."""
