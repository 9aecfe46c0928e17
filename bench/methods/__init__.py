"""Other methods beside sigma: on the same backbone, images, seeds, rounds and local steps.

These are comparisons, not part of the product: only sigma has a wire format, validation and site policies.
"""
