"""The tables of CLIP-SVD's paper on published data sets: one module per step from a table to its results."""

MAX_ROUNDS, NO_STEP_LIMIT = 60, 10**9
"""Default limits of a federated run's rounds and of a site's optimiser steps."""
