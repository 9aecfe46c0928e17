"""What sites that are not alike cost against pooled training, and what wins it back.

Candidates are tried here first. What does not help stays here; docs/research/unlike-sites.md has the numbers.
"""
