"""Sites that differ: their cost against pooled training, and candidates that reduce it.

Candidates that do not help stay here; docs/research/unlike-sites.md has the figures.
"""
