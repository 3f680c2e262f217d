"""Rank, score, compare, report."""
