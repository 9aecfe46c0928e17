"""Inference by HTTP with a finished model: `fedsigma serve`. docs/serve.md has what it promises."""
