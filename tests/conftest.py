"""Settings of the whole test run."""

from hypothesis import settings

# Machines are shared and noisy: how long an example takes must not decide whether it passes.
settings.register_profile("fedsigma", deadline=None, print_blob=True)
settings.load_profile("fedsigma")
