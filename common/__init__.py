"""The library: all that a site, a server and a notebook share."""

__version__ = "0.1.0"
