"""The protocols of CLIP-SVD's paper over published data sets, in one place and federated, table by table."""

ROUNDS, NO_END = 60, 10**9
"""The most rounds of a federated run, and the most steps of a site, unless others are asked for."""
