"""The field's methods beside sigma: on the same backbone, images, seeds, rounds and local steps.

These are comparisons. Nothing here is part of the product: there is no wire format, no check of replies and
no site policy for any method but sigma.
"""
